"""What is measured: a case is plain data, so that a process of its own can be given it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_far import FARTransformer3DModel

GRID = 8  # latent pixels per side: 64 tokens a frame, as in the published protocol
NUM_ACTIONS = 4


@dataclass(frozen=True)
class Case:
    """One line of a table.

    Args:
        task: "frame": new frames after `context` frames; "rollout": `frames` frames from nothing;
            "training": steps of FAR-B on clips of `frames` frames.
        long: FAR-B-Long with actions instead of FAR-B.
        batch: videos.
        frames: that are timed (frame, rollout), or that a clip has (training).
        context: frames before the first new one.
        steps: denoising steps per frame.
        short_window: of the Long model.
        num_layers, num_attention_heads: FAR-B's by default.
    """

    task: str
    long: bool = False
    batch: int = 1
    frames: int = 3
    context: int = 0
    steps: int = 5
    short_window: int = 16
    num_layers: int = 12
    num_attention_heads: int = 12

    @property
    def model(self) -> str:
        return f"FAR-B-Long, window {self.short_window}" if self.long else "FAR-B"

    def build_model(self) -> FARTransformer3DModel:
        """With the same random weights everywhere in every process."""
        torch.manual_seed(0)
        model = FARTransformer3DModel(
            long_patch_size=4 if self.long else None,
            num_actions=NUM_ACTIONS if self.long else None,
            short_window=self.short_window,
            num_layers=self.num_layers,
            num_attention_heads=self.num_attention_heads,
        )
        for parameter in model.parameters():  # AdaLN and head start at zero: a comparison would be empty
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        return model

    def noise(self, num_frames: int, seed: int) -> Tensor:
        """`[batch, num_frames, C, GRID, GRID]`, the same in every process."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.batch, num_frames, 32, GRID, GRID, generator=generator)

    def actions(self, num_frames: int) -> Tensor | None:
        """`[batch, num_frames]` of a model that has them."""
        if not self.long:
            return None
        generator = torch.Generator().manual_seed(2)
        return torch.randint(NUM_ACTIONS, (self.batch, num_frames), generator=generator)
