"""Several processes of a training script on one machine, joined by gloo as `torchrun` joins them."""

import os
import random
import socket
from collections.abc import Sequence
from pathlib import Path

from tests.python_process import PythonProcess


def start(command: Sequence[str], num_processes: int, folder: Path) -> list[PythonProcess]:
    """`python COMMAND` in each of so many processes."""
    port = free_port()
    shared = {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        PythonProcess(command, folder, os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(num_processes)
    ]


def free_port() -> int:
    """Of those that the system gives to no connection by itself, as it might before a process has it."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)):
                return port
    raise OSError("no free port")


def finish(processes: Sequence[PythonProcess], timeout: float = 120) -> list[str]:
    """What each said; none is left running."""
    try:
        return ["".join(process.communicate(timeout)) for process in processes]
    finally:
        for process in processes:
            process.kill()
