"""The published system's numbers, through the real path: conversion command, `from_pretrained`, pipeline.

Each case of `golden/index.json` holds a small random model of the authors' code with its inputs and outputs.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import Tensor

from conversion.convert_far import convert
from diffusers_far import FARVideoPipeline
from diffusers_far.flow_matching import add_noise, frame_loss, velocity_target
from diffusers_far.key_map import model_name
from tests.python_process import run_python
from tests.tiny_models import TOLERANCE, max_error, relative_error

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = REPOSITORY.parent / "shared" / "reference" / "golden"
if not (GOLDEN / "index.json").is_file():
    pytest.skip("no goldens: ../shared/reference/golden is absent", allow_module_level=True)

CASES = sorted(json.loads((GOLDEN / "index.json").read_text()))
FORWARD = [case for case in CASES if case.startswith("forward_")]
SAMPLING = [case for case in CASES if case.startswith(("generate_", "predict_", "long_"))]


@cache
def description(case: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{case}.json").read_text())


@cache
def tensors(case: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{case}.safetensors")


def conversion_arguments(case: str, folder: Path) -> list[str]:
    config = folder / f"{case}.json"
    config.write_text(json.dumps(description(case)["config"]))
    return [
        str(GOLDEN / description(case)["weights"]),
        *("--autoencoder", str(GOLDEN / "dcae.pth")),
        *("--autoencoder-config", str(GOLDEN / "dcae_config.json")),
        *("--config", str(config)),
        *("--output", str(folder / case)),
    ]


def load(folder: Path) -> FARVideoPipeline:
    pipe = FARVideoPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a converted case; each is converted once."""
    folder = tmp_path_factory.mktemp("converted")

    @cache
    def path(case: str) -> Path:
        convert(conversion_arguments(case, folder), standalone_mode=False)
        return folder / case

    return path


def test_every_case_is_checked() -> None:
    assert set(CASES) == {*FORWARD, *SAMPLING, "dcae_roundtrip", "schedule"}
    assert len(FORWARD) >= 6 and len(SAMPLING) >= 9


def condition(case: str) -> dict[str, Tensor | None]:
    return {"class_labels": tensors(case).get("label"), "actions": tensors(case).get("action")}


@pytest.mark.parametrize("case", FORWARD)
def test_forward(case: str, converted: Any) -> None:
    pipe, golden = load(converted(case)), tensors(case)
    slope = pipe.config.flex_rope_slope
    assert slope == description(case)["config"]["slope_scale"]
    with torch.no_grad():
        sample = pipe.transformer(
            golden["hidden_states"], golden["timestep"], **condition(case), flex_rope_slope=slope
        ).sample
    assert relative_error(sample, golden["all_frames"][:, -sample.shape[1] :]) <= TOLERANCE
    assert relative_error(sample[:, -1:], golden["last_frame_eval"]) <= TOLERANCE


@pytest.mark.parametrize("case", FORWARD)
def test_loss_and_gradients(case: str, converted: Any) -> None:
    pipe, golden = load(converted(case)), tensors(case)
    model, clean = pipe.transformer.train(), golden["clean_mask"]
    # The noisy input of the golden is what our noising gives for its noise levels, and clean frames.
    sigma = golden["train_timestep"].clamp(min=0) / 1000
    noisy = add_noise(golden["latents"], golden["noise"], sigma)
    assert relative_error(noisy, golden["train_noisy"]) <= TOLERANCE

    sample = model(
        golden["train_noisy"],
        golden["train_timestep"],
        **condition(case),
        flex_rope_slope=pipe.config.flex_rope_slope,
    ).sample
    window = sample.shape[1]
    target = velocity_target(golden["latents"], golden["noise"])
    loss = frame_loss(sample, target[:, -window:], clean[:, -window:])
    assert relative_error(loss.reshape(1), golden["loss"]) <= TOLERANCE

    loss.backward()
    gradients = {
        name.removeprefix("grad."): value for name, value in golden.items() if name.startswith("grad.")
    }
    assert gradients
    parameters = dict(model.named_parameters())
    for name, expected in gradients.items():
        gradient = parameters[model_name(name)].grad
        assert gradient is not None and gradient.abs().max() > 0, name
        assert relative_error(gradient, expected) <= TOLERANCE, name


def sample_videos(pipe: FARVideoPipeline, case: str, **changes: Any) -> tuple[Tensor, Tensor]:
    """Latents and video of a sampling case."""
    golden, about = tensors(case), description(case)
    arguments = {
        "video": golden.get("context_video_01"),
        "num_frames": about["num_context_frames"] + about["num_new_frames"],
        **condition(case),
        "guidance_scale": about["guidance_scale"],
        "num_inference_steps": about["num_inference_steps"],
        "latents": golden["noise"],
        "height": golden["video_01"].shape[-2],
        "width": golden["video_01"].shape[-1],
        "batch_size": golden["noise"].shape[0],
        "output_type": "latent",
    }
    sampled = pipe(**arguments | changes).frames
    return sampled, pipe.frames_so_far("pt")


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("case", SAMPLING)
def test_sampling(case: str, use_cache: bool, converted: Any) -> None:
    sampled, video = sample_videos(load(converted(case)), case, use_cache=use_cache)
    assert relative_error(sampled, tensors(case)["latents"]) <= TOLERANCE
    assert relative_error(video, tensors(case)["video_01"]) <= TOLERANCE


def test_the_default_slope_of_a_converted_flexrope_model_matters(converted: Any) -> None:
    sampled, _ = sample_videos(load(converted("predict_flexrope")), "predict_flexrope", flex_rope_slope=0.0)
    assert max_error(sampled, tensors("predict_flexrope")["latents"]) > 1e-3


def test_the_command_line(tmp_path: Path) -> None:
    case = "long_flexrope"
    script = REPOSITORY / "conversion" / "convert_far.py"
    run = run_python([str(script), *conversion_arguments(case, tmp_path)], cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    sampled, _ = sample_videos(load(tmp_path / case), case)
    assert relative_error(sampled, tensors(case)["latents"]) <= TOLERANCE


def test_autoencoder(converted: Any) -> None:
    pipe, golden = load(converted("predict_uncond")), tensors("dcae_roundtrip")
    with torch.no_grad():
        latent = pipe.vae.encode(golden["image_01"] * 2 - 1).latent
        reconstruction = pipe.vae.decode(golden["latent"]).sample
    assert relative_error(latent, golden["latent"]) <= TOLERANCE
    assert relative_error(reconstruction, golden["reconstruction_pm1"]) <= TOLERANCE


def test_encoding_frame_by_frame(converted: Any) -> None:
    pipe, golden = load(converted("predict_uncond")), tensors("dcae_roundtrip")
    with torch.no_grad():
        encoded = pipe.encode_video(golden["image_01"])[0]  # one video of three frames
        decoded = pipe.decode_latents(encoded)
    assert relative_error(encoded, golden["latent"] * pipe.vae.config.scaling_factor) <= TOLERANCE
    assert relative_error(decoded, golden["reconstruction_pm1"]) <= TOLERANCE


@pytest.mark.parametrize("num_steps", [1, 4, 5, 25, 50])
def test_schedule(num_steps: int, converted: Any) -> None:
    golden = tensors("schedule")
    pipe = load(converted("predict_uncond"))
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    pipe.scheduler.set_timesteps(num_steps)
    assert relative_error(pipe.scheduler.timesteps, golden[f"timesteps_{num_steps}"]) <= TOLERANCE
    assert relative_error(pipe.scheduler.sigmas, golden[f"sigmas_{num_steps}"]) <= TOLERANCE
