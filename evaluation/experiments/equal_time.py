"""What the experiments share: models trained for equal time, and results that are kept as they come.

Time is that of a processor (on a GPU that of the clock), and the cost of a step is measured first, of all
models in turn, so that other work on the machine does not change who wins; each model gets as many steps as
fit into the minutes. All see the same batches, as these depend on the seed and the step alone.

Models whose steps are of other kinds get equal floating-point operations in place of time: as many as the
first of them does in its minutes.
"""

import argparse
import datetime
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffusers_far import FARTransformer3DModel, FARVideoPipeline
from diffusers_far.attention import FARAttnProcessor
from diffusers_far.evaluation.machine import describe
from diffusers_far.fvd import I3D, frechet_distance
from diffusers_far.lpips import LPIPS
from diffusers_far.memory_loss import change_long_frames, window_loss
from diffusers_far.metrics import psnr
from diffusers_far.training.clips import LatentVideos, action_options
from diffusers_far.training.make_pipeline import make_scheduler
from diffusers_far.training.matmul_attn_processor import MatmulAttnProcessor
from diffusers_far.training.options import FAROptions, ModelOptions
from diffusers_far.training.pretrained import Change, change_model, mean_of_tokens
from diffusers_far.training.train_far import FARTrainer
from diffusers_far.whole_files import written_whole
from evaluation.world_model import decode

CALIBRATION_STEPS = 30  # whose cost says how many steps a model gets; batches with own frames cost more
SAMPLING_STEPS = 5  # of UniPC, of a frame
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}  # of models by `--mixed-precision`
LEVELS = (0.3, 0.5, 0.7, 0.9)  # noise of the next frame
TARGETS_PER_WALK = 4
RECIPE: dict[str, Any] = {  # options of all runs of all experiments
    "max_train_steps": CALIBRATION_STEPS,
    "lr_scheduler": "warmup_stable_decay",
    "warmup_ratio": 0.05,
    "decay_ratio": 0.5,
    "adam_beta2": 0.99,
    "ema_decay": 0.98,
    "validation_steps": 0,
    "save_minutes": 5.0,
    "keep_checkpoints": 1,
    "logging_steps": 20,
    "resume_from": "latest",
    "seed": 0,
}
NEW_MODEL: dict[str, Any] = {"muon_learning_rate": 2.5e-3, "learning_rate": 6e-4}  # rates of these
SIZES = {  # of new models, small and for a GPU
    False: ModelOptions(patch_size=2, num_layers=6, num_attention_heads=3),
    True: ModelOptions(patch_size=2, num_layers=12, num_attention_heads=8),
}


# ------------------------------------------------------------------------------------------------------------
# Training


class Wrapper(nn.Module):
    """A model that is called in another way."""

    def __init__(self, model: FARTransformer3DModel) -> None:
        super().__init__()
        self.model = model
        self.device, self.dtype = model.device, model.dtype


class Trainer(FARTrainer):
    """Trains one model of an experiment.

    Args:
        make_model: gives it as training begins, of the videos to train on.
        options: of its run.
        wrapper: what turns the model into what is trained and measured; None: it is the model itself.
        num_actions: of the model, for the run's list of options.
    """

    def __init__(
        self,
        make_model: Callable[[LatentVideos], FARTransformer3DModel],
        options: FAROptions,
        wrapper: type[Wrapper] | None = None,
        num_actions: Any = None,
    ) -> None:
        self.make_model = make_model
        super().__init__(ModelOptions(num_actions=num_actions), options)
        self.learner = self.network if wrapper is None else wrapper(self.network)
        self.objective.model = self.learner

    def create_models(self, sizes: ModelOptions, videos: LatentVideos) -> Any:
        return self.make_model(videos), None, None


class MarkTrainer(Trainer):
    """Trains one model, and keeps its averaged weights at each validation: OUTPUT/step-<step>.safetensors."""

    def validate(self) -> dict[str, float]:
        path = snapshot(Path(self.options.output_dir), self.run.clock.step)
        weights = {name: weight.contiguous() for name, weight in self.network.state_dict().items()}
        with written_whole(path) as unfinished:
            save_file(weights, unfinished)
        return {}

    def save_weights(self) -> None:
        """Those of the marks are enough."""


def snapshot(folder: Path, step: int) -> Path:
    """Where a `MarkTrainer` keeps weights."""
    return folder / f"step-{step}.safetensors"


def device_here() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def processor() -> Any:
    """The fastest attention to train with on this machine."""
    return FARAttnProcessor() if torch.accelerator.is_available() else MatmulAttnProcessor()


def new_model(videos: LatentVideos, sizes: ModelOptions, **changes: Any) -> FARTransformer3DModel:
    """A model for the frames and actions of some videos, from nothing.

    Args:
        changes: of its configuration.
    """
    known = [values for values in videos.actions if values is not None]
    conditions = action_options(known) if len(known) == len(videos) else {}
    torch.manual_seed(RECIPE["seed"])
    options = asdict(sizes) | {"in_channels": videos.frame_shape[0]} | conditions | changes
    model = FARTransformer3DModel(**options)
    model.set_attn_processor(processor())
    return model


def with_changes(checkpoint: FARTransformer3DModel, changes: dict[str, Any]) -> FARTransformer3DModel:
    """A copy with another window, or other long-term frames.

    Other patches of these start as means of short-term ones; without any (`long_patch_size` None), what is of
    them goes.
    """
    if "long_patch_size" not in changes:
        return change_model(checkpoint, Change(changes))
    model = FARTransformer3DModel.from_config(checkpoint.config, **changes)
    patch, weights = model.config.patch_size, dict(checkpoint.state_dict())
    if not model.is_long:
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        return model
    ratio = model.config.long_patch_size // patch
    weights["context_embedder.weight"] = mean_of_tokens(weights["x_embedder.weight"], patch, ratio)
    weights["context_embedder.bias"] = weights["x_embedder.bias"]
    model.load_state_dict(weights)
    return model


def now(device: torch.device) -> float:
    """Seconds of the processor, or on a GPU of the clock, once all its work is done."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class Training:
    """How one model is trained.

    Args:
        make_trainer: for options, which are those below but for the number of steps.
        options: of its run.
    """

    make_trainer: Callable[[FAROptions], Trainer]
    options: FAROptions

    @property
    def plan(self) -> Path:
        """The file that says how many steps it gets."""
        return Path(self.options.output_dir) / "plan.json"


def seconds_per_step(trainings: Sequence[Training]) -> list[float]:
    """Of one batch of each, over the first ones.

    The models take their steps in turn: what else the machine does then makes all of them slower alike.
    """
    trainers = [training.make_trainer(training.options) for training in trainings]
    spent = [0.0] * len(trainers)
    for index in range(CALIBRATION_STEPS):
        for number, trainer in enumerate(trainers):
            device = trainer.run.accelerator.device
            started = now(device)
            trainer.step(index)
            if index > 0:  # the first one warms up
                spent[number] += now(device) - started
    return [seconds / (CALIBRATION_STEPS - 1) for seconds in spent]


def flops_per_step(training: Training) -> int:
    """Floating-point operations of one batch, forward, backward and optimizers, as PyTorch counts them."""
    trainer = training.make_trainer(training.options)
    with FlopCounterMode(display=False) as counter:
        trainer.step(0)
    return counter.get_total_flops()


def plan_steps(trainings: Iterable[Training], minutes: float) -> None:
    """Write down how many steps of each fit into so many minutes; those that have a plan keep it."""
    unplanned = [training for training in trainings if not training.plan.exists()]
    for training, seconds in zip(unplanned, seconds_per_step(unplanned), strict=True):
        seconds *= training.options.gradient_accumulation_steps
        number = max(1, round(minutes * 60 / seconds))
        training.plan.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(training.plan) as unfinished:
            unfinished.write_text(json.dumps({"steps": number, "seconds_per_step": round(seconds, 3)}))


def train_to_end(training: Training) -> Trainer:
    """Train for all steps of its options, or go on with that; ends the process if it is interrupted."""
    trainer = training.make_trainer(training.options)
    if not trainer.train():
        sys.exit(f"{Path(training.options.output_dir).name}: interrupted; start again to go on")
    return trainer


def train(training: Training) -> tuple[Trainer, dict[str, Any]]:
    """Train a model for as long as is planned, or go on with that; ends the process if it is interrupted.

    Returns:
        The trainer, and `steps` and `seconds_per_step`.
    """
    planned: dict[str, Any] = json.loads(training.plan.read_text())
    options = replace(training.options, max_train_steps=planned["steps"])
    return train_to_end(replace(training, options=options)), planned


def train_new(training: Training) -> tuple[FARTransformer3DModel, dict[str, Any]]:
    """As `train`: the averaged weights as a model of its own, in the format of training, and what it took."""
    options = training.options
    done = Path(options.output_dir) / "trained.json"
    if not done.exists():
        planned = train(training)[1]
        with written_whole(done) as unfinished:
            unfinished.write_text(json.dumps(planned))
    dtype = DTYPES[options.mixed_precision]
    model = FARTransformer3DModel.from_pretrained(Path(options.output_dir) / "ema", torch_dtype=dtype)
    return model.eval().to(device_here()), json.loads(done.read_text())


# ------------------------------------------------------------------------------------------------------------
# Measuring


class Targets:
    """Frames to predict of held-out walks, with their noise.

    Args:
        videos: walks of more than `contexts[0]` frames.
        num_walks: the first ones are taken.
        contexts: observed frames before a target, the most first.
        noisy_frames: of a window that is noisy as a whole.
    """

    def __init__(
        self, videos: LatentVideos, num_walks: int, contexts: Sequence[int], noisy_frames: int
    ) -> None:
        self.videos, self.contexts = videos, contexts
        self.walks, self.frames, self.revisits = [], [], []
        first = contexts[0]
        for walk in range(min(num_walks, len(videos))):
            ages = videos.revisits[walk]
            if ages is None or videos.num_frames[walk] <= first or videos.actions[walk] is None:
                raise ValueError(
                    f"latents: {videos.paths[walk]} has {videos.num_frames[walk]} frames; it takes more than "
                    f"{first}, with actions and revisits"
                )
            (seen,) = ages[first:].nonzero(as_tuple=True)
            for candidates, kind in ((torch.arange(len(ages) - first), False), (seen, True)):
                number = min(TARGETS_PER_WALK, len(candidates))
                chosen = candidates[torch.linspace(0, len(candidates) - 1, number).round().long()]
                self.walks += [walk] * number
                self.frames += (first + chosen).tolist()
                self.revisits += [kind] * number
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(len(self.frames), noisy_frames, *videos.frame_shape, generator=generator)

    def clips(self, chosen: list[int], num_observed: int) -> tuple[Tensor, Tensor]:
        """Latents `[B, F, C, H, W]` and actions `[B, F]` of some targets and the frames before each."""
        latents, actions = [], []
        for index in chosen:
            walk, start = self.walks[index], self.frames[index] - num_observed
            latents.append(self.videos.clip(walk, start, num_observed + 1))
            actions.append(self.videos.actions[walk][start : start + num_observed + 1])
        return torch.stack(latents), torch.stack(actions)

    @property
    def facts(self) -> dict[str, list[Any]]:
        """Of each target: its walk, its frame, and whether it is a revisit."""
        return {"walks": self.walks, "frames": self.frames, "revisits": self.revisits}


def next_frame_losses(learner: nn.Module, targets: Targets, chosen: list[int]) -> dict[str, list[float]]:
    """Losses of some targets, mean of `LEVELS`, by context: `next_<observed frames>`."""
    values = {}
    for num_observed in targets.contexts:
        clips, noise = targets.clips(chosen, num_observed), targets.noise[chosen, -1:]
        by_level = [window_loss(learner, *clips, noise, level) for level in LEVELS]
        values[f"next_{num_observed}"] = torch.stack(by_level).mean(dim=0).tolist()
    return values


def measure(learner: nn.Module, targets: Targets, batch_size: int) -> dict[str, list[float]]:
    """Losses of all targets, in the order of `targets`."""
    found: dict[str, list[float]] = {}
    contexts = targets.contexts
    window = contexts[-1] + 1  # of the checkpoint
    for begin in range(0, len(targets.frames), batch_size):
        chosen = list(range(begin, min(begin + batch_size, len(targets.frames))))
        values, noise = next_frame_losses(learner, targets, chosen), targets.noise[chosen]
        latents, actions = targets.clips(chosen, contexts[0])
        generator = torch.Generator().manual_seed(begin)
        shuffled = change_long_frames(latents, actions, latents.shape[1] - window, "shuffled", generator)
        for name, clips in (
            ("right", (latents, actions)),
            ("shuffled", shuffled),
            ("none", (latents[:, -window:], actions[:, -window:])),
        ):
            values[f"noisy_{name}"] = window_loss(learner, *clips, noise).tolist()
        for name, part in values.items():
            found.setdefault(name, []).extend(part)
    return found


def beside(values: Sequence[float], baseline: Sequence[float], walks: Sequence[int]) -> dict[str, float]:
    """Mean difference of values of the same targets, and its standard error over the walks they are of."""
    found = over_walks(np.array(values) - np.array(baseline), walks)
    return {"difference": found["mean"], "standard_error": found["standard_error"]}


def over_walks(values: Sequence[float] | np.ndarray, walks: Sequence[int]) -> dict[str, float]:
    """Mean of the means of walks, and its standard error.

    Args:
        walks: that the values are of.
    """
    found, owners = np.array(values), np.array(walks)
    by_walk = np.array([found[owners == walk].mean() for walk in np.unique(owners)])
    error = by_walk.std(ddof=1) / len(by_walk) ** 0.5 if len(by_walk) > 1 else 0.0
    return {"mean": float(by_walk.mean()), "standard_error": float(error)}


def make_pipeline(
    model: FARTransformer3DModel, autoencoder: Path, num_training_frames: int
) -> FARVideoPipeline:
    """A pipeline that samples and decodes on the device of the model."""
    vae = AutoencoderDC.from_pretrained(autoencoder).eval()
    pipeline = FARVideoPipeline(
        model,
        vae.to(model.device),
        make_scheduler("UniPC"),
        num_inference_steps=SAMPLING_STEPS,
        num_training_frames=num_training_frames,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_coder(autoencoder: Path, device: torch.device) -> FARVideoPipeline:
    """A pipeline without a model, which decodes."""
    vae = AutoencoderDC.from_pretrained(autoencoder).eval()
    return FARVideoPipeline(None, vae.to(device), make_scheduler("UniPC"))


def held_out_clips(
    videos: LatentVideos, walks: Sequence[int], end: int, num_frames: int
) -> tuple[Tensor, Tensor]:
    """Latents `[N, F, C, H, W]` and actions `[N, F]` of the frames before `end` of some walks.

    Raises:
        ValueError: for walks that are shorter, or have no actions.
    """
    latents, actions = [], []
    for walk in walks:
        known = videos.actions[walk]
        if known is None or not num_frames <= end <= videos.num_frames[walk]:
            raise ValueError(
                f"latents: {videos.paths[walk]} has {videos.num_frames[walk]} frames; it takes {end} or "
                "more, with actions"
            )
        latents.append(videos.clip(walk, end - num_frames, num_frames))
        actions.append(known[end - num_frames : end])
    return torch.stack(latents), torch.stack(actions)


def spread_clips(videos: LatentVideos, number: int, num_frames: int) -> tuple[Tensor, Tensor, list[int]]:
    """So many clips, evenly spread over the videos and in them: latents, actions, and their walks."""
    rounds = -(-number // len(videos))
    clips, walks = [], []
    for index in range(number):
        walk, which = index % len(videos), index // len(videos)
        end = num_frames + (videos.num_frames[walk] - num_frames) * (which + 1) // (rounds + 1)
        clips.append(held_out_clips(videos, [walk], end, num_frames))
        walks.append(walk)
    latents, actions = (torch.cat(part) for part in zip(*clips, strict=True))
    return latents, actions, walks


def sources_of(seeds: Iterable[int]) -> list[torch.Generator]:
    """One of noise for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise_of(seeds: Iterable[int], shape: Sequence[int]) -> Tensor:
    """`[N, *shape]`, the same for a seed whatever the others are."""
    return torch.stack([torch.randn(shape, generator=source) for source in sources_of(seeds)])


def predict_in_parts(
    make: Callable[[Tensor, Tensor, list[torch.Generator]], Tensor],
    context: Tensor,
    actions: Tensor,
    clips_at_once: int,
) -> Tensor:
    """What `make` gives for all clips, some at once, each with its own source of noise, as in `predict`."""
    parts = []
    for chosen in torch.arange(len(context)).split(clips_at_once):
        parts.append(make(context[chosen], actions[chosen], sources_of(chosen.tolist())))
    return torch.cat(parts)


class Measures:
    """Figures of predictions of held-out clips, beside the true latents, decoded.

    Args:
        pipeline: that decodes.
        truth: latents `[N, F, C, h, w]` of the frames to predict.
        clips_at_once: that are decoded and looked at.
    """

    def __init__(self, pipeline: FARVideoPipeline, truth: Tensor, clips_at_once: int) -> None:
        self.pipeline, self.latents, self.clips_at_once = pipeline, truth, clips_at_once
        self.lpips, self.i3d = LPIPS(), I3D().to(pipeline.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Frames `[N, F, 3, H, W]` in [0, 1]."""
        return decode(self.pipeline, latents.float(), self.clips_at_once * latents.shape[1])

    @cached_property
    def truth(self) -> Tensor:
        """The frames to predict."""
        return self.decode(self.latents)

    @cached_property
    def true_features(self) -> Tensor:
        return self.features(self.truth)

    def features(self, frames: Tensor) -> Tensor:
        device = self.pipeline.device
        return torch.cat([self.i3d(video.to(device)).cpu() for video in frames.split(1)])

    def __call__(self, frames: Tensor) -> dict[str, Any]:
        """PSNR and LPIPS by clip, of the first frame and of all; their means by frame; FVD.

        Args:
            frames: `[N, F, 3, H, W]` in [0, 1].
        """
        size = self.clips_at_once * frames.shape[1]
        quality, distance = psnr(frames, self.truth), self.lpips.by_frame(frames, self.truth, size)
        return {
            "psnr_1": quality[:, 0].tolist(),
            "psnr": quality.mean(dim=1).tolist(),
            "psnr_by_frame": quality.mean(dim=0).tolist(),
            "lpips_1": distance[:, 0].tolist(),
            "lpips": distance.mean(dim=1).tolist(),
            "lpips_by_frame": distance.mean(dim=0).tolist(),
            "fvd": frechet_distance(self.features(frames), self.true_features),
        }


BY_CLIP = {"psnr_1": 2, "psnr": 2, "lpips_1": 3, "lpips": 3}  # of `Measures`, with their digits in tables
QUALITY_HEADER = ["PSNR of frame 1", "of 16", "LPIPS of frame 1", "of 16", "FVD"]


def means(measured: dict[str, Any], walks: list[int]) -> dict[str, dict[str, float]]:
    """What `Measures` gave by clip, over the walks that the clips are of."""
    return {name: over_walks(measured[name], walks) for name in BY_CLIP}


def quality_cells(row: dict[str, Any]) -> list[str]:
    """Of `QUALITY_HEADER`."""
    cells = [
        f"{row[name]['mean']:.{digits}f} ± {row[name]['standard_error']:.{digits}f}"
        for name, digits in BY_CLIP.items()
    ]
    return [*cells, f"{row['fvd']:.0f}"]


# ------------------------------------------------------------------------------------------------------------
# Results


class Kept:
    """Results by name in a JSON file, each written as soon as it is there, and not made twice.

    Args:
        path: of the file.
        settings: what results depend on.

    Raises:
        ValueError: for a file of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        settings = json.loads(json.dumps(settings, default=str))
        self.content: dict[str, Any] = {"settings": settings, "results": {}}
        if path.exists():
            self.content = json.loads(path.read_text())
            for name, value in self.content["settings"].items():
                if settings.get(name) != value:
                    raise ValueError(
                        f"{name}={settings.get(name)!r}: {path} has results of {name}={value!r}; give the "
                        "same, or another output"
                    )

    @property
    def results(self) -> dict[str, Any]:
        """Those that are there, by name."""
        return self.content["results"]

    def __call__(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of this name."""
        results = self.results
        if name not in results:
            results[name] = make()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(self.path) as unfinished:
                unfinished.write_text(json.dumps(self.content) + "\n")
        return results[name]


def write_results(folder: Path, facts: dict[str, Any], markdown: str) -> None:
    """results.json, with the machine and the day, and results.md."""
    about = {"machine": describe(device_here()), "date": datetime.date.today().isoformat()}
    about |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    with written_whole(folder / "results.json") as unfinished:
        unfinished.write_text(json.dumps(about | facts, indent=1) + "\n")
    with written_whole(folder / "results.md") as unfinished:
        unfinished.write_text(markdown)


def told(value: dict[str, float], digits: int) -> str:
    """A mean, and its difference."""
    text = f"{value['mean']:.{digits}f}"
    if value.get("difference"):
        text += f" ({value['difference']:+.{digits}f} ± {value['standard_error']:.{digits}f})"
    return text


def parse_arguments(
    parser: argparse.ArgumentParser, full: dict[str, Any], **small: Any
) -> argparse.Namespace:
    """Arguments of an experiment; what is not given is as in `small`, or with `--full` as in `full`."""
    parser.add_argument("latents", type=Path, help="encoded walks with splits train and validation")
    parser.add_argument("--autoencoder", type=Path, required=True, help="folder of the one that made them")
    parser.add_argument("--output", type=Path, required=True, help="folder; to go on, that of before")
    parser.add_argument("--plot", type=Path, help="PNG file")
    parser.add_argument("--full", action="store_true", help="a larger model for longer, on a GPU")
    parser.add_argument("--batch-size", type=int, default=16, help="clips of a step")
    parser.add_argument("--measured-at-once", type=int, default=4, help="clips of a forward in measuring")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="bf16")
    parser.set_defaults(**small)
    if parser.parse_known_args()[0].full:
        parser.set_defaults(**full)
    arguments = parser.parse_args()
    for name in ("batch_size", "measured_at_once", "walks", "ends", "marks", "steps"):
        if getattr(arguments, name, 1) < 1:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} {getattr(arguments, name)}: it takes 1 or more")
    if getattr(arguments, "clips", 2) < 2:
        parser.error(f"--clips {arguments.clips}: FVD takes 2 or more")
    for name in ("minutes", "unet_rate", "simvp_rate"):
        if getattr(arguments, name, 1) <= 0:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} {getattr(arguments, name)}: it takes more than 0")
    logging.basicConfig(level=logging.INFO)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    return arguments


def run_options(arguments: argparse.Namespace, name: str, **changes: Any) -> FAROptions:
    """Options of the run of one model."""
    places = {"latents": str(arguments.latents), "output_dir": str(arguments.output / name)}
    sizes = {"batch_size": arguments.batch_size, "mixed_precision": arguments.mixed_precision}
    return FAROptions(**{**RECIPE, **places, **sizes, **changes})
