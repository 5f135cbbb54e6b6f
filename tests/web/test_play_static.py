"""`diffusers-far play --static`."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner

from diffusers_far.cli import main


def test_it_serves_an_export_with_the_page_until_ctrl_c(repository: Path, long_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "diffusers_far.cli", "play", "--static", "--checkpoint", str(long_model)]
    run = subprocess.Popen(
        [*command, "--port", str(port)],
        cwd=repository,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert run.stdout is not None and f"http://127.0.0.1:{port}/ until Ctrl-C" in run.stdout.readline()
    for name in ("", "main.js", "model/rollout.json"):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{name}", timeout=30) as reply:
            assert reply.status == 200 and reply.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=30) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--static", "--max-players", "2"], "--max-players goes without --static"),
        (["--static", "--device", "cpu"], "--device goes without --static"),
        (["--dtype", "int8"], "--dtype goes with --static"),
    ],
)
def test_options_of_the_other_way_to_play(options: list[str], message: str) -> None:
    done = CliRunner().invoke(main, ["play", *options])
    assert done.exit_code == 2 and message in done.output
