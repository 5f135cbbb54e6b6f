"""Models as graphs that run without PyTorch. Each name is imported when it is first used."""

import importlib
from typing import Any

_MODULES = {
    "ExportedRollout": "diffusers_far.export.exported_rollout",
    "FramePlan": "diffusers_far.export.frame_plan",
    "export_onnx": "diffusers_far.export.onnx_export",
    "seeded_noise": "diffusers_far.export.noise",
}

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
