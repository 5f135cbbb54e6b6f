"""benchmarks/: every task runs on a small model and does what it says; figures are checked for sense only."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SMALL = {"num_layers": 1, "num_attention_heads": 1, "frames": 3, "steps": 2}


def measure(repository: Path, output: Path, **case: Any) -> tuple[dict[str, float], torch.Tensor]:
    command = [sys.executable, str(repository / "benchmarks" / "measure.py"), json.dumps({**SMALL, **case})]
    result = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1]), torch.load(output)


@pytest.mark.parametrize("long", [False, True], ids=["base", "long"])
def test_new_frames(repository: Path, tmp_path: Path, long: bool) -> None:
    figures, frames = measure(
        repository, tmp_path / "a.pt", task="frame", long=long, context=5, short_window=4
    )
    assert frames.shape == (1, 4, 32, 8, 8)  # the first one is made, but not timed
    assert figures["frame_ms"] == pytest.approx(2 * figures["step_ms"] + figures["commit_ms"])
    assert min(figures["step_ms"], figures["frame_gflop"], figures["step_mb"]) > 0
    _, again = measure(repository, tmp_path / "b.pt", task="frame", long=long, context=5, short_window=4)
    assert torch.equal(frames, again)  # the same weights and noise in every process: sides can be compared


def test_rollout_and_training(repository: Path, tmp_path: Path) -> None:
    figures, frames = measure(repository, tmp_path / "a.pt", task="rollout", long=True, batch=2)
    assert frames.shape == (2, 3, 32, 8, 8)
    assert figures["frames_per_second"] == pytest.approx(6 / figures["seconds"])
    figures, velocity = measure(repository, tmp_path / "b.pt", task="training", batch=2)
    assert velocity.shape == (2, 3, 32, 8, 8) and velocity.any()
    # Weights of one layer of width 64, twice and more for the backward: 3 x 2 FLOPs per weight and token.
    assert figures["step_gflop"] > 3 * 2 * 12 * 64**2 * 2 * 3 * 64 / 1e9
