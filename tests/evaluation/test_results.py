"""Figures of all clips: on numbers whose means and intervals are known."""

import numpy as np
import pytest
import torch

from diffusers_far.evaluation.clips import Clip
from diffusers_far.evaluation.results import bootstrap_mean, by_video, summarize_fvd, summarize_measure

CLIPS = [Clip("a", 0), Clip("b", 0), Clip("c", 0)]


def test_the_interval_is_that_of_the_mean() -> None:
    """Of a normal distribution 1.96 standard errors to both sides; of equal values nothing."""
    values = np.random.default_rng(3).normal(5, 2, size=(400, 2))
    low, high = bootstrap_mean(values)
    error = values.std(axis=0) / 20
    np.testing.assert_allclose(low, values.mean(axis=0) - 1.96 * error, atol=0.15 * error.max())
    np.testing.assert_allclose(high, values.mean(axis=0) + 1.96 * error, atol=0.15 * error.max())
    low, high = bootstrap_mean(np.full(7, 0.25))
    assert low == pytest.approx(0.25) and high == pytest.approx(0.25)


def test_the_interval_holds_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    ends = [bootstrap_mean(rng.normal(size=40)) for _ in range(200)]
    assert 0.88 <= np.mean([low <= 0 <= high for low, high in ends]) <= 0.99


def test_clips_of_a_video_count_as_one() -> None:
    clips = [Clip("a", 0), Clip("a", 5), Clip("b", 0)]
    assert by_video(np.array([1.0, 3.0, 10.0]), clips).tolist() == [2.0, 10.0]


def test_the_best_sample_is_the_best_of_each_clip_in_each_measure() -> None:
    files = [
        {
            "psnr": torch.tensor([[10.0, 20.0], [30.0, 10.0]]),  # means 15, 20
            "lpips": torch.tensor([[0.1, 0.1], [0.2, 0.4]]),  # means 0.1, 0.3
            "repeated_psnr": torch.tensor([7.0, 5.0]),
        }
    ] * 2 + [
        {
            "psnr": torch.tensor([[40.0, 40.0], [30.0, 40.0]]),
            "lpips": torch.tensor([[0.6, 0.0], [0.1, 0.1]]),
            "repeated_psnr": torch.tensor([1.0, 5.0]),
        }
    ]
    psnr = summarize_measure("psnr", files, CLIPS)
    assert psnr["mean"] == pytest.approx((17.5 + 17.5 + 37.5) / 3)
    assert psnr["best"]["mean"] == pytest.approx((20 + 20 + 40) / 3)
    assert psnr["best"]["by_frame"] == pytest.approx([100 / 3, 20])
    assert psnr["repeated"]["by_frame"] == pytest.approx([5, 5])
    lpips = summarize_measure("lpips", files, CLIPS)
    assert lpips["best"]["mean"] == pytest.approx((0.1 + 0.1 + 0.1) / 3)
    assert lpips["best_by_psnr"]["mean"] == pytest.approx((0.3 + 0.3 + 0.3) / 3)
    assert "best" not in summarize_measure("psnr", [{"psnr": torch.ones(1, 2)}] * 3, CLIPS)


def test_fvd_is_the_mean_of_those_of_samples() -> None:
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(60, 8, generator=rng)
    files = [{"real_features": row, "features": torch.stack([row, row + 2])} for row in real]
    clips = [Clip(f"v{i}", 0) for i in range(60)]
    fvd = summarize_fvd(files, clips)
    assert fvd["by_sample"] == pytest.approx([0, 32], abs=1e-6)
    assert fvd["mean"] == pytest.approx(16, abs=1e-6)
    low, high = fvd["interval"]
    assert low == pytest.approx(16, abs=1e-4) and high == pytest.approx(16, abs=1e-4)  # of pairs: no spread
    other = torch.randn(60, 8, generator=rng)
    files = [{"real_features": row, "features": made[None]} for row, made in zip(real, other, strict=True)]
    few, many = summarize_fvd(files[:20], clips[:20]), summarize_fvd(files, clips)
    assert few["interval"][1] - few["mean"] > many["interval"][1] - many["mean"] > 0
