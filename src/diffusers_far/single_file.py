"""Loading the published single-file checkpoints: reading, checking against the model, `from_single_file`."""

import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.loaders.single_file_utils import load_single_file_checkpoint
from torch import Tensor

from .checked_loading import check_shapes, check_weights
from .key_map import convert_published_state_dict, published_name, unused_shapes
from .presets import PRESETS, convert_published_config, preset, preset_of_file

Model = TypeVar("Model", bound=ModelMixin)

# Where training scripts put the weights in what they save, averaged ones first; what wrapped modules prepend.
WRAPPERS = ("ema", "params_ema", "params", "state_dict", "model", "module")
PREFIXES = ("module.", "_orig_mod.")

HUB_ARGUMENTS = {
    "cache_dir",
    "config_revision",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "token",
}


def read_checkpoint(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or PyTorch file, mapped from disk, without a wrapper around them."""
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # any of a dozen types, with advice that does not help here
        raise ValueError(f"{path}: cut short, or not a checkpoint of tensors only") from error
    try:
        return unwrap(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_json_object(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file."""
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a JSON object")
    return content


def unwrap(content: Any) -> dict[str, Tensor]:
    """The mapping of names to tensors in what a checkpoint holds: itself, or one level down."""
    if not isinstance(content, Mapping):
        raise ValueError(f"holds a {type(content).__name__}, not tensors by name")
    wrapper = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
    tensors = dict(content if wrapper is None else content[wrapper])
    if not tensors:
        raise ValueError("holds no tensors")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}, not a tensor")
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def load_checked(
    model_class: type[Model],
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    source: str,
    dtype: torch.dtype | None = None,
    label: Callable[[str], str] = str,
) -> Model:
    """A model in evaluation mode with these tensors; an unknown, missing or misshapen one is an error.

    Args:
        config: the constructor's arguments.
        state_dict: all tensors, under the model's names.
        source: where they are from, for messages.
        dtype: what to convert them to; None keeps each as it is.
        label: turns a name into the one that messages show.
    """
    try:
        with init_empty_weights():
            model: Model = model_class.from_config(dict(config))
    except Exception as error:  # what a wrong argument raises depends on where it is first used
        raise ValueError(f"no {model_class.__name__} can be built from the configuration: {error}") from error
    check_shapes(
        {label(name): tuple(tensor.shape) for name, tensor in state_dict.items()},
        {label(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        source,
    )
    keep_in_fp32 = set(model_class._keep_in_fp32_modules or ())
    converted = {
        name: tensor
        if dtype is None or not tensor.is_floating_point() or keep_in_fp32 & set(name.split("."))
        else tensor.to(dtype)
        for name, tensor in state_dict.items()
    }
    model.load_state_dict(converted, strict=True, assign=True)
    check_weights(model, source)
    return model.eval()


def load_published_transformer(
    model_class: type[Model],
    config: Mapping[str, Any],
    checkpoint: Mapping[str, Tensor],
    source: str,
    dtype: torch.dtype | None = None,
) -> Model:
    """The transformer of a published checkpoint; see [`load_checked`]."""
    state_dict = convert_published_state_dict(checkpoint, config)
    model = load_checked(model_class, config, state_dict, source, dtype, label=published_name)
    unused = {name: shape for name, shape in unused_shapes(config).items() if name in checkpoint}
    check_shapes({name: tuple(checkpoint[name].shape) for name in unused}, unused, source)
    return model


def from_single_file(
    model_class: type[Model],
    /,
    pretrained_model_link_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    original_config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    subfolder: str | None = None,
    dtype: torch.dtype | None = None,
    torch_dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    **hub_kwargs: Any,
) -> Model:
    """Load a published checkpoint (`.pth` or `.safetensors`): `FARTransformer3DModel.from_single_file`.

    Diffusers' own takes a configuration of Stable Diffusion where none is given, and leaves missing tensors
    without values.

    Args:
        pretrained_model_link_or_path_or_dict: the file, a link to it on the Hub, or its tensors by name.
        config: a preset's name, the model's arguments, or the folder or Hub repository of a pipeline or
            transformer that is configured alike. A file that still has its published name needs none.
        original_config: instead of `config`, the authors' keys or a JSON file of them.
        subfolder: where in the folder or repository `config.json` is; by default `transformer`, if
            it is not in the folder itself.
        dtype, torch_dtype: what to convert the weights to; by default they stay as they are.
        device: where to put the model.
        hub_kwargs: for downloads: `token`, `cache_dir`, `force_download`, `local_files_only`, `proxies`,
            `revision` of the file and `config_revision` of the configuration.
    """
    if unknown := sorted(hub_kwargs.keys() - HUB_ARGUMENTS):
        raise TypeError(f"from_single_file does not take {', '.join(unknown)}")
    config_revision = hub_kwargs.pop("config_revision", None)
    link = pretrained_model_link_or_path_or_dict
    if isinstance(link, Mapping):
        checkpoint, source = unwrap(link), "the state dict"
    elif str(link).startswith(("https://", "http://")):
        checkpoint, source = unwrap(load_single_file_checkpoint(str(link), **hub_kwargs)), str(link)
    else:
        checkpoint, source = read_checkpoint(link), str(link)
    if config is not None and original_config is not None:
        raise ValueError("give config or original_config, not both")
    if original_config is not None:
        if not isinstance(original_config, Mapping):
            original_config = read_json_object(original_config)
        arguments: Mapping[str, Any] = convert_published_config(original_config)[0]
    elif config is not None:
        hub_kwargs["revision"] = config_revision
        arguments = _resolve_config(model_class, config, subfolder, hub_kwargs)
    elif (published := preset_of_file(source)) is not None:
        arguments = published.transformer
    else:
        raise ValueError(
            f"{source} is not the name of a published file: give config, for example a preset's name"
        )
    model = load_published_transformer(model_class, arguments, checkpoint, source, dtype or torch_dtype)
    return model if device is None else model.to(device)


def _resolve_config(
    model_class: type[Model],
    config: str | os.PathLike[str] | Mapping[str, Any],
    subfolder: str | None,
    hub_kwargs: dict[str, Any],
) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    if config in PRESETS:
        return preset(str(config)).transformer
    if subfolder is None and not (Path(config) / "config.json").is_file():
        subfolder = "transformer"
    return model_class.load_config(config, subfolder=subfolder, **hub_kwargs)
