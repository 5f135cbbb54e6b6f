"""What pipelines are given, and which are refused."""

import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusers_far.evaluation.clips import Clip, open_clips
from diffusers_far.evaluation.prediction import Predictor, generator
from diffusers_far.evaluation.protocols import EvaluateOptions
from diffusers_far.training.clips import AUTOENCODER_KEY
from diffusers_far.training.encode_latents import hash_autoencoder
from diffusers_far.video_files import save_video
from tests.evaluation.guesses import Guess, write_videos
from tests.tiny_models import latents, pipeline, transformer


def options(**changes: Any) -> EvaluateOptions:
    return EvaluateOptions(**{"num_context": 4, "num_frames": 8, "measures": ["psnr"]} | changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_videos(tmp_path_factory.mktemp("data"), 3, actions=np.arange(24) % 4)


class Recorder:
    """Takes everything, and repeats the first frame."""

    def __call__(self, **arguments: Any) -> tuple[torch.Tensor]:
        self.arguments = arguments
        number = len(arguments["generator"])
        return (torch.zeros(number, arguments["num_frames"], 3, 32, 32),)


def predicted(model: Any, data: Path, settled: EvaluateOptions, **more: Any) -> Any:
    videos = open_clips(data, settled)
    predictor = Predictor(model, videos, settled, more)
    real = list(videos.read(videos.clips, settled.frame_options()))
    return predictor, predictor.predict([(clip, 5) for clip in real])


def test_a_pipeline_is_given_what_is_known(data: Path) -> None:
    model = Recorder()
    predictor, frames = predicted(model, data, options(protocol="teco", num_videos=3), flex_rope_slope=0.5)
    assert frames.shape == (3, 4, 3, 32, 32) and predictor.conditions == ["actions"]
    given = model.arguments
    assert given["video"].shape == (3, 4, 3, 32, 32) and given["num_frames"] == 8
    assert given["actions"].tolist() == [[0, 1, 2, 3] * 2] * 3
    assert given["guidance_scale"] == 1.5 and given["flex_rope_slope"] == 0.5 and given["output_type"] == "pt"
    assert "class_labels" not in given and "num_inference_steps" not in given


def test_actions_of_shards_are_given_too(tmp_path: Path) -> None:
    shard = tmp_path / "data" / "validation" / "shard.tar"
    shard.parent.mkdir(parents=True)
    with tarfile.open(shard, "w") as tar:
        for name in ("a", "b"):
            save_video(np.random.default_rng(0).random((8, 32, 32, 3)), tmp_path / f"{name}.mp4", 10)
            (tmp_path / f"{name}.json").write_text(json.dumps({"actions": [0, 1, 2, 3] * 2}))
            for ending in ("mp4", "json"):
                tar.add(tmp_path / f"{name}.{ending}", f"{name}.{ending}")
    model = Recorder()
    predictor, _ = predicted(model, tmp_path / "data", options(protocol="teco", num_videos=2))
    assert predictor.conditions == ["actions"] and predictor.guidance_scale == 1.5
    assert model.arguments["actions"].tolist() == [[0, 1, 2, 3] * 2] * 2


@pytest.mark.parametrize("same", [True, False])
def test_latents_of_another_autoencoder_are_told(
    tmp_path: Path, same: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = pipeline(transformer())
    encoder = hash_autoencoder(pipe.vae) if same else "0" * 64
    file = tmp_path / "validation" / "0.safetensors"
    file.parent.mkdir()
    save_file({"latents": latents(1, 10)[0].half()}, file, {AUTOENCODER_KEY: encoder})
    settled = options(num_videos=1)
    Predictor(pipe, open_clips(tmp_path, settled), settled)
    assert ("encoded by other weights" in caplog.text) is not same


def test_without_context_it_is_told_the_size(tmp_path: Path) -> None:
    write_videos(tmp_path / "a", 2, split="train/left")
    write_videos(tmp_path / "a", 2, split="train/right")
    model = Recorder()
    settled = EvaluateOptions(protocol="latte", num_frames=10, num_videos=4, num_inference_steps=7)
    predictor, _ = predicted(model, tmp_path / "a", settled)
    given = model.arguments
    assert "video" not in given and (given["height"], given["width"], given["batch_size"]) == (32, 32, 4)
    assert given["class_labels"].tolist() == [0, 0, 1, 1] and predictor.conditions == ["class labels"]
    assert given["guidance_scale"] == 2.0 and given["num_inference_steps"] == 7


def test_a_model_without_conditions_gets_none(data: Path) -> None:
    settled = options(protocol="teco", num_videos=3)
    plain = Predictor(pipeline(transformer()), open_clips(data, settled), settled)
    assert plain.conditions == [] and plain.guidance_scale == 1.0
    settled = options(protocol="teco", num_videos=3, ignore_actions=True)
    ignoring = Predictor(pipeline(), open_clips(data, settled), settled)
    assert ignoring.conditions == [] and ignoring.guidance_scale == 1.0


def test_noise_is_that_of_the_clip_and_the_seed() -> None:
    draws = [torch.rand(2, generator=generator(*of)) for of in [(Clip("a", 0), 1), (Clip("a", 0), 1)]]
    assert torch.equal(*draws)
    for other in ((Clip("a", 1), 1), (Clip("b", 0), 1), (Clip("a", 0), 2)):
        assert not torch.equal(draws[0], torch.rand(2, generator=generator(*other)))


def test_identity_is_that_of_weights_and_arguments(data: Path) -> None:
    settled = options()
    videos = open_clips(data, settled)

    hashes = set()
    for seed, ratio in ((0, 1.0), (0, 1.0), (1, 1.0), (0, 2.0)):
        model = pipeline(transformer(seed, num_actions=4))
        hashes.add(Predictor(model, videos, settled, {"rope_interpolation": ratio}).identity())
    assert len(hashes) == 3


def test_parts_of_other_libraries_have_an_identity(data: Path) -> None:
    class Composed(Guess):
        def __init__(self, width: int, weight: float) -> None:
            super().__init__()
            encoder = torch.nn.Linear(2, 2)
            encoder.weight.data.fill_(weight)
            encoder.bias.data.zero_()
            encoder.config = SimpleNamespace(to_dict=lambda: {"width": width})
            self.components = {"encoder": encoder, "tokenizer": object()}

    settled = options()
    videos = open_clips(data, settled)
    hashes = [Predictor(Composed(*of), videos, settled).identity() for of in ((1, 0), (1, 0), (2, 0), (1, 1))]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


class Brief:
    def __call__(self, video: Any, num_frames: int) -> None: ...


@pytest.mark.parametrize(
    ("make", "changes", "call", "message"),
    [
        (Brief, {}, {}, "a call of Brief takes no generator, output_type"),
        (Guess, {}, {"context_schedule": None}, "call_arguments: a call of Guess takes no context_schedule"),
        (Guess, {}, {"video": None}, "call_arguments: video is what the evaluation gives itself"),
        (Guess, {"guidance_scale": 2}, {}, "guidance_scale=2: a call of Guess takes none; pass 1"),
        (Guess, {"num_inference_steps": 2}, {}, "num_inference_steps: a call of Guess takes none"),
        (
            Guess,
            {"num_context": 0, "num_frames": 12, "measures": ["fvd"]},
            {},
            "takes no height, width, batch_size",
        ),
        (lambda: pipeline(transformer(num_actions=2)), {}, {}, "000.npz.* 3"),
        (pipeline, {"resolution": "30"}, {}, "resolution=30: .*multiple"),
    ],
)
def test_what_cannot_be_called_is_refused_before(
    make: Any, changes: Any, call: Any, message: str, data: Path
) -> None:
    settled = options(**changes)
    with pytest.raises(ValueError, match=message):
        Predictor(make(), open_clips(data, settled), settled, call)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(3, 7, 3, 32, 32), r"returned frames \(3, 7, 3, 32, 32\); it should be \(3, 8, 3\)"),
        (torch.full((3, 8, 3, 32, 32), torch.nan), "predicted NaN or infinite pixels"),
        ([1], "returned frames list"),
    ],
)
def test_results_that_are_no_videos_are_refused(frames: Any, message: str, data: Path) -> None:
    class Broken:
        def __call__(self, video: Any, num_frames: Any, generator: Any, output_type: Any) -> Any:
            return SimpleNamespace(frames=frames)

    with pytest.raises(ValueError, match=message):
        predicted(Broken(), data, options())
