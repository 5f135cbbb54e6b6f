"""The measures of diffusers_far/metrics.py, on pictures whose motion is known."""

import math

import pytest
import torch
from torch.nn import functional

from diffusers_far.metrics import horizontal_shift, psnr, sharpness, ssim, zoom


@pytest.fixture
def picture():
    """Smooth random pictures `[4, 3, 96, 96]`, larger than a frame: frames are cut at an offset."""
    noise = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return functional.interpolate(noise, size=96, mode="bicubic", align_corners=False).clamp(0, 1)


def test_psnr_is_that_of_each_frame():
    target = torch.full((2, 3, 3, 8, 8), 0.5)
    prediction = target.clone()
    prediction[0, 1] += 0.1
    values = psnr(prediction, target)
    assert values.shape == (2, 3)
    assert values[0, 1].item() == pytest.approx(20.0, abs=1e-3)
    assert values[1, 2].item() == 100.0  # equal frames
    assert math.isfinite(values.mean().item())


def test_ssim_is_that_of_each_frame(picture):
    video = picture.unflatten(0, (2, 2))
    changed = video.clone()
    changed[1, 0] = 1 - changed[1, 0]
    values = ssim(changed, video)
    torch.testing.assert_close(values[[0, 0, 1], [0, 1, 1]], torch.ones(3))
    assert values[1, 0] < 0
    flat = torch.full((1, 1, 3, 16, 16), 0.5)  # of pictures without texture only the brightness counts
    expected = (2 * 0.5 * 0.7 + 1e-4) / (0.5**2 + 0.7**2 + 1e-4)
    assert ssim(flat, flat + 0.2).item() == pytest.approx(expected, rel=1e-4)


def test_sharpness_falls_when_pictures_are_blurred(picture):
    blurred = functional.avg_pool2d(picture, 3, stride=1, padding=1, count_include_pad=False)
    assert 0 < sharpness(blurred) < sharpness(picture)
    ramp = torch.arange(4.0).expand(1, 3, 4, 4) / 8  # 1/8 from column to column, nothing from row to row
    assert sharpness(ramp) == pytest.approx(1 / 16)


@pytest.mark.parametrize("shift", [-9, -3, 0, 4, 12])
def test_shift_to_the_right_is_positive(picture, shift):
    before = picture[..., 16:80, 16:80]
    after = picture[..., 16:80, 16 - shift : 80 - shift]
    assert horizontal_shift(before, after).tolist() == [shift] * 4


@pytest.mark.parametrize(("side", "grows"), [(56, True), (64, None), (76, False)])
def test_zoom_tells_growing_from_shrinking(picture, side, grows):
    margin = (96 - side) // 2
    before = picture[..., 16:80, 16:80]
    cut = picture[..., margin : margin + side, margin : margin + side]
    after = functional.interpolate(cut, size=64, mode="bilinear", align_corners=False)
    factors = zoom(before, after)
    assert factors.eq(1).all() if grows is None else (factors > 1).eq(grows).all()
