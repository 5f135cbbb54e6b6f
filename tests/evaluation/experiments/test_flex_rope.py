"""The experiment on contexts longer than the clips of training, with tiny models and walks."""

import json
import sys
from pathlib import Path

import pytest
import torch

from diffusers_far import ContextSchedule
from evaluation.experiments import flex_rope
from evaluation.world_model import predict
from tests import tiny_models

TRAINED = 4
WAYS = ["newest", "sinks", "all", "slope", "interpolated", "RIFLEx", "re-indexed", "ALiBi", "ALiBi newest"]


@pytest.fixture(autouse=True)
def short_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_rope, "TRAINED", TRAINED)
    monkeypatch.setattr(flex_rope, "NOISY_FRAMES", 2)
    monkeypatch.setattr(flex_rope, "PREDICTED", 2)
    monkeypatch.setattr(flex_rope, "LEAST_APART", 1)
    monkeypatch.setattr("evaluation.beyond_training.NUM_SINKS", 1)


@pytest.mark.filterwarnings("ignore:.*resume")
@pytest.mark.usefixtures("tiny_experiment")
def test_both_models_are_trained_and_every_way_is_measured_once(
    walks: Path, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "output"
    arguments = [str(walks), "--autoencoder", str(autoencoder), "--output", str(output), "--minutes", "0.002"]
    arguments += ["--contexts", "4", "8", "--slopes", "1", "4", "--walks", "3", "--choosing-walks", "1"]
    arguments += ["--batch-size", "2", "--mixed-precision", "no", "--plot", str(tmp_path / "plot.png")]
    monkeypatch.setattr(sys, "argv", ["flex_rope", *arguments])
    flex_rope.main()

    results = json.loads((output / "results.json").read_text())
    assert results["slope"] == float(min(results["slopes"], key=results["slopes"].get))
    rows = {
        (row["observed"], row["way"].removesuffix(f" {results['slope']:g}")): row for row in results["rows"]
    }
    assert list(rows) == [(observed, way) for observed in (4, 8) for way in WAYS]
    newest, everything = rows[8, "newest"], rows[8, "all"]
    for measure in ("loss", "psnr_1", "psnr", "lpips"):
        assert newest[measure]["difference"] == 0 and everything[measure]["standard_error"] > 0
        difference = everything[measure]["mean"] - newest[measure]["mean"]
        assert everything[measure]["difference"] == pytest.approx(difference, abs=1e-6)
    # A sliding window, and its loss, do not depend on what is before it.
    assert newest["loss"]["mean"] == pytest.approx(rows[4, "newest"]["loss"]["mean"], rel=1e-5)
    text = (output / "results.md").read_text()
    assert text.count("\n| 8 | ") == len(WAYS) and "after 8 frames" in text
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    before = (output / "measured.json").read_text()
    monkeypatch.setattr(flex_rope, "way_loss", None)  # not called again
    monkeypatch.setattr(flex_rope, "predict", None)
    flex_rope.main()
    assert (output / "measured.json").read_text() == before

    monkeypatch.setattr(sys, "argv", ["flex_rope", *arguments, "--ends", "1"])
    with pytest.raises(ValueError, match=r"ends=1: .*has results of ends=2"):
        flex_rope.main()


def test_alibi_knows_time_by_the_bias_alone() -> None:
    model = flex_rope.forget_time(tiny_models.transformer(num_actions=4))
    frames = tiny_models.latents(2, 5)
    timestep = torch.full((2, 5), 300.0)

    def velocity(places: list[int], slope: float) -> torch.Tensor:
        return model(frames, timestep, frame_positions=torch.tensor(places), flex_rope_slope=slope).sample

    near, far = [0, 1, 2, 3, 4], [0, 10, 20, 30, 40]
    assert tiny_models.relative_error(velocity(near, 0.0), velocity(far, 0.0)) <= tiny_models.TOLERANCE
    assert tiny_models.relative_error(velocity(near, 1.0), velocity(far, 1.0)) > 0.01


def test_each_head_has_a_slope_of_its_own() -> None:
    """Two heads with the same queries, keys and values: the one with the steep slope looks less far."""
    attention = flex_rope.BiasAttnProcessor(2)
    query, key = torch.zeros(3, 1, 2, 4), torch.zeros(3, 2, 2, 4)
    value = torch.tensor([0.0, 1.0])[None, :, None, None].expand(3, 2, 2, 4)
    bias = torch.tensor([-8.0, 0.0])[None, None, None]
    found = attention.attend(query, key, value, bias)[:, 0, :, 0]
    expected = torch.sigmoid(torch.tensor([8 * 2.0**-4, 8 * 2.0**-8]))
    torch.testing.assert_close(found, expected.expand(3, 2))


def test_reindexed_predictions_within_the_trained_half_are_those_of_all_frames() -> None:
    """Nothing is squeezed there, and the noise is that of `predict`."""
    pipeline = tiny_models.pipeline(tiny_models.transformer(num_actions=4), num_training_frames=TRAINED)
    clips, actions = tiny_models.latents(3, 1), torch.zeros(3, 3, dtype=torch.long)
    found = flex_rope.predict_reindexed(pipeline, clips, actions, batch_size=2)
    expected = predict(pipeline, clips, actions, 3, 0, context_schedule=ContextSchedule.unbounded())
    assert tiny_models.relative_error(found, expected) <= tiny_models.TOLERANCE
    clips, actions = tiny_models.latents(3, 7), torch.zeros(3, 9, dtype=torch.long)
    longer = flex_rope.predict_reindexed(pipeline, clips, actions, batch_size=2)
    plain = predict(pipeline, clips, actions, 3, 0, context_schedule=ContextSchedule.unbounded())
    assert tiny_models.relative_error(longer, plain) > 0.001
