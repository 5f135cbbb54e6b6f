"""benchmarks/: every task runs on a small model and does what it says; figures are checked for sense only."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.python_process import run_python

SMALL = {"num_layers": 1, "num_attention_heads": 1, "frames": 3, "steps": 2}


def measure(repository: Path, output: Path, **case: Any) -> tuple[dict[str, float], torch.Tensor]:
    command = [str(repository / "benchmarks" / "measure.py"), json.dumps({**SMALL, **case})]
    result = run_python([*command, "--output", str(output)])
    assert result.returncode == 0, result.stderr
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


def test_training_cost(repository: Path) -> None:
    command = [str(repository / "benchmarks" / "training_cost.py"), "far-b-ucf101-64", "--batch-size", "2"]
    said = run_python(command, cwd=repository).stdout
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if "|" in line]
    rows = {row[0]: row[1:] for row in table}
    (parameters,) = re.findall(r"far-b-ucf101-64: (\d+) million parameters", said)
    tokens, operations = rows["16"]
    # 6 operations per weight and token, forward and backward; attention has fewer. A third of the weights
    # (AdaLN) is applied once per frame, not to each of its 64 tokens.
    of_weights = 6 * (2 / 3) * float(parameters) * 1e6 * 16 * 64 / 1e12
    assert tokens == "1,024" and of_weights < float(operations.split()[0]) < 2 * of_weights
    assert rows["mean"] == ["", operations]
    kept, checkpointed = (float(value[0].split()[0]) for name, value in rows.items() if "2 clips" in name)
    assert 0 < checkpointed < 0.3 * kept
    assert float(rows["10%"][0]) == pytest.approx(4 * float(rows["40%"][0]), abs=0.05)
