"""The published side: a checkout of the authors' code (showlab/FAR; it needs einops), run as it is."""

import sys
from pathlib import Path

import torch
from cases import NUM_ACTIONS, Case
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffusers_far.key_map import published_state_dict


class Published:
    """Their model and pipeline on one case, with the weights of ours."""

    def __init__(self, checkout: Path, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        sys.path.insert(0, str(checkout))
        from far.models.far_long_model import FAR_Long
        from far.models.far_model import FAR
        from far.pipelines.pipeline_far import FARPipeline

        ours = case.build_model()
        size = {"num_layers": case.num_layers, "num_attention_heads": case.num_attention_heads}
        if case.long:
            condition = {"type": "action", "num_action_classes": NUM_ACTIONS}
            model = FAR_Long(**size, condition_cfg=condition, short_term_ctx_winsize=case.short_window)
        else:
            model = FAR(**size)
        model.load_state_dict(published_state_dict(ours.state_dict(), ours.config))
        self.case = case
        self.transformer = model.to(device, dtype).eval()
        self._pipeline = FARPipeline(model, vae=None, scheduler=FlowMatchEulerDiscreteScheduler())
        self._pipeline.execution_device = device  # as their scripts do
        self._pipeline.set_progress_bar_config(disable=True)

    def start(self, context: Tensor, actions: Tensor | None) -> None:
        """Begin a video with frames `[B, T, C, h, w]`; `actions` `[B, T + new]` are those of all of it."""
        self._actions, self._latents = actions, context.to(self.transformer.device, self.transformer.dtype)
        self._cache = {"kv_cache": {}, "cached_seqlen": 0, "multi_level_cache_init": False}

    def new_frame(self, noise: Tensor) -> Tensor:
        """Latents `[B, 1, C, h, w]` of the next frame."""
        seen = self._latents if self._latents.shape[1] else None
        conditions = None
        if self._actions is not None:
            conditions = {"action": self._actions[:, : self._latents.shape[1] + 1]}
        latents, self._cache = self._pipeline(
            seen,
            noise.to(self._latents),
            conditions=conditions,
            context_cache=self._cache,
            guidance_scale=1.0,
            num_inference_steps=self.case.steps,
        )
        self._latents = torch.cat([self._latents, latents], dim=1)
        return latents

    def velocity(self, frames: Tensor, timestep: Tensor) -> Tensor:
        """Of a clip `[B, F, C, h, w]`, in training."""
        return self.transformer(frames, timestep=timestep).sample
