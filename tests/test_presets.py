"""The presets against the list of published models, and the translation of the authors' configurations."""

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate import init_empty_weights
from diffusers import AutoencoderDC

from diffusers_far import FARTransformer3DModel
from diffusers_far.key_map import unused_shapes
from diffusers_far.presets import (
    PRESETS,
    FARPreset,
    autoencoder_config,
    convert_published_config,
    preset,
    preset_of_file,
    transformer_config,
)

PUBLISHED_CONFIG = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": [4, 6, 6],
}


@pytest.fixture(scope="session")
def published(checkpoints_dir: Path) -> dict[str, dict[str, Any]]:
    """The ten published models by file name."""
    models = json.loads((checkpoints_dir / "published.json").read_text())
    return {model["file"]: model for model in models}


def test_every_published_model_has_one_preset(published: dict[str, dict[str, Any]]) -> None:
    assert sorted(preset(name).transformer_file for name in PRESETS) == sorted(published)
    assert len(set(PRESETS)) == len(published) == 10


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_published_model(
    name: str, published: dict[str, dict[str, Any]], checkpoints_dir: Path
) -> None:
    model = preset(name)
    theirs = published[model.transformer_file]
    assert model.autoencoder_file == theirs["autoencoder_file"]
    assert model.resolution == theirs["resolution"]
    assert convert_published_config(theirs["transformer_config"]) == (model.transformer, 0.0)

    config = json.loads((checkpoints_dir / f"{theirs['autoencoder_config']}.json").read_text())
    ours = json.loads(json.dumps(model.autoencoder))  # tuples become lists
    assert ours == {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds_a_model_of_the_published_size(
    name: str, published: dict[str, dict[str, Any]]
) -> None:
    model = preset(name)
    with init_empty_weights():
        transformer = FARTransformer3DModel(**model.transformer)
    features_and_dim = unused_shapes(model.transformer).get("context_proj_out.weight", (0, 0))
    unused = features_and_dim[0] * features_and_dim[1] + features_and_dim[0]
    num_parameters = sum(parameter.numel() for parameter in transformer.parameters())
    assert num_parameters + unused == published[model.transformer_file]["parameters"]


@pytest.mark.parametrize("compression", [8, 16, 32])
def test_an_autoencoder_compresses_as_it_says(compression: Any) -> None:
    with init_empty_weights():
        autoencoder = AutoencoderDC(**autoencoder_config(compression))
    assert autoencoder.spatial_compression_ratio == compression


@pytest.mark.parametrize("name", PRESETS)
def test_sampling_is_the_evaluation_of_the_paper(name: str) -> None:
    model = preset(name)
    expected = {"ucf101-64": (16, 4), "bair": (30, 2), "long": (300, 144)}
    num_frames, num_context_frames = next(
        (frames for part, frames in expected.items() if part in name), (16, 0)
    )
    assert model.num_context_frames == num_context_frames
    guidance_scale = 1.5 if model.num_actions else 2.0 if model.num_classes else 1.0
    assert model.sampling == {
        "height": model.resolution,
        "width": model.resolution,
        "num_frames": num_frames,
        "num_inference_steps": 50,
        "guidance_scale": guidance_scale,
    }


def test_an_unknown_preset_is_an_error_that_lists_them() -> None:
    with pytest.raises(ValueError, match="unknown preset 'far-s'; there are far-l-ucf101-uncond-128, "):
        preset("far-s")


def test_a_preset_is_found_by_its_file() -> None:
    found = preset_of_file(Path("anywhere") / "FAR_B_BAIR_Uncond64-1983191b.pth")
    assert isinstance(found, FARPreset)
    assert found.name == "far-b-bair-64"
    assert preset_of_file("FAR.pth") is None


def test_published_configurations_become_ours(golden_dir: Path) -> None:
    long, slope = convert_published_config(
        json.loads((golden_dir / "long_flexrope.json").read_text())["config"]
    )
    assert slope == 0.25
    assert (long["long_patch_size"], long["short_window"], long["num_actions"]) == (4, 4, 4)
    assert long["num_classes"] is None
    base, slope = convert_published_config(
        json.loads((golden_dir / "generate_label_cfg.json").read_text())["config"]
    )
    assert slope == 0.0
    assert (base["long_patch_size"], base["num_classes"], base["num_actions"]) == (None, 5, None)


def test_a_bare_published_configuration_has_the_authors_defaults() -> None:
    config, slope = convert_published_config(PUBLISHED_CONFIG)
    assert slope == 0.0
    assert config["out_channels"] is None
    assert config["short_window"] == transformer_config("B")["short_window"] == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layer": 2}, "unknown key num_layer"),
        ({"in_channels": None}, "in_channels must be a positive integer, found None"),
        ({"num_layers": 0}, "num_layers must be a positive integer, found 0"),
        ({"patch_size": "1"}, "patch_size must be a positive integer, found '1'"),
        ({"attention_head_dim": True}, "attention_head_dim must be a positive integer, found True"),
        ({"axes_dims_rope": [4, 12]}, "axes_dims_rope must be three integers"),
        ({"slope_scale": "steep"}, "slope_scale must be a number, found 'steep'"),
        (
            {"condition_cfg": {"type": "text"}},
            "condition_cfg must have the type label or action, found 'text'",
        ),
        ({"condition_cfg": {"type": "label"}}, "num_classes must be a positive integer, found None"),
        ({"condition_cfg": "label"}, "condition_cfg must be an object, found 'label'"),
    ],
)
def test_a_wrong_published_configuration_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_published_config(PUBLISHED_CONFIG | change)


def test_a_missing_key_is_named() -> None:
    config = {key: value for key, value in PUBLISHED_CONFIG.items() if key != "num_layers"}
    with pytest.raises(ValueError, match="missing key num_layers"):
        convert_published_config(config)
