"""The app in a process that does not know the checkout."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def plain(**more: str) -> dict[str, str]:
    """The environment of such a process."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | more


@contextmanager
def running(command: Sequence[str | Path], folder: Path, **settings: str) -> Iterator[str]:
    """The app that a command serves, ended as the Hub ends it; its address."""
    environ = plain(PYTHONUNBUFFERED="1", **settings)
    process = subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = None
        while address is None and (line := process.stdout.readline()):
            address = re.search(r"http://[\d.]+:(\d+)", line)
        assert address is not None
        yield f"http://127.0.0.1:{address[1]}"
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
