"""The published sizes and models of FAR (arXiv 2503.19325), as the arguments that build and sample them.

model = FARTransformer3DModel(**preset("far-l-ucf101-uncond-128").transformer)
frames = pipe(**preset("far-l-ucf101-uncond-128").sampling).frames
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal, TypedDict

Size = Literal["B", "M", "L", "XL"]
Compression = Literal[8, 16, 32]

LAYERS_AND_HEADS: dict[Size, tuple[int, int]] = {"B": (12, 12), "M": (12, 16), "L": (24, 16), "XL": (28, 18)}


class TransformerConfig(TypedDict):
    """Arguments of [`FARTransformer3DModel`]."""

    patch_size: int
    long_patch_size: int | None
    in_channels: int
    out_channels: int | None
    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    axes_dims_rope: tuple[int, int, int]
    num_classes: int | None
    num_actions: int | None
    short_window: int


class AutoencoderConfig(TypedDict):
    """Arguments of diffusers' `AutoencoderDC`."""

    in_channels: int
    latent_channels: int
    attention_head_dim: int
    encoder_block_types: tuple[str, ...]
    decoder_block_types: tuple[str, ...]
    encoder_block_out_channels: tuple[int, ...]
    decoder_block_out_channels: tuple[int, ...]
    encoder_layers_per_block: tuple[int, ...]
    decoder_layers_per_block: tuple[int, ...]
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...]
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...]
    decoder_norm_types: tuple[str, ...]
    decoder_act_fns: tuple[str, ...]
    downsample_block_type: str
    upsample_block_type: str
    scaling_factor: float


class SamplingConfig(TypedDict):
    """Arguments of [`FARVideoPipeline.__call__`]."""

    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float


def transformer_config(
    size: Size,
    *,
    long_patch_size: int | None = None,
    num_classes: int | None = None,
    num_actions: int | None = None,
    short_window: int = 16,
) -> TransformerConfig:
    """A transformer of a published size; `long_patch_size=4` makes it a published Long model."""
    num_layers, num_attention_heads = LAYERS_AND_HEADS[size]
    return TransformerConfig(
        patch_size=1,
        long_patch_size=long_patch_size,
        in_channels=32,
        out_channels=32,
        num_layers=num_layers,
        num_attention_heads=num_attention_heads,
        attention_head_dim=64,
        axes_dims_rope=(16, 24, 24),
        num_classes=num_classes,
        num_actions=num_actions,
        short_window=short_window,
    )


def autoencoder_config(compression: Compression) -> AutoencoderConfig:
    """The published DC-AE with `compression` pixels per latent pixel and side, a stage per factor of two."""
    num_stages = compression.bit_length()
    num_resnet_stages = 3
    num_transformer_stages = num_stages - num_resnet_stages
    block_types = ("ResBlock",) * num_resnet_stages + ("EfficientViTBlock",) * num_transformer_stages
    block_out_channels = (128, 256, 512, 512, 1024, 1024)[:num_stages]
    return AutoencoderConfig(
        in_channels=3,
        latent_channels=32,
        attention_head_dim=32,
        encoder_block_types=block_types,
        decoder_block_types=block_types,
        encoder_block_out_channels=block_out_channels,
        decoder_block_out_channels=block_out_channels,
        encoder_layers_per_block=(0, 4, 8) + (2,) * num_transformer_stages,
        decoder_layers_per_block=(0, 5, 10) + (2,) * num_transformer_stages,
        encoder_qkv_multiscales=((),) * num_stages,
        decoder_qkv_multiscales=((),) * num_stages,
        decoder_norm_types=("batch_norm",) * num_resnet_stages + ("rms_norm",) * num_transformer_stages,
        decoder_act_fns=("relu",) * num_resnet_stages + ("silu",) * num_transformer_stages,
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
        scaling_factor=0.2889,
    )


@dataclass(frozen=True)
class FARPreset:
    """One published model.

    Args:
        name: what [`preset`] finds it by.
        size: B, M, L or XL.
        resolution: pixels per side of its frames.
        compression: pixels per latent pixel and side of its autoencoder.
        transformer_file, autoencoder_file: the published files, by path in the authors' Hub repository.
        num_frames: frames of a video in its evaluation, the context included, and of the longest clips of its
            training.
        num_context_frames: how many of them are given.
        guidance_scale: that of its evaluation.
        long_patch_size, num_classes, num_actions, short_window: as in [`FARTransformer3DModel`].
    """

    name: str
    size: Size
    resolution: int
    compression: Compression
    transformer_file: str
    autoencoder_file: str
    num_frames: int
    num_context_frames: int = 0
    guidance_scale: float = 1.0
    long_patch_size: int | None = None
    num_classes: int | None = None
    num_actions: int | None = None
    short_window: int = 16

    @property
    def transformer(self) -> TransformerConfig:
        """Arguments of its [`FARTransformer3DModel`]."""
        return transformer_config(
            self.size,
            long_patch_size=self.long_patch_size,
            num_classes=self.num_classes,
            num_actions=self.num_actions,
            short_window=self.short_window,
        )

    @property
    def autoencoder(self) -> AutoencoderConfig:
        """Arguments of its `AutoencoderDC`."""
        return autoencoder_config(self.compression)

    @property
    def sampling(self) -> SamplingConfig:
        """Arguments that sample it as in its evaluation (a prediction model also needs its context)."""
        return SamplingConfig(
            height=self.resolution,
            width=self.resolution,
            num_frames=self.num_frames,
            num_inference_steps=50,
            guidance_scale=self.guidance_scale,
        )


def _ucf101_generation(size: Size, resolution: int, file: str, num_classes: int | None = None) -> FARPreset:
    condition = "cond" if num_classes else "uncond"
    return FARPreset(
        name=f"far-{size.lower()}-ucf101-{condition}-{resolution}",
        size=size,
        resolution=resolution,
        compression=16 if resolution == 128 else 32,
        transformer_file=f"video_generation/{file}",
        autoencoder_file=f"dcae/DCAE_UCF101_Res{'128-bb9d1258' if resolution == 128 else '256-9c4355c8'}.pth",
        num_frames=16,
        guidance_scale=2.0 if num_classes else 1.0,
        num_classes=num_classes,
    )


_MODELS = (
    _ucf101_generation("L", 128, "FAR_L_UCF101_Uncond128-c19abd2c.pth"),
    _ucf101_generation("L", 128, "FAR_L_UCF101_Cond128-c6f798bf.pth", num_classes=101),
    _ucf101_generation("L", 256, "FAR_L_UCF101_Uncond256-adea51e9.pth"),
    _ucf101_generation("L", 256, "FAR_L_UCF101_Cond256-41c6033f.pth", num_classes=101),
    _ucf101_generation("XL", 256, "FAR_XL_UCF101_Uncond256-3594ce6b.pth"),
    _ucf101_generation("XL", 256, "FAR_XL_UCF101_Cond256-28a88f56.pth", num_classes=101),
    FARPreset(
        name="far-b-ucf101-64",
        size="B",
        resolution=64,
        compression=8,
        transformer_file="short_video_prediction/FAR_B_UCF101_Uncond64-381d295f.pth",
        autoencoder_file="dcae/DCAE_UCF101_Res64-9da18dcf.pth",
        num_frames=16,
        num_context_frames=4,
    ),
    FARPreset(
        name="far-b-bair-64",
        size="B",
        resolution=64,
        compression=8,
        transformer_file="short_video_prediction/FAR_B_BAIR_Uncond64-1983191b.pth",
        autoencoder_file="dcae/DCAE_BAIR_Res64-1a8547fb.pth",
        num_frames=30,
        num_context_frames=2,
        short_window=30,
    ),
    FARPreset(
        name="far-b-long-dmlab",
        size="B",
        resolution=64,
        compression=8,
        transformer_file="long_video_prediction/FAR_B_Long_DMLab_Action64-c09441dc.pth",
        autoencoder_file="dcae/DCAE_DMLab_Res64-17035ae5.pth",
        num_frames=300,
        num_context_frames=144,
        guidance_scale=1.5,
        long_patch_size=4,
        num_actions=4,
    ),
    FARPreset(
        name="far-m-long-minecraft",
        size="M",
        resolution=128,
        compression=16,
        transformer_file="long_video_prediction/FAR_M_Long_Minecraft_Action128-4c041561.pth",
        autoencoder_file="dcae/DCAE_Minecraft_Res128-a5677f66.pth",
        num_frames=300,
        num_context_frames=144,
        guidance_scale=1.5,
        long_patch_size=4,
        num_actions=4,
    ),
)

PRESETS = tuple(model.name for model in _MODELS)


def preset(name: str) -> FARPreset:
    """The published model of this name, one of `PRESETS`."""
    for model in _MODELS:
        if model.name == name:
            return model
    raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")


def preset_of_file(file: str | PurePath) -> FARPreset | None:
    """The published model whose transformer file has this name, whatever its folder, if there is one."""
    file_name = PurePath(file).name
    return next((model for model in _MODELS if PurePath(model.transformer_file).name == file_name), None)


_REQUIRED_KEYS = ("in_channels", "num_layers", "attention_head_dim", "num_attention_heads", "axes_dims_rope")
_OPTIONAL_KEYS = (
    "patch_size",
    "context_patch_size",
    "out_channels",
    "short_term_ctx_winsize",
    "condition_cfg",
    "slope_scale",
)
_CONDITION_KEYS = {"label": "num_classes", "action": "num_action_classes"}


def convert_published_config(config: Mapping[str, Any]) -> tuple[TransformerConfig, float]:
    """Our arguments, and the slope of FlexRoPE, from a configuration with the authors' keys.

    The slope is theirs to keep in the model; ours takes it when sampling (`flex_rope_slope`).
    """
    unknown = sorted(set(config) - {*_REQUIRED_KEYS, *_OPTIONAL_KEYS})
    missing = [key for key in _REQUIRED_KEYS if key not in config]
    if unknown or missing:
        problems = [f"unknown key {key}" for key in unknown] + [f"missing key {key}" for key in missing]
        raise ValueError(f"not a published FAR configuration: {', '.join(problems)}")

    axes_dims_rope = config["axes_dims_rope"]
    if not isinstance(axes_dims_rope, list | tuple) or len(axes_dims_rope) != 3:
        raise ValueError(
            f"axes_dims_rope must be three integers (frame, row, column), found {axes_dims_rope!r}"
        )
    slope = config.get("slope_scale", 0)
    if isinstance(slope, bool) or not isinstance(slope, int | float):
        raise ValueError(f"slope_scale must be a number, found {slope!r}")
    condition = config.get("condition_cfg") or {}
    if not isinstance(condition, Mapping):
        raise ValueError(f"condition_cfg must be an object, found {condition!r}")
    if condition and (kind := condition.get("type")) not in _CONDITION_KEYS:
        raise ValueError(f"condition_cfg must have the type label or action, found {kind!r}")
    num_conditions = {
        kind: _size(condition, key) if condition.get("type") == kind else None
        for kind, key in _CONDITION_KEYS.items()
    }
    transformer = TransformerConfig(
        patch_size=_size(config, "patch_size", 1),
        long_patch_size=None
        if config.get("context_patch_size") is None
        else _size(config, "context_patch_size"),
        in_channels=_size(config, "in_channels"),
        out_channels=None if config.get("out_channels") is None else _size(config, "out_channels"),
        num_layers=_size(config, "num_layers"),
        num_attention_heads=_size(config, "num_attention_heads"),
        attention_head_dim=_size(config, "attention_head_dim"),
        axes_dims_rope=tuple(axes_dims_rope),
        num_classes=num_conditions["label"],
        num_actions=num_conditions["action"],
        short_window=_size(config, "short_term_ctx_winsize", 16),
    )
    return transformer, float(slope)


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be a positive integer, found {value!r}")
    return value
