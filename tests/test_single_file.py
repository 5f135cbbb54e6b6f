"""Reading published files, and `FARTransformer3DModel.from_single_file`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_far import FARTransformer3DModel, presets, single_file
from diffusers_far.key_map import UNUSED, model_name
from diffusers_far.presets import convert_published_config
from diffusers_far.single_file import read_checkpoint


def load(file: Path) -> dict[str, Tensor]:
    return torch.load(file, weights_only=True)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert different == []


@pytest.fixture
def config(golden_dir: Path) -> dict[str, Any]:
    """The authors' configuration of the golden Long model."""
    return json.loads((golden_dir / "long_flexrope.json").read_text())["config"]


@pytest.fixture
def file(golden_dir: Path) -> Path:
    """A Long model's file, as published."""
    return golden_dir / "long_flexrope.pth"


def assert_loaded(model: FARTransformer3DModel, file: Path, dtype: torch.dtype = torch.float32) -> None:
    expected = {
        model_name(name): tensor.to(dtype) for name, tensor in load(file).items() if name not in UNUSED
    }
    assert_equal(model.state_dict(), expected)
    assert not model.training
    assert model.config.short_window == 4


def test_a_model_loads_with_the_arguments_of_the_model(file: Path, config: dict[str, Any]) -> None:
    arguments, _ = convert_published_config(config)
    assert_loaded(FARTransformer3DModel.from_single_file(file, config=arguments), file)
    assert_loaded(FARTransformer3DModel.from_single_file(str(file), config=arguments), file)
    assert_loaded(FARTransformer3DModel.from_single_file(load(file), config=arguments), file)


def test_a_model_loads_with_the_authors_configuration(
    file: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    assert_loaded(FARTransformer3DModel.from_single_file(file, original_config=config), file)
    (tmp_path / "FAR.json").write_text(json.dumps(config))
    assert_loaded(FARTransformer3DModel.from_single_file(file, original_config=tmp_path / "FAR.json"), file)


@pytest.mark.parametrize("subfolder", [None, "transformer", "other"])
def test_a_model_loads_with_the_configuration_in_a_folder(
    subfolder: str | None, file: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    arguments, _ = convert_published_config(config)
    model = FARTransformer3DModel(**arguments)
    model.save_config(tmp_path / (subfolder or "."))
    folder = str(tmp_path)
    explicit = subfolder if subfolder == "other" else None
    assert_loaded(FARTransformer3DModel.from_single_file(file, config=folder, subfolder=explicit), file)


def test_a_model_loads_by_the_name_of_a_preset_or_of_its_file(
    file: Path, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Weights of a published size would be large: the golden model stands in for that of the preset.
    arguments, _ = convert_published_config(config)
    monkeypatch.setattr(presets.FARPreset, "transformer", property(lambda self: arguments))
    model = FARTransformer3DModel.from_single_file(file, config="far-b-long-dmlab")
    assert_loaded(model, file)
    renamed = tmp_path / "FAR_B_Long_DMLab_Action64-c09441dc.pth"
    shutil.copyfile(file, renamed)
    assert_loaded(FARTransformer3DModel.from_single_file(renamed), file)


def test_what_save_pretrained_wrote_loads_too(file: Path, config: dict[str, Any], tmp_path: Path) -> None:
    FARTransformer3DModel.from_single_file(file, original_config=config).save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    assert_loaded(FARTransformer3DModel.from_single_file(weights, config=str(tmp_path)), file)


def test_a_model_loads_in_the_dtype_asked_for(file: Path, config: dict[str, Any]) -> None:
    load_model = FARTransformer3DModel.from_single_file
    assert_loaded(load_model(file, original_config=config, dtype=torch.bfloat16), file, torch.bfloat16)
    assert_loaded(load_model(file, original_config=config, torch_dtype=torch.float16), file, torch.float16)
    assert load_model(file, original_config=config, device="cpu").device.type == "cpu"


def test_a_loaded_model_can_be_trained_without_touching_the_file(
    file: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    copy = tmp_path / "FAR.pth"
    shutil.copyfile(file, copy)
    model = FARTransformer3DModel.from_single_file(copy, original_config=config)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert copy.read_bytes() == file.read_bytes()


def test_a_link_is_left_to_diffusers(
    file: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(link: str, **kwargs: Any) -> dict[str, Tensor]:
        asked.update(link=link, **kwargs)
        return load(file)

    monkeypatch.setattr(single_file, "load_single_file_checkpoint", download)
    link = "https://huggingface.co/guyuchao/FAR_Models/blob/main/long_video_prediction/FAR.pth"
    model = FARTransformer3DModel.from_single_file(link, original_config=config, revision="main")
    assert_loaded(model, file)
    assert asked == {"link": link, "revision": "main"}


def test_wrong_arguments_are_named(file: Path, config: dict[str, Any]) -> None:
    load_model = FARTransformer3DModel.from_single_file
    with pytest.raises(
        ValueError, match=r"long_flexrope\.pth is not the name of a published file: give config"
    ):
        load_model(file)
    with pytest.raises(ValueError, match="config or original_config, not both"):
        load_model(file, config="far-b-bair-64", original_config=config)
    with pytest.raises(TypeError, match="from_single_file does not take quantization_config"):
        load_model(file, original_config=config, quantization_config=None)
    with pytest.raises(ValueError, match=r"x_embedder\.weight has shape \[32, 4\], expected \[768, 32\]"):
        load_model(file, config="far-b-long-dmlab")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_model(file.with_name("absent.pth"), original_config=config)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: {"ema": tensors, "step": 3},
        lambda tensors: {"params": {name: tensor + 1 for name, tensor in tensors.items()}, "ema": tensors},
        lambda tensors: {"state_dict": tensors, "optimizer": {"lr": 1e-4}},
        lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
        lambda tensors: {"model": {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()}},
    ],
    ids=["ema", "ema before params", "state_dict", "module.", "model, module. and compiled"],
)
def test_one_wrapper_around_the_weights_is_taken_off(
    wrap: Callable[[dict[str, Tensor]], dict[str, Any]], golden_dir: Path, tmp_path: Path
) -> None:
    weights = load(golden_dir / "dcae.pth")
    torch.save(wrap(weights), tmp_path / "wrapped.pth")
    assert_equal(read_checkpoint(tmp_path / "wrapped.pth"), weights)


def test_only_one_wrapper_is_taken_off(golden_dir: Path, tmp_path: Path) -> None:
    torch.save({"ema": {"model": load(golden_dir / "dcae.pth")}}, tmp_path / "wrapped.pth")
    with pytest.raises(ValueError, match=r"wrapped\.pth: model is a .*[dD]ict, not a tensor"):
        read_checkpoint(tmp_path / "wrapped.pth")
