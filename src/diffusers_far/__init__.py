"""FAR, the frame-autoregressive video model (arXiv 2503.19325), for diffusers.

Importing this package is cheap: each name below is imported when it is first used.
"""

from . import registration as registration
from .lazy_names import lazy_names

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
    "read_video": "diffusers_far.video_files",
    # diffusers looks this base class up in the package that a pipeline's model_index.json names.
    "ModelMixin": "diffusers",
}

__all__ = [name for name, module in _MODULES.items() if module != "diffusers"]

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
