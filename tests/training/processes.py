"""Several processes of a training script on one machine, joined by gloo as `torchrun` joins them."""

import os
import random
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def start(command: Sequence[str], num_processes: int, folder: Path) -> list[subprocess.Popen[str]]:
    """`python COMMAND` in each of so many processes."""
    port = free_port()
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


def free_port() -> int:
    """Of those that the system gives to no connection by itself, as it might before a process has it."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)):
                return port
    raise OSError("no free port")


def finish(processes: Sequence[subprocess.Popen[str]], timeout: float = 120) -> list[str]:
    """What each said; none is left running."""
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
