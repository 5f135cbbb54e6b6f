"""Measures of predicted video, on tensors `[..., 3, H, W]` in [0, 1]."""

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """PSNR in dB of each frame: `[B, F, 3, H, W]` twice gives `[B, F]`.

    Equal frames would be infinitely good; they count as 100 dB.
    """
    frames = [video.flatten(0, 1) for video in (prediction, target)]
    values = [
        peak_signal_noise_ratio(*pair, data_range=1.0).clamp(max=100.0) for pair in zip(*frames, strict=True)
    ]
    return torch.stack(values).unflatten(0, prediction.shape[:2])


def ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """SSIM of each frame, 1 for equal ones: `[B, F, 3, H, W]` twice gives `[B, F]`; 11 x 11 pixels at least.

    The usual window: a Gaussian of deviation 1.5, cut at 11 x 11 pixels.
    """
    values = structural_similarity_index_measure(
        prediction.flatten(0, 1), target.flatten(0, 1), data_range=1.0, reduction="none"
    )
    assert isinstance(values, Tensor)
    return values.reshape(prediction.shape[:2])


def sharpness(frames: Tensor) -> float:
    """Mean absolute difference of neighbouring pixels of `[..., H, W]`."""
    return (frames.diff(dim=-1).abs().mean() + frames.diff(dim=-2).abs().mean()).item() / 2


def horizontal_shift(before: Tensor, after: Tensor, max_shift: int = 16) -> Tensor:
    """How far the picture moved to the right between two frames, in pixels.

    The shift whose overlapping columns agree best. A camera that turns left moves its picture to the right.

    Args:
        before, after: `[N, 3, H, W]`.
        max_shift: largest shift tried, to either side.

    Returns:
        `[N]` integer shifts.
    """
    width = before.shape[-1]
    errors = []
    for shift in range(-max_shift, max_shift + 1):
        old = before[..., max(0, -shift) : width - max(0, shift)]
        new = after[..., max(0, shift) : width - max(0, -shift)]
        errors.append((old - new).square().mean(dim=(1, 2, 3)))
    return torch.stack(errors).argmin(dim=0) - max_shift


# A step between two frames is small: measured against frames 64 pixels wide, 1.07 is too coarse to see it.
ZOOM_FACTORS = (0.75, 0.8, 0.87, 0.93, 0.97, 1.0, 1.03, 1.07, 1.15, 1.25, 1.33)


def zoom(before: Tensor, after: Tensor, factors: tuple[float, ...] = ZOOM_FACTORS) -> Tensor:
    """By which factor the picture grew between two frames: walking forward gives more than 1.

    Args:
        before, after: `[N, 3, H, W]`.
        factors: candidates; the one whose scaled `before` agrees best with `after` where both are defined.

    Returns:
        `[N]` factors.
    """
    height, width = before.shape[-2:]
    rows, columns = height // 8, width // 8  # of a border left out: factors below 1 leave it undefined
    inner = (..., slice(rows, height - rows), slice(columns, width - columns))
    errors = []
    for factor in factors:
        theta = before.new_tensor([[1 / factor, 0, 0], [0, 1 / factor, 0]]).expand(before.shape[0], -1, -1)
        grid = functional.affine_grid(theta, list(before.shape), align_corners=False)
        scaled = functional.grid_sample(before, grid, align_corners=False, padding_mode="border")
        errors.append((scaled[inner] - after[inner]).square().mean(dim=(1, 2, 3)))
    return before.new_tensor(factors)[torch.stack(errors).argmin(dim=0)]
