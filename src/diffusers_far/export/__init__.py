"""Models as graphs that run without PyTorch. Each name is imported when it is first used."""

from ..lazy_names import lazy_names

_MODULES = {
    "ExportedRollout": "diffusers_far.export.exported_rollout",
    "FramePlan": "diffusers_far.export.frame_plan",
    "export_onnx": "diffusers_far.export.onnx_export",
    "seeded_noise": "diffusers_far.export.noise",
}

__all__ = [*_MODULES]

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
