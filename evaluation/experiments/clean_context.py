"""What stochastic clean context is worth, and frames of the model's own in it.

    python evaluation/experiments/clean_context.py LATENTS --autoencoder checkpoints/far-doom-maze-64/vae \
        --output OUTPUT --plot docs/experiments_clean_context.png

LATENTS is what training.encode_latents wrote of walks of 300 frames with actions. Base models are trained
from nothing on the same clips of 16 frames, each for `--minutes` of a processor's time (on a GPU: of the
clock):

- `clean_0`: all frames of a clip are noisy, each at a level of its own. In sampling it gets clean frames with
  the mark of clean ones, which it does not know, or (`clean_0_least_noise`) as ones of the least noise;
- `clean_0.1`, `clean_0.5`: each frame of a clip is given clean, and marked so, with this chance;
- `..._own`: in 3 of 10 batches the clean frames are the model's own, made of noisy ones in one step.

Each then continues held-out walks for 256 frames after 16, with the sliding window that it was trained on,
and the walk's own actions. At frames 1, 16, 64 and 256: PSNR and LPIPS beside the true latents, decoded, and
sharpness as a share of theirs. The loss of the next frame after 15 clean ones, mean of four noise levels, has
no noise of sampling. Differences are to `clean_0.1`, as published.

With `--options`, two processes share out the models of one OUTPUT; the last one to end writes results.json
and results.md of all that are complete. Started again, it goes on.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout: this file is run as a script

from diffusers_far import FARTransformer3DModel
from diffusers_far.evaluation.tables import table
from diffusers_far.lpips import LPIPS
from diffusers_far.memory_loss import window_loss
from diffusers_far.metrics import psnr, sharpness
from diffusers_far.training.clips import LatentVideos
from evaluation.experiments.equal_time import (
    LEVELS,
    NEW_MODEL,
    SIZES,
    Kept,
    Trainer,
    Training,
    beside,
    held_out_clips,
    make_pipeline,
    new_model,
    noise_of,
    parse_arguments,
    plan_steps,
    run_options,
    told,
    train_new,
    write_results,
)
from evaluation.plots import plotted
from evaluation.world_model import decode, predict

TRAINED = 16  # frames of a clip
AHEAD = (1, 16, 64, 256)  # frames of a rollout that are looked at
LEAST_TIMESTEP = 1.0  # of the noise levels of training
TARGETS_PER_WALK = 4  # of the loss
FULL = {"minutes": 60.0, "batch_size": 64, "measured_at_once": 64}


@dataclass(frozen=True)
class Option:
    """One way to train."""

    clean: float  # chance of a frame to be given clean
    own: float = 0.0  # chance of a batch whose clean frames are the model's own
    # In sampling; `least_noise` for a model that knows no clean frames.
    ways: tuple[str, ...] = ("",)


OPTIONS = {
    "clean_0": Option(0.0, ways=("", "_least_noise")),
    "clean_0.1": Option(0.1),
    "clean_0.5": Option(0.5),
    "clean_0.1_own": Option(0.1, own=0.3),
    "clean_0.5_own": Option(0.5, own=0.3),
}
BASELINE = "clean_0.1"


def training_of(name: str, arguments: argparse.Namespace) -> Training:
    """How the model of an option is trained."""
    option = OPTIONS[name]
    options = run_options(
        arguments,
        name,
        num_frames=TRAINED,
        clean_context_probability=option.clean,
        own_context_probability=option.own,
        **NEW_MODEL,
    )
    return Training(
        lambda options: Trainer(lambda videos: new_model(videos, SIZES[arguments.full]), options), options
    )


def mark_as_least_noise(model: FARTransformer3DModel) -> None:
    """Let the model take clean frames for ones of the least noise of training."""
    own = model.embed_condition

    def embed_condition(timestep: Tensor, *others: Any, **named: Any) -> Tensor:
        return own(timestep.clamp(min=LEAST_TIMESTEP), *others, **named)

    model.embed_condition = embed_condition


def measure_loss(
    model: FARTransformer3DModel, videos: LatentVideos, arguments: argparse.Namespace
) -> dict[str, list[Any]]:
    """Of each target: its walk, and the loss of that next frame."""
    walks, losses = [], []
    for index in range(TARGETS_PER_WALK):
        for chosen in torch.arange(arguments.walks).split(arguments.measured_at_once):
            clips = [
                held_out_clips(videos, [walk], videos.num_frames[walk] - TRAINED * index, TRAINED)
                for walk in chosen.tolist()
            ]
            latents, actions = (torch.cat(part) for part in zip(*clips, strict=True))
            noise = noise_of((1000 * index + chosen).tolist(), latents[0, :1].shape)
            by_level = [window_loss(model, latents, actions, noise, level) for level in LEVELS]
            walks += chosen.tolist()
            losses += torch.stack(by_level).mean(dim=0).tolist()
    return {"walks": walks, "loss": losses}


def measure_rollouts(
    model: FARTransformer3DModel, lpips: LPIPS, videos: LatentVideos, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Of each walk: `psnr_k`, `lpips_k`, and `sharpness_k` beside `true_sharpness_k`, k frames ahead."""
    walks, size, longest = list(range(arguments.walks)), arguments.measured_at_once, max(AHEAD)
    pipeline = make_pipeline(model, arguments.autoencoder, TRAINED)
    num_frames = TRAINED + longest
    latents, actions = held_out_clips(videos, walks, num_frames, num_frames)
    made = predict(pipeline, latents[:, :TRAINED], actions, size, seed=0)
    looked_at = torch.tensor(AHEAD) - 1
    frames, truth = (
        decode(pipeline, part[:, looked_at], size) for part in (made.float().cpu(), latents[:, TRAINED:])
    )
    quality, distance = psnr(frames, truth), lpips.by_frame(frames, truth, size)
    found: dict[str, Any] = {"walks": walks}
    for column, ahead in enumerate(AHEAD):
        found[f"psnr_{ahead}"] = quality[:, column].tolist()
        found[f"lpips_{ahead}"] = distance[:, column].tolist()
        found[f"sharpness_{ahead}"] = [sharpness(video) for video in frames[:, column]]
        found[f"true_sharpness_{ahead}"] = [sharpness(video) for video in truth[:, column]]
    return found


def rows_of(measured: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Means of all ways, beside those of the published one where it is there.

    Args:
        measured: by way: `loss` and `rollouts`, as they were measured, and `trained`.
    """
    rows = []
    base = measured.get(BASELINE)
    for way, values in measured.items():
        row: dict[str, Any] = {"way": way, **values["trained"]}
        for part in ("loss", "rollouts"):
            for name, found in values[part].items():
                if name == "walks":
                    continue
                row[name] = {"mean": sum(found) / len(found)}
                if base is not None:
                    row[name] |= beside(found, base[part][name], values[part]["walks"])
        for ahead in AHEAD:
            real = row.pop(f"true_sharpness_{ahead}")["mean"]
            row[f"sharpness_share_{ahead}"] = row.pop(f"sharpness_{ahead}")["mean"] / real
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """All tables."""
    losses: list[list[object]] = [[row["way"], row["steps"], told(row["loss"], 4)] for row in rows]
    parts = [table(["model", "steps", "loss of the next frame"], losses)]
    for title, name, digits in (("PSNR", "psnr", 2), ("LPIPS", "lpips", 3)):
        cells: list[list[object]] = [
            [row["way"], *(told(row[f"{name}_{ahead}"], digits) for ahead in AHEAD)] for row in rows
        ]
        parts.append(table([f"{title} at frame", *map(str, AHEAD)], cells))
    shares: list[list[object]] = [
        [row["way"], *(f"{row[f'sharpness_share_{ahead}']:.0%}" for ahead in AHEAD)] for row in rows
    ]
    parts.append(table(["sharpness at frame", *map(str, AHEAD)], shares))
    return "\n\n".join(parts) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """PSNR, LPIPS and sharpness by frame of the rollout."""
    with plotted(path, (15, 4.5), 3) as axes:
        titles = {"psnr": "PSNR, dB", "lpips": "LPIPS", "sharpness_share": "sharpness, share of real"}
        for axis, (name, title) in zip(axes, titles.items(), strict=True):
            axis.set(title=title, xlabel="frame of the rollout")
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
            for row in rows:
                found = [row[f"{name}_{ahead}"] for ahead in AHEAD]
                values = [value["mean"] if isinstance(value, dict) else value for value in found]
                axis.plot(AHEAD, values, marker="o", label=row["way"])
        axes[2].axhline(1, linestyle="--", color="grey")
        axes[0].legend(fontsize="small")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="for each model")
    parser.add_argument("--options", nargs="+", choices=[*OPTIONS], default=[*OPTIONS])
    parser.add_argument("--walks", type=int, default=32, help="held-out ones that are continued")
    arguments = parse_arguments(parser, FULL, measured_at_once=16)
    lpips = LPIPS()  # first: its weights may be missing, and the rest takes minutes
    videos = LatentVideos(arguments.latents / "validation")
    if len(videos) < arguments.walks:
        parser.error(f"--walks {arguments.walks}: {videos.folder} has {len(videos)}")
    names = ("latents", "full", "minutes", "walks", "batch_size", "mixed_precision")
    settings = {name: getattr(arguments, name) for name in names}
    parts = [(name, f"{name}{way}") for name, option in OPTIONS.items() for way in option.ways]

    def kept_of(name: str) -> Kept:
        return Kept(arguments.output / name / "measured.json", settings)

    trainings = {name: training_of(name, arguments) for name in OPTIONS}
    plan_steps(trainings.values(), arguments.minutes)
    for name, way in parts:
        kept = kept_of(name)
        if name not in arguments.options or way in kept.results:
            continue
        model, trained = train_new(trainings[name])
        if way != name:
            mark_as_least_noise(model)
        kept(
            way,
            lambda model=model, trained=trained: {
                "trained": trained,
                "loss": measure_loss(model, videos, arguments),
                "rollouts": measure_rollouts(model, lpips, videos, arguments),
            },
        )
    found = {name: kept_of(name).results for name in OPTIONS}  # those of another process, too
    measured = {way: found[name][way] for name, way in parts if way in found[name]}
    rows = rows_of(measured)
    text = markdown(rows)
    facts = {"minutes": arguments.minutes, "walks": arguments.walks, "rows": rows}
    write_results(arguments.output, facts, text)
    print(text)
    if arguments.plot is not None:
        draw(rows, arguments.plot)


if __name__ == "__main__":
    main()
