"""Exports that are made at first need and kept in the cache."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from ..pipeline_far_video import FARVideoPipeline
from .exported_starts import Clip
from .onnx_export import PACKED, VERSION, export_onnx


def kept_export(
    pipeline: FARVideoPipeline, dtype: str, starts: Sequence[Clip] = (), cache: Path | None = None
) -> Path:
    """The folder of an export with compressed copies, made unless the cache has it.

    Args:
        pipeline, dtype, starts: as of `export_onnx`.
        cache: folder; by default `diffusers-far/exports` in that of Hugging Face.

    Raises:
        ValueError: as `export_onnx`.
    """
    cache = Path(HF_HOME) / "diffusers-far" / "exports" if cache is None else cache
    folder = cache / _fingerprint(pipeline, dtype, starts)
    if not (folder / "rollout.json").is_file():
        export_onnx(pipeline, folder, dtype, starts=starts, packed=True)
    return folder


def _fingerprint(pipeline: FARVideoPipeline, dtype: str, starts: Sequence[Clip]) -> str:
    """A name that changes with all that an export has."""
    configs = [pipeline.config, *(part.config for part in pipeline.components.values())]
    actions = [actions for _, actions in starts]
    known = hashlib.sha256(json.dumps([VERSION, PACKED, dtype, configs, actions], default=str).encode())
    for model in (pipeline.transformer, pipeline.vae):
        for name, tensor in model.state_dict().items():
            known.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
    for frames, _ in starts:
        known.update(frames.tobytes())
    return f"{dtype}-{known.hexdigest()[:16]}"
