"""The package as an index has it: built, installed into a fresh environment, used in an empty folder."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, expect

from diffusers_far import read_video
from tests.app_process import plain, running

MOST_MB = 30
SOURCES = ("src", "checkpoints", "data", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of the source distribution, as `python -m build` does."""
    folder = tmp_path_factory.mktemp("wheel")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in SOURCES:  # building leaves files among them
        source, target = repository / name, checkout / name
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.png")
        shutil.copytree(source, target, ignore=ignored) if source.is_dir() else shutil.copy(source, target)
    build = "import setuptools.build_meta as build, sys; print(build.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, folder], cwd=checkout, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        content.extractall(folder / "sdist", filter="data")
    (unpacked,) = (folder / "sdist").iterdir()
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, unpacked, "-w", folder], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the dependencies of this one, but without the checkout; folder of its commands."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # A path, of which Python reads no .pth files: neither one that leads to the checkout.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        folder / "bin/python",
        "install",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*pip, "--ignore-installed", wheel], check=True, capture_output=True)
    where = "import diffusers_far; print(diffusers_far.__file__)"
    found = subprocess.check_output([folder / "bin/python", "-c", where], cwd=folder, env=plain(), text=True)
    assert Path(found.strip()).is_relative_to(folder)
    return folder / "bin"


def test_the_wheel_has_the_faster_model_and_the_episodes(wheel: Path) -> None:
    assert wheel.stat().st_size < MOST_MB * 1e6
    names = zipfile.ZipFile(wheel).namelist()
    weights = [name for name in names if name.endswith(".safetensors")]
    assert len(weights) == 2 and all(
        "shipped_files/checkpoints/far-doom-maze-64-any-step" in name for name in weights
    )
    assert sum(name.endswith(".mp4") for name in names) == 2
    assert not [name for name in names if name.startswith(("tests", "data", "checkpoints"))]


def test_demo(environment: Path, tmp_path: Path) -> None:
    command = [environment / "diffusers-far", "demo", "--num-frames", "34"]
    said = subprocess.run(
        command, cwd=tmp_path, env=plain(), capture_output=True, text=True, check=True
    ).stdout
    assert said.startswith("demo.mp4: 32 frames of context, then 2 predicted")
    assert [path.name for path in tmp_path.iterdir()] == ["demo.mp4"]
    video = read_video(tmp_path / "demo.mp4").astype(np.float64)
    assert len(video) == 34
    width = video.shape[2] // 2
    truth, prediction = video[-1, 8:-8, 8 : width - 8], video[-1, 8:-8, width + 8 : -8]
    assert np.abs(truth - prediction).mean() < 0.5 * np.abs(truth - truth.mean()).mean()


def test_play(environment: Path, tmp_path: Path, browser: Browser) -> None:
    with running([environment / "diffusers-far", "play"], tmp_path) as url:
        page = browser.new_page()
        page.goto(f"{url}/?paused")
        status = page.locator("#play .far-status")
        expect(status).to_contain_text("frame 31", timeout=60_000)  # a start has 32 frames
        page.keyboard.down("w")
        expect(status).to_contain_text(re.compile(r"frame (3[4-9]|[4-9]\d)"), timeout=60_000)
        page.close()
    assert not list(tmp_path.iterdir())
