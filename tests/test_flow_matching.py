"""The training objective against its published formulas."""

import pytest
import torch

from diffusers_far.flow_matching import (
    CLEAN_TIMESTEP,
    add_noise,
    frame_loss,
    sample_clean_frames,
    sample_flow_map_steps,
    sample_sigmas,
    velocity_target,
)
from tests.tiny_models import generator, latents, max_error


def test_noising_and_target() -> None:
    clean, noise = latents(2, 3), latents(2, 3, seed=5)
    sigma = torch.tensor([[0.0, 0.25, 1.0], [0.5, 0.1, 0.9]])
    noisy = add_noise(clean, noise, sigma)
    for video in range(2):
        for frame in range(3):
            level = sigma[video, frame]
            expected = level * noise[video, frame] + (1 - level) * clean[video, frame]
            assert max_error(noisy[video, frame], expected) <= 1e-6
    assert torch.equal(noisy[0, 0], clean[0, 0]) and torch.equal(noisy[0, 2], noise[0, 2])
    assert torch.equal(velocity_target(clean, noise), noise - clean)
    # Walking from the noisy latents along the velocity by sigma gives the clean ones.
    walked = noisy - sigma[..., None, None, None] * velocity_target(clean, noise)
    assert max_error(walked, clean) <= 1e-5
    assert CLEAN_TIMESTEP == -1
    assert add_noise(clean.bfloat16(), noise.bfloat16(), sigma).dtype == torch.bfloat16


def test_sigmas_lie_on_the_grid_and_are_logit_normal() -> None:
    sigmas = sample_sigmas((500, 100), generator())
    assert sigmas.shape == (500, 100)
    assert sigmas.min() > 0 and sigmas.max() <= 1
    assert max_error(sigmas * 1000, (sigmas * 1000).round()) <= 1e-3
    logits = torch.logit(sigmas.clamp(max=0.9995).double())
    assert logits.mean().item() == pytest.approx(0, abs=0.02)
    assert logits.std().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(sample_sigmas((3, 4), generator(1)), sample_sigmas((3, 4), generator(1)))


@pytest.mark.parametrize(("mean", "extreme"), [(30.0, 0.001), (-30.0, 1.0)])
def test_extreme_draws_stay_on_the_grid(mean: float, extreme: float) -> None:
    sigmas = sample_sigmas((4, 4), generator(), logit_mean=mean)
    assert max_error(sigmas, torch.full((4, 4), extreme)) <= 1e-6


def test_clean_frames() -> None:
    clean = sample_clean_frames((4000, 16), 0.1, num_long_frames=4, generator=generator())
    assert clean.dtype == torch.bool and clean[:, :4].all()
    assert clean[:, 4:].float().mean().item() == pytest.approx(0.1, abs=0.01)
    per_frame = clean[:, 4:].float().mean(dim=0)
    assert per_frame.min() > 0.08 and per_frame.max() < 0.12


@pytest.mark.parametrize("num_long_frames", [0, 3])
def test_a_window_is_never_all_clean(num_long_frames: int) -> None:
    clean = sample_clean_frames((50, 5), 1.0, num_long_frames, generator())
    assert clean[:, :-1].all() and not clean[:, -1].any()
    assert not sample_clean_frames((50, 5), 0.0, generator=generator()).any()


def test_clean_frames_leave_the_loss() -> None:
    prediction, target = latents(2, 4), latents(2, 4, seed=3)
    clean = torch.tensor([[True, False, False, True], [False, False, False, False]])
    loss = frame_loss(prediction, target, clean)
    error = (prediction - target).square()
    expected = (
        error[0, 1:3].mean() + error[1].mean()
    ) / 2  # videos count alike, however many frames are noisy
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    changed = prediction.clone()
    changed[0, [0, 3]] += 100
    assert torch.equal(frame_loss(changed, target, clean), loss)
    assert frame_loss(prediction.bfloat16(), target, clean).dtype == torch.float32


def test_steps_of_a_flow_map_are_those_of_samplers() -> None:
    start, end = sample_flow_map_steps((5000, 4), 4, generator())
    num_steps = (1 / (start - end)).round()
    index = (1 - start) * num_steps
    assert max_error(index, index.round()) < 1e-5 and index.min() == 0
    assert end.min() == 0 and start.max() == 1
    for number in range(1, 5):  # chances as 1 to 1/2, 1/3 and 1/4
        of_number = num_steps == number
        assert of_number.float().mean().item() == pytest.approx(12 / 25 / number, abs=0.02)
        first = (index[of_number] == 0).float().mean().item()
        assert first == pytest.approx(1 / number, abs=0.03)
