"""Groups of actions and vectors on the way from data to a model: latents, clips, a run, a pipeline."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_far import FARTransformer3DModel, FARVideoPipeline, read_video
from diffusers_far.training import encode_latents, make_pipeline, train_folder
from diffusers_far.training.clips import ClipBatches, LatentVideos, action_options
from diffusers_far.training.options import FAROptions, ModelOptions, parse
from diffusers_far.training.train_far import FARTrainer
from tests.tiny_latents import averaged_weights, read_log, run_options
from tests.tiny_latents import write_latents as write_integers
from tests.tiny_models import autoencoder
from tests.video_writing import numbered_frames, write_video

KINDS = {"groups": ["--num_actions", "3", "2"], "vector": ["--action_dim", "2"]}
kinds = pytest.mark.parametrize("kind", KINDS)


def write_latents(folder: Path, kind: str, names: list[str] | None = None) -> Path:
    """Videos of 12 frames whose action shifts one pattern: 4 to train on, 2 held out."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(2, 4, 4, generator=generator)
    metadata = None if names is None else {"action_names": json.dumps(names)}
    for split, number in (("train", 4), ("validation", 2)):
        (folder / split).mkdir(parents=True)
        for index in range(number):
            moves = torch.randint(3, (12,), generator=generator)
            frames = torch.stack([pattern.roll(shift, dims=-1) for shift in (moves - 1).cumsum(0).tolist()])
            other = torch.randint(2, (12,), generator=generator)
            actions = torch.stack([moves, other], dim=1)
            if kind == "vector":
                actions = torch.stack([100 + 10.0 * (moves - 1), torch.full((12,), 7.0)], dim=1)
                actions[0] = math.nan
            file = folder / split / f"{index:05d}.safetensors"
            save_file({"latents": frames.half(), "actions": actions}, file, metadata=metadata)
    return folder


def trainer(kind: str, latents: Path, output: Path, *more: str) -> FARTrainer:
    words = [*run_options(latents, output), *more]
    at = words.index("--num_actions")
    words[at : at + 2] = KINDS[kind]
    return FARTrainer(*parse(words, (ModelOptions, FAROptions), None))


# ------------------------------------------------------------------------------------------------------------
# Latents and clips


@kinds
def test_actions_are_dropped_as_a_whole(kind: str, tmp_path: Path) -> None:
    videos = LatentVideos(write_latents(tmp_path, kind) / "train")
    batches = ClipBatches(videos, 16, 6, condition_dropout=0.3)
    clips = batches[0]
    assert clips.actions.shape == (16, 6, 2)
    is_null = clips.actions.isnan() if kind == "vector" else clips.actions == -1
    assert torch.equal(is_null.any(-1), is_null.all(-1))
    assert 0.1 < is_null.float().mean() < 0.6
    kept = ClipBatches(videos, 16, 6, condition_dropout=0.0)[0]
    assert torch.equal(kept.latents, clips.latents)
    assert torch.equal(kept.actions[~is_null], clips.actions[~is_null])


def test_statistics_of_vectors(tmp_path: Path) -> None:
    videos = LatentVideos(write_latents(tmp_path, "vector") / "train")
    rows = torch.cat([values[1:] for values in videos.actions])  # of the first frame nothing is known
    statistics = videos.action_statistics()
    assert statistics["action_mean"] == pytest.approx(rows.mean(0).tolist())
    assert statistics["action_std"] == pytest.approx([float(rows[:, 0].std(correction=0)), 1.0])


def test_options_of_a_model_for_actions() -> None:
    assert action_options([torch.tensor([0, 3, -1]), torch.tensor([1, 0])]) == {"num_actions": 4}
    groups = [torch.tensor([[0, 3], [-1, 0]]), torch.tensor([[2, 1]])]
    assert action_options(groups) == {"num_actions": [3, 4]}
    assert action_options([torch.zeros(3, 5)]) == {"action_dim": 5}
    with pytest.raises(ValueError, match=r"actions of several kinds: torch.float32 \['T', 5\], torch.int64"):
        action_options([torch.zeros(3, 5), torch.zeros(3, dtype=torch.long)])


@pytest.mark.parametrize(
    ("kind", "conditions", "message"),
    [
        (
            "groups",
            (3, None, None),
            r"num_actions=3: .*00000\.safetensors has actions of torch.int64 \[12, 2\]",
        ),
        ("groups", ([3, 1], None, None), r"num_actions=\[3, 1\]: .* has actions such as 1; it takes 0 to 0"),
        (
            "groups",
            (None, None, 2),
            r"action_dim=2: .* has actions of torch.int64 .* takes vectors of 2 numbers",
        ),
        ("vector", (None, None, 3), r"action_dim=3: .*float32 \[12, 2\]; it takes vectors of 3 numbers"),
        ("vector", ([3, 2], None, None), r"num_actions=\[3, 2\]: .* it takes groups of 3, 2"),
    ],
)
def test_actions_that_do_not_fit_the_model_are_named(
    kind: str, conditions: tuple[Any, ...], message: str, tmp_path: Path
) -> None:
    videos = LatentVideos(write_latents(tmp_path, kind) / "train")
    with pytest.raises(ValueError, match=message):
        videos.keep_conditions(*conditions)


def test_videos_whose_actions_have_other_names(tmp_path: Path) -> None:
    folder = write_latents(tmp_path, "vector", ["x", "y"]) / "train"
    assert LatentVideos(folder).action_names == ("x", "y")
    file = folder / "00003.safetensors"
    save_file(load_file(file), file, metadata={"action_names": '["y", "x"]'})
    with pytest.raises(ValueError, match=r"00003\.safetensors has actions called \[\"y\", \"x\"\]"):
        LatentVideos(folder)


def test_encoding_keeps_actions_and_their_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    autoencoder().save_pretrained(tmp_path / "autoencoder")
    keyboard, mouse = np.array([0, 2, 1, 0]), np.array([1, 1, 0, 1])
    for number in range(2):
        write_video(tmp_path / f"keys/train/{number}.mp4", numbered_frames(4))
        np.savez(tmp_path / f"keys/train/{number}.npz", action_keyboard=keyboard, action_mouse=mouse)
        vectors = np.array([[math.nan] * 3, [0.1, 0.2, 0.3], [1e-8, 2, 3], [4, 5, 6]])
        write_video(tmp_path / f"arm/train/{number}.mp4", numbered_frames(4))
        np.savez(tmp_path / f"arm/train/{number}.npz", actions=vectors)
    for name, expected in (("keys", np.stack([keyboard, mouse], 1)), ("arm", vectors)):
        output = tmp_path / "latents" / name
        words = [
            str(tmp_path / name),
            "--autoencoder",
            str(tmp_path / "autoencoder"),
            "--output",
            str(output),
        ]
        encode_latents.main([*words, "--splits", "train", "--stride", "2"])
        file = output / "train/0.safetensors"
        found = load_file(file)["actions"]
        assert found.dtype == (torch.int64 if name == "keys" else torch.float32)
        assert torch.allclose(found.double(), torch.tensor(expected[::2]).double(), rtol=1e-6, equal_nan=True)
        with safe_open(file, framework="pt") as content:
            names = content.metadata().get("action_names")
        assert names == ('["keyboard", "mouse"]' if name == "keys" else None)
        before = file.stat().st_mtime_ns
        encode_latents.main([*words, "--splits", "train", "--stride", "2"])
        assert file.stat().st_mtime_ns == before  # nothing has changed


# ------------------------------------------------------------------------------------------------------------
# A run


@kinds
def test_a_run_learns_actions_and_resumes(kind: str, tmp_path: Path) -> None:
    latents = write_latents(tmp_path / "latents", kind)
    more = (
        "--max_train_steps",
        "100",
        "--batch_size",
        "8",
        "--validation_steps",
        "100",
        "--save_steps",
        "50",
    )
    more = (*more, "--logging_steps", "10")
    assert trainer(kind, latents, tmp_path / "run", *more).train()
    losses = [line["loss"] for line in read_log(tmp_path / "run") if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    model = FARTransformer3DModel.from_pretrained(tmp_path / "run/ema")
    if kind == "vector":
        assert model.config.action_dim == 2
        assert model.config.action_mean == LatentVideos(latents / "train").action_statistics()["action_mean"]
    else:
        assert list(model.config.num_actions) == [3, 2]
    (tmp_path / "again").mkdir()
    (tmp_path / "run/checkpoint-0000050").rename(tmp_path / "again/checkpoint-0000050")
    trainer(kind, latents, tmp_path / "again", *more, "--resume_from", "latest").train()
    expected = averaged_weights(tmp_path / "run")
    found = averaged_weights(tmp_path / "again")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(name.startswith("action_embedder") for name in expected)


def test_a_run_from_before_there_were_vectors_resumes(tmp_path: Path) -> None:
    """Its checkpoint says nothing of them."""
    (tmp_path / "latents").mkdir()
    latents = write_integers(tmp_path / "latents")
    options = (*run_options(latents, tmp_path / "run"), "--save_steps", "3", "--validation_steps", "0")
    FARTrainer(*parse(options, (ModelOptions, FAROptions), None)).train()
    known = json.loads((tmp_path / "run/checkpoint-0000003/run.json").read_text())["model"]
    assert known["num_actions"] == 3 and not any(name.startswith("action_") for name in known)


@pytest.mark.parametrize(
    ("kind", "names", "kept"),
    [
        ("groups", ["keyboard=none,walk,jump", "mouse=none,left"], None),
        ("groups", ["keyboard", "mouse"], ["keyboard", "mouse"]),
        ("vector", ["x", "y"], ["x", "y"]),
    ],
)
def test_a_pipeline_with_names(kind: str, names: list[str], kept: Any, tmp_path: Path) -> None:
    size = {"in_channels": 4, "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 16}
    config = {"num_actions": [3, 2]} if kind == "groups" else {"action_dim": 2}
    FARTransformer3DModel(**size, axes_dims_rope=(4, 6, 6), **config).save_pretrained(tmp_path / "far")
    torch.manual_seed(0)
    autoencoder().save_pretrained(tmp_path / "vae")
    parts = ["--transformer", str(tmp_path / "far"), "--autoencoder", str(tmp_path / "vae")]
    make_pipeline.main([*parts, "--output", str(tmp_path / "out"), "--action-names", *names])
    pipeline = FARVideoPipeline.from_pretrained(tmp_path / "out")
    values = [{"keyboard": ["none", "walk", "jump"]}, {"mouse": ["none", "left"]}]
    assert pipeline.config.action_names == (kept or values)
    with pytest.raises(ValueError, match=r"action_names=\['x'\] must be 2 names"):
        make_pipeline.main([*parts, "--output", str(tmp_path / "other"), "--action-names", "x"])


# ------------------------------------------------------------------------------------------------------------
# The whole way


@kinds
def test_from_videos_with_such_actions_to_a_model(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    autoencoder().save_pretrained(tmp_path / "vae")
    rng, data = np.random.default_rng(0), tmp_path / "data"
    for number in range(4):
        write_video(data / f"{number}.mp4", numbered_frames(6))
        content = {"action_keys": rng.integers(0, 3, 6), "action_mouse": rng.integers(0, 2, 6)}
        if kind == "vector":
            content = {"actions": rng.normal(3, 0.1, (6, 2))}
        elif number == 0:
            content = {"action_keys": np.arange(6) % 3, "action_mouse": np.arange(6) % 2}
        np.savez(data / f"{number}.npz", **content)
    output = tmp_path / "model"
    words = [str(data), "--output-dir", str(output), "--autoencoder", str(tmp_path / "vae"), "--size", "tiny"]
    words += ["--resolution", "32", "--max-train-steps", "2", "--batch-size", "2", "--validation-steps", "2"]
    assert train_folder.main([*words, "--num-threads", "1"]) == 0
    pipeline = FARVideoPipeline.from_pretrained(output / "pipeline")
    card = (output / "pipeline/README.md").read_text()
    space = pipeline.transformer.action_space
    if kind == "vector":
        assert space.action_dim == 2 and space.mean == pytest.approx([3, 3], abs=0.1)
        assert "vectors of 2 numbers" in card
    else:
        assert space.sizes == (3, 2) and pipeline.config.action_names == ["keys", "mouse"]
        assert "- actions: keys=0 to 2, mouse=0 to 1" in card and "2 groups: keys, mouse" in card
    made = pipeline(num_frames=3, actions=[[1, 1]] * 3, num_inference_steps=2, output_type="latent").frames
    assert made.isfinite().all()
    assert len(read_video(output / "sample.mp4")) == 6
