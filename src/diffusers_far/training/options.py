"""Options of the training scripts: a YAML recipe, then the command line, into typed dataclasses.

An option's type carries the values that it takes, its field the line of `--help`. On the command line an
option is written with dashes or with underscores. `preset: NAME` makes the sizes of a published model the
defaults; what the recipe or the command line says of them wins.
"""

import argparse
import dataclasses
import logging
import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..presets import PRESETS, Compression, preset


class Range(NamedTuple):
    """Numbers that an option takes. NaN and infinity are in none."""

    takes: str
    least: float = -math.inf
    more_than: float = -math.inf
    most: float = math.inf
    less_than: float = math.inf

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, int | float)
        in_bounds = self.least <= value <= self.most and self.more_than < value < self.less_than
        return math.isfinite(value) and in_bounds


Integer = Annotated[int, Range("an integer")]
Count = Annotated[int, Range("an integer of at least 1", least=1)]
CountOrZero = Annotated[int, Range("an integer of at least 0", least=0)]
Positive = Annotated[float, Range("a number greater than 0", more_than=0)]
NotNegative = Annotated[float, Range("a number of at least 0", least=0)]
Share = Annotated[float, Range("a number in [0, 1)", least=0, less_than=1)]
Probability = Annotated[float, Range("a number in [0, 1]", least=0, most=1)]


def option(default: Any, help: str) -> Any:
    """A field of a dataclass of options."""
    # argparse takes % for the start of a placeholder.
    metadata = {"help": help.replace("%", "%%")}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


@dataclass(kw_only=True)
class FrameOptions:
    """Which frames of a video are used, and at which size."""

    resolution: str | None = option(
        None, "height and width of frames in pixels: 64, or 64x96; else their own"
    )
    fit: Literal["crop", "pad", "stretch"] = option(
        "crop", "how a frame of another shape becomes that: its middle, with black borders, or distorted"
    )
    fps: Positive | None = option(
        None, "frames a second, taken by the times at which a video shows them; else all frames"
    )
    stride: Count = option(1, "of these, every so many")
    camera: str | None = option(None, "of a LeRobot data set with several: the feature's name")

    def __post_init__(self) -> None:
        check_ranges(self)
        _ = self.frame_size

    @property
    def frame_size(self) -> tuple[int, int] | None:
        """Height and width."""
        if self.resolution is None:
            return None
        sides = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", str(self.resolution))
        if sides is None:
            raise ValueError(
                f"resolution={self.resolution!r} must be a number of pixels, or two: 64, or 64x96"
            )
        return int(sides[1]), int(sides[2] or sides[1])

    @property
    def identity(self) -> str:
        """What frames depend on, in words; empty if they are those of the video."""
        words = [] if self.frame_size is None else [f"{self.frame_size} {self.fit}"]
        words += [] if self.fps is None else [f"fps {self.fps}"]
        words += [] if self.stride == 1 else [f"stride {self.stride}"]
        return ", ".join(words)


@dataclass(kw_only=True)
class RunOptions:
    """What every run has: its length, its optimizer, its checkpoints and its logs."""

    output_dir: str = option(dataclasses.MISSING, "new folder for weights, checkpoints and logs")
    max_train_steps: Count | None = option(None, "length of the run in steps of the optimizer")
    max_minutes: Positive | None = option(None, "the same in time; the run ends with the first of the two")
    batch_size: Count = option(32, "clips, or frames of an autoencoder, per process and forward")
    gradient_accumulation_steps: Count = option(1, "forwards per step of the optimizer")
    learning_rate: Positive = option(1e-4, "the highest one")
    lr_scheduler: str = option(
        "constant_with_warmup",
        "a schedule of diffusers' get_scheduler over the length of the run, or warmup_stable_decay: highest "
        "until the last part, so that an earlier checkpoint can go on for longer",
    )
    warmup_ratio: Share = option(0.01, "share of the run in which the learning rate rises")
    decay_ratio: Share = option(0.2, "share of the run in which warmup_stable_decay falls to zero")
    max_grad_norm: Positive = option(1.0, "longer gradients are cut to this norm")
    ema_decay: Share = option(0.9999, "highest decay of the averaged weights")
    ema_power: Positive = option(0.75, "their decay after n steps is 1 - (1 + n) ** -ema_power")
    mixed_precision: Literal["no", "bf16", "fp16"] = option("no", "number format of the forward pass")
    num_threads: Count | None = option(None, "CPU threads of torch")
    seed: CountOrZero = option(0, "of the weights and all draws")
    logging_steps: Count = option(50, "steps between two lines of the log")
    validation_steps: CountOrZero = option(1000, "steps between two validations; 0 for none")
    save_minutes: Positive = option(10.0, "minutes between two checkpoints")
    save_steps: Count | None = option(None, "steps between two checkpoints, in place of save_minutes")
    keep_checkpoints: Count = option(2, "so many of those saved last are kept")
    resume_from: str | None = option(None, "checkpoint to go on from, or latest: the one saved last, if any")
    report_to: str | None = option(None, "a tracker that accelerate knows, such as tensorboard")

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.max_train_steps is None and self.max_minutes is None:
            raise ValueError("max_train_steps=None and max_minutes=None: give the length of the run")


@dataclass(kw_only=True)
class ModelOptions:
    """Size of a new model; `in_channels` comes from the latents."""

    patch_size: Count = option(1, "pixels of the latent grid in a token, per side")
    long_patch_size: Count | None = option(None, "the same of long-term frames, which makes a Long model")
    num_layers: Count = option(12, "transformer blocks")
    num_attention_heads: Count = option(12, "heads of a block")
    attention_head_dim: Count = option(64, "width of a head")
    axes_dims_rope: list[int] = option([16, 24, 24], "of it, for time, height and width")
    num_classes: CountOrZero | None = option(
        None, "classes of videos that condition the model; 0 for none, where a pretrained one has some"
    )
    num_actions: list[int] | None = option(
        None, "actions of frames that condition the model; several numbers are sizes of groups; 0 likewise"
    )
    action_dim: CountOrZero | None = option(
        None, "numbers of a continuous action, in place of num_actions; 0 likewise"
    )
    short_window: Count = option(16, "frames of a Long model's window")

    def __post_init__(self) -> None:
        check_ranges(self)
        if isinstance(self.num_actions, list) and len(self.num_actions) == 1:  # from a command line
            self.num_actions = self.num_actions[0]  # type: ignore[assignment]

    def given(self) -> dict[str, Any]:
        """Those that are given, for a pretrained model; without conditions (0) as None."""
        plain = ModelOptions()
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {name: value or None for name, value in values.items() if value != getattr(plain, name)}


@dataclass(kw_only=True)
class MemoryOptions:
    """What trades time for memory in training FAR."""

    gradient_checkpointing: bool = option(
        False, "keep the inputs of the blocks only, and compute the rest again in the backward pass"
    )


@dataclass(kw_only=True)
class SampleOptions:
    """What a validation shows."""

    validation_seconds: NotNegative = option(
        0.0,
        "time of a validation for continuing held-out videos with averaged weights, to OUTPUT/samples and "
        "the tracker, with their PSNR at 1, 4 and 16 frames; 0 for none",
    )


@dataclass(kw_only=True)
class StartOptions:
    """What training starts from."""

    pretrained: str | None = option(
        None, "pipeline or model to fine-tune: a folder, such as ema of another run, or a repo of the Hub"
    )
    lora_rank: Count | None = option(
        None, "train an adapter of this rank (LoRA) for pretrained, which stays as it is; 16 does for most"
    )
    action_names: list[str] | None = option(
        None, "what the actions are called, in order; pretrained keeps what it knows of equal names"
    )

    def __post_init__(self) -> None:
        if self.lora_rank is not None and self.pretrained is None:
            raise ValueError(f"pretrained=None: lora_rank={self.lora_rank} takes the model to adapt")


@dataclass(kw_only=True)
class FAROptions(StartOptions, MemoryOptions, SampleOptions, RunOptions):
    """Options of training FAR. The defaults are the published ones where there are any."""

    latents: str = option(dataclasses.MISSING, "what encode_latents wrote: splits train and validation")
    autoencoder: str | None = option(
        None, "that made them, for validation_seconds; by default that of pretrained"
    )
    objective: Literal["flow_matching", "flow_map"] = option(
        "flow_matching", "flow_map makes any-step models"
    )
    num_frames: Count = option(16, "frames of a clip; of the longest clip of a Long model")
    length_distribution: Literal["uniform", "log_uniform"] = option(
        "uniform", "of a Long model's clips: uniform as published, or log_uniform, mostly short"
    )
    revisit_probability: Probability = option(
        0.0, "chance of a clip whose window shows a view seen before it"
    )
    condition_dropout: Share = option(0.1, "chance of a video's label, or a frame's action, to be dropped")
    clean_context_probability: Share = option(0.1, "chance of a frame of the window to be given clean")
    own_context_probability: Share = option(
        0.0,
        "chance of a batch whose clean frames of the window are the model's own (scheduled sampling); not "
        "published. It keeps long rollouts from washing out",
    )
    noisy_window_probability: Share = option(
        0.0, "chance of a batch whose windows have no clean frame: only long-term frames can tell what comes"
    )
    muon_learning_rate: Positive | None = option(
        None, "highest one of Muon, which then trains the matrices of the blocks; AdamW trains the rest"
    )
    adam_beta1: Share = option(0.9, "of AdamW")
    adam_beta2: Share = option(0.999, "of AdamW")
    attention: Literal["sdpa", "matmul"] = option("sdpa", "matmul is faster on CPUs with bf16 matrix units")
    compile: bool = option(False, "compile the transformer blocks, which takes minutes once")
    dataloader_workers: CountOrZero = option(0, "processes that read clips ahead")
    validation_batches: Count = option(8, "batches of one validation")

    def __post_init__(self) -> None:
        RunOptions.__post_init__(self)
        StartOptions.__post_init__(self)
        if self.lora_rank is not None and self.muon_learning_rate is not None:
            raise ValueError(
                f"muon_learning_rate={self.muon_learning_rate}: an adapter (lora_rank={self.lora_rank}) is "
                "trained by AdamW alone"
            )
        if self.objective == "flow_map":
            if self.lora_rank is not None:
                raise ValueError(f"lora_rank={self.lora_rank}: objective=flow_map trains whole models only")
            if self.pretrained is None:
                raise ValueError("pretrained=None: objective=flow_map takes the folder of a trained model")
            if self.noisy_window_probability:
                raise ValueError(
                    f"noisy_window_probability={self.noisy_window_probability}: objective=flow_map takes 0"
                )


@dataclass(kw_only=True)
class AutoencoderOptions(FrameOptions, RunOptions):
    """Options of training an autoencoder, some with defaults of their own."""

    max_train_steps: Count | None = option(10_000, "length of the run in steps of the optimizer")
    learning_rate: Positive = option(1e-3, "the highest one")
    lr_scheduler: str = option("cosine", "a schedule of diffusers' get_scheduler over the length of the run")
    warmup_steps: CountOrZero | None = option(None, "steps in which it rises, in place of warmup_ratio")
    ema_decay: Share = option(0.999, "highest decay of the averaged weights")
    validation_steps: CountOrZero = option(500, "steps between two validations; 0 for none")
    save_steps: Count | None = option(500, "steps between two checkpoints, in place of save_minutes")

    data: str = option(dataclasses.MISSING, "folder of videos, or another source of docs/data.md")
    cache_dir: str | None = option(None, "decoded frames; by default beside the data")
    train_split: str = option("train", "part of the data to train on")
    validation_split: str = option("validation", "part of the data that is held out")
    compression: Compression | None = option(
        None, "pixels per side for one of a latent: that published DC-AE, in place of the next three"
    )
    latent_channels: Count = option(16, "channels of a latent")
    block_out_channels: list[int] = option([32, 48, 96, 128], "channels of stages; each halves the size")
    layers_per_block: list[int] = option([0, 1, 1, 2], "their layers; 0 first: none at full resolution")
    init_from: str | None = option(None, "folder of an autoencoder to go on from; it keeps its sizes")
    freeze_encoder: bool = option(False, "train the decoder of init_from only: latents stay valid")
    gradient_loss_weight: NotNegative = option(0.5, "of L1 of differences in x and y, beside L1 of pixels")
    perceptual_loss_weight: NotNegative = option(0.0, "of LPIPS (VGG); published: 1")
    adversarial_loss_weight: NotNegative = option(
        0.0, "of a discriminator, times the adaptive one; published: 0.5"
    )
    adam_beta1: Share = option(0.9, "of AdamW; published: 0.5")
    adam_beta2: Share = option(0.99, "of AdamW; published: 0.9")
    discriminator_learning_rate: Positive = option(2e-4, "constant")
    discriminator_downsamples: Count = option(
        2, "it judges patches of 16 pixels with 1, 34 with 2, 70 with 3"
    )
    latent_noise: NotNegative = option(0.0, "on what the decoder sees, in deviations of the batch's latents")
    equivariance_probability: Probability = option(
        0.0,
        "chance of a batch whose latents are mirrored or shrunk and then decoded, to frames of the same "
        "change (EQ-VAE, arXiv 2502.09509): such latents are easier to predict",
    )
    num_validation_frames: Count = option(512, "frames of one validation")
    num_scaling_frames: Count = option(4096, "training frames behind scaling_factor")

    def __post_init__(self) -> None:
        FrameOptions.__post_init__(self)
        RunOptions.__post_init__(self)
        if self.warmup_steps is not None:
            if self.max_train_steps is None:
                raise ValueError(
                    f"warmup_steps={self.warmup_steps} takes max_train_steps; or give warmup_ratio"
                )
            self.warmup_ratio = min(self.warmup_steps / self.max_train_steps, 1)
        if len(self.layers_per_block) != len(self.block_out_channels):
            raise ValueError(
                f"layers_per_block={self.layers_per_block} takes one number for each of block_out_channels="
                f"{self.block_out_channels}"
            )
        if self.compression is not None:
            for item in dataclasses.fields(self):
                replaced = item.name in ("latent_channels", "block_out_channels", "layers_per_block")
                if replaced and (value := getattr(self, item.name)) != _default(item):
                    raise ValueError(f"{item.name}={value}: compression={self.compression} has its own")
        if self.freeze_encoder and self.init_from is None:
            raise ValueError("init_from=None: freeze_encoder takes the folder of an autoencoder")


def check_ranges(options: Any) -> None:
    """Raise a ValueError for the first option whose value its type does not take."""
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        value = getattr(options, name)
        for kind in (hint, *get_args(hint)):  # itself, or one part of `kind | None`
            for limits in getattr(kind, "__metadata__", ()):
                if value is not None and value not in limits:
                    raise ValueError(f"{name}={value} must be {limits.takes}")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description, and tells defaults but for None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def parse(
    command_line: Sequence[str],
    kinds: Sequence[type],
    description: str | None,
    positional: str | Sequence[str] = (),
    program: str | None = None,
) -> tuple[Any, ...]:
    """A dataclass of each of `kinds`, of `[RECIPE.yaml] [--option value ...]`; the command line wins.

    Args:
        positional: names of words that the command line takes besides; they come first in the result.
        program: its name in messages; by default that of the script.
    """
    parser = _Parser(
        tuple(kinds),
        prog=program,
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    takes_preset = not {ModelOptions, AutoencoderOptions}.isdisjoint(kinds)
    if takes_preset:
        parser.add_argument(
            "--preset",
            choices=PRESETS,
            help="published model whose sizes, and longest clip, are the defaults",
        )
    known = {action.dest for action in parser._actions}
    words = list(command_line)
    names = (positional,) if isinstance(positional, str) else positional
    for name in names:
        parser.add_argument(name)
    if not names and words and words[0].endswith((".yaml", ".yml")):
        words = [*_recipe_words(words[0], known), *words[1:]]
    if takes_preset and (name := parser.parse_known_args(words)[0].preset) is not None:
        facts = _facts_of_preset(name)
        parser.set_defaults(**{option: facts[option] for option in facts.keys() & known})
    *options, rest = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return (*(getattr(options[-1], name) for name in names), *options[: len(kinds)])


def _facts_of_preset(name: str) -> dict[str, Any]:
    """Of a published model and its autoencoder, by the names of options, and others."""
    model = preset(name)
    return {
        **model.transformer,
        "axes_dims_rope": list(model.transformer["axes_dims_rope"]),
        "num_frames": model.num_frames,
        "compression": model.compression,
        "resolution": str(model.resolution),
    }


def _recipe_words(recipe: str, known: set[str]) -> list[str]:
    """What the options of a recipe are on a command line, where the last of several values counts."""
    try:
        options = yaml.safe_load(Path(recipe).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"recipe {recipe} cannot be read: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"recipe {recipe} is a {type(options).__name__}; it takes lines of option: value")
    words = []
    for name, value in options.items():
        if str(name).replace("-", "_") not in known:
            raise ValueError(f"{recipe} sets {name!r}, which is no option; --help lists the options")
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


@contextmanager
def script() -> Iterator[None]:
    """What every script does around its work: a log, and mistakes of its user in one line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it tells of every file that it saves
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
