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
import json
import logging
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout: this file is run as a script

from diffusers_far import FARTransformer3DModel
from diffusers_far.evaluation.tables import table
from diffusers_far.flow_matching import CLEAN_TIMESTEP, add_noise
from diffusers_far.training.clips import Clips, LatentVideos
from diffusers_far.training.matmul_attn_processor import MatmulAttnProcessor
from diffusers_far.training.options import FAROptions
from diffusers_far.whole_files import written_whole
from evaluation.experiments import equal_time
from evaluation.experiments.equal_time import Targets, Wrapper, beside, measure, with_changes, write_results

CONTEXT_NOISE = 0.15  # highest share of noise in the clean frames of `context_noise`
NULL_FRAMES = 4  # learned ones before the first frame
LEAST_SIGMA = 0.05  # of `clean_prediction`, whose error grows without bound below
CONTEXTS = (255, 31, 7)  # observed frames before it
NOISY_FRAMES = 4


class LearnedNullFrames(Wrapper):
    """A model that finds some learned frames, the same for all videos, before the first one."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, **conditions: Any) -> Any:
        frames = self.model.null_frames.expand(len(hidden_states), -1, -1, -1, -1)
        actions = conditions.pop("actions")
        return self.model(
            torch.cat([frames.to(hidden_states.dtype), hidden_states], dim=1),
            nn.functional.pad(timestep, (NULL_FRAMES, 0), value=CLEAN_TIMESTEP),
            actions=None if actions is None else nn.functional.pad(actions, (NULL_FRAMES, 0), value=-1),
            **conditions,
        )


class CleanPrediction(Wrapper):
    """A model whose output is the clean frame, as the velocity that leads there."""

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
        wrapper: what turns the model into what is trained and measured; None: it is the model itself.
        context_noise: highest share of noise in clean frames, which the model is not told.
        is_new: begins with a new model.
    """

    what: str
    changes: dict[str, Any] = field(default_factory=dict)
    model_changes: dict[str, Any] = field(default_factory=dict)
    wrapper: type[Wrapper] | None = None
    context_noise: float = 0.0
    is_new: bool = False


NEW = {**equal_time.NEW_MODEL, "own_context_probability": 0.0}
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


class Trainer(equal_time.Trainer):
    """Trains one option."""

    def __init__(self, option: Option, checkpoint: FARTransformer3DModel, options: FAROptions) -> None:
        self.option = option

        def make_model(videos: LatentVideos) -> FARTransformer3DModel:
            if option.is_new:
                torch.manual_seed(options.seed)
                model = FARTransformer3DModel.from_config(checkpoint.config)
            else:
                model = with_changes(checkpoint, option.model_changes)
            if option.wrapper is LearnedNullFrames:
                model.null_frames = nn.Parameter(torch.zeros(1, NULL_FRAMES, *videos.frame_shape))
            model.set_attn_processor(MatmulAttnProcessor())
            return model

        super().__init__(make_model, options, option.wrapper, checkpoint.config.num_actions)

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


# ------------------------------------------------------------------------------------------------------------
# Measuring


def summary(results: dict[str, Any], targets: dict[str, Any]) -> dict[str, Any]:
    """Mean losses of all options, and how far from the baseline, with the standard error over walks."""
    walks, revisits = np.array(targets["walks"]), np.array(targets["revisits"])
    rows = {}
    for name, result in results.items():
        baseline = results.get(BASELINES.get(name, "recipe"), result)["losses"]
        row: dict[str, Any] = {"steps": result["steps"], "seconds_per_step": result["seconds_per_step"]}
        for measured, values in result["losses"].items():
            for kind, of_kind in (("", ~revisits), ("_revisits", revisits)):
                chosen = of_kind.nonzero()[0]
                loss, others = (np.array(part)[chosen] for part in (values, baseline[measured]))
                row[measured + kind] = {"loss": float(loss.mean()), **beside(loss, others, walks[chosen])}
        rows[name] = row
    return rows


def markdown(rows: dict[str, Any]) -> str:
    """The table."""
    measured = [f"next_{number}{kind}" for number in CONTEXTS for kind in ("", "_revisits")]
    measured += ["noisy_right", "noisy_shuffled", "noisy_none"]
    header = ["option", "", "steps", *(name.replace("_", " ") for name in measured)]
    lines: list[list[object]] = []
    for name, row in rows.items():
        cells = [f"{row[key]['loss']:.4f}" for key in measured]
        if name != "recipe" and name not in BASELINES.values():
            cells = [
                f"{cell} ({row[key]['difference']:+.4f} ± {row[key]['standard_error']:.4f})"
                for cell, key in zip(cells, measured, strict=True)
            ]
        lines.append([name, OPTIONS[name].what, row["steps"], *cells])
    return table(header, lines) + "\n"


# ------------------------------------------------------------------------------------------------------------
# Running


def run_options(arguments: argparse.Namespace, name: str) -> FAROptions:
    values = {
        "num_frames": arguments.num_frames,
        "length_distribution": "log_uniform",
        "revisit_probability": 0.5,
        "noisy_window_probability": 0.35,
        "clean_context_probability": 0.4,
        "own_context_probability": 0.3,
        "muon_learning_rate": 5e-4,
        "learning_rate": 1.2e-4,
    }
    return equal_time.run_options(arguments, name, **{**values, **OPTIONS[name].changes})


def training_of(
    name: str, checkpoint: FARTransformer3DModel, arguments: argparse.Namespace
) -> equal_time.Training:
    """How an option is trained."""
    return equal_time.Training(
        lambda options: Trainer(OPTIONS[name], checkpoint, options), run_options(arguments, name)
    )


def train(training: equal_time.Training, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one option and measure it: its losses and cost."""
    trainer, planned = equal_time.train(training)
    videos = LatentVideos(Path(training.options.latents) / "validation")
    targets = Targets(videos, arguments.walks, CONTEXTS, NOISY_FRAMES)
    with trainer.run.averaged_weights():
        found = measure(trainer.learner.eval(), targets, arguments.batch_size)
    return {**planned, "losses": found, "targets": targets.facts}


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
    chosen = [name for name in OPTIONS if name in arguments.options]
    trainings = {name: training_of(name, checkpoint, arguments) for name in chosen}
    equal_time.plan_steps(trainings.values(), arguments.minutes)
    for name, training in trainings.items():
        path = arguments.output / name / "results.json"
        if not path.exists():
            result = train(training, arguments)
            with written_whole(path) as unfinished:
                unfinished.write_text(json.dumps(result))
        results[name] = json.loads(path.read_text())
        rows = summary(results, results[name]["targets"])
        write_results(arguments.output, {"minutes": arguments.minutes, "rows": rows}, markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
