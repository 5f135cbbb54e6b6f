"""What a loaded checkpoint must be like: whole, finite, and with no option that nobody knows."""

import difflib
import inspect
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin, UniPCMultistepScheduler
from safetensors import safe_open
from torch import nn

_WEIGHTS = re.compile(r"diffusion_pytorch_model(\.(?P<variant>.+?))?(-\d+-of-\d+)?\.safetensors")


def check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Raise with the names (and shapes) of what differs, if anything does."""
    problems = [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems += [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    problems += [f"unknown {name} {list(shape)}" for name, shape in found.items() if name not in expected]
    _refuse(problems, source)


def check_names(missing: Iterable[str], unknown: Iterable[str], source: str) -> None:
    """Raise with the names of tensors that a file lacks, or has too many, if there are any."""
    problems = [f"missing {name}" for name in sorted(missing)]
    _refuse([*problems, *(f"unknown {name}" for name in sorted(unknown))], source)


def _refuse(problems: list[str], source: str) -> None:
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{source} does not fit the configuration: {'; '.join(problems[:5])}{more}")


def check_weights(model: nn.Module, source: str) -> None:
    """Raise with the name of a weight that is NaN or infinite, if there is one."""
    plain = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for name, tensor in model.state_dict().items():
        if tensor.dtype in plain and not tensor.is_meta and not torch.isfinite(tensor).all():
            raise ValueError(f"{source}: {name} has values that are NaN or infinite")


def check_options(classes: Iterable[type], config: Mapping[str, Any], source: str) -> None:
    """Raise with the names of options that none of the classes has, if there are any."""
    known = _options(classes)
    unknown = [
        name for name in config if not name.startswith("_") and name not in {*known, "quantization_config"}
    ]
    if unknown:
        meant = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; {unknown[0]} may mean {meant[0]}" if meant else ""
        raise ValueError(f"{source} has options that nobody knows: {', '.join(unknown)}{hint}")


def check_complete(cls: type, config: Iterable[str], optional: Iterable[str], source: str) -> None:
    """Raise with the names of options of a class that its saved configuration lacks, if there are any."""
    missing = _options([cls]) - {*config, *optional}
    if missing:
        raise ValueError(f"{source} has lost options: {', '.join(sorted(missing))}")


def _options(classes: Iterable[type]) -> set[str]:
    names = {name for each in classes for name in inspect.signature(each.__init__).parameters}  # type: ignore[misc]
    return names - {"self"}


def check_scaling_factor(factor: Any) -> None:
    """Raise unless an autoencoder's `scaling_factor` can normalise latents."""
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise ValueError(f"scaling_factor={factor!r} of the autoencoder must be a positive number")


def check_autoencoder(vae: nn.Module, folder: Path) -> None:
    """Raise unless a folder has just the tensors and options of an autoencoder, in each of its variants."""
    config = read_config(folder / "config.json")
    check_options([type(vae)], config, f"{folder}/config.json")
    if "scaling_factor" not in config:
        raise ValueError(f"{folder}/config.json has no scaling_factor, by which latents are normalised")
    found: dict[str, set[str]] = {}
    for path in sorted(folder.iterdir()):
        if weights := _WEIGHTS.fullmatch(path.name):
            with safe_open(path, framework="pt") as file:
                found.setdefault(weights["variant"] or "", set()).update(file.keys())
    own = {name for name, _ in [*vae.named_parameters(), *vae.named_buffers()]}
    expected = {name for name in vae.state_dict() if name in own}  # quantisation adds others
    for variant, names in found.items():
        source = f"{folder} ({variant})" if variant else str(folder)
        check_names(expected - names, names - expected, source)
    check_weights(vae, str(folder))


def check_scheduler_config(scheduler: Any, folder: Path) -> None:
    """Raise unless a folder has options of a scheduler, and no others.

    Args:
        scheduler: the one of the pipeline, which need not come from there.
        folder: of the scheduler's configuration.
    """
    config = read_config(folder / "scheduler_config.json")
    if all(name.startswith("_") for name in config):
        raise ValueError(f"{folder}/scheduler_config.json is empty: what the model was made for is lost")
    # One that was made from the configuration of another keeps the other's options.
    others = {FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, type(scheduler)}
    saved = getattr(diffusers, str(config.get("_class_name")), None)
    if isinstance(saved, type) and issubclass(saved, SchedulerMixin):
        others.add(saved)
    known = {each for other in others for each in (other, *other._get_compatibles())}
    check_options(known, config, f"{folder}/scheduler_config.json")


def read_config(path: Path) -> dict[str, Any]:
    """The options in a JSON file; none if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
