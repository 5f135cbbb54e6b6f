"""Several processes of a training script on one machine, joined by gloo as `torchrun` joins them."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def start(command: Sequence[str], num_processes: int, folder: Path) -> list[subprocess.Popen[str]]:
    """`python COMMAND` in each of so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_processes)
    ]


def finish(processes: Sequence[subprocess.Popen[str]], timeout: float = 120) -> list[str]:
    """What each said; none is left running."""
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
