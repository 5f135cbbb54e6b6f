"""Models small enough for tests, with random weights: as built, a FAR transformer predicts zeros."""

from typing import Any

import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffusers_far import FARTransformer3DModel, FARVideoPipeline

# Largest `relative_error` allowed between two ways to the same float32 result. CPUs add in different orders:
# up to 2e-5 was seen. Real faults are at least 100 times this, as `tests/parity/test_faults.py` shows.
TOLERANCE = 1e-4

CHANNELS, GRID = 4, 8  # latents of the tiny autoencoder: [B, F, 4, 8, 8] for 64 x 64 pixels

SIZE = {
    "in_channels": CHANNELS,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}
LONG = {"long_patch_size": 4, "short_window": 4}

AUTOENCODER = {
    "latent_channels": CHANNELS,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16, 16, 16),
    "decoder_block_out_channels": (8, 16, 16, 16),
    "encoder_layers_per_block": (0, 1, 1, 1),
    "decoder_layers_per_block": (0, 1, 1, 1),
    "encoder_qkv_multiscales": ((), (), (), ()),
    "decoder_qkv_multiscales": ((), (), (), ()),
    "decoder_norm_types": ("batch_norm", "batch_norm", "batch_norm", "rms_norm"),
    "decoder_act_fns": ("relu", "relu", "relu", "silu"),
    "downsample_block_type": "pixel_unshuffle",
    "upsample_block_type": "pixel_shuffle",
    "scaling_factor": 0.3,
}


def transformer(seed: int = 0, std: float = 0.15, **config: Any) -> FARTransformer3DModel:
    """A model whose output depends on everything that goes in: weights drawn anew, with `std`."""
    model = FARTransformer3DModel(**SIZE | config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        # RMSNorm weights stay around 1, the output head small so that rollouts stay in range.
        around, spread = (1.0, 0.1) if "attn.norm" in name else (0.0, std)
        draw = torch.randn(parameter.shape, generator=generator)
        parameter.data = (around + spread * draw).to(parameter.dtype)
    return model.eval()


def long_transformer(seed: int = 0, **config: Any) -> FARTransformer3DModel:
    return transformer(seed, **LONG | config)


def autoencoder(seed: int = 0) -> AutoencoderDC:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderDC(**AUTOENCODER).eval()


def pipeline(model: FARTransformer3DModel | None = None, **settings: Any) -> FARVideoPipeline:
    """A pipeline of 64 x 64 videos, three steps per frame, without progress bars."""
    settings = {"sample_size": 64, "num_inference_steps": 3} | settings
    pipe = FARVideoPipeline(
        model if model is not None else transformer(num_actions=4),
        autoencoder(),
        FlowMatchEulerDiscreteScheduler(),
        **settings,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents(batch_size: int, num_frames: int, seed: int = 1) -> Tensor:
    """Latents `[B, F, 4, 8, 8]` of some video."""
    return noise(batch_size, num_frames, CHANNELS, GRID, GRID, seed=seed)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def max_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; shapes must agree, and NaN counts as infinite."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} is not {tuple(expected.shape)}"
    return float((found.detach().float() - expected.detach().float()).abs().nan_to_num(nan=torch.inf).max())


def relative_error(found: Tensor, expected: Tensor) -> float:
    """`max_error` as a share of the largest expected value, since rounding errors grow with the values."""
    error, scale = max_error(found, expected), float(expected.detach().abs().max())
    return error / scale if scale > 0 else (0.0 if error == 0 else float("inf"))
