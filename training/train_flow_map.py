"""Turn a trained FAR into an any-step one: a flow map, which few denoising steps sample as many do.

    python training/train_flow_map.py training/recipes/far_doom_maze_any_step.yaml --pretrained RUN/ema

Options and output are those of training/train_far.py. The model learns the mean velocity u(x, t, r) of the
way from level t down to r, which obeys (MeanFlow, arXiv 2505.13447, equation 6)

    u(x, t, r) = v(x, t) - (t - r) d/dt u(x, t, r),

where d/dt goes along the way, dx/dt = v. Its own velocity u(x, t, t) serves as v where r < t, and the
derivative is a central difference, which needs no forward-mode differentiation. Where r = t this is flow
matching, and what the model was trained for before.

The frames before a noisy frame are clean, as in sampling: a clip's clean frames are computed once, and a
noisy copy of each frame of the window sees those before it.

Shapes: B batch, F frames, C channels, H x W latent grid.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout: this file is run as a script

from diffusers_far.flow_matching import CLEAN_TIMESTEP, add_noise, velocity_target
from diffusers_far.kv_cache import FARCache
from diffusers_far.transformer_far import FARTransformer3DModel
from training.data.latents import ClipBatch
from training.far_arguments import ModelArguments, parse_arguments
from training.matmul_attn_processor import MatmulAttnProcessor
from training.train_far import Trainer

DIFFERENCE = 0.01  # half the distance in sigma of what the derivative is taken between


class FlowMapTrainer(Trainer):
    """A run of the flow map; `loss`, for validation, is still that of velocities at an instant."""

    def create_model(self, model_args: ModelArguments, in_channels: int) -> FARTransformer3DModel:
        if not self.args.pretrained:
            raise ValueError("pretrained=None: it takes the folder of a trained model")
        trained = FARTransformer3DModel.from_pretrained(self.args.pretrained)
        model = FARTransformer3DModel.from_config(trained.config, use_meanflow=True)
        model.load_state_dict(trained.state_dict(), strict=False)  # it may have no weights for intervals yet
        self.processor = MatmulAttnProcessor()
        model.set_attn_processor(self.processor)
        return model

    def training_loss(self, batch: ClipBatch) -> Tensor:
        """Squared error of the mean velocity, each frame's by its own size (MeanFlow, section 4.3)."""
        if batch.own_context:
            with torch.no_grad():
                noisy, velocity = self.predict(batch.all_noisy())
            batch = batch.with_estimates(noisy, velocity)
        context = self.encode_clean(batch)
        start, end = batch.intervals
        frames = add_noise(batch.window_latents, batch.noise, start)
        target = velocity_target(batch.window_latents, batch.noise)
        with torch.no_grad():
            velocity = self.mean_velocity(batch, context, frames, start, start).float()
            upper, lower = (start + DIFFERENCE).clamp(max=1), torch.maximum(start - DIFFERENCE, end)
            with torch.autocast(frames.device.type, enabled=False):  # differences of bf16 would be noise
                above, below = (
                    self.mean_velocity(batch, context, move(frames, velocity, level - start), level, end)
                    for level in (upper, lower)
                )
            still = spread(start == end)
            derivative = (above - below) / spread(upper - lower).clamp(min=1e-6)
            target = torch.where(still, target, velocity - spread(start - end) * derivative)
        prediction = self.mean_velocity(batch, context, frames, start, end).float()
        error = (prediction - target).square().mean(dim=(2, 3, 4))
        return (error / (error.detach() + 1e-3)).mean()

    @torch.no_grad()
    def encode_clean(self, batch: ClipBatch) -> FARCache:
        """Keys and values of the clips' frames, all clean; the model's own ones where it made some."""
        window = batch.window_latents if batch.estimates is None else batch.estimates
        before = batch.latents[:, : -window.shape[1]]
        frames = torch.cat([before, window.to(before.dtype)], dim=1)
        model = self.accelerator.unwrap_model(self.model)
        cache = model.create_cache(len(frames), *frames.shape[-2:])
        timestep = torch.full(frames.shape[:2], CLEAN_TIMESTEP, device=frames.device)
        self.model(
            frames,
            timestep,
            class_labels=batch.class_labels if self.uses_labels else None,
            actions=batch.actions if self.uses_actions else None,
            cache=cache,
            num_long_frames=before.shape[1],
        )
        cache.append(range(before.shape[1]), range(before.shape[1], frames.shape[1]))
        return cache

    def mean_velocity(
        self, batch: ClipBatch, context: FARCache, frames: Tensor, start: Tensor, end: Tensor
    ) -> Tensor:
        """`[B, window, C, H, W]` from levels `start` to `end` of noisy copies of the window's frames."""
        window = frames.shape[1]
        positions = torch.arange(context.next_frame - window, context.next_frame, device=frames.device)
        actions = None if batch.actions is None else batch.actions[:, -window:]
        with self.processor.copies(window):
            return self.model(
                frames,
                start * 1000,
                class_labels=batch.class_labels if self.uses_labels else None,
                actions=actions if self.uses_actions else None,
                cache=context,
                frame_positions=positions,
                timestep_r=end * 1000,
            ).sample


def spread(values: Tensor) -> Tensor:
    """`[B, F]` as factors of frames `[B, F, C, H, W]`."""
    return values[..., None, None, None]


def move(frames: Tensor, velocity: Tensor, distance: Tensor) -> Tensor:
    """Frames `[B, F, C, H, W]`, moved along their velocity by `[B, F]` in sigma."""
    return frames + spread(distance) * velocity


if __name__ == "__main__":
    FlowMapTrainer(*parse_arguments(sys.argv[1:], __doc__)).train()
