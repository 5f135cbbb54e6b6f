"""The experiment on windows, patches and full context, with tiny models and walks."""

import json
import sys
from pathlib import Path

import pytest
import torch

from evaluation.experiments import long_context
from evaluation.experiments.equal_time import with_changes
from tests import tiny_models

OPTIONS = {
    "window_8_patch_4": {"short_window": 4, "long_patch_size": 4},  # as the tiny Long model
    "window_4_patch_4": {"short_window": 2, "long_patch_size": 4},
    "window_8_patch_2": {"short_window": 4, "long_patch_size": 2},
    "full": {"long_patch_size": None},
}


@pytest.mark.filterwarnings("ignore:.*resume")
@pytest.mark.usefixtures("tiny_experiment")
@pytest.mark.parametrize("is_changed", [False, True])
def test_models_are_trained_and_measured_once(
    walks: Path, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_changed: bool
) -> None:
    for name, value in {"OPTIONS": OPTIONS, "SHORT_CONTEXT": 6, "TIMED_FRAMES": 1}.items():
        monkeypatch.setattr(long_context, name, value)
    output = tmp_path / "output"
    arguments = [str(walks), "--autoencoder", str(autoencoder), "--output", str(output), "--minutes", "0.002"]
    arguments += ["--walks", "3", "--num-frames", "12", "--batch-size", "4", "--measured-at-once", "2"]
    arguments += ["--mixed-precision", "no", "--plot", str(tmp_path / "plot.png")]
    if is_changed:
        model = tiny_models.long_transformer(num_actions=3)
        tiny_models.pipeline(model).save_pretrained(tmp_path / "checkpoint")
        arguments += ["--checkpoint", str(tmp_path / "checkpoint")]
    monkeypatch.setattr(sys, "argv", ["long_context", *arguments])
    long_context.main()

    rows = {row["option"]: row for row in json.loads((output / "results.json").read_text())["rows"]}
    assert list(rows) == list(OPTIONS)
    short, patch_2 = (64, 16) if is_changed else (16, 16)  # tokens of a frame, patches of 1 or 2
    tokens = {name: row["tokens"] for name, row in rows.items()}
    assert tokens == {
        "window_8_patch_4": 3 * short + 8 * 4,
        "window_4_patch_4": 1 * short + 10 * 4,
        "window_8_patch_2": 3 * short + 8 * patch_2,
        "full": 11 * short,
    }
    baseline, full = rows["window_8_patch_4"], rows["full"]
    assert baseline["next_11"]["difference"] == 0
    for name in ("next_11", "next_6_revisits", "psnr", "lpips"):
        difference = full[name]["mean"] - baseline[name]["mean"]
        assert full[name]["difference"] == pytest.approx(difference, abs=1e-6) and difference != 0
    measured = json.loads((output / "full" / "measured.json").read_text())["results"]["measured"]
    assert len(measured["psnr"]) == sum(measured["targets"]["revisits"]) == 6
    assert (output / "results.md").read_text().count("| full |") == 2
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(long_context, "train_new", None)  # not called again
    long_context.main()
    assert {row["option"]: row for row in json.loads((output / "results.json").read_text())["rows"]} == rows


def test_full_context_begins_with_the_weights_of_short_term_frames() -> None:
    """Within a window, where no frame is long-term, nothing has changed."""
    model = tiny_models.long_transformer(num_actions=3)
    full = with_changes(model, {"long_patch_size": None})
    assert not full.is_long
    frames, timestep = tiny_models.latents(2, model.short_window), torch.full((2, model.short_window), 300.0)
    expected = model(frames, timestep).sample
    assert tiny_models.relative_error(full(frames, timestep).sample, expected) <= tiny_models.TOLERANCE
