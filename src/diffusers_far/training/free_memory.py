"""How much memory training may use: of the GPU, or of the machine and the container that it runs in."""

from pathlib import Path

import torch


def free_memory() -> int:
    """Bytes that are free: of the GPU, or of the machine, as far as its container lets it."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    import psutil  # comes with accelerate

    return min([int(psutil.virtual_memory().available), *_left_by_containers(Path("/"))])


def _left_by_containers(root: Path) -> list[int]:
    """What each control group of Linux that this process is in leaves it, in bytes, where it has a limit.

    Args:
        root: of the file system.
    """
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:  # another system
        return []
    left = []
    for _, controllers, path in groups:
        files = ("memory.max", "memory.current", "inactive_file")
        mount = root / "sys/fs/cgroup"
        if "memory" in controllers.split(","):  # version 1
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            mount = mount / "memory"
        elif controllers:
            continue
        own = mount / path.lstrip("/")
        # Inside of a container its own group may be the mount, while its path is that outside.
        around = [folder for folder in (own, *own.parents) if folder.is_relative_to(mount)] or [mount]
        left += [number for folder in around if (number := _left(folder, *files)) is not None]
    return left


def _left(group: Path, limit: str, usage: str, cache: str) -> int | None:
    try:
        most, used = int((group / limit).read_text()), int((group / usage).read_text())
        lines = (group / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no such group, or no limit: "max"
        return None
    # The files that it has read last stay in memory until others need the room.
    reclaimed = next((int(line.split()[1]) for line in lines if line.split()[0] == cache), 0)
    return max(0, most - used + reclaimed)
