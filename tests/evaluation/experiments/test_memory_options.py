"""The experiment on options of training for memory, from a tiny checkpoint and tiny walks."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.experiments import equal_time, memory_options
from tests import tiny_models
from tests.tiny_latents import WALK_FRAMES


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = tiny_models.long_transformer(num_actions=3)
    tiny_models.pipeline(model).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.filterwarnings("ignore:.*resume")
def test_options_are_trained_measured_and_not_done_twice(
    checkpoint: Path, walks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_options, "CONTEXTS", (11, 6, 2))
    monkeypatch.setattr(memory_options, "NOISY_FRAMES", 2)
    monkeypatch.setattr(equal_time, "CALIBRATION_STEPS", 2)
    output = tmp_path / "output"
    arguments = [str(checkpoint), str(walks), "--output", str(output), "--minutes", "0.002"]
    arguments += ["--num-frames", "12", "--batch-size", "2", "--mixed-precision", "no", "--options"]
    options = ["recipe", "context_noise", "null_frames", "long_patch_2", "new_velocity", "new_clean"]
    monkeypatch.setitem(
        memory_options.OPTIONS,
        "long_patch_2",
        memory_options.Option("finer", model_changes={"long_patch_size": 1}),
    )
    monkeypatch.setattr(sys, "argv", ["memory_options", *arguments, *options])
    memory_options.main()

    rows = json.loads((output / "results.json").read_text())["rows"]
    assert list(rows) == options
    for row in rows.values():
        assert np.isfinite(row["next_11"]["loss"])
    assert rows["recipe"]["next_11"]["difference"] == 0
    assert rows["null_frames"]["next_11_revisits"]["difference"] != 0
    assert rows["long_patch_2"]["noisy_right"]["difference"] != 0
    measured = json.loads((output / "recipe" / "results.json").read_text())
    assert measured["targets"]["frames"][-1] == WALK_FRAMES - 1
    assert (output / "results.md").read_text().count("\n") == len(options) + 2

    monkeypatch.setattr(memory_options, "train", None)  # not called again
    memory_options.main()
    assert json.loads((output / "results.json").read_text())["rows"] == rows


def test_what_is_predicted_as_clean_is_the_same_velocity() -> None:
    """Whatever a model says of the clean frame, the velocity leads from the noisy one to it."""
    model = tiny_models.long_transformer()
    frames = tiny_models.latents(1, 3)
    sigma = 0.4
    timestep = torch.full((1, 3), 1000 * sigma)
    velocity = memory_options.CleanPrediction(model)(frames, timestep, actions=None).sample
    clean = model(frames, timestep).sample
    torch.testing.assert_close(frames - sigma * velocity, clean)


def test_null_frames_come_before_the_first_and_are_not_predicted() -> None:
    model = tiny_models.long_transformer(num_actions=3)
    model.null_frames = torch.nn.Parameter(tiny_models.latents(1, memory_options.NULL_FRAMES, seed=5))
    frames = tiny_models.latents(2, 4)
    timestep = torch.full((2, 4), 300.0)
    actions = torch.ones(2, 4, dtype=torch.int64)
    found = memory_options.LearnedNullFrames(model)(frames, timestep, actions=actions).sample
    padded = torch.cat([model.null_frames.expand(2, -1, -1, -1, -1), frames], dim=1)
    times = torch.cat([torch.full((2, memory_options.NULL_FRAMES), -1.0), timestep], dim=1)
    nulls = torch.full((2, memory_options.NULL_FRAMES), -1)
    expected = model(padded, times, actions=torch.cat([nulls, actions], dim=1)).sample
    torch.testing.assert_close(found, expected)
