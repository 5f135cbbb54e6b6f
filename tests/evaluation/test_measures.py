"""Measures of the frames of a clip, and sizes that are too small for them."""

import pytest
import torch

from diffusers_far.evaluation.measures import Measures
from diffusers_far.metrics import psnr, ssim


def test_each_sample_is_compared_with_the_truth() -> None:
    rng = torch.Generator().manual_seed(0)
    truth, samples = torch.rand(3, 3, 32, 32, generator=rng), torch.rand(2, 3, 3, 32, 32, generator=rng)
    samples[1] = truth
    found = Measures(["psnr", "ssim", "lpips"], torch.device("cpu")).by_frame(samples, truth)
    assert {name: tuple(values.shape) for name, values in found.items()} == dict.fromkeys(found, (2, 3))
    assert torch.equal(found["psnr"][:1], psnr(samples[:1], truth[None]))
    assert torch.equal(found["ssim"][:1], ssim(samples[:1], truth[None]))
    assert found["lpips"][1].abs().max() < 1e-6 < found["lpips"][0].min()


@pytest.mark.parametrize(("name", "side"), [("ssim", 10), ("lpips", 31)])
def test_frames_that_are_too_small_are_refused(name: str, side: int) -> None:
    frames = torch.zeros(2, 3, 40, side)
    with pytest.raises(ValueError, match=rf"{name} takes {side + 1} pixels a side or more, got 40 x {side}"):
        Measures([name], torch.device("cpu")).by_frame(frames[None], frames)
