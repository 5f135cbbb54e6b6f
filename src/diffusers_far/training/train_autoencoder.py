"""Train diffusers' `AutoencoderDC` on single frames of videos.

    python -m training.train_autoencoder RECIPE.yaml [--option value ...]
    python -m training.train_autoencoder --data DATA --output-dir OUTPUT [--option value ...]

A recipe is a YAML file of the options below; options on the command line win. The result is
OUTPUT/autoencoder, as `save_pretrained` writes it: the averaged weights, and `scaling_factor` = 1 / deviation
of the latents.

As published, a second run sharpens the first one's decoder against a discriminator, on the same latents:

    --init-from RUN/autoencoder --freeze-encoder --perceptual-loss-weight 1 --adversarial-loss-weight 0.5

    latent = autoencoder.encode(2 * frame - 1).latent * scaling_factor                  # frame in [0, 1]
    frame = (autoencoder.decode(latent / scaling_factor).sample / 2 + 0.5).clamp(0, 1)

Shapes: B batch, C latent channels, H x W frame, h x w latent grid.
"""

import hashlib
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn
from torch.nn import functional

from ..lpips import LPIPS
from ..metrics import psnr, sharpness
from ..presets import autoencoder_config
from .episodes import load_frames
from .options import AutoencoderOptions, parse, script
from .patch_discriminator import DiscriminatorLoss, PatchDiscriminator, adaptive_weight
from .run import Run
from .sources import open_source


class Transform(NamedTuple):
    """A mirror image at a smaller size, of frames or of their latents alike."""

    height: int  # of the latent grid
    width: int
    mirrored: bool

    def __call__(self, images: Tensor, factor: int = 1) -> Tensor:
        """Images `[B, C, H, W]`, of `factor` pixels for one of the latent grid, per side."""
        images = images.flip(-1) if self.mirrored else images
        size = (factor * self.height, factor * self.width)
        if images.shape[-2:] == size:
            return images
        return functional.interpolate(images, size, mode="bicubic", antialias=True)


class Reconstruction(nn.Module):
    """Decodes what it encodes, in one `forward`, so that wrappers for several processes see all of it."""

    def __init__(self, autoencoder: AutoencoderDC, latent_noise: float) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.latent_noise = latent_noise

    def forward(
        self, frames: Tensor, generator: torch.Generator | None = None, transform: Transform | None = None
    ) -> Tensor:
        """Frames [B, 3, H, W] in [-1, 1] to their reconstructions, or those of the transformed latents."""
        latents = self.autoencoder.encode(frames).latent  # [B, C, h, w]
        if transform is not None:
            latents = transform(latents)
        if self.latent_noise:
            # The deviation is a constant here, or the encoder would learn to drown the noise.
            deviation = latents.detach().float().std()
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            latents = latents + self.latent_noise * deviation * noise
        return self.autoencoder.decode(latents).sample.float()


class AutoencoderTrainer:
    """What training an autoencoder adds to a run."""

    def __init__(self, options: AutoencoderOptions) -> None:
        self.options = options
        self.run = Run("autoencoder", options)
        if self.run.is_sharded:
            raise ValueError(
                "fsdp_version=2 of accelerate: an autoencoder is small, and trained without FSDP"
            )
        accelerator, device = self.run.accelerator, self.run.accelerator.device
        cache_dir = options.cache_dir or f"{options.data.rstrip('/')}.cache"
        source = open_source(options.data, ignore_actions=True, camera=options.camera)
        with accelerator.main_process_first():  # the others find the decoded frames
            self.frames, held_out = (
                load_frames(source.split(split), cache_dir, options)
                for split in (options.train_split, options.validation_split)
            )
        self.held_out_frames = spread(held_out, options.num_validation_frames)
        self.autoencoder = build_autoencoder(options).to(device)
        height, width, factor = *self.frames.shape[1:3], self.autoencoder.spatial_compression_ratio
        if height % factor or width % factor:
            raise ValueError(
                f"{options.data} has frames of {height} x {width} pixels; it takes multiples of {factor}"
            )
        trained = [parameter for parameter in self.autoencoder.parameters() if parameter.requires_grad]
        betas = (options.adam_beta1, options.adam_beta2)
        optimizer = torch.optim.AdamW(trained, options.learning_rate, betas=betas, weight_decay=0.0)
        data = hashlib.sha256(
            repr(self.frames.shape).encode() + spread(self.frames, 64).tobytes()
        ).hexdigest()
        model = Reconstruction(self.autoencoder, options.latent_noise)
        config = dict(self.autoencoder.config)
        self.model, self.optimizers = self.run.prepare(model, [optimizer], config, data, {})
        self.models = [self.model]
        self.perceptual = None
        if options.perceptual_loss_weight:
            self.perceptual = _on(LPIPS("vgg16"), device)
        self.discriminator = None
        if options.adversarial_loss_weight:
            # A convolution, or a block with one, depending on whether there are layers at full resolution.
            last = self.autoencoder.decoder.conv_out
            self.last_weight = [weight for weight in last.parameters() if weight.ndim == 4][-1]
            self.discriminator = PatchDiscriminator(options.discriminator_downsamples)
            _on(self.discriminator, device)
            rate, weights = options.discriminator_learning_rate, self.discriminator.parameters()
            self.discriminator_loss, self.discriminator_optimizer = accelerator.prepare(
                DiscriminatorLoss(self.discriminator),
                torch.optim.AdamW(weights, rate, betas=(0.5, 0.9), weight_decay=0.0),
            )
            self.models.append(self.discriminator_loss)

    def train(self) -> bool:
        """From the first step, or a checkpoint, to the autoencoder; False if a signal ended it."""
        finished = self.run.train(self)
        if finished:
            self.run.export("autoencoder", self._write)
        return finished

    def step(self, index: int) -> dict[str, float]:
        """Forward and backward of batch `index` of the run."""
        run, accelerator = self.run, self.run.accelerator
        frames = draw_batch(self.frames, self.options, index, accelerator.process_index)
        inputs = to_input(frames, accelerator.device)
        factor = self.autoencoder.spatial_compression_ratio
        grid = (inputs.shape[-2] // factor, inputs.shape[-1] // factor)
        transform = draw_transform(grid, self.options, index, accelerator.process_index)
        decoded = self.model(inputs, run.generator(index, rank=accelerator.process_index), transform)
        if transform is not None:
            inputs = transform(inputs, factor)
        loss, max_norm = self.loss(inputs, decoded), self.options.max_grad_norm
        values = run.descend(loss, self.model, self.optimizers, max_norm)
        if self.discriminator is not None:
            loss = self.discriminator_loss(inputs, decoded.detach())
            run.descend(loss, self.discriminator, [self.discriminator_optimizer], math.inf)
        return {**values, "frames": len(inputs) * accelerator.num_processes}

    def loss(self, inputs: Tensor, decoded: Tensor) -> Tensor:
        """Distance of reconstructions to frames, each [B, 3, H, W] in [-1, 1]."""
        options, accelerator = self.options, self.run.accelerator
        loss = pixel_loss(decoded, inputs, options.gradient_loss_weight)
        if self.perceptual is not None:
            with accelerator.autocast():
                distance = self.perceptual(decoded, inputs).mean()
            loss = loss + options.perceptual_loss_weight * distance
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)  # it judges here and learns afterwards
            with accelerator.autocast():
                adversarial = -self.discriminator(decoded).float().mean()
            self.discriminator.requires_grad_(True)
            weight = adaptive_weight(loss, adversarial, self.last_weight)
            loss = loss + options.adversarial_loss_weight * weight * adversarial
        return loss

    def validate(self) -> dict[str, float]:
        """PSNR in dB, and sharpness as a share of the frames', of the held-out frames."""
        self.autoencoder.eval()
        quality, sharp = measure(self.autoencoder, self.held_out_frames, self.run.accelerator.device)
        self.autoencoder.train()
        return {"validation_psnr": quality, "validation_sharpness": sharp}

    def save_weights(self) -> None:
        """Nothing: the autoencoder is written at the end, when its scaling factor is measured."""

    def _write(self, _: nn.Module, folder: Path) -> None:
        autoencoder, options = self.autoencoder, self.options
        if not options.freeze_encoder:
            sample = spread(self.frames, options.num_scaling_frames)
            factor = measure_scaling_factor(autoencoder, sample, self.run.accelerator.device)
            autoencoder.register_to_config(scaling_factor=factor)
        autoencoder.to(memory_format=torch.contiguous_format).save_pretrained(folder)


def _on(network: Any, device: torch.device) -> Any:
    return network.to(device, memory_format=torch.channels_last)  # which the stubs of torch do not know


def build_autoencoder(options: AutoencoderOptions) -> AutoencoderDC:
    if options.init_from is not None:
        autoencoder = AutoencoderDC.from_pretrained(options.init_from)
    elif options.compression is not None:
        autoencoder = AutoencoderDC(**autoencoder_config(options.compression))
    else:
        config: dict[str, Any] = {}
        for side in ("encoder", "decoder"):
            config[f"{side}_block_out_channels"] = tuple(options.block_out_channels)
            config[f"{side}_layers_per_block"] = tuple(options.layers_per_block)
            config[f"{side}_qkv_multiscales"] = ((),) * len(options.block_out_channels)
        autoencoder = AutoencoderDC(latent_channels=options.latent_channels, **config)
    autoencoder.train()  # published decoders have batch norms
    autoencoder.encoder.requires_grad_(not options.freeze_encoder)
    return autoencoder.to(memory_format=torch.channels_last)  # the norms are over channels


def pixel_loss(decoded: Tensor, frames: Tensor, gradient_weight: float) -> Tensor:
    """L1 of pixels and, weighted, of the differences between neighbours."""
    error = decoded - frames
    # The gradient of the error is the error of the gradients: it keeps edges sharp.
    gradients = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + gradient_weight * gradients


def to_input(frames: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [B, H, W, 3] to the autoencoder's input: float32 [B, 3, H, W] in [-1, 1], channels last."""
    return torch.from_numpy(frames).to(device).movedim(-1, 1).float() / 127.5 - 1


def draw_batch(frames: np.ndarray, options: AutoencoderOptions, index: int, process: int) -> np.ndarray:
    """Frames of one forward; drawn from the options alone, so that a resumed run goes on alike."""
    generator = np.random.default_rng((options.seed, index, process))
    return frames[np.sort(generator.integers(len(frames), size=options.batch_size))]


def draw_transform(
    grid: tuple[int, int], options: AutoencoderOptions, index: int, process: int
) -> Transform | None:
    """Of the latents of one forward: half to full size, mirrored or not; None for most batches."""
    generator = np.random.default_rng((options.seed, index, process, 1))
    if generator.random() >= options.equivariance_probability:
        return None
    scale = generator.uniform(0.5, 1)
    height, width = (max(1, round(scale * side)) for side in grid)
    return Transform(height, width, bool(generator.random() < 0.5))


def spread(frames: np.ndarray, count: int) -> np.ndarray:
    """`count` frames, evenly spaced over all of them."""
    return frames[np.linspace(0, len(frames) - 1, min(count, len(frames))).astype(int)]


def chunks(frames: np.ndarray) -> list[np.ndarray]:
    """The frames in parts of up to 64."""
    return np.array_split(frames, math.ceil(len(frames) / 64))


@torch.no_grad()
def measure(autoencoder: AutoencoderDC, frames: np.ndarray, device: torch.device) -> tuple[float, float]:
    """PSNR in dB, the mean over frames, and sharpness as a share of theirs, of reconstructions.

    Args:
        frames: uint8 [N, H, W, 3].
    """
    qualities, sharp, sharp_frames = [], 0.0, 0.0
    for chunk in chunks(frames):
        inputs = to_input(chunk, device)
        decoded = autoencoder.decode(autoencoder.encode(inputs).latent).sample.clamp(-1, 1)
        qualities.append(psnr(decoded[None] / 2 + 0.5, inputs[None] / 2 + 0.5).flatten())
        sharp += len(chunk) * sharpness(decoded)
        sharp_frames += len(chunk) * sharpness(inputs)
    return torch.cat(qualities).mean().item(), sharp / max(sharp_frames, 1e-10)


@torch.no_grad()
def measure_scaling_factor(autoencoder: AutoencoderDC, frames: np.ndarray, device: torch.device) -> float:
    """1 / standard deviation of the latents of uint8 frames [N, H, W, 3]."""
    latents = [autoencoder.encode(to_input(chunk, device)).latent for chunk in chunks(frames)]
    return 1 / torch.cat(latents).double().std().item()


def main(command_line: list[str]) -> None:
    with script():
        trainer = AutoencoderTrainer(*parse(command_line, (AutoencoderOptions,), __doc__))
        if not trainer.train():
            sys.exit(128 + (trainer.run.received_signal or 0))  # as the shell says of what a signal ended


if __name__ == "__main__":
    main(sys.argv[1:])
