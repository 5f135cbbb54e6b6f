"""Damaged copies of a checkpoint: each is refused when it is loaded, with a message that names the damage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from safetensors.torch import load_file, save_file

from diffusers_far import FARTransformer3DModel, FARVideoPipeline
from tests.tiny_models import autoencoder, generator, long_transformer, pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"
DECODER = "decoder.up_blocks.2.1.conv1.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pipeline(long_transformer(num_actions=4)).save_pretrained(tmp_path)
    return tmp_path


Damage = Callable[[Path], Any]


def options(file: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Changes the options in a JSON file of a folder."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return damage


def tensors(part: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """Changes the weights of a part of a folder."""

    def damage(folder: Path) -> None:
        weights = load_file(folder / part / WEIGHTS)
        change(weights)
        save_file(weights, folder / part / WEIGHTS, metadata={"format": "pt"})

    return damage


def last_value(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[name].view(-1)[-1] = value

    return change


def text(file: str, content: str) -> Damage:
    return lambda folder: (folder / file).write_text(content)


TRANSFORMER, VAE, SCHEDULER = "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"
EMPTIED = '{"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.42.1"}'
DAMAGES: dict[str, tuple[Damage, str]] = {
    "a missing decoder tensor": (tensors("vae", lambda w: w.pop(DECODER)), DECODER),
    "an unknown tensor": (tensors("vae", lambda w: w.update(more=torch.ones(1))), "unknown more"),
    "a missing tensor": (
        tensors("transformer", lambda w: w.pop("proj_out.weight")),
        "missing proj_out.weight",
    ),
    "fewer layers": (options(TRANSFORMER, lambda c: c.update(num_layers=1)), "unknown transformer_blocks.1"),
    "more layers": (options(TRANSFORMER, lambda c: c.update(num_layers=3)), "missing transformer_blocks.2"),
    "a lost long_patch_size": (
        options(TRANSFORMER, lambda c: c.pop("long_patch_size")),
        "FARTransformer3DModel has lost options: long_patch_size",
    ),
    "a lost short_window of the transformer": (
        options(TRANSFORMER, lambda c: c.pop("short_window")),
        "FARTransformer3DModel has lost options: short_window",
    ),
    "NaN in the transformer": (
        tensors("transformer", last_value("proj_out.weight", float("nan"))),
        "proj_out.weight has values that are NaN",
    ),
    "infinity in the autoencoder": (
        tensors("vae", last_value(DECODER, float("inf"))),
        f"{DECODER} has values that are NaN or infinite",
    ),
    "scaling_factor 0": (options(VAE, lambda c: c.update(scaling_factor=0)), "scaling_factor=0"),
    "no scaling_factor": (options(VAE, lambda c: c.pop("scaling_factor")), "has no scaling_factor"),
    "an empty scheduler": (text(SCHEDULER, "{}"), "scheduler_config.json is empty"),
    "an emptied scheduler": (text(SCHEDULER, EMPTIED), "scheduler_config.json is empty"),
    "a misspelt option of the scheduler": (
        options(SCHEDULER, lambda c: c.update(shifft=3.0)),
        "shifft; shifft may mean shift",
    ),
    "a misspelt option of the autoencoder": (
        options(VAE, lambda c: c.update(scaling_facto=3.0)),
        "scaling_facto may mean scaling_factor",
    ),
    "a misspelt option of the transformer": (
        options(TRANSFORMER, lambda c: c.update(short_windo=3)),
        "short_windo may mean short_window",
    ),
    "a misspelt option of the pipeline": (
        options("model_index.json", lambda c: c.update(flex_rope_slop=0.2)),
        "flex_rope_slop may mean flex_rope_slope",
    ),
}


@pytest.mark.parametrize("loader", [FARVideoPipeline, DiffusionPipeline])
@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_pipeline_is_refused(folder: Path, damage: Damage, words: str, loader: Any) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=words):
        loader.from_pretrained(folder)


@pytest.mark.parametrize(
    "name", [name for name in DAMAGES if "layers" in name or "transformer" in name or "long_patch" in name]
)
def test_a_damaged_transformer_is_refused(folder: Path, name: str) -> None:
    damage, words = DAMAGES[name]
    damage(folder)
    with pytest.raises(ValueError, match=words):
        FARTransformer3DModel.from_pretrained(folder, subfolder="transformer")


def test_every_option_of_the_transformer_is_needed(folder: Path) -> None:
    """Save those that checkpoints of earlier versions lack, and those that the call gives."""
    names = [name for name in FARTransformer3DModel().config if not name.startswith("_")]
    whole = (folder / TRANSFORMER).read_text()
    for name in names:
        options(TRANSFORMER, lambda config, name=name: config.pop(name))(folder)  # type: ignore[misc]
        if name in ("use_meanflow", "action_dim", "action_mean", "action_std"):
            model = FARTransformer3DModel.from_pretrained(folder, subfolder="transformer")
            assert not model.config[name]
        else:
            with pytest.raises(ValueError, match=f"has lost options: {name}$"):
                FARTransformer3DModel.from_pretrained(folder, subfolder="transformer")
        (folder / TRANSFORMER).write_text(whole)
    options(TRANSFORMER, lambda config: config.pop("short_window"))(folder)
    model = FARTransformer3DModel.from_pretrained(folder, subfolder="transformer", short_window=4)
    assert model.config.short_window == 4


def test_all_variants_of_the_autoencoder_are_checked(folder: Path) -> None:
    pipeline(long_transformer(num_actions=4)).save_pretrained(folder, variant="fp16")
    variant = WEIGHTS.replace("model.", "model.fp16.")
    weights = load_file(folder / "vae" / variant)
    del weights[DECODER]
    save_file(weights, folder / "vae" / variant, metadata={"format": "pt"})
    for loader in (FARVideoPipeline, DiffusionPipeline):
        with pytest.raises(ValueError, match=f"fp16.* missing {DECODER}"):
            loader.from_pretrained(folder, variant="fp16")


def test_parts_from_elsewhere_are_not_checked_against_the_folder(folder: Path, tmp_path: Path) -> None:
    tensors("vae", lambda weights: weights.pop(DECODER))(folder)
    for loader in (FARVideoPipeline, DiffusionPipeline):
        assert loader.from_pretrained(folder, vae=autoencoder()).vae.config.scaling_factor == 0.3


def test_whole_pipelines_load(folder: Path) -> None:
    """Of any dtype and form, with parts of one's own, and with the options of related schedulers."""
    settings = {"num_frames": 2, "output_type": "latent", "actions": [0, 1]}
    expected = FARVideoPipeline.from_pretrained(folder)(generator=generator(), **settings).frames
    model, info = FARTransformer3DModel.from_pretrained(
        folder, subfolder="transformer", output_loading_info=True
    )
    assert not info["missing_keys"]
    own = FARVideoPipeline.from_pretrained(folder, transformer=model, vae=autoencoder())
    assert torch.equal(own(generator=generator(), **settings).frames, expected)
    half = FARVideoPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.vae.dtype == half.transformer.dtype == torch.bfloat16
    half.scheduler = UniPCMultistepScheduler.from_config(
        half.scheduler.config, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    half.save_pretrained(folder / "sharded", variant="fp16", max_shard_size="200KB")
    assert len(list((folder / "sharded").glob("vae/*.safetensors"))) >= 1
    again = FARVideoPipeline.from_pretrained(folder / "sharded", variant="fp16")
    assert again.scheduler.config.use_flow_sigmas
    again.scheduler = FlowMatchEulerDiscreteScheduler.from_config(again.scheduler.config)
    again.save_pretrained(folder / "back")
    assert FARVideoPipeline.from_pretrained(folder / "back").scheduler.config.shift == 1.0
