"""Turn a trained FAR into an any-step one: a flow map, which few denoising steps sample as many do.

    python training/train_flow_map.py training/recipes/far_doom_maze_any_step.yaml --pretrained RUN/ema

Options and output are those of training/train_far.py. The model learns the mean velocity of the way that the
trained model, frozen, takes a noisy frame from level t down to r (MeanFlow, arXiv 2505.13447, equation 3):

    u(x_t, t, r) = 1 / (t - r) * integral from r to t of v(x_s, s) ds = (x_t - x_r) / (t - r),

so that one step x_t - (t - r) u lands where the trained model comes in many. The integral is worked out in
NUM_TEACHER_STEPS Euler steps, so that targets do not rest on what the model itself has learned so far.

The frames before a noisy frame are clean, as in sampling: a clip's clean frames are computed once, and a
noisy copy of each frame of the window sees those before it.

Shapes: B batch, F frames, C channels, H x W latent grid.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout: this file is run as a script

from diffusers_far.flow_matching import CLEAN_TIMESTEP, add_noise
from diffusers_far.kv_cache import FARCache, Slot
from diffusers_far.transformer_far import FARTransformer3DModel
from training.data.latents import ClipBatch, ClipBatches
from training.far_arguments import ModelArguments, parse_arguments
from training.matmul_attn_processor import MatmulAttnProcessor
from training.train_far import Trainer

NUM_TEACHER_STEPS = 8  # of the longest interval; shorter ones take as many


class FlowMapTrainer(Trainer):
    """A run of the flow map."""

    def create_model(self, model_args: ModelArguments, in_channels: int) -> FARTransformer3DModel:
        if not self.args.pretrained:
            raise ValueError("pretrained=None: it takes the folder of a trained model")
        processor = MatmulAttnProcessor()
        self.teacher = FARTransformer3DModel.from_pretrained(self.args.pretrained)
        model = FARTransformer3DModel.from_config(self.teacher.config, use_meanflow=True)
        model.load_state_dict(self.teacher.state_dict(), strict=False)  # it may have no weights for intervals
        for network in (self.teacher.to(self.accelerator.device), model):
            network.set_attn_processor(processor)
        return model

    def _validation_sets(self) -> dict[str, ClipBatches]:
        return {"validation_loss": super()._validation_sets()["validation_loss"]}

    def loss(self, batch: ClipBatch) -> Tensor:
        """Squared error of the mean velocity."""
        batch = self.with_own_context(self.teacher, batch)
        start, end = batch.intervals
        frames = add_noise(batch.window_latents, batch.noise, start)
        target = self.teacher_velocity(batch, frames, start, end)
        prediction = self.velocity(
            self.model, batch, self.encode_clean(self.model, batch), frames, start, end
        )
        return (prediction - target).square().mean()

    @torch.no_grad()
    def teacher_velocity(self, batch: ClipBatch, frames: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """`[B, window, C, H, W]`, mean over the trained model's steps from levels `start` to `end`."""
        context = self.encode_clean(self.teacher, batch)
        step = (start - end) / NUM_TEACHER_STEPS
        velocities = []
        for index in range(NUM_TEACHER_STEPS):
            velocities.append(self.velocity(self.teacher, batch, context, frames, start - index * step))
            frames = frames - step[..., None, None, None] * velocities[-1]
        return torch.stack(velocities).mean(dim=0)

    @torch.no_grad()
    def encode_clean(self, model: nn.Module, batch: ClipBatch) -> FARCache:
        """Keys and values of the clips' frames, all clean; the model's own ones where it made some."""
        window = batch.window_latents if batch.estimates is None else batch.estimates
        before = batch.latents[:, : -window.shape[1]]
        frames = torch.cat([before, window.to(before.dtype)], dim=1)
        unwrapped = self.accelerator.unwrap_model(model)
        cache = unwrapped.create_cache(len(frames), *frames.shape[-2:])
        timestep = torch.full(frames.shape[:2], CLEAN_TIMESTEP, device=frames.device)
        model(
            frames,
            timestep,
            class_labels=batch.class_labels if self.uses_labels else None,
            actions=batch.actions if self.uses_actions else None,
            cache=cache,
            num_long_frames=before.shape[1],
        )
        cache.commit([Slot(frame, frame < before.shape[1], frame) for frame in range(frames.shape[1])])
        return cache

    def velocity(
        self,
        model: nn.Module,
        batch: ClipBatch,
        context: FARCache,
        frames: Tensor,
        start: Tensor,
        end: Tensor | None = None,
    ) -> Tensor:
        """`[B, window, C, H, W]` of noisy copies of the window's frames, from levels `start` to `end`.

        Args:
            end: by default `start`: the velocity of the instant.
        """
        window = frames.shape[1]
        positions = torch.arange(context.next_position - window, context.next_position, device=frames.device)
        actions = None if batch.actions is None else batch.actions[:, -window:]
        return model(  # the frames are in the cache, too: noisy copies
            frames,
            start * 1000,
            class_labels=batch.class_labels if self.uses_labels else None,
            actions=actions if self.uses_actions else None,
            cache=context,
            frame_positions=positions,
            timestep_r=None if end is None else end * 1000,
        ).sample.float()


if __name__ == "__main__":
    FlowMapTrainer(*parse_arguments(sys.argv[1:], __doc__)).train()
