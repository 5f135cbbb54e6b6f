"""The adversary of an autoencoder: what it sees, what it learns, and how strongly it speaks."""

import pytest
import torch
from torch import nn

from diffusers_far.training.patch_discriminator import DiscriminatorLoss, PatchDiscriminator, adaptive_weight


@pytest.mark.parametrize(("num_downsamples", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_score_sees_one_patch(num_downsamples, patch):
    discriminator = PatchDiscriminator(num_downsamples, channels=16)
    for index, module in enumerate(discriminator):
        if isinstance(module, nn.GroupNorm):  # it alone looks at the whole picture
            discriminator[index] = nn.Identity()
    picture = torch.rand(1, 3, 128, 128, requires_grad=True)
    scores = discriminator(picture)
    assert scores.shape[:2] == (1, 1)
    scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2].backward()
    seen = picture.grad.abs().sum(dim=(0, 1)) > 0
    assert seen.any(dim=0).sum() == seen.any(dim=1).sum() == patch


def test_hinge_loss_is_that_of_the_paper():
    discriminator = PatchDiscriminator(channels=16)
    real, decoded = torch.rand(2, 3, 3, 32, 32)
    expected = (
        (1 - discriminator(real)).clamp(min=0).mean() + (1 + discriminator(decoded)).clamp(min=0).mean()
    ) / 2
    torch.testing.assert_close(DiscriminatorLoss(discriminator)(real, decoded), expected)


def test_it_learns_to_tell_sharp_pictures_from_smooth_ones():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(channels=16)
    loss = DiscriminatorLoss(discriminator)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    for _ in range(30):
        real = torch.rand(8, 3, 32, 32) * 2 - 1
        optimizer.zero_grad()
        loss(real, nn.functional.avg_pool2d(real, 3, stride=1, padding=1)).backward()
        optimizer.step()
    real = torch.rand(8, 3, 32, 32) * 2 - 1
    smooth = nn.functional.avg_pool2d(real, 3, stride=1, padding=1)
    assert discriminator(real).mean() > discriminator(smooth).mean() + 0.5


def test_adaptive_weight_makes_both_pulls_on_the_last_layer_equal():
    last = nn.Linear(4, 4)
    output = last(torch.rand(8, 4))
    reconstruction, adversarial = (output - 1).abs().mean(), 100 * output.square().mean()
    weight = adaptive_weight(reconstruction, adversarial, last.weight)
    pulls = [
        torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm()
        for loss in (reconstruction, weight * adversarial)
    ]
    torch.testing.assert_close(pulls[0], pulls[1], rtol=1e-3, atol=0)
    assert not weight.requires_grad
