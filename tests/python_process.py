"""Python processes that begin with imports done, as these take longer than most of what tests run.

Each is a process of its own, with its folder, environment, output, exit code and signals. It is forked from
one that has imported all that commands need, or PyTorch and SciPy alone: for programs whose own imports are
tested, or that import what reads the environment then, such as huggingface_hub. A `subprocess` is for what
PyTorch reads itself, what begins from nothing, as a command does for a user, and what runs at the
interpreter's exit.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Literal
from unittest import mock

_IMPORTED = {
    "all": [
        "diffusers_far.cli",
        "diffusers_far.lpips",
        "diffusers_far.training.pretrained",
        "diffusers_far.training.sharded",
        "diffusers_far.training.sources",
        "diffusers_far.training.validation_samples",
    ],
    "torch": ["torch", "torch._dynamo", "scipy.stats"],
}
_SERVERS = {name: forkserver.ForkServer() for name in _IMPORTED}
for _name, _modules in _IMPORTED.items():
    _SERVERS[_name].set_forkserver_preload(_modules)


class PythonProcess:
    """`python COMMAND`, which has begun; a part of what `subprocess.Popen` is.

    Args:
        command: `-m MODULE`, `-c CODE` or a file, and the arguments of it.
        cwd: folder to run in.
        env: environment; by default that of the test.
        imported: what is imported already.
    """

    def __init__(
        self,
        command: Sequence[str],
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        imported: Literal["all", "torch"] = "all",
    ) -> None:
        self.args = [sys.executable, *command]
        self._files = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._files.name, name) for name in ("stdout", "stderr")]
        environment = dict(os.environ if env is None else env)
        arguments = (list(command), str(cwd or Path.cwd()), environment, [*map(str, self._outputs)])
        context: Any = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_run, args=arguments)
        # The library knows one server.
        connect = _SERVERS[imported].connect_to_new_process
        with mock.patch.object(forkserver, "connect_to_new_process", connect):
            self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        stdout, stderr = (path.read_text() for path in self._outputs)
        return stdout, stderr

    def wait_for_line(self, beginning: str, timeout: float = 120) -> None:
        """Until a line of the output begins so."""
        end = time.monotonic() + timeout
        while True:
            ended = self.returncode is not None
            said = [path.read_text() if path.exists() else "" for path in self._outputs]
            if any(line.startswith(beginning) for line in said[0].splitlines()):
                return
            assert not ended and time.monotonic() < end, f"no line {beginning!r} in: {said}"
            time.sleep(0.005)

    def send_signal(self, number: int) -> None:
        """If it still runs."""
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        if self.returncode is None:
            self._process.kill()


def run_python(
    command: Sequence[str],
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
    imported: Literal["all", "torch"] = "all",
) -> subprocess.CompletedProcess[str]:
    """`python COMMAND` to its end, as `subprocess.run` gives it."""
    process = PythonProcess(command, cwd, env, imported)
    try:
        stdout, stderr = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.wait(), stdout, stderr)


def _run(command: list[str], folder: str, environment: dict[str, str], outputs: list[str]) -> None:
    multiprocessing.set_start_method(None, force=True)  # what a new interpreter would take
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    tempfile.tempdir = None  # it is found anew, as TMPDIR may be another
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, path in enumerate(outputs, start=1):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    if command[0] == "-m":
        sys.argv = command[1:]
        sys.path.insert(0, folder)
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        sys.path.insert(0, folder)
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = list(command)
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")
