"""The table of names against the list of all published tensors, and both directions on the golden weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderDC
from torch import Tensor

from diffusers_far import FARTransformer3DModel
from diffusers_far.key_map import (
    UNUSED,
    convert_published_state_dict,
    model_name,
    published_name,
    published_state_dict,
    unused_shapes,
)
from diffusers_far.presets import PRESETS, autoencoder_config, convert_published_config, preset
from diffusers_far.single_file import load_published_transformer

TRANSFORMERS = (
    "forward_base_action",
    "forward_base_flexrope",
    "forward_base_label",
    "forward_base_uncond",
    "forward_long_action",
    "forward_long_flexrope",
    "generate_label_cfg",
    "generate_uncond",
    "predict_action_cfg",
    "predict_flexrope",
    "predict_uncond",
    "long_from_scratch",
    "long_predict_action_cfg",
    "long_predict_past_window",
    "long_flexrope",
)


def load(file: Path) -> dict[str, Tensor]:
    return torch.load(file, weights_only=True)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert different == []


def shapes(state_dict: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in state_dict.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_every_published_tensor_is_used_or_left_out_for_a_reason(name: str, checkpoints_dir: Path) -> None:
    published = json.loads((checkpoints_dir / "published.json").read_text())
    theirs = next(model for model in published if model["file"] == preset(name).transformer_file)
    tensors = json.loads((checkpoints_dir / f"tensors_{theirs['tensors']}.json").read_text())
    config = preset(name).transformer
    with init_empty_weights():
        model = FARTransformer3DModel(**config)

    assert convert_published_state_dict(tensors, config) == shapes(model.state_dict())
    left_out = {name: shape for name, shape in tensors.items() if name in UNUSED}
    assert left_out == {name: list(shape) for name, shape in unused_shapes(config).items()}
    assert all(UNUSED[name] for name in left_out)
    assert all(published_name(model_name(name)) == name for name in tensors)


@pytest.mark.parametrize("compression", [8, 16, 32])
def test_every_published_tensor_of_an_autoencoder_is_used(compression: Any, checkpoints_dir: Path) -> None:
    tensors = json.loads((checkpoints_dir / f"tensors_dcae_{compression}x_c32.json").read_text())
    with init_empty_weights():
        model = AutoencoderDC(**autoencoder_config(compression))
    assert shapes(model.state_dict()) == tensors


def test_all_lists_of_published_tensors_are_tested(checkpoints_dir: Path) -> None:
    lists = {path.stem.removeprefix("tensors_") for path in checkpoints_dir.glob("tensors_*.json")}
    published = json.loads((checkpoints_dir / "published.json").read_text())
    assert lists == {model["tensors"] for model in published} | {
        model["autoencoder_config"] for model in published
    }


@pytest.mark.parametrize("golden", TRANSFORMERS)
def test_the_weights_survive_both_directions(golden: str, golden_dir: Path) -> None:
    published = load(golden_dir / f"{golden}.pth")
    config, _ = convert_published_config(json.loads((golden_dir / f"{golden}.json").read_text())["config"])
    model = load_published_transformer(FARTransformer3DModel, config, published, golden)
    assert not model.training
    assert not any(parameter.is_meta for parameter in model.parameters())

    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, published[published_name(name)]), name
    expected = published | {name: torch.zeros_like(published[name]) for name in UNUSED if name in published}
    assert_equal(published_state_dict(model.state_dict(), model.config), expected)


def test_all_goldens_with_weights_are_tested(golden_dir: Path) -> None:
    assert sorted(path.stem for path in golden_dir.glob("*.pth")) == sorted([*TRANSFORMERS, "dcae"])
