"""An autoencoder's adversary: PatchGAN, hinge loss and adaptive weight as in VQGAN (arXiv 2012.09841)."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class PatchDiscriminator(nn.Sequential):
    """Judges overlapping patches of a picture: `[B, 3, H, W]` gives a map of scores, higher for real ones.

    Args:
        num_downsamples: convolutions of stride 2. A score sees 16 pixels with 1, 34 with 2, 70 with 3.
        channels: after the first convolution; each further one doubles them.
    """

    def __init__(self, num_downsamples: int = 2, channels: int = 64) -> None:
        super().__init__(nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2))
        for index in range(1, num_downsamples + 1):
            stride = 2 if index < num_downsamples else 1
            # Norms over groups, not over the batch: a score depends on its own picture alone.
            self.append(nn.Conv2d(channels, 2 * channels, 4, stride, padding=1, bias=False))
            self.append(nn.GroupNorm(16, 2 * channels))
            self.append(nn.LeakyReLU(0.2))
            channels *= 2
        self.append(nn.Conv2d(channels, 1, 4, padding=1))


class DiscriminatorLoss(nn.Module):
    """What the discriminator trains: the hinge loss of real and decoded pictures, one `forward` for both."""

    def __init__(self, discriminator: PatchDiscriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: Tensor, decoded: Tensor) -> Tensor:
        real_scores, decoded_scores = self.discriminator(torch.cat([real, decoded])).float().chunk(2)
        return (functional.relu(1 - real_scores).mean() + functional.relu(1 + decoded_scores).mean()) / 2


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_weight: nn.Parameter) -> Tensor:
    """Weight with which the adversarial loss moves the last layer as strongly as the other loss does."""
    by_reconstruction, by_adversary = (
        torch.autograd.grad(loss, last_weight, retain_graph=True)[0].norm()
        for loss in (reconstruction, adversarial)
    )
    return (by_reconstruction / (by_adversary + 1e-4)).clamp(max=1e4)
