"""FAR, the frame-autoregressive video model (arXiv 2503.19325), for diffusers.

Importing this package is cheap: each name below is imported when it is first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "ContextSchedule": "diffusers_far.context_schedule",
    "FARCache": "diffusers_far.kv_cache",
    "FARTransformer3DModel": "diffusers_far.transformer_far",
    "FARTransformer3DModelOutput": "diffusers_far.transformer_far",
    "FARVideoPipeline": "diffusers_far.pipeline_far_video",
    "FARVideoPipelineOutput": "diffusers_far.pipeline_far_video",
    "Rollout": "diffusers_far.rollout",
    "preset": "diffusers_far.presets",
    "read_video": "diffusers_far.pipeline_inputs",
    # diffusers looks these base classes up on the package that a pipeline's model_index.json names.
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
}

__all__ = [name for name, module in _MODULES.items() if module != "diffusers"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _register()
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    if name == "FARVideoPipeline":  # where `DiffusionPipeline.from_pretrained(repo)` looks the class up
        importlib.import_module("diffusers").FARVideoPipeline = value  # type: ignore[attr-defined]
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])


def _register() -> None:
    """Make `["diffusers_far", ...]` in a model_index.json loadable, from the Hub too, without
    trusting remote code.
    """
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    methods = ["save_pretrained", "from_pretrained"]
    LOADABLE_CLASSES.setdefault("diffusers_far", {"ModelMixin": methods, "SchedulerMixin": methods})
