"""What protocols prescribe, what options replace, and which do not go together."""

from typing import Any

import pytest

from diffusers_far.evaluation.protocols import EvaluateOptions


def test_numbers_come_from_the_protocol_unless_they_are_given() -> None:
    teco = EvaluateOptions(protocol="teco")
    assert (teco.context, teco.length, teco.num_videos, teco.num_fvd_frames) == (144, 300, 256, 300)
    assert teco.sample_seeds == [0, 1, 2, 3] and teco.prescribed.guidance_scale == 1.5
    latte = EvaluateOptions(protocol="latte")
    assert latte.sample_seeds == [0, 2, 4, 6] and latte.measure_names == ["fvd"] and latte.split == "train"
    bair = EvaluateOptions(protocol="mcvd", num_context=2, num_frames=30, num_samples=5)
    assert (bair.context, bair.length, bair.sample_seeds) == (2, 30, [0, 1, 2, 3, 4])
    assert EvaluateOptions(protocol="next").num_fvd_frames == 16  # those predicted
    assert EvaluateOptions(protocol="latte", num_samples=2).sample_seeds == [0, 2]
    assert EvaluateOptions(measures=["lpips", "psnr"]).measure_names == ["psnr", "lpips"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "best"}, "protocol='best' must be next, latte, mcvd, teco"),
        ({"num_frames": 32}, "num_frames=32 must be more than num_context=32"),
        ({"num_frames": 40}, "num_frames=40: fvd takes 10 frames or more, those predicted; these are 8"),
        ({"measures": ["psnr", "vmaf"]}, "must be some of psnr, ssim, lpips, fvd"),
        ({"measures": ["psnr", "psnr"]}, "each once"),
        ({"num_context": 0}, "num_context=0 takes fvd only"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\] must be different integers"),
        ({"seeds": [-1]}, "of at least 0"),
        ({"seeds": [1, 2], "num_samples": 3}, "num_samples=3, but seeds has 2"),
        ({"num_videos": -1}, "num_videos=-1 must be an integer of at least 0"),
        ({"resolution": "x"}, "resolution='x' must be"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluateOptions(**options)
