"""From a folder of videos to a model that plays, in one command.

    diffusers-far train VIDEOS --output-dir far-model --resolution 64 --fps 10 --size small --max-minutes 60

VIDEOS is a folder, or a repo of the Hub, of any kind in docs/data.md. Prints what it is and the plan, encodes
it, trains, and ends with a sample beside the truth. OUTPUT gets

    pipeline/       the model as `FARVideoPipeline.from_pretrained` reads it, with a model card; renewed with
                    every checkpoint
    sample.mp4      a held-out video and its continuation by the model
    autoencoder/    of a new autoencoder: its run
    latents/        the encoded videos
    samples/        continuations of held-out videos, of each validation
    plan.json       sizes and batch, kept when the run goes on
    log.jsonl, checkpoint-<step>/, ema/     the run, as of every script

With `--pretrained` a trained pipeline is fine-tuned: all its weights, or with `--lora-rank 16` an adapter,
which goes to OUTPUT/lora in place of pipeline/ and ema/ (docs/fine_tuning.md).

After Ctrl-C, and after a crash, `--resume-from latest` goes on. The steps are those of encode_latents.py,
train_autoencoder.py, train_far.py and make_pipeline.py, which take more options.

Shapes: B batch, F frames, C channels, H x W latent grid, N frames of several videos.
"""

import json
import logging
import math
import os
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..actions import ActionSpace
from ..shipped import CHECKPOINT, find
from ..whole_files import written_whole
from .episodes import Episode
from .free_memory import free_memory
from .options import (
    AutoencoderOptions,
    Count,
    CountOrZero,
    FAROptions,
    FrameOptions,
    MemoryOptions,
    ModelOptions,
    NotNegative,
    Positive,
    RunOptions,
    SampleOptions,
    Share,
    StartOptions,
    option,
    parse,
)
from .pretrained import Change, Pretrained, add_lora, find_pretrained, plan_change
from .sources import Source, open_source

if TYPE_CHECKING:
    from .clips import Clips
    from .objectives import FlowMatching
    from .pipeline_trainer import PipelineTrainer

MAX_BATCH = 32  # published
MEASURING_SECONDS = 1.0  # of each of two models
SHARE_OF_MEMORY = 0.5  # of what is free, for weights, optimizer and activations
MOST_CLIP_FRAMES = 32  # of a clip, where no length is asked for
MOST_BASE_FRAMES = 16  # a longer clip takes a Long model
GOOD_PSNR = 30.0  # dB: from here on the shipped autoencoder serves as it is
NUM_JUDGED, NUM_JUDGED_VIDEOS = 64, 8  # held-out frames that an autoencoder is measured on
AUTOENCODER_BATCH = 16  # frames of up to 128 x 128 pixels; fewer of larger ones
MOST_AUTOENCODER_FRAMES = 20_000

logger = logging.getLogger("train")


class Size(NamedTuple):
    """What `--size` means."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    axes_dims_rope: tuple[int, int, int]
    patch_size: int
    short_window: int  # of a Long model


SIZES = {
    "tiny": Size(4, 4, 32, (8, 12, 12), 2, 8),
    "small": Size(6, 4, 64, (16, 24, 24), 2, 8),
    "base": Size(12, 12, 64, (16, 24, 24), 1, 16),  # FAR-B
}


@dataclass(kw_only=True)
class TrainOptions(StartOptions, MemoryOptions, SampleOptions, FrameOptions, RunOptions):
    """Options of the command."""

    output_dir: str = option("far-model", "new folder for the model and all that leads to it")
    resolution: str | None = option(
        None, "height and width of frames in pixels: 64, or 64x96; default: as of pretrained, or 64"
    )
    size: Literal["tiny", "small", "base"] | None = option(
        None, "of a new model: about 1, 9 (default) and 130 million parameters"
    )
    clip_seconds: Positive | None = option(
        None,
        f"length of a training clip; default: up to {MOST_CLIP_FRAMES} frames, as half of the videos have",
    )
    autoencoder: str = option(
        "auto",
        "folder of one, or shipped, or new: train one; auto: the shipped one if it reconstructs held-out "
        f"frames with {GOOD_PSNR:g} dB, else the better of it and a new one; that of pretrained always stays",
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = option(
        "bf16" if torch.cuda.is_available() else "no", "number format of the forward pass"
    )
    autoencoder_steps: Count = option(3000, "of a new one; with max_minutes, at most half as long")
    ignore_actions: bool = option(False, "train on the videos alone")
    dry_run: bool = option(False, "print the plan and end")
    max_train_steps: Count | None = option(
        None, "length of the run in steps; default without max_minutes: 10,000"
    )
    batch_size: CountOrZero = option(0, f"clips of a step; 0: as memory allows, up to {MAX_BATCH}")
    learning_rate: Positive = option(3e-4, "the highest one")
    lr_scheduler: str = option("cosine", "a schedule of diffusers' get_scheduler, or warmup_stable_decay")
    ema_decay: Share = option(0.999, "highest decay of the averaged weights")
    logging_steps: Count = option(20, "steps between two lines of the log")
    validation_steps: CountOrZero = option(500, "steps between two validations; 0 for none")
    validation_seconds: NotNegative = option(
        10.0,
        "time of a validation for continuing held-out videos, to OUTPUT/samples and the tracker, with their "
        "PSNR at 1, 4 and 16 frames; 0 for none",
    )

    def __post_init__(self) -> None:
        FrameOptions.__post_init__(self)
        StartOptions.__post_init__(self)
        if self.pretrained is not None:
            for name, default in (("size", None), ("autoencoder", "auto")):
                if (value := getattr(self, name)) != default:
                    raise ValueError(
                        f"{name}={value!r}: pretrained={self.pretrained!r} has its own, which stays"
                    )
        if self.max_train_steps is None and self.max_minutes is None:
            self.max_train_steps = 10_000
        RunOptions.__post_init__(self)

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of frames."""
        assert self.frame_size is not None
        return self.frame_size

    def shared(self, kind: type) -> dict[str, Any]:
        """Values of the options that options of another kind have, too."""
        own = {item.name for item in fields(self)}
        return {item.name: getattr(self, item.name) for item in fields(kind) if item.name in own}


@dataclass
class Plan:
    """What is decided before the first step; a run that goes on keeps it."""

    autoencoder: str  # folder
    sizes: dict[str, Any]
    num_frames: int
    batch_size: int


# ------------------------------------------------------------------------------------------------------------
# The plan


def clip_frames(source: Source, options: TrainOptions, most: int = MOST_CLIP_FRAMES) -> int:
    """Frames of a clip: `clip_seconds`, or what half of the examined videos have, up to `most`."""
    examined = source.examine("train", options)
    if options.clip_seconds is not None:
        rates = [one.frame_rate for one in examined.stated if one.frame_rate is not None]
        if options.fps is None and not rates:
            raise ValueError(
                f"clip_seconds={options.clip_seconds:g}: the videos do not state their frames per second"
            )
        rate = options.fps or statistics.median(rates)
        return max(2, round(options.clip_seconds * rate / options.stride))
    if not examined.lengths:
        return MOST_BASE_FRAMES
    return max(2, min(most, int(statistics.median(examined.lengths))))


def choose_sizes(size: str, num_frames: int, grid: tuple[int, int]) -> dict[str, Any]:
    """Sizes of the model for clips of so many frames: a Long one for clips longer than a base model's.

    Args:
        grid: height and width of latents.
    """
    chosen = SIZES[size]._asdict()
    chosen["axes_dims_rope"] = list(chosen["axes_dims_rope"])
    patch = chosen["patch_size"]
    if grid[0] % patch or grid[1] % patch:
        raise ValueError(
            f"size={size!r} has patches of {patch} x {patch} latents; the resolution gives {grid[0]} x "
            f"{grid[1]}"
        )
    long_patch = long_patch_size(patch, grid)
    if num_frames > max(MOST_BASE_FRAMES, chosen["short_window"]) and long_patch is not None:
        chosen["long_patch_size"] = long_patch
    return chosen


def long_patch_size(patch: int, grid: tuple[int, int]) -> int | None:
    """Of a Long model, where this grid of latents has room for one."""
    return None if grid[0] % (2 * patch) or grid[1] % (2 * patch) else 2 * patch


def pretrained_sizes(pretrained: Pretrained, num_frames: int, grid: tuple[int, int]) -> dict[str, Any]:
    """Those of a trained model; a base model becomes a Long one for clips longer than it was trained with."""
    config = pretrained.config
    sizes = {item.name: config[item.name] for item in fields(ModelOptions)}
    sizes["axes_dims_rope"] = list(sizes["axes_dims_rope"])
    multiple = config["long_patch_size"] or config["patch_size"]
    if grid[0] % multiple or grid[1] % multiple:
        raise ValueError(
            f"pretrained={pretrained.name!r} takes multiples of {multiple} x {multiple} latents; the "
            f"resolution gives {grid[0]} x {grid[1]}"
        )
    if config["long_patch_size"] is None:
        if num_frames > most_frames(pretrained):
            sizes["long_patch_size"] = long_patch_size(config["patch_size"], grid)
    elif num_frames < config["short_window"]:
        raise ValueError(
            f"pretrained={pretrained.name!r} has a window of {config['short_window']} frames; clips have "
            f"{num_frames}: it takes longer videos, or a greater clip_seconds"
        )
    return sizes


def most_frames(pretrained: Pretrained | None) -> int:
    """Of a clip, where no length is asked for."""
    if pretrained is None or pretrained.config["long_patch_size"] is not None:
        return MOST_CLIP_FRAMES
    return pretrained.num_training_frames or MOST_BASE_FRAMES


class Cost(NamedTuple):
    """Of training on one clip."""

    memory: float  # bytes that the forward pass keeps for the backward pass
    seconds: float


def measure_cost(
    sizes: dict[str, Any],
    in_channels: int,
    grid: tuple[int, int],
    num_frames: int,
    lora_rank: int | None = None,
    gradient_checkpointing: bool = False,
) -> Cost:
    """Measured on models of one and two blocks, from which the cost of all blocks follows."""
    from ..transformer_far import FARTransformer3DModel
    from .clips import Clips
    from .objectives import FlowMatching

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_long = sizes.get("long_patch_size") is not None
    window = min(num_frames, sizes["short_window"]) if is_long else num_frames
    latents = torch.zeros(1, num_frames, in_channels, *grid)
    space = ActionSpace.of(sizes)
    labels = None if space is None else space.null((1, num_frames))
    classes = torch.zeros(1, dtype=torch.long) if sizes.get("num_classes") else None
    clips = Clips(latents, window, labels, classes, ("",)).to(device)
    costs = []
    for num_layers in (1, 2):
        model = FARTransformer3DModel(in_channels=in_channels, **{**sizes, "num_layers": num_layers}).to(
            device
        )
        if lora_rank is not None:
            add_lora(model, lora_rank)
        objective = FlowMatching(model)
        memory = kept_for_backward(objective, clips)
        if gradient_checkpointing:
            model.enable_gradient_checkpointing()
        runs: list[float] = []
        began = time.perf_counter()
        while len(runs) < 3 and (not runs or time.perf_counter() - began < MEASURING_SECONDS):
            started = time.perf_counter()
            loss = objective.loss(clips, torch.Generator().manual_seed(0))
            loss.backward()
            loss.item()
            runs.append(time.perf_counter() - started)
        weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        costs.append(Cost(max(0.0, memory - weights), min(runs)))
    one, two = costs
    more, memory_of_block = sizes["num_layers"] - 1, max(0.0, two.memory - one.memory)
    if gradient_checkpointing:  # of each block its input is kept, and of one at a time all the rest
        long_tokens, short_tokens = model.tokens_per_frame(*grid)
        tokens = (num_frames - window) * long_tokens + window * short_tokens
        memory_of_block = 4.0 * tokens * sizes["num_attention_heads"] * sizes["attention_head_dim"]
    return Cost(
        one.memory + more * memory_of_block,
        one.seconds + more * max(0.0, two.seconds - one.seconds),
    )


def kept_for_backward(objective: "FlowMatching", clips: "Clips") -> int:
    """Bytes of the tensors that a loss of these clips keeps for its backward pass, weights included."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective.loss(clips, torch.Generator().manual_seed(0))
    size = sum(kept.values())
    loss.backward()
    return size


def find_batch(cost: Cost, num_parameters: int, num_clips: int) -> int:
    """The largest power of two that memory allows."""
    # Weights, their averages, gradients and the two moments of AdamW take 4 bytes each.
    left = SHARE_OF_MEMORY * free_memory() - 20 * num_parameters
    most = min(MAX_BATCH, max(1, num_clips), left / max(cost.memory, 1))
    if most < 1:
        raise ValueError(
            f"a batch of one clip takes {(20 * num_parameters + cost.memory) / 1e9:.1f} GB of memory; "
            f"{free_memory() / 1e9:.1f} GB are free, of which half is used: take a smaller --size, "
            "--resolution or --clip-seconds, or --gradient-checkpointing"
        )
    return int(2 ** math.floor(math.log2(most)))


def count_parameters(sizes: dict[str, Any], in_channels: int) -> int:
    from ..transformer_far import FARTransformer3DModel

    with torch.device("meta"):
        model = FARTransformer3DModel(in_channels=in_channels, **sizes)
    return sum(parameter.numel() for parameter in model.parameters())


def examine_conditions(source: Source) -> dict[str, Any]:
    """What the videos have, by the episodes that are examined: `num_actions` and so on."""
    from .clips import stack_actions

    episodes = list(source.split("train").some(16))
    actions = [stack_actions(values) if (values := episode.actions) else None for episode in episodes]
    return conditions(actions, [episode.class_label for episode in episodes], len(source.class_names))


def conditions(
    actions: Sequence[Tensor | None], class_labels: Sequence[Tensor | int | None], num_named: int
) -> dict[str, Any]:
    """`num_actions` and so on of a model for such videos; nothing of what some of them lack.

    Args:
        num_named: classes that have a name.
    """
    from .clips import action_options

    found: dict[str, Any] = {}
    known_actions = [values for values in actions if values is not None]
    if len(known_actions) == len(actions):
        found |= action_options(known_actions)
    labels = [int(label) for label in class_labels if label is not None]
    if len(labels) == len(class_labels):
        found["num_classes"] = max(num_named, 1 + max(labels))
    return found


def fit_conditions(
    found: dict[str, Any], options: TrainOptions, pretrained: Pretrained | None
) -> dict[str, Any]:
    """What conditions the model: what the videos have; all actions of a pretrained model, or of
    `action_names`, if those of the videos are among them."""
    num_actions, names, space = found.get("num_actions"), options.action_names, ActionSpace.of(found)
    if names is not None:
        if not isinstance(num_actions, int):
            have = "no actions" if space is None else f"actions that are {space}"
            raise ValueError(f"action_names={names}: the videos have {have}")
        if num_actions > len(names):
            raise ValueError(
                f"action_names={names} are {len(names)}; the videos have actions up to {num_actions - 1}"
            )
        num_actions = len(names)
    elif pretrained is not None and space is not None and not space.is_vector:
        known = ActionSpace.of(pretrained.config)
        alike = known is not None and known.shape == space.shape and not known.is_vector
        if known is not None and alike and all(map(int.__le__, space.sizes, known.sizes)):
            num_actions = list(known.sizes) if known.is_grouped else known.sizes[0]
    conditions = {name: found.get(name) for name in ("action_dim", "num_classes")}
    return conditions | {"num_actions": num_actions}


def change_of(plan: Plan, options: TrainOptions, pretrained: Pretrained) -> Change:
    """What the plan changes in a pretrained model."""
    return plan_change(pretrained, wanted_sizes(plan, pretrained), options)


def wanted_sizes(plan: Plan, pretrained: Pretrained | None) -> ModelOptions:
    if pretrained is None:
        return ModelOptions(**plan.sizes)
    conditions = ("num_actions", "action_dim", "num_classes")
    without = {name: 0 for name in conditions if plan.sizes[name] is None}
    return ModelOptions(**plan.sizes | without)


def describe_start(options: TrainOptions, plan: Plan, pretrained: Pretrained) -> Iterator[str]:
    """What is made of a pretrained model."""
    rank = options.lora_rank
    yield f"fine-tuning: {pretrained.name}, " + (
        "all weights" if rank is None else f"by a LoRA of rank {rank}; the model stays as it is"
    )
    for line in change_of(plan, options, pretrained).told:
        yield f"  {line}"
    known, names = pretrained.config["num_actions"], pretrained.action_names
    if isinstance(known, int) and plan.sizes["num_actions"] == known and options.action_names is None:
        listed = ", ".join(f"{number} {name}" for number, name in enumerate(names or []))
        yield f"  actions: taken for the {known} of the model" + (f": {listed}" if listed else "")
    if pretrained.resolution and FrameOptions(resolution=pretrained.resolution).frame_size != options.pixels:
        yield f"  frames: of {options.resolution} pixels; the model was trained on {pretrained.resolution}"


def duration(seconds: float) -> str:
    """In words, roughly."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36 * 3600 else f"{seconds / 86400:.1f} days"


def describe_plan(
    options: TrainOptions, source: Source, plan: Plan, in_channels: int, cost: Cost
) -> Iterator[str]:
    """Two lines: the model, and the run."""
    parameters = count_parameters(plan.sizes, in_channels)
    window = plan.sizes.get("long_patch_size") and plan.sizes["short_window"]
    kind = f"FAR Long, window of {window} frames" if window else "FAR base"
    step = plan.batch_size * cost.seconds * options.gradient_accumulation_steps
    seconds = min((options.max_train_steps or math.inf) * step, (options.max_minutes or math.inf) * 60)
    steps = round(seconds / step)
    clips = steps * plan.batch_size * options.gradient_accumulation_steps
    yield (
        f"model: {kind}, {parameters / 1e6:.1f} million parameters, frames of {options.resolution} pixels, "
        f"clips of {plan.num_frames} frames"
    )
    yield (
        f"training: {steps:,} steps of {plan.batch_size} clips, {clips * plan.num_frames:,} frames in all; "
        f"about {duration(seconds)} ({step:.2g} s a step, {plan.batch_size * cost.memory / 1e6:.0f} MB of "
        "activations, as measured on two blocks)"
    )


# ------------------------------------------------------------------------------------------------------------
# The autoencoder


def shipped_autoencoder() -> Path | None:
    """Of a checkout; a package that was installed from an index has none."""
    try:
        return find(f"{CHECKPOINT}/vae", "autoencoder")
    except ValueError:
        return None


def held_out_frames(source: Source, options: FrameOptions) -> np.ndarray:
    """Some held-out frames, uint8 `[N, H, W, 3]`."""
    each = NUM_JUDGED // NUM_JUDGED_VIDEOS
    frames: list[np.ndarray] = []
    for episode in source.split("validation").some(NUM_JUDGED_VIDEOS):
        frames += [frame for _, frame in islice(episode.frames(options), 0, 8 * each, 8)]
    return np.stack(frames)


def judge(folder: Path, frames: np.ndarray) -> float:
    """PSNR of the frames as an autoencoder reconstructs them, in dB."""
    from diffusers import AutoencoderDC

    from .train_autoencoder import measure

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autoencoder = AutoencoderDC.from_pretrained(folder).to(device).eval()
    return measure(autoencoder, frames, device)[0]


def choose_autoencoder(source: Source, options: TrainOptions) -> tuple[Path, float] | None:
    """Folder, and PSNR in dB on held-out frames; None if training a new one was interrupted."""
    frames = held_out_frames(source, options)
    shipped, choice = shipped_autoencoder(), options.autoencoder
    if choice not in ("auto", "new", "shipped"):
        quality = judge(Path(choice), frames)
        say(f"autoencoder: {choice}, {quality:.1f} dB on {len(frames)} held-out frames")
        return Path(choice), quality
    if choice == "shipped" and shipped is None:
        raise ValueError(
            "autoencoder='shipped' comes with a checkout of diffusers-far, which is not here; take new"
        )
    quality = -math.inf
    if choice != "new" and shipped is not None:
        quality = judge(shipped, frames)
        say(f"autoencoder: the shipped one has {quality:.1f} dB on {len(frames)} held-out frames")
        if choice == "shipped" or quality >= GOOD_PSNR:
            return shipped, quality
    new = train_autoencoder(source, options)
    if new is None:
        return None
    new_quality = judge(new, frames)
    say(f"autoencoder: the new one has {new_quality:.1f} dB on {len(frames)} held-out frames")
    if shipped is not None and quality > new_quality:
        say("autoencoder: the shipped one is taken, as it is better")
        return shipped, quality
    return new, new_quality


def train_autoencoder(source: Source, options: TrainOptions) -> Path | None:
    """A new autoencoder of the videos, or the one that is there; None if a signal ended its training."""
    from .train_autoencoder import AutoencoderTrainer

    output = Path(options.output_dir) / "autoencoder"
    finished = output / "autoencoder"
    if finished.is_dir():
        return finished
    minutes = options.max_minutes and options.max_minutes / 2
    at_most = f", {minutes:g} min at most" if minutes else ""
    say(f"autoencoder: training a new one for {options.autoencoder_steps} steps{at_most}")
    cache = Path(options.output_dir) / "frames"
    num_frames = source.examine("train", options).num_frames or 0
    shared = options.shared(FrameOptions)
    shared["stride"] = options.stride * max(1, math.ceil(num_frames / MOST_AUTOENCODER_FRAMES))
    trainer = AutoencoderTrainer(
        AutoencoderOptions(
            **shared,
            data=source.data,
            output_dir=str(output),
            cache_dir=str(cache),
            max_train_steps=options.autoencoder_steps,
            max_minutes=minutes,
            batch_size=max(
                1, min(AUTOENCODER_BATCH, AUTOENCODER_BATCH * 128**2 // math.prod(options.pixels))
            ),
            num_threads=options.num_threads,
            mixed_precision=options.mixed_precision,
            seed=options.seed,
            save_steps=None,
            logging_steps=options.logging_steps,
            resume_from="latest",
        )
    )
    if not trainer.train():
        return None
    shutil.rmtree(cache)
    return finished


# ------------------------------------------------------------------------------------------------------------
# The command


def say(line: str) -> None:
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def train(data: str, options: TrainOptions, words: Sequence[str]) -> int:
    """The whole way; returns the exit code of the command.

    Args:
        words: the command line, for how to go on.
    """
    from .run import check_output

    check_output(options)
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    if (
        options.autoencoder not in ("auto", "new", "shipped")
        and not (Path(options.autoencoder) / "config.json").is_file()
    ):
        raise ValueError(
            f"autoencoder={options.autoencoder!r} must be a folder with config.json, or auto, shipped or new"
        )
    output = Path(options.output_dir)
    pretrained = None if options.pretrained is None else find_pretrained(options.pretrained)
    if pretrained is not None:
        if pretrained.pipeline is None:
            raise ValueError(
                f"pretrained={options.pretrained!r} is a transformer alone; it takes a pipeline, whose "
                "autoencoder is used as well"
            )
        options.autoencoder = str(pretrained.pipeline / "vae")
    if options.resolution is None:
        options.resolution = (pretrained and pretrained.resolution) or "64"
    source = open_source(data, options.ignore_actions, options.camera)
    say(source.describe(options))
    source.split("validation")

    in_channels, factor = latent_shape(options)
    height, width = options.pixels
    if height % factor or width % factor:
        raise ValueError(
            f"resolution={options.resolution!r}: the autoencoder takes multiples of {factor} pixels"
        )
    grid = height // factor, width // factor
    plan = read_plan(output) if options.resume_from else None
    is_new = plan is None
    if plan is None:
        num_frames = clip_frames(source, options, most_frames(pretrained))
        plan = Plan("", {}, num_frames, options.batch_size)
        plan.sizes = find_sizes(plan, options, pretrained, examine_conditions(source), grid)
    cost = measure_cost(
        plan.sizes, in_channels, grid, plan.num_frames, options.lora_rank, options.gradient_checkpointing
    )
    if not plan.batch_size:
        parameters = count_parameters(plan.sizes, in_channels)
        examined = source.examine("train", options)
        num_clips = (examined.num_frames or plan.num_frames * MAX_BATCH) // plan.num_frames
        plan.batch_size = find_batch(cost, parameters, num_clips)
    if pretrained is not None:
        for line in describe_start(options, plan, pretrained):
            say(line)
    for line in describe_plan(options, source, plan, in_channels, cost):
        say(line)
    if options.dry_run:
        return 0

    resume = f"to go on: diffusers-far train {shlex.join(without_resuming(words))} --resume-from latest"
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not plan.autoencoder:
            chosen = choose_autoencoder(source, options)
            if chosen is None:
                say(f"interrupted, and saved; {resume}")
                return 130
            plan.autoencoder = str(chosen[0])
        encode_all(source, options, plan.autoencoder)
    except KeyboardInterrupt:
        say(f"interrupted; what is done is kept; {resume}")
        return 130
    if is_new:
        settle(plan, options, source, grid, pretrained)
        write_plan(output, plan)
    trainer = make_trainer(source, options, plan, pretrained)
    if not trainer.train():
        say(f"interrupted at step {trainer.run.clock.step}, and saved; {resume}")
        return 128 + (trainer.run.received_signal or 0)
    after = f"after {trainer.run.clock.step:,} steps"
    if pretrained is not None and options.lora_rank is not None:
        say(f"{output / 'lora'}: a LoRA for {pretrained.name}, {after}")
    else:
        say(f"{output / 'pipeline'}: the model, {after}")
    say(make_sample(source, options, plan, pretrained))
    return 0


def without_resuming(words: Sequence[str]) -> list[str]:
    kept = list(words)
    for name in ("--resume-from", "--resume_from"):
        if name in kept:
            at = kept.index(name)
            del kept[at : at + 2]
    return kept


def latent_shape(options: TrainOptions) -> tuple[int, int]:
    """Channels, and pixels of a latent per side, of the autoencoder that will be taken."""
    from diffusers import AutoencoderDC

    folder = options.autoencoder if Path(options.autoencoder).is_dir() else None
    if folder is None:
        defaults = AutoencoderOptions(data="", output_dir="")
        return defaults.latent_channels, 2 ** (len(defaults.block_out_channels) - 1)
    config = AutoencoderDC.load_config(folder)
    return config["latent_channels"], 2 ** (len(config["encoder_block_out_channels"]) - 1)


def read_plan(output: Path) -> Plan | None:
    file = output / "plan.json"
    if not file.is_file():
        return None
    plan = Plan(**json.loads(file.read_text()))
    if (inside := output / plan.autoencoder).is_dir():
        plan.autoencoder = str(inside)
    return plan


def write_plan(output: Path, plan: Plan) -> None:
    autoencoder, folder = Path(plan.autoencoder).resolve(), output.resolve()
    values = asdict(plan)
    if autoencoder.is_relative_to(folder):  # so that a run goes on when its folder was moved
        values["autoencoder"] = str(autoencoder.relative_to(folder))
    with written_whole(output / "plan.json") as unfinished:
        unfinished.write_text(json.dumps(values, indent=2) + "\n")


def encode_all(source: Source, options: TrainOptions, autoencoder: str) -> None:
    from .encode_latents import EncodeOptions, encode

    total = sum(len(source.split(split)) for split in ("train", "validation"))
    settings = EncodeOptions(
        **options.shared(FrameOptions),
        autoencoder=autoencoder,
        output=str(Path(options.output_dir) / "latents"),
    )
    with tqdm(total=total, desc="encoding", unit=" videos", disable=None) as bar:
        encode(source, settings, lambda split, number: bar.update())


def find_sizes(
    plan: Plan,
    options: TrainOptions,
    pretrained: Pretrained | None,
    found: dict[str, Any],
    grid: tuple[int, int],
) -> dict[str, Any]:
    """Of the model, for clips of the plan's length and conditions that were found."""
    if pretrained is None:
        sizes = choose_sizes(options.size or "small", plan.num_frames, grid)
    else:
        sizes = pretrained_sizes(pretrained, plan.num_frames, grid)
    return sizes | fit_conditions(found, options, pretrained)


def settle(
    plan: Plan,
    options: TrainOptions,
    source: Source,
    grid: tuple[int, int],
    pretrained: Pretrained | None,
) -> None:
    """Bring the plan in line with all videos, now that each has been read."""
    from .clips import LatentVideos

    splits = [LatentVideos(Path(options.output_dir) / "latents" / split) for split in ("train", "validation")]
    longest = min(max(videos.num_frames) for videos in splits)
    if longest < 2:
        raise ValueError(f"data={source.data!r}: videos of one frame; it takes two or more")
    if longest < plan.num_frames:
        say(f"clips of {longest} frames: no video, or no held-out one, is longer")
        plan.num_frames = longest
    actions, labels = (
        [value for videos in splits for value in getattr(videos, name)]
        for name in ("actions", "class_labels")
    )
    for name, values in (("actions", actions), ("class labels", labels)):
        if 0 < sum(value is None for value in values) < len(values):
            say(f"{name} are left out: some videos have none")
    found = conditions(actions, labels, len(source.class_names))
    plan.sizes = find_sizes(plan, options, pretrained, found, grid)


def make_trainer(
    source: Source, options: TrainOptions, plan: Plan, pretrained: Pretrained | None
) -> "PipelineTrainer":
    from .pipeline_trainer import PipelineTrainer

    settings = FAROptions(
        **{
            **options.shared(FAROptions),
            "latents": str(Path(options.output_dir) / "latents"),
            "autoencoder": plan.autoencoder,
            "num_frames": plan.num_frames,
            "batch_size": plan.batch_size,
            "validation_batches": 4,
        }
    )
    facts = [*source.describe(options).splitlines(), f"frames: {options.identity}"]
    height, width = options.pixels
    sample_size = height if height == width else (height, width)
    sizes = wanted_sizes(plan, pretrained)
    return PipelineTrainer(sizes, settings, sample_size, facts)


def make_sample(source: Source, options: TrainOptions, plan: Plan, pretrained: Pretrained | None) -> str:
    """Continue a held-out video with the model, the truth beside it; returns what is in the file."""
    from diffusers.utils import logging as diffusers_logging

    from ..demo import side_by_side, zoom_of
    from ..pipeline_far_video import FARVideoPipeline
    from ..video_files import save_video

    output = Path(options.output_dir)
    episode, frames, numbers = sample_frames(source, options, plan.num_frames)
    num_context = len(frames) // 2
    diffusers_logging.disable_progress_bar()
    if pretrained is not None and options.lora_rank is not None:
        pipeline = FARVideoPipeline.from_pretrained(pretrained.pipeline)
        pipeline.load_lora_weights(output / "lora")
    else:
        pipeline = FARVideoPipeline.from_pretrained(output / "pipeline")
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    conditions: dict[str, Any] = {}
    if ActionSpace.of(plan.sizes) is not None and episode.actions is not None:
        conditions["actions"] = [episode.actions[number] for number in numbers]
    if plan.sizes.get("num_classes"):
        conditions["class_labels"] = episode.class_label
    prediction = pipeline(
        video=frames[:num_context],
        num_frames=len(frames),
        generator=torch.Generator().manual_seed(options.seed),
        output_type="np",
        **conditions,
    ).frames[0]
    rate = (options.fps or episode.frame_rate or 10) / options.stride
    zoom = zoom_of(*options.pixels)
    save_video(side_by_side(frames / 255.0, prediction, num_context, zoom), output / "sample.mp4", rate)
    return (
        f"{output / 'sample.mp4'}: {episode.name}, held out; left the truth, right {num_context} frames of "
        f"context and {len(frames) - num_context} that the model makes"
    )


def sample_frames(source: Source, options: TrainOptions, most: int) -> tuple[Episode, np.ndarray, list[int]]:
    """The longest of some held-out videos, its first frames, and their numbers."""
    best: tuple[Episode, np.ndarray, list[int]] | None = None
    for episode in source.split("validation").some(NUM_JUDGED_VIDEOS):
        pairs = list(islice(episode.frames(options), most))
        if best is None or len(pairs) > len(best[1]):
            best = episode, np.stack([frame for _, frame in pairs]), [number for number, _ in pairs]
        if len(pairs) == most:
            break
    assert best is not None  # a split has episodes, and an episode frames
    return best


def main(command_line: Sequence[str]) -> int:
    """The command, without its name; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    program = "diffusers-far train"
    data, options = parse(command_line, (TrainOptions,), __doc__, positional="videos", program=program)
    return train(data, options, command_line)
