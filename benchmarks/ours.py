"""Our side of the comparison."""

import torch
from cases import Case
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffusers_far.rollout import Rollout


class Ours:
    """FAR of this repository on one case."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype, compiled: bool = False) -> None:
        self.case = case
        self.transformer = case.build_model().to(device, dtype).eval()
        if compiled:
            self.transformer.compile_repeated_blocks(fullgraph=True)

    def start(self, context: Tensor, actions: Tensor | None) -> None:
        """Begin a video with frames `[B, T, C, h, w]`; `actions` `[B, T + new]` are those of all of it."""
        self._actions, device = actions, self.transformer.device
        self._rollout = Rollout(
            self.transformer,
            FlowMatchEulerDiscreteScheduler(),
            encode=lambda latents: latents,
            decode=lambda latents: latents,
            context_latents=context.to(device),
            context_actions=None if actions is None else actions[:, : context.shape[1]].to(device),
            num_inference_steps=self.case.steps,
            device=device,
        )

    def new_frame(self, noise: Tensor) -> Tensor:
        """Latents `[B, 1, C, h, w]` of the next frame."""
        action = None if self._actions is None else self._actions[:, self._rollout.num_frames]
        device = self.transformer.device
        action = None if action is None else action.to(device)
        return self._rollout.step_latents(action, noise.to(device))

    def velocity(self, frames: Tensor, timestep: Tensor) -> Tensor:
        """Of a clip `[B, F, C, h, w]`, in training."""
        return self.transformer(frames, timestep).sample

    def step_bytes(self) -> int:
        """What a step cannot but read: weights (but AdaLN's), and the keys and values of the context."""
        parameters = self.transformer.named_parameters()
        weights = sum(weight.nbytes for name, weight in parameters if ".attn." in name or ".ff." in name)
        cache = self._rollout.cache
        assert cache is not None  # rollouts of the suite have one
        return weights + cache.num_bytes * cache.num_tokens // cache.layers[0].keys.shape[1]
