"""`diffusers-far play --static`."""

import signal
import socket
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner

from diffusers_far.cli import main
from tests.python_process import PythonProcess


def test_it_serves_an_export_with_the_page_until_ctrl_c(repository: Path, long_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["-m", "diffusers_far.cli", "play", "--static", "--checkpoint", str(long_model)]
    run = PythonProcess([*command, "--port", str(port)], cwd=repository)
    run.wait_for_line(f"Play at http://127.0.0.1:{port}/ until Ctrl-C")
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
        (["--static", "--checkpoint", "EXPORT", "--dtype", "int8"], "--dtype goes with a checkpoint, and"),
        (["--static", "--checkpoint", "EXPORT", "--episodes", "x"], "--episodes goes with a checkpoint, and"),
    ],
)
def test_options_of_the_other_way_to_play(options: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "rollout.json").touch()  # an export, as far as the command looks
    done = CliRunner().invoke(main, ["play", *(str(tmp_path) if o == "EXPORT" else o for o in options)])
    assert done.exit_code == 2 and message in done.output
