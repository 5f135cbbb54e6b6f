"""evaluation/beyond_training.py: ways to show a long context to a model."""

import argparse
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from diffusers_far.memory_loss import memory_loss
from evaluation.beyond_training import (
    LoweredFrequency,
    begin,
    frequency_for,
    measure_losses,
    measure_predictions,
    save,
    way_loss,
    ways,
)
from tests.tiny_models import TOLERANCE, latents, long_transformer, pipeline, relative_error

TRAINED, FRAMES = 8, 20


def test_the_newest_frames_within_the_training_length_have_the_loss_of_memory() -> None:
    model = long_transformer(num_actions=4)
    window = model.short_window
    assert window is not None
    videos = latents(2, TRAINED)
    noise = torch.randn(videos[:, -window:].shape, generator=torch.Generator().manual_seed(3))
    alone, newest = ways(TRAINED, window, TRAINED, [1.0])
    actions = torch.zeros(2, TRAINED, dtype=torch.long)
    losses = memory_loss(model, videos, actions, TRAINED, torch.Generator().manual_seed(3))
    for way, name in ((alone, "none"), (newest, "right")):
        loss = way_loss(model, way, videos, actions, noise, TRAINED).mean()
        assert loss.item() == pytest.approx(losses[name], rel=1e-4)


def test_ways_beyond_the_training_length() -> None:
    model = long_transformer(num_actions=4)
    window = model.short_window
    assert window is not None
    videos = latents(2, FRAMES)
    noise = torch.randn(videos[:, -window:].shape, generator=torch.Generator().manual_seed(3))
    actions = torch.zeros(2, FRAMES, dtype=torch.long)
    found = {way.name: way for way in ways(FRAMES, window, TRAINED, [1.0, 4.0])}
    for way in found.values():
        assert len(way.kept) == len(way.positions) and way.positions[-1] == FRAMES - 1
        assert (way.positions.diff() > 0).all()
    assert found["newest"].kept.tolist() == list(range(FRAMES - TRAINED, FRAMES))
    assert found["sinks"].kept.tolist() == [0, 1, 2, 3, *range(FRAMES - TRAINED + 4, FRAMES)]
    assert found["sinks"].positions.tolist() == found["newest"].positions.tolist()
    assert found["slope 4"].flex_rope_slope == 4 / TRAINED
    assert FRAMES - 1 - found["re-indexed"].positions[0] <= TRAINED
    losses = {
        name: way_loss(model, way, videos, actions, noise, TRAINED).mean().item()
        for name, way in found.items()
    }
    assert len({round(loss, 7) for loss in losses.values()}) == len(losses)  # each way is another one


def test_riflex_slows_one_frequency_of_time() -> None:
    model = long_transformer()
    (riflex,) = [way for way in ways(FRAMES, 3, TRAINED, []) if way.is_riflex]
    own = model.pos_embed
    coordinates = torch.tensor([[0.0, 2, 3], [5, 0, 1], [19, 1, 1]])
    with frequency_for(model, riflex.is_riflex, TRAINED, FRAMES):
        assert isinstance(model.pos_embed, LoweredFrequency)
        lowered = model.pos_embed(coordinates)
        channels, ratio = model.pos_embed.channels, model.pos_embed.ratio
    assert model.pos_embed is own and ratio < 1
    slower = coordinates * torch.tensor([ratio, 1, 1])
    for table, plain, expected in zip(lowered, own(coordinates), own(slower), strict=True):
        assert relative_error(table[:, channels], expected[:, channels]) <= TOLERANCE
        others = torch.ones(table.shape[1], dtype=torch.bool)
        others[channels] = False
        assert torch.equal(table[:, others], plain[:, others])


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(long_transformer(num_actions=4), num_training_frames=TRAINED)
    pipe.set_progress_bar_config(disable=True)
    clips, actions = latents(2, FRAMES), torch.zeros(2, FRAMES, dtype=torch.long)
    frames = torch.randint(0, 256, (2, FRAMES, 3, 64, 64), dtype=torch.uint8)
    output = tmp_path / "results.json"
    options = argparse.Namespace(output=output, lengths=[FRAMES], slopes=[1.0], ends=1, batch_size=2, seed=0)

    def run(most: int | None = None) -> int:
        """Rows that this run measured, stopped after `most`."""
        results, saved = begin(options, torch.device("cpu")), 0
        lost, predicted = results["losses"], results["predictions"]
        ways_done = {(row["frames"], row["way"]) for row in lost}
        rows = itertools.chain(
            ((lost, row) for row in measure_losses(pipe, clips, actions, options, ways_done)),
            (
                (predicted, row)
                for row in measure_predictions(
                    pipe, frames, clips, actions, options, {row["way"] for row in predicted}
                )
            ),
        )
        for kind, row in itertools.islice(rows, most):
            kind.append(row)
            save(results, output)
            saved += 1
        return saved

    whole = run()
    expected = json.loads(output.read_text())
    assert whole == len(expected["losses"]) + len(expected["predictions"]) == 14
    output.unlink()
    assert (run(3), run(7), run()) == (3, 7, 4)  # the second one stops among the predictions
    found = json.loads(output.read_text())
    for kind, name in (("losses", "loss"), ("predictions", "psnr")):
        assert [row["way"] for row in found[kind]] == [row["way"] for row in expected[kind]]
        assert [row[name] for row in found[kind]] == pytest.approx([row[name] for row in expected[kind]])
    monkeypatch.setattr(sys, "argv", ["beyond_training.py", "--seed", "1"])
    with pytest.raises(ValueError, match="has command="):
        run()
