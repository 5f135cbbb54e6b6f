"""FVD against a figure of the original code, and against known distances."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from diffusers_far.fvd import I3D, frechet_distance


@pytest.fixture(scope="module")
def i3d():
    return I3D()


def test_black_against_white_is_as_in_the_original_code(i3d):
    """The example of the original TensorFlow code: videos of 30 frames, 151.3924."""
    black, white = (i3d(torch.full((1, 30, 3, 64, 64), level)).expand(2, -1) for level in (0.0, 1.0))
    assert frechet_distance(black, white) == pytest.approx(151.3924, rel=1e-5)


def test_a_video_has_the_same_logits_in_any_batch(i3d):
    videos = torch.rand(2, 10, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    together = i3d(videos)
    assert together.shape == (2, 400)
    torch.testing.assert_close(together[1:], i3d(videos[1:]), rtol=1e-4, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_short_videos_are_refused(i3d):
    with pytest.raises(ValueError, match="9 frames each; FVD takes 10 or more"):
        i3d(torch.zeros(1, 9, 3, 32, 32))


@pytest.mark.parametrize("number", [20, 300])  # fewer than numbers of a feature, and more
def test_frechet_distance_agrees_with_its_formula(number):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(number, 30)) @ rng.normal(size=(30, 30))
    others = 0.5 * rng.normal(size=(number + 5, 30)) + 1
    covariances = [np.cov(values, rowvar=False) for values in (features, others)]
    means = [values.mean(axis=0) for values in (features, others)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    found = frechet_distance(torch.from_numpy(features), torch.from_numpy(others))
    # scipy's root of a singular matrix is good to few digits
    assert found == pytest.approx(expected, rel=1e-9 if number > 30 else 1e-3)


def test_frechet_distance_of_moved_and_of_equal_features():
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert frechet_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features + 2) == pytest.approx(8 * 2**2)
    with pytest.raises(ValueError, match=r"others has shape \(1, 8\); it takes"):
        frechet_distance(features, features[:1])
