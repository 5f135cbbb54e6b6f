"""The experiment on stochastic clean context, with tiny models and walks."""

import json
import sys
from pathlib import Path

import pytest
import torch

from diffusers_far.flow_matching import CLEAN_TIMESTEP
from evaluation.experiments import clean_context
from tests import tiny_models


@pytest.mark.filterwarnings("ignore:.*resume")
@pytest.mark.usefixtures("tiny_experiment")
def test_models_are_trained_and_continue_walks_once(
    walks: Path, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clean_context, "TRAINED", 4)
    monkeypatch.setattr(clean_context, "AHEAD", (1, 2, 5))
    monkeypatch.setattr(clean_context, "TARGETS_PER_WALK", 2)
    output = tmp_path / "output"
    arguments = [str(walks), "--autoencoder", str(autoencoder), "--output", str(output), "--minutes", "0.002"]
    arguments += ["--walks", "2", "--batch-size", "2", "--measured-at-once", "2", "--mixed-precision", "no"]
    arguments += ["--plot", str(tmp_path / "plot.png"), "--options"]
    monkeypatch.setattr(sys, "argv", ["clean_context", *arguments, "clean_0"])
    clean_context.main()  # alone, there is nothing to compare with
    assert "±" not in (output / "results.md").read_text()
    monkeypatch.setattr(sys, "argv", ["clean_context", *arguments, "clean_0.1", "clean_0.5_own"])
    clean_context.main()

    rows = {row["way"]: row for row in json.loads((output / "results.json").read_text())["rows"]}
    assert list(rows) == ["clean_0", "clean_0_least_noise", "clean_0.1", "clean_0.5_own"]
    published, least_noise = rows["clean_0.1"], rows["clean_0_least_noise"]
    assert published["loss"]["difference"] == 0
    assert {row["steps"] for row in rows.values()} == {8}
    assert least_noise["loss"]["mean"] != rows["clean_0"]["loss"]["mean"]
    for name in ("loss", "psnr_1", "psnr_5", "lpips_2"):
        difference = least_noise[name]["mean"] - published[name]["mean"]
        assert least_noise[name]["difference"] == pytest.approx(difference, abs=1e-6)
    measured = json.loads((output / "clean_0.1" / "measured.json").read_text())["results"]["clean_0.1"]
    assert len(measured["loss"]["loss"]) == 4 and len(measured["rollouts"]["psnr_5"]) == 2
    text = (output / "results.md").read_text()
    assert text.count("| clean_0.5_own |") == 4 and "±" in text
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(clean_context, "train_new", None)  # not called again
    clean_context.main()
    assert {row["way"]: row for row in json.loads((output / "results.json").read_text())["rows"]} == rows


def test_least_noise_takes_the_place_of_the_clean_mark_alone() -> None:
    model = tiny_models.transformer(num_actions=3)
    frames = tiny_models.latents(1, 3)
    clean, noisy = (torch.tensor([[value, value, 300.0]]) for value in (CLEAN_TIMESTEP, 1.0))
    expected = model(frames, noisy).sample
    assert tiny_models.relative_error(model(frames, clean).sample, expected) > 0.001
    clean_context.mark_as_least_noise(model)
    assert torch.equal(model(frames, clean).sample, expected)
    assert torch.equal(model(frames, noisy).sample, expected)
