"""Train diffusers' `AutoencoderDC` on single frames of a videofolder.

    python training/train_autoencoder.py RECIPE.yaml [--argument value ...]
    python training/train_autoencoder.py --data DATA --output_dir DIR [--argument value ...]

The recipe holds arguments by their names; the command line wins over it. The result is DIR/autoencoder, in
`save_pretrained` layout: the averaged (EMA) weights, and `scaling_factor` = 1 / deviation of the latents.

As published, a second run sharpens the first one's decoder against a discriminator, on the same latents:

    --init_from DIR/autoencoder --freeze_encoder true --perceptual_loss_weight 1 --adversarial_loss_weight 0.5

    latent = autoencoder.encode(2 * frame - 1).latent * scaling_factor                  # frame in [0, 1]
    frame = (autoencoder.decode(latent / scaling_factor).sample / 2 + 0.5).clamp(0, 1)

Shapes: B batch, C latent channels, H x W frame, h x w latent grid.
"""

import logging
import math
import shutil
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderDC
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout: this file is run as a script

from evaluation.lpips import LPIPS
from evaluation.metrics import sharpness
from training.data.video_folder import list_episodes, load_frames
from training.patch_discriminator import DiscriminatorLoss, PatchDiscriminator, adaptive_weight

logger = logging.getLogger("train_autoencoder")


@dataclass
class AutoencoderArguments:
    """Arguments of a run, in a recipe or on the command line."""

    data: str = field(metadata={"help": "videofolder: <split>/*.mp4 and <split>/metadata.jsonl"})
    output_dir: str = field(metadata={"help": "takes checkpoint-<step> folders and, at the end, autoencoder"})
    cache_dir: str | None = field(default=None, metadata={"help": "decoded frames; default: beside the data"})
    train_split: str = "train"
    validation_split: str = "validation"

    latent_channels: int = 16
    block_out_channels: list[int] = field(default_factory=lambda: [32, 48, 96, 128])
    layers_per_block: list[int] = field(
        default_factory=lambda: [0, 1, 1, 2], metadata={"help": "0 first: no layer at full resolution"}
    )
    init_from: str | None = field(default=None, metadata={"help": "folder of an autoencoder to go on from"})
    freeze_encoder: bool = field(
        default=False, metadata={"help": "train the decoder of init_from only: encoded latents stay valid"}
    )

    max_train_steps: int = 10_000
    batch_size: int = field(default=32, metadata={"help": "frames per step and process"})
    learning_rate: float = 1e-3
    warmup_steps: int = field(default=100, metadata={"help": "then a cosine to zero"})
    max_grad_norm: float = 1.0
    gradient_loss_weight: float = field(
        default=0.5, metadata={"help": "weight of the L1 of differences in x and y beside the L1 of pixels"}
    )
    perceptual_loss_weight: float = field(
        default=0.0, metadata={"help": "weight of LPIPS (VGG); published: 1"}
    )
    adversarial_loss_weight: float = field(
        default=0.0,
        metadata={"help": "weight of a discriminator's opinion, times the adaptive one; published: 0.5"},
    )
    discriminator_learning_rate: float = field(default=2e-4, metadata={"help": "constant"})
    discriminator_downsamples: int = field(
        default=2, metadata={"help": "it judges patches of 16 pixels with 1, 34 with 2, 70 with 3"}
    )
    latent_noise: float = field(
        default=0.0, metadata={"help": "noise on what the decoder sees, in deviations of the batch's latents"}
    )
    ema_decay: float = 0.999
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16"})
    num_threads: int | None = field(default=None, metadata={"help": "CPU threads of torch"})
    seed: int = 0

    logging_steps: int = 50
    validation_steps: int = 500
    num_validation_frames: int = 512
    num_scaling_frames: int = field(default=4096, metadata={"help": "training frames behind scaling_factor"})
    save_steps: int = 500
    keep_checkpoints: int = 2
    resume_from: str | None = field(
        default=None, metadata={"help": "a checkpoint folder, or latest: the newest one, if there is any"}
    )

    def __post_init__(self) -> None:
        for name in (
            *("latent_channels", "max_train_steps", "batch_size", "learning_rate", "max_grad_norm"),
            *("logging_steps", "validation_steps", "num_validation_frames", "num_scaling_frames"),
            *("save_steps", "keep_checkpoints", "discriminator_learning_rate", "discriminator_downsamples"),
        ):
            require(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        for name in (
            *("warmup_steps", "gradient_loss_weight", "perceptual_loss_weight", "adversarial_loss_weight"),
            "latent_noise",
        ):
            require(getattr(self, name) >= 0, name, getattr(self, name), "a number of at least 0")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "a number in [0, 1)")
        precision = self.mixed_precision
        require(precision in ("no", "bf16", "fp16"), "mixed_precision", precision, "no, bf16 or fp16")
        same_length = len(self.layers_per_block) == len(self.block_out_channels)
        require(same_length, "layers_per_block", self.layers_per_block, "one number per block_out_channels")
        if self.freeze_encoder:
            require(self.init_from is not None, "init_from", None, "a folder, as freeze_encoder is set")


def require(condition: bool, name: str, got: object, takes: str) -> None:
    if not condition:
        raise ValueError(f"{name}: got {got!r}; it takes {takes}")


def parse_arguments(command_line: list[str]) -> AutoencoderArguments:
    """Arguments of the recipe, if the first word is a YAML file, overridden by the words after it."""
    words = command_line
    if command_line and command_line[0].endswith((".yaml", ".yml")):
        recipe = yaml.safe_load(Path(command_line[0]).read_text())
        names = [argument.name for argument in fields(AutoencoderArguments)]
        words = []
        for name, value in recipe.items():
            require(name in names, "recipe", name, f"{', '.join(names)}")
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values)]
        words += command_line[1:]  # argparse keeps the last of several values
    (arguments,) = HfArgumentParser(AutoencoderArguments).parse_args_into_dataclasses(words)
    return arguments


class Reconstruction(nn.Module):
    """Decodes what it encodes, in one `forward`, so that wrappers for several processes see all of it."""

    def __init__(self, autoencoder: AutoencoderDC, latent_noise: float) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.latent_noise = latent_noise

    def forward(self, frames: Tensor) -> Tensor:
        """Frames [B, 3, H, W] in [-1, 1] to their reconstructions."""
        latents = self.autoencoder.encode(frames).latent  # [B, C, h, w]
        if self.latent_noise:
            # The deviation is a constant here, or the encoder would learn to drown the noise.
            deviation = latents.detach().float().std()
            latents = latents + self.latent_noise * deviation * torch.randn_like(latents)
        return self.autoencoder.decode(latents).sample.float()


def pixel_loss(decoded: Tensor, frames: Tensor, gradient_weight: float) -> Tensor:
    """L1 of pixels and, weighted, of the differences between neighbours."""
    error = decoded - frames
    # The gradient of the error is the error of the gradients: it keeps edges sharp.
    gradients = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + gradient_weight * gradients


def build_autoencoder(arguments: AutoencoderArguments) -> AutoencoderDC:
    if arguments.init_from is not None:
        autoencoder = AutoencoderDC.from_pretrained(arguments.init_from)
    else:
        scales: tuple[tuple[int, ...], ...] = ((),) * len(arguments.block_out_channels)
        autoencoder = AutoencoderDC(
            latent_channels=arguments.latent_channels,
            encoder_block_out_channels=tuple(arguments.block_out_channels),
            decoder_block_out_channels=tuple(arguments.block_out_channels),
            encoder_layers_per_block=tuple(arguments.layers_per_block),
            decoder_layers_per_block=tuple(arguments.layers_per_block),
            encoder_qkv_multiscales=scales,
            decoder_qkv_multiscales=scales,
        )
    autoencoder.encoder.requires_grad_(not arguments.freeze_encoder)
    return autoencoder.to(memory_format=torch.channels_last)  # the norms are over channels


def to_input(frames: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [B, H, W, 3] to the autoencoder's input: float32 [B, 3, H, W] in [-1, 1], channels last."""
    return torch.from_numpy(frames).to(device).movedim(-1, 1).float() / 127.5 - 1


def draw_batch(frames: np.ndarray, arguments: AutoencoderArguments, step: int, process: int) -> np.ndarray:
    """Frames of one step; drawn from the arguments alone, so that a resumed run goes on alike."""
    generator = np.random.default_rng((arguments.seed, step, process))
    return frames[np.sort(generator.integers(len(frames), size=arguments.batch_size))]


def spread(frames: np.ndarray, count: int) -> np.ndarray:
    """`count` frames, evenly spaced over all of them."""
    return frames[np.linspace(0, len(frames) - 1, min(count, len(frames))).astype(int)]


def learning_rate_at(step: int, arguments: AutoencoderArguments) -> float:
    """Learning rate of a step, counted from 0: linear warm-up, then a cosine to zero."""
    warmup = min(1.0, (step + 1) / (arguments.warmup_steps + 1))
    return arguments.learning_rate * warmup * (1 + math.cos(math.pi * step / arguments.max_train_steps)) / 2


@torch.no_grad()
def measure(autoencoder: AutoencoderDC, frames: np.ndarray, device: torch.device) -> tuple[float, float]:
    """PSNR in dB, the mean over frames, and sharpness as a share of theirs, of reconstructions.

    Args:
        frames: uint8 [N, H, W, 3].
    """
    errors, sharp, sharp_frames = [], 0.0, 0.0
    for chunk in np.array_split(frames, math.ceil(len(frames) / 64)):
        inputs = to_input(chunk, device)
        decoded = autoencoder.decode(autoencoder.encode(inputs).latent).sample.clamp(-1, 1)
        errors.append(((decoded - inputs) / 2).square().mean(dim=(1, 2, 3)))
        sharp += len(chunk) * sharpness(decoded)
        sharp_frames += len(chunk) * sharpness(inputs)
    psnr = -10 * torch.cat(errors).clamp(min=1e-10).log10().mean().item()
    return psnr, sharp / max(sharp_frames, 1e-10)


@torch.no_grad()
def measure_scaling_factor(autoencoder: AutoencoderDC, frames: np.ndarray, device: torch.device) -> float:
    """1 / standard deviation of the latents of uint8 frames [N, H, W, 3]."""
    chunks = np.array_split(frames, math.ceil(len(frames) / 64))
    latents = [autoencoder.encode(to_input(chunk, device)).latent for chunk in chunks]
    return 1 / torch.cat(latents).double().std().item()


def list_checkpoints(arguments: AutoencoderArguments) -> list[Path]:
    """Checkpoints of the output folder, the newest last."""
    folders = Path(arguments.output_dir).glob("checkpoint-*[0-9]")
    return sorted(folders, key=checkpoint_step)


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def find_checkpoint(arguments: AutoencoderArguments) -> Path | None:
    """The folder to resume from; None to start anew."""
    if arguments.resume_from is None:
        return None
    if arguments.resume_from == "latest":
        return max(list_checkpoints(arguments), key=checkpoint_step, default=None)
    folder = Path(arguments.resume_from)
    is_checkpoint = folder.is_dir() and folder.name.removeprefix("checkpoint-").isdecimal()
    require(is_checkpoint, "resume_from", str(folder), "latest or a folder checkpoint-<step>")
    return folder


def save_checkpoint(accelerator: Accelerator, arguments: AutoencoderArguments, step: int) -> None:
    folder = Path(arguments.output_dir) / f"checkpoint-{step}"
    partial = folder.with_name(folder.name + ".partial")
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()  # every process has a file of its own in it
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
        for old in list_checkpoints(arguments)[: -arguments.keep_checkpoints]:
            shutil.rmtree(old)


def save_autoencoder(autoencoder: AutoencoderDC, folder: Path) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    autoencoder.to(memory_format=torch.contiguous_format).save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def train(arguments: AutoencoderArguments) -> None:
    if arguments.num_threads is not None:
        torch.set_num_threads(arguments.num_threads)
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    set_seed(arguments.seed, device_specific=True)
    device, process = accelerator.device, accelerator.process_index

    cache_dir = arguments.cache_dir or f"{arguments.data.rstrip('/')}.cache"
    with accelerator.main_process_first():  # the others find the decoded frames
        train_frames, validation_frames = (
            load_frames([episode.video for episode in list_episodes(arguments.data, split)], cache_dir)
            for split in (arguments.train_split, arguments.validation_split)
        )
    validation_frames = spread(validation_frames, arguments.num_validation_frames)

    autoencoder = build_autoencoder(arguments).to(device)
    reconstruct = Reconstruction(autoencoder, arguments.latent_noise)
    trained = [parameter for parameter in autoencoder.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    ema = EMAModel(autoencoder.parameters(), decay=arguments.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(device)
    reconstruct, optimizer = accelerator.prepare(reconstruct, optimizer)
    accelerator.register_for_checkpointing(ema)
    perceptual = None
    if arguments.perceptual_loss_weight:
        perceptual = LPIPS("vgg16").to(device, memory_format=torch.channels_last)
    if arguments.adversarial_loss_weight:
        # A convolution, or a block with one, depending on whether there are layers at full resolution.
        last_weight = [weight for weight in autoencoder.decoder.conv_out.parameters() if weight.ndim == 4][-1]
        discriminator = PatchDiscriminator(arguments.discriminator_downsamples)
        discriminator.to(device, memory_format=torch.channels_last)
        discriminator_loss, discriminator_optimizer = accelerator.prepare(
            DiscriminatorLoss(discriminator),
            torch.optim.AdamW(
                discriminator.parameters(),
                lr=arguments.discriminator_learning_rate,
                betas=(0.5, 0.9),
                weight_decay=0.0,
            ),
        )

    first_step = 0
    if (checkpoint := find_checkpoint(arguments)) is not None:
        accelerator.load_state(str(checkpoint))
        first_step = checkpoint_step(checkpoint)
        logger.info("resumed from %s", checkpoint)
    num_parameters = sum(parameter.numel() for parameter in autoencoder.parameters())
    logger.info("%d training frames, %d parameters", len(train_frames), num_parameters)

    start = time.monotonic()
    for step in range(first_step, arguments.max_train_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, arguments)
        inputs = to_input(draw_batch(train_frames, arguments, step, process), device)
        decoded = reconstruct(inputs)
        loss = pixel_loss(decoded, inputs, arguments.gradient_loss_weight)
        if perceptual is not None:
            with accelerator.autocast():
                distance = perceptual(decoded, inputs).mean()
            loss = loss + arguments.perceptual_loss_weight * distance
        if arguments.adversarial_loss_weight:
            discriminator.requires_grad_(False)  # it judges here and learns below
            with accelerator.autocast():
                adversarial = -discriminator(decoded).float().mean()
            discriminator.requires_grad_(True)
            weight = adaptive_weight(loss, adversarial, last_weight)
            loss = loss + arguments.adversarial_loss_weight * weight * adversarial
        done = step + 1
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} at step {done}")
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(autoencoder.parameters())
        if arguments.adversarial_loss_weight:
            accelerator.backward(discriminator_loss(inputs, decoded.detach()))
            discriminator_optimizer.step()
            discriminator_optimizer.zero_grad()

        if done % arguments.logging_steps == 0 and accelerator.is_main_process:
            speed = (done - first_step) / (time.monotonic() - start)
            logger.info("step %d: loss %.4f, %.2f steps/s", done, loss.item(), speed)
        last = done == arguments.max_train_steps
        if done % arguments.save_steps == 0 or last:
            save_checkpoint(accelerator, arguments, done)
        if (done % arguments.validation_steps == 0 or last) and accelerator.is_main_process:
            ema.store(autoencoder.parameters())
            ema.copy_to(autoencoder.parameters())
            psnr, sharp = measure(autoencoder, validation_frames, device)
            logger.info("step %d: validation PSNR %.2f dB, sharpness %.3f of the frames'", done, psnr, sharp)
            ema.restore(autoencoder.parameters())

    if accelerator.is_main_process:
        ema.copy_to(autoencoder.parameters())
        if not arguments.freeze_encoder:
            sample = spread(train_frames, arguments.num_scaling_frames)
            scaling_factor = measure_scaling_factor(autoencoder, sample, device)
            autoencoder.register_to_config(scaling_factor=scaling_factor)
        save_autoencoder(autoencoder, Path(arguments.output_dir) / "autoencoder")
        logger.info("wrote autoencoder, scaling_factor %.5f", autoencoder.config.scaling_factor)
    accelerator.end_training()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(parse_arguments(sys.argv[1:]))
