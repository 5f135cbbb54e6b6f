"""evaluation/context_curve.py and memory_loss.py: what is a revisit, what is changed, and whole runs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_far import ContextSchedule
from diffusers_far.flow_matching import CLEAN_TIMESTEP
from diffusers_far.memory_loss import SIGMA, change_long_frames, memory_loss
from evaluation import context_curve
from evaluation.context_curve import (
    TARGETS,
    appearance,
    observed_revisits,
    wall_colours,
)
from evaluation.world_model import predict
from tests.python_process import run_python
from tests.tiny_models import generator, latents, long_transformer, max_error, pipeline, transformer

ACTIONS = torch.arange(60).view(3, 20) % 4


def turn_away(frames_away: int, angle: float = 90.0) -> np.ndarray:
    """Poses that look ahead for 12 frames, then aside for some."""
    poses = np.zeros((12 + frames_away, 3))
    poses[12:, 2] = angle
    return poses


# ----------------------------------------------------------------------------------------------------
# Revisits


def test_a_walker_that_turns_around_and_back_revisits() -> None:
    """No jumps: 30 degrees a frame, so that every frame resembles the one before it."""
    aside = [30.0 * step for step in (*range(7), *[6] * 9, *range(5, -1, -1), *[0] * 20)]
    poses = np.zeros((12 + len(aside), 3))
    poses[12:, 2] = aside
    mask = observed_revisits(poses, 28, 8)
    assert mask[5] and not mask[0]
    assert not observed_revisits(poses, 12, 8).any()  # nothing has left the window yet


def test_what_was_seen_too_long_ago_does_not_count() -> None:
    back = np.zeros((TARGETS, 3))
    for away, counts in ((248, [True, True]), (249, [True, False]), (250, [False, False])):
        mask = observed_revisits(np.concatenate([turn_away(away), back]), 12 + away, 8)
        assert mask[:2].tolist() == counts and not mask[2:].any()


# ----------------------------------------------------------------------------------------------------
# Long-term frames and the loss after them


def test_only_long_term_frames_change() -> None:
    videos = latents(3, 20)
    mixed, labels = change_long_frames(videos, ACTIONS, 12, "shuffled", generator())
    assert labels is not None
    for clip in range(3):  # a frame keeps the action that led to it
        order = [int((videos[clip] == frame).flatten(1).all(1).nonzero()) for frame in mixed[clip]]
        assert sorted(order[:12]) == list(range(12)) != order[:12] and order[12:] == list(range(12, 20))
        assert torch.equal(labels[clip], ACTIONS[clip, order])
    other, labels = change_long_frames(videos, ACTIONS, 12, "other", generator())
    assert labels is not None
    for clip in range(3):
        assert torch.equal(other[clip], torch.cat([videos[clip - 1, :12], videos[clip, 12:]]))
        assert torch.equal(labels[clip], torch.cat([ACTIONS[clip - 1, :12], ACTIONS[clip, 12:]]))


def test_without_long_term_frames_a_change_of_them_changes_nothing() -> None:
    """Frames 0 to 16 are long-term when frame 20 is made with a window of 4: the pipeline agrees."""
    pipe, videos, actions = (
        pipeline(long_transformer(num_actions=4)),
        latents(2, 20),
        torch.zeros(2, 21).long(),
    )
    changed, labels = change_long_frames(videos, actions, 17, "other", generator())
    kept, dropped = ContextSchedule(), ContextSchedule(max_long_frames=0)
    for schedule in (kept, dropped):
        right = predict(pipe, videos, actions, 2, 0, context_schedule=schedule)
        wrong = predict(pipe, changed, labels, 2, 0, context_schedule=schedule)
        scale = max_error(right, torch.zeros_like(right))
        error = max_error(wrong, right) / scale
        assert error < 1e-5 if schedule is dropped else error > 1e-3


def test_loss_is_that_of_the_window_after_each_kind_of_frames() -> None:
    model, videos = long_transformer(num_actions=4), latents(3, 24)
    actions = torch.arange(72).view(3, 24) % 4
    losses = memory_loss(model, videos, actions, 24, generator(5))
    assert list(losses) == ["right", "recent", "shuffled", "other", "none"]
    assert len(set(losses.values())) == 5
    noise = torch.randn(3, 4, 4, 8, 8, generator=generator(5))
    for name, first in (("right", 0), ("recent", 4), ("none", 20)):
        given = videos[:, first:].clone()
        given[:, -4:] = SIGMA * noise + (1 - SIGMA) * given[:, -4:]
        levels = torch.full(given.shape[:2], CLEAN_TIMESTEP)
        levels[:, -4:] = 800
        with torch.no_grad():
            velocity = model(given, levels, actions=actions[:, first:]).sample
        expected = (velocity - (noise - videos[:, -4:])).square().mean().item()
        assert losses[name] == pytest.approx(expected, rel=1e-5)


def test_loss_tells_a_model_that_remembers() -> None:
    """Trained for a moment on videos that stand still, a model looks at the long-term frames."""
    model = long_transformer(std=0.05)
    still = latents(8, 1).expand(-1, 8, -1, -1, -1).contiguous()
    before = memory_loss(model, still, None, 8, generator())
    assert before["right"] == pytest.approx(before["shuffled"], rel=1e-4)  # equal frames in another order
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    levels = torch.full((8, 8), CLEAN_TIMESTEP)
    levels[:, -4:] = 1000 * SIGMA
    for step in range(150):
        given, noise = still.clone(), torch.randn(8, 4, 4, 8, 8, generator=generator(100 + step))
        given[:, -4:] = SIGMA * noise + (1 - SIGMA) * still[:, -4:]
        loss = (model(given, levels).sample - (noise - still[:, -4:])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    losses = memory_loss(model, still, None, 8, generator())
    assert losses["right"] < 0.9 * min(losses["other"], losses["none"])


@pytest.mark.parametrize(
    ("model", "batch", "num_frames", "message"),
    [
        (transformer(num_actions=4), 2, 12, "model: a base model"),
        (long_transformer(num_actions=4), 1, 12, "latents: a batch of 1"),
        (long_transformer(num_actions=4), 2, 4, "num_frames=4 takes 5"),
        (long_transformer(num_actions=4), 2, 21, "num_frames=21 takes 5 .* to 20"),
    ],
)
def test_loss_refuses_what_it_cannot_measure(model, batch: int, num_frames: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory_loss(model, latents(batch, 20), ACTIONS[:batch], num_frames, generator())


# ----------------------------------------------------------------------------------------------------
# Looks of a rollout


def test_one_blurred_wall_is_not_three_textures() -> None:
    colours = torch.tensor([[0.6, 0.2, 0.1], [0.2, 0.5, 0.2], [0.3, 0.3, 0.8]])
    draw = generator()
    texture = colours[:, :, None, None] + 0.2 * torch.randn(3, 3, 64, 64, generator=draw)
    three = texture[torch.arange(60) // 20].clamp(0, 1)
    one = (colours[:1, :, None, None] + 0.02 * torch.randn(60, 3, 1, 1, generator=draw)).expand(
        -1, -1, 64, 64
    )
    assert wall_colours(three) == 3 and wall_colours(one) == 1
    looks, blurred = appearance(three), appearance(one)
    assert blurred["sharpness"] < 0.01 * looks["sharpness"]
    assert blurred["colour_spread"] < 0.2 * looks["colour_spread"]


# ----------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    pipeline(long_transformer(num_actions=6, std=0.1), num_inference_steps=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """The sample episodes, with poses that turn around and a script; ends of 40 frames."""
    from diffusers.utils import export_to_video
    from PIL import Image

    from diffusers_far import read_video

    samples = repository / "data" / "samples" / "doom-maze-64" / "validation"
    folder = tmp_path_factory.mktemp("recording") / "validation"
    folder.mkdir()
    lines = []
    for line in (samples / "metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        frames = [Image.fromarray(frame) for frame in read_video(samples / row["file_name"])[:40]]
        export_to_video(frames, str(folder / row["file_name"]), fps=8, macro_block_size=1)
        poses = [[0.0, 0.0, 180.0 if 10 <= t < 24 else 0.0] for t in range(40)]
        row |= {"actions": row["actions"][:40], "poses": poses, "script": "turn-away-16", "return_frame": 24}
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder.parent


def run(repository: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    script = repository / "evaluation" / "context_curve.py"
    return run_python([str(script), *map(str, arguments)])


def test_a_whole_run(repository: Path, tmp_path: Path, checkpoint: Path, recording: Path) -> None:
    weights = tmp_path / "ema"
    long_transformer(seed=7, num_actions=6, std=0.1).save_pretrained(weights)
    sizes = ["--contexts", 8, 24, "--clips", 2, "--rollout-frames", 30, "--rollouts", 1, "--loss-frames", 24]
    modes = ["--modes", "all", "default", "window", "shuffled", "other"]
    files = ["--output", tmp_path / "a.json", "--plot", tmp_path / "a.png"]
    result = run(repository, checkpoint, recording, "--scripted", recording, *sizes, *modes, *files)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "a.json").read_text())
    assert {"command", "date", "torch", "cpu", "curve", "scripted", "rollout", "loss"} <= set(found)
    curve = found["curve"]
    # All 16 targets of both clips look ahead again, after 14 frames that look back.
    assert (curve["clips"], curve["target_frames"], curve["revisited_frames"]) == (2, 32, 32)
    rows = {(row["mode"], row["observed"]): row for row in curve["rows"]}
    assert set(rows) == {
        ("reconstruction", None),
        *((mode, observed) for mode in ("all", "default") for observed in (8, 24)),
        ("window", 3),
        ("shuffled", 24),
        ("other", 24),
    }
    figures = {name: (row["psnr"]["mean"], row["lpips"], row["revisit_psnr"]) for name, row in rows.items()}
    assert len({figures[name] for name in rows if name[0] != "default"}) == 6  # all differ
    assert [row["mode"] for row in found["scripted"]["rows"]] == ["all", "window", "shuffled"]
    right, scripted = figures["all", 24], found["scripted"]["rows"][0]
    assert (scripted["psnr"]["mean"], scripted["lpips"]) == pytest.approx(
        right[:2], rel=1e-3
    )  # the same clips
    assert [(row["first"], row["last"]) for row in found["rollout"]["rows"]] == [(1, 30)]
    assert found["loss"]["rows"][0]["right"] != found["loss"]["rows"][0]["other"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "| all | 24 |" in result.stdout and "32 of 32 target frames are revisits" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png", "ema"]

    options = ["--parts", "loss", *sizes, "--output", tmp_path / "b.json", "--transformer", weights]
    result = run(repository, checkpoint, recording, *options)
    assert result.returncode == 0, result.stderr
    other = json.loads((tmp_path / "b.json").read_text())
    assert "curve" not in other and other["loss"]["rows"] != found["loss"]["rows"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contexts", "0"], "--contexts [0]: it takes 1 or more"),
        (["--clips", "1"], "--clips 1: it takes 2 or more"),
        (["--parts", "scripted"], "takes --scripted FOLDER"),
        (["--contexts", "8", "--changed-contexts", "9"], "--changed-contexts [9]"),
        (["--contexts", "25", "--parts", "curve"], "contexts=[25]: some episodes have less than 41 frames"),
        (["--loss-frames", "41", "--parts", "loss"], "loss_frames=41: some episodes have 40 frames only"),
    ],
)
def test_bad_options(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    checkpoint: Path,
    recording: Path,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["context_curve.py", str(checkpoint), str(recording), *options])
    with pytest.raises((SystemExit, ValueError)) as error:
        context_curve.main()
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_a_folder_without_metadata(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["context_curve.py", str(checkpoint), str(tmp_path)])
    with pytest.raises(ValueError, match=r"data=.* there is no .*metadata\.jsonl"):
        context_curve.main()
