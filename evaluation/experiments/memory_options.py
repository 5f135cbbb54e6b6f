"""Which options of training a Long model for memory are worth having, after equal time.

    python evaluation/experiments/memory_options.py checkpoints/far-doom-maze-64 LATENTS --output OUTPUT

LATENTS is what training.encode_latents wrote of walks that come back (`data/doom_maze.py --walk revisit`),
with its `revisits`. Each option trains on from the checkpoint, but for the two of new models, for as many
steps as fit into `--minutes` of a processor's time by its own cost of a step, which is measured first. So
other work on the machine does not change who wins. The learning rate falls to zero over the second half;
averaged weights are measured.

Measured on held-out walks, always on the same targets with the same noise, the velocity loss (squared error)
of

- the next frame, mean over four levels of noise, after 255, 31 and 7 observed frames, over all targets and
  over revisits alone (frames whose view was seen before, but not in the window);
- the last four frames, all noisy at level 0.8, after the right frames, the same ones shuffled in time, and
  none but the window's.

Differences to `recipe` are of the same targets; ± is their standard error over the walks. OUTPUT gets a
folder for each option, and results.json and results.md of those that are complete. Started again, it goes on
where it was.
"""

import argparse
import datetime
import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout: this file is run as a script

from diffusers_far import FARTransformer3DModel
from diffusers_far.flow_matching import CLEAN_TIMESTEP, add_noise, velocity_target
from diffusers_far.training.clips import Clips, LatentVideos
from diffusers_far.training.matmul_attn_processor import MatmulAttnProcessor
from diffusers_far.training.options import FAROptions, ModelOptions
from diffusers_far.training.pretrained import Change, change_model, mean_of_tokens
from diffusers_far.training.train_far import FARTrainer
from diffusers_far.whole_files import written_whole
from evaluation.machine import describe

CONTEXT_NOISE = 0.15  # highest share of noise in the clean frames of `context_noise`
NULL_FRAMES = 4  # learned ones before the first frame
LEAST_SIGMA = 0.05  # of `clean_prediction`, whose error grows without bound below
LEVELS = (0.3, 0.5, 0.7, 0.9)  # noise of the next frame
CONTEXTS = (255, 31, 7)  # observed frames before it
NOISY_FRAMES, NOISY_SIGMA = 4, 0.8
TARGETS_PER_WALK = 4
CALIBRATION_STEPS = 10  # whose cost says how many steps an option gets


class LearnedNullFrames(nn.Module):
    """A model that finds some learned frames, the same for all videos, before the first one."""

    def __init__(self, model: FARTransformer3DModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden_states: Tensor, timestep: Tensor, **conditions: Any) -> Any:
        frames = self.model.null_frames.expand(len(hidden_states), -1, -1, -1, -1)
        actions = conditions.pop("actions")
        return self.model(
            torch.cat([frames.to(hidden_states.dtype), hidden_states], dim=1),
            nn.functional.pad(timestep, (NULL_FRAMES, 0), value=CLEAN_TIMESTEP),
            actions=None if actions is None else nn.functional.pad(actions, (NULL_FRAMES, 0), value=-1),
            **conditions,
        )


class CleanPrediction(nn.Module):
    """A model whose output is the clean frame, as the velocity that leads there."""

    def __init__(self, model: FARTransformer3DModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden_states: Tensor, timestep: Tensor, **conditions: Any) -> Any:
        clean = self.model(hidden_states, timestep, **conditions).sample
        num_short = clean.shape[1]
        sigmas = (timestep[:, -num_short:] / 1000).clamp(min=LEAST_SIGMA)[..., None, None, None]
        return SimpleNamespace(sample=(hidden_states[:, -num_short:] - clean) / sigmas)


@dataclass
class Option:
    """One way to train.

    Args:
        what: in the table.
        changes: of the options of a run.
        model_changes: of the model's configuration.
        wrapper: what turns the model into what is trained and measured.
        context_noise: highest share of noise in clean frames, which the model is not told.
        is_new: begins with a new model.
    """

    what: str
    changes: dict[str, Any] = field(default_factory=dict)
    model_changes: dict[str, Any] = field(default_factory=dict)
    wrapper: Callable[[FARTransformer3DModel], nn.Module] = nn.Module.train  # which returns the model itself
    context_noise: float = 0.0
    is_new: bool = False


NEW = {"muon_learning_rate": 2.5e-3, "learning_rate": 6e-4, "own_context_probability": 0.0}
OPTIONS = {
    "recipe": Option("as the shipped model"),
    "context_noise": Option("noise on the clean frames, up to 15%", context_noise=CONTEXT_NOISE),
    "null_frames": Option("four learned frames before the first", wrapper=LearnedNullFrames),
    "window_4": Option("a window of 4 frames", model_changes={"short_window": 4}),
    "long_patch_2": Option("long-term frames of 16 tokens", model_changes={"long_patch_size": 2}),
    "clean_context_0.1": Option("10% of the window clean, as published", {"clean_context_probability": 0.1}),
    "true_context": Option("no frames of its own in the context", {"own_context_probability": 0.0}),
    "new_velocity": Option("new model, predicts the velocity", NEW, is_new=True),
    "new_clean": Option("new model, predicts the clean frame", NEW, wrapper=CleanPrediction, is_new=True),
}
BASELINES = {"new_clean": "new_velocity"}  # of the others: recipe


class Trainer(FARTrainer):
    """Trains one option."""

    def __init__(self, option: Option, checkpoint: FARTransformer3DModel, options: FAROptions) -> None:
        self.option, self.checkpoint = option, checkpoint
        super().__init__(ModelOptions(num_actions=checkpoint.config.num_actions), options)
        self.learner = option.wrapper(self.network)
        self.objective.model = self.learner

    def create_models(self, sizes: ModelOptions, videos: LatentVideos) -> Any:
        option = self.option
        if option.is_new:
            torch.manual_seed(self.options.seed)
            model = FARTransformer3DModel.from_config(self.checkpoint.config)
        else:
            model = with_changes(self.checkpoint, option.model_changes)
        if option.wrapper is LearnedNullFrames:
            model.null_frames = nn.Parameter(torch.zeros(1, NULL_FRAMES, *videos.frame_shape))
        model.set_attn_processor(MatmulAttnProcessor())
        return model, None, None

    def loss(self, clips: Clips, index: int) -> Tensor:
        if self.option.context_noise:
            generator = self.run.generator(index, seed=2)
            shape = clips.latents.shape
            level = torch.rand(shape[0], 1, generator=generator) * self.option.context_noise
            noise = torch.randn(shape, generator=generator)
            noisy = add_noise(clips.before, noise[:, : -clips.window], level)
            clips = replace(clips, latents=torch.cat([noisy, clips.target], dim=1))
        return super().loss(clips, index)

    def save_weights(self) -> None:
        """Checkpoints are enough."""


def with_changes(checkpoint: FARTransformer3DModel, changes: dict[str, Any]) -> FARTransformer3DModel:
    """A copy with another window, or other patches of long-term frames that start as means of short ones."""
    if "long_patch_size" not in changes:
        return change_model(checkpoint, Change(changes))
    model = FARTransformer3DModel.from_config(checkpoint.config, **changes)
    patch, weights = model.config.patch_size, dict(checkpoint.state_dict())
    ratio = model.config.long_patch_size // patch
    weights["context_embedder.weight"] = mean_of_tokens(weights["x_embedder.weight"], patch, ratio)
    weights["context_embedder.bias"] = weights["x_embedder.bias"]
    model.load_state_dict(weights)
    return model


# ------------------------------------------------------------------------------------------------------------
# Measuring


class Targets:
    """Frames to predict of held-out walks, with their noise.

    Args:
        videos: walks of more than `CONTEXTS[0]` frames.
        num_walks: the first ones are taken.
    """

    def __init__(self, videos: LatentVideos, num_walks: int) -> None:
        self.videos = videos
        self.walks, self.frames, self.revisits = [], [], []
        first = CONTEXTS[0]
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
        self.noise = torch.randn(len(self.frames), NOISY_FRAMES, *videos.frame_shape, generator=generator)

    def clips(self, chosen: list[int], num_observed: int) -> tuple[Tensor, Tensor]:
        """Latents `[B, F, C, H, W]` and actions `[B, F]` of some targets and the frames before each."""
        latents, actions = [], []
        for index in chosen:
            walk, start = self.walks[index], self.frames[index] - num_observed
            latents.append(self.videos.clip(walk, start, num_observed + 1))
            actions.append(self.videos.actions[walk][start : start + num_observed + 1])
        return torch.stack(latents), torch.stack(actions)


@torch.no_grad()
def losses(learner: nn.Module, latents: Tensor, actions: Tensor, noise: Tensor, sigma: float) -> list[float]:
    """Velocity loss of each clip in its last frames, as many as `noise` `[B, F, C, H, W]` is for."""
    num_noisy, clean = noise.shape[1], latents[:, -noise.shape[1] :]
    noisy = add_noise(clean, noise, torch.full(clean.shape[:2], sigma))
    timestep = torch.full(latents.shape[:2], CLEAN_TIMESTEP, dtype=torch.float32)
    timestep[:, -num_noisy:] = 1000 * sigma
    hidden_states = torch.cat([latents[:, :-num_noisy], noisy], dim=1)
    velocity = learner(hidden_states, timestep, class_labels=None, actions=actions).sample
    error = velocity[:, -num_noisy:].float() - velocity_target(clean, noise)
    return error.square().flatten(1).mean(dim=1).tolist()


def measure(learner: nn.Module, targets: Targets, batch_size: int) -> dict[str, list[float]]:
    """Losses of all targets, in the order of `targets`."""
    found: dict[str, list[float]] = {}
    window = CONTEXTS[-1]  # of the checkpoint, without the frame to predict
    for begin in range(0, len(targets.frames), batch_size):
        chosen = list(range(begin, min(begin + batch_size, len(targets.frames))))
        noise = targets.noise[chosen]
        values: dict[str, list[float]] = {}
        for num_observed in CONTEXTS:
            latents, actions = targets.clips(chosen, num_observed)
            by_level = [losses(learner, latents, actions, noise[:, -1:], level) for level in LEVELS]
            values[f"next_{num_observed}"] = np.mean(by_level, axis=0).tolist()
        latents, actions = targets.clips(chosen, CONTEXTS[0])
        values["noisy_right"] = losses(learner, latents, actions, noise, NOISY_SIGMA)
        generator = torch.Generator().manual_seed(begin)
        kept = window + 1
        order = torch.randperm(latents.shape[1] - kept, generator=generator)
        order = torch.cat([order, torch.arange(latents.shape[1] - kept, latents.shape[1])])
        values["noisy_shuffled"] = losses(learner, latents[:, order], actions[:, order], noise, NOISY_SIGMA)
        values["noisy_none"] = losses(learner, latents[:, -kept:], actions[:, -kept:], noise, NOISY_SIGMA)
        for name, part in values.items():
            found.setdefault(name, []).extend(part)
    return found


def summary(results: dict[str, Any], targets: dict[str, Any]) -> dict[str, Any]:
    """Mean losses of all options, and how far from the baseline, with the standard error over walks."""
    walks, revisits = np.array(targets["walks"]), np.array(targets["revisits"])
    rows = {}
    for name, result in results.items():
        baseline = results.get(BASELINES.get(name, "recipe"), result)["losses"]
        row: dict[str, Any] = {"steps": result["steps"], "seconds_per_step": result["seconds_per_step"]}
        for measured, values in result["losses"].items():
            for kind, of_kind in (("", ~revisits), ("_revisits", revisits)):
                difference = np.array(values) - np.array(baseline[measured])
                numbers = [walk for walk in np.unique(walks) if of_kind[walks == walk].any()]
                by_walk = np.array([difference[of_kind & (walks == walk)].mean() for walk in numbers])
                row[measured + kind] = {
                    "loss": float(np.array(values)[of_kind].mean()),
                    "difference": float(by_walk.mean()),
                    "standard_error": float(by_walk.std(ddof=1) / len(by_walk) ** 0.5),
                }
        rows[name] = row
    return rows


def table(rows: dict[str, Any]) -> str:
    """Markdown."""
    measured = [f"next_{number}{kind}" for number in CONTEXTS for kind in ("", "_revisits")]
    measured += ["noisy_right", "noisy_shuffled", "noisy_none"]
    lines = [
        "| option | | steps | " + " | ".join(name.replace("_", " ") for name in measured) + " |",
        "|" + "---|" * (len(measured) + 3),
    ]
    for name, row in rows.items():
        cells = [f"{row[key]['loss']:.4f}" for key in measured]
        if name != "recipe" and name not in BASELINES.values():
            cells = [
                f"{cell} ({row[key]['difference']:+.4f} ± {row[key]['standard_error']:.4f})"
                for cell, key in zip(cells, measured, strict=True)
            ]
        lines.append(f"| {name} | {OPTIONS[name].what} | {row['steps']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------------
# Running


def run_options(arguments: argparse.Namespace, name: str) -> FAROptions:
    values = {
        "latents": str(arguments.latents),
        "output_dir": str(arguments.output / name),
        "num_frames": arguments.num_frames,
        "length_distribution": "log_uniform",
        "revisit_probability": 0.5,
        "noisy_window_probability": 0.35,
        "clean_context_probability": 0.4,
        "own_context_probability": 0.3,
        "max_train_steps": CALIBRATION_STEPS,
        "batch_size": arguments.batch_size,
        "muon_learning_rate": 5e-4,
        "learning_rate": 1.2e-4,
        "lr_scheduler": "warmup_stable_decay",
        "warmup_ratio": 0.05,
        "decay_ratio": 0.5,
        "adam_beta2": 0.99,
        "ema_decay": 0.98,
        "mixed_precision": arguments.mixed_precision,
        "validation_steps": 0,
        "save_minutes": 5.0,
        "keep_checkpoints": 1,
        "logging_steps": 20,
        "resume_from": "latest",
        "seed": 0,
    }
    return FAROptions(**{**values, **OPTIONS[name].changes})


def seconds_per_step(option: Option, checkpoint: FARTransformer3DModel, options: FAROptions) -> float:
    """Of a processor's time, over the first batches."""
    trainer = Trainer(option, checkpoint, options)
    trainer.step(0)  # warms up
    started = time.process_time()
    for index in range(1, CALIBRATION_STEPS):
        trainer.step(index)
    return (time.process_time() - started) / (CALIBRATION_STEPS - 1)


def train(name: str, checkpoint: FARTransformer3DModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one option and measure it: its losses and cost."""
    option, options = OPTIONS[name], run_options(arguments, name)
    folder = arguments.output / name
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "plan.json"
    if not plan.exists():
        seconds = seconds_per_step(option, checkpoint, options)
        with written_whole(plan) as unfinished:
            number = max(1, round(arguments.minutes * 60 / seconds))
            unfinished.write_text(json.dumps({"steps": number, "seconds_per_step": round(seconds, 3)}))
    planned = json.loads(plan.read_text())
    trainer = Trainer(option, checkpoint, replace(options, max_train_steps=planned["steps"]))
    if not trainer.train():
        sys.exit(f"{name}: interrupted; start again to go on")
    targets = Targets(LatentVideos(Path(options.latents) / "validation"), arguments.walks)
    with trainer.run.averaged_weights():
        found = measure(trainer.learner.eval(), targets, arguments.batch_size)
    chosen = {"walks": targets.walks, "frames": targets.frames, "revisits": targets.revisits}
    return {**planned, "losses": found, "targets": chosen}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="folder of a Long pipeline")
    parser.add_argument("latents", type=Path, help="encoded walks with splits train and validation")
    parser.add_argument("--output", type=Path, required=True, help="folder; to go on, that of before")
    parser.add_argument("--options", nargs="+", choices=[*OPTIONS], default=[*OPTIONS])
    parser.add_argument("--minutes", type=float, default=8.0, help="of a processor's time for each option")
    parser.add_argument("--num-frames", type=int, default=160, help="of the longest clip to train on")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--walks", type=int, default=48, help="held-out ones that are measured")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="bf16")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    checkpoint = FARTransformer3DModel.from_pretrained(arguments.checkpoint / "transformer").float()
    if not checkpoint.is_long:
        parser.error(f"checkpoint={str(arguments.checkpoint)!r} is a base model; it takes a Long one")

    results = {}
    for name in [name for name in OPTIONS if name in arguments.options]:
        path = arguments.output / name / "results.json"
        if not path.exists():
            result = train(name, checkpoint, arguments)
            with written_whole(path) as unfinished:
                unfinished.write_text(json.dumps(result))
        results[name] = json.loads(path.read_text())
        rows = summary(results, results[name]["targets"])
        facts = {
            "machine": describe(torch.device("cpu")),
            "date": datetime.date.today().isoformat(),
            "minutes": arguments.minutes,
            "rows": rows,
        }
        with written_whole(arguments.output / "results.json") as unfinished:
            unfinished.write_text(json.dumps(facts, indent=1) + "\n")
        with written_whole(arguments.output / "results.md") as unfinished:
            unfinished.write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
