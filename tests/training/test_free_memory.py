"""training/free_memory.py: limits of containers, as Linux shows them in files."""

from pathlib import Path

import psutil
import pytest
import torch

from diffusers_far.training import free_memory as module
from diffusers_far.training.free_memory import free_memory

UNLIMITED_1 = 9223372036854771712  # what version 1 has where there is no limit


def write(root: Path, groups: str, **folders: dict[str, object]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, files in folders.items():
        folder = root / "sys/fs/cgroup" / name.replace("__", "/")
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (folder / file.replace("__", ".")).write_text(f"{content}\n")
    return root


def version_2(limit: object, used: int, cached: int = 0) -> dict[str, object]:
    stat = f"anon {used}\nfile {cached + 7}\ninactive_file {cached}\nactive_file 7"
    return {"memory__max": limit, "memory__current": used, "memory__stat": stat}


def version_1(limit: int, used: int, cached: int = 0) -> dict[str, object]:
    stat = f"cache 5\ninactive_file 3\ntotal_inactive_file {cached}"
    return {"memory__limit_in_bytes": limit, "memory__usage_in_bytes": used, "memory__stat": stat}


def left(root: Path) -> list[int]:
    return module._left_by_containers(root)


def test_a_container_of_version_2(tmp_path: Path) -> None:
    """Its group is the root of what it sees; files that were read last can go."""
    root = write(tmp_path, "0::/\n", **{"": version_2(4_000, 3_000, 500)})
    assert left(root) == [1_500]


def test_groups_within_groups(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        "0::/user.slice/job/step\n",
        **{"user.slice": version_2("max", 1)},
        **{
            "user.slice__job": version_2(2_000, 1_200),
            "user.slice__job__step": version_2(1_000, 1_100),
            "user.slice__other": version_2(1, 0),
        },
    )
    assert left(root) == [0, 800]


def test_version_1_with_a_group_that_the_container_does_not_see(tmp_path: Path) -> None:
    groups = "9:cpu,cpuacct:/docker/abc\n4:hugetlb,memory:/docker/abc\n0::/docker/abc\n"
    root = write(tmp_path, groups, memory=version_1(8_000, 5_000, 1_000))
    assert left(root) == [4_000]


def test_version_1_without_a_limit(tmp_path: Path) -> None:
    root = write(
        tmp_path, "4:memory:/job\n", memory=version_1(UNLIMITED_1, 10), memory__job=version_1(90, 10)
    )
    assert left(root) == [80, UNLIMITED_1 - 10]


def test_a_group_beside_that_of_the_mount(tmp_path: Path) -> None:
    root = write(tmp_path, "0::/../other\n", **{"": version_2(30, 10)})
    assert left(root) == [20]


def test_no_limit_and_no_groups(tmp_path: Path) -> None:
    assert left(tmp_path) == []  # not Linux
    assert left(write(tmp_path, "0::/\n", **{"": {"cgroup__procs": 1}})) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="then the memory is that of the GPU")
def test_the_smaller_of_machine_and_container(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < free_memory() <= psutil.virtual_memory().total
    monkeypatch.setattr(module, "_left_by_containers", lambda root: [9_000, 7_000])
    assert free_memory() == 7_000
    monkeypatch.setattr(module, "_left_by_containers", lambda root: [2**62])
    assert free_memory() <= psutil.virtual_memory().total
    monkeypatch.setattr(module, "_left_by_containers", lambda root: [])
    assert 0 < free_memory() <= psutil.virtual_memory().total
