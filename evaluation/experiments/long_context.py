"""What long short-term context saves, and what it costs: windows, patches of long-term frames, full context.

    python evaluation/experiments/long_context.py LATENTS --autoencoder checkpoints/far-doom-maze-64/vae \
        --checkpoint checkpoints/far-doom-maze-64 --output OUTPUT --plot docs/experiments_long_context.png

LATENTS is what training.encode_latents wrote of walks that come back (`data/doom_maze.py --walk revisit`),
with its `revisits`. Models of windows of 4, 8 and 16 frames, of long-term frames in patches of 2, 4 and 8 (of
a grid of 8: 16, 4 and 1 tokens a frame), and a base model that keeps all frames in full, are trained for
`--minutes` each of a processor's time (of the clock on a GPU), on clips of up to `--num-frames` frames.

With `--checkpoint` they begin as that Long pipeline's model, changed; without, from nothing. In a changed
model, patches begin as means of short-term ones, and full context has the projections of short-term frames.

Measured, for the frame after `--num-frames` - 1 observed ones:

- tokens that it sees, their keys and values in MB of 16 bits each, and on a GPU the peak of its memory;
- seconds of a frame in a rollout, the window of the context computed anew as by default;
- the loss of the next frame, mean of four noise levels, over all targets and over revisits alone (frames
  whose view was seen before, but not in the last frames), also after 31 observed frames;
- PSNR and LPIPS of that frame at revisits, sampled, beside the true latents, decoded.

Differences are to a window of 8 and patches of 4; ± is their standard error over the walks. With `--options`,
two processes share out the models of one OUTPUT. Started again, it goes on.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout: this file is run as a script

from diffusers_far import FARTransformer3DModel, FARVideoPipeline
from diffusers_far.evaluation.tables import table
from diffusers_far.lpips import LPIPS
from diffusers_far.metrics import psnr
from diffusers_far.training.clips import LatentVideos
from diffusers_far.training.options import FAROptions
from evaluation.experiments.equal_time import (
    NEW_MODEL,
    SIZES,
    Kept,
    Targets,
    Trainer,
    Training,
    beside,
    make_pipeline,
    new_model,
    next_frame_losses,
    now,
    parse_arguments,
    plan_steps,
    processor,
    run_options,
    told,
    train_new,
    with_changes,
    write_results,
)
from evaluation.plots import plotted
from evaluation.world_model import decode, predict

SHORT_CONTEXT = 31  # observed frames, beside the longest context
TIMED_FRAMES = 4  # of a rollout
FULL = {"minutes": 60.0, "batch_size": 64, "measured_at_once": 8, "num_frames": 256}
CHANGED_MODEL = {"muon_learning_rate": 5e-4, "learning_rate": 1.2e-4}  # rates of one that goes on
OPTIONS: dict[str, dict[str, Any]] = {  # of the model's configuration
    "window_8_patch_4": {"short_window": 8, "long_patch_size": 4},
    "window_4_patch_4": {"short_window": 4, "long_patch_size": 4},
    "window_16_patch_4": {"short_window": 16, "long_patch_size": 4},
    "window_8_patch_2": {"short_window": 8, "long_patch_size": 2},
    "window_8_patch_8": {"short_window": 8, "long_patch_size": 8},
    "full": {"long_patch_size": None},
}
BASELINE = "window_8_patch_4"


def options_of(name: str, arguments: argparse.Namespace) -> FAROptions:
    """Options of the run of one model."""
    changes: dict[str, Any] = {
        "num_frames": arguments.num_frames,
        "clean_context_probability": 0.4,
        "own_context_probability": 0.3,
        **(NEW_MODEL if arguments.checkpoint is None else CHANGED_MODEL),
    }
    if name == "full":  # clips of the longest length, all frames of which it learns to predict
        changes |= {"batch_size": max(1, arguments.batch_size // 4)}
    else:
        changes |= {"length_distribution": "log_uniform", "revisit_probability": 0.5}
        changes |= {"noisy_window_probability": 0.35}
    return run_options(arguments, name, **changes)


def training_of(
    name: str, checkpoint: FARTransformer3DModel | None, arguments: argparse.Namespace
) -> Training:
    """How the model of an option is trained."""

    def make_model(videos: LatentVideos) -> FARTransformer3DModel:
        if checkpoint is None:
            return new_model(videos, SIZES[arguments.full], **OPTIONS[name])
        changes = {key: value for key, value in OPTIONS[name].items() if checkpoint.config[key] != value}
        model = with_changes(checkpoint, changes)
        model.set_attn_processor(processor())
        return model

    return Training(lambda options: Trainer(make_model, options), options_of(name, arguments))


# ------------------------------------------------------------------------------------------------------------
# Measuring


def cost(pipeline: FARVideoPipeline, targets: Targets) -> dict[str, Any]:
    """Of the frame after the longest context: tokens that it sees, MB of these, seconds, peak of memory."""
    model, device = pipeline.transformer, pipeline.device
    latents, actions = targets.clips([0], targets.contexts[0])
    long_tokens, short_tokens = model.tokens_per_frame(*latents.shape[-2:])
    # The frame that is made has a place in the trained number of frames: each observed one is context.
    rollout = pipeline.rollout(
        video_latents=latents[:, :-1],
        context_actions=actions[:, :-1],
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    context = rollout.context
    tokens = len(context.long) * long_tokens + len(context.short) * short_tokens
    width = model.config.num_attention_heads * model.config.attention_head_dim
    found = {"tokens": tokens, "megabytes": 2 * 2 * model.config.num_layers * width * tokens / 1e6}
    action = int(actions[0, -1])
    rollout.step(action)  # computes the context
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = now(device)
    for _ in range(TIMED_FRAMES):
        rollout.step(action)
    found["seconds_per_frame"] = (now(device) - started) / TIMED_FRAMES
    if device.type == "cuda":
        found["peak_megabytes"] = torch.cuda.max_memory_allocated(device) / 1e6
    return found


def measure_option(
    model: FARTransformer3DModel, lpips: LPIPS, targets: Targets, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Cost, losses of all targets, and `psnr` and `lpips` of those that are revisits."""
    pipeline = make_pipeline(model, arguments.autoencoder, arguments.num_frames)
    size = arguments.measured_at_once
    losses: dict[str, list[float]] = {}
    quality, distance = [], []
    for chosen in torch.arange(len(targets.frames)).split(size):
        for name, values in next_frame_losses(model, targets, chosen.tolist()).items():
            losses.setdefault(name, []).extend(values)
    for chosen in torch.tensor(targets.revisits).nonzero()[:, 0].split(size):
        latents, actions = targets.clips(chosen.tolist(), targets.contexts[0])
        made = predict(pipeline, latents[:, :-1], actions, size, seed=int(chosen[0]))
        frames, truth = (decode(pipeline, part, size) for part in (made.float(), latents[:, -1:]))
        quality += psnr(frames, truth)[:, 0].tolist()
        distance += lpips.by_frame(frames, truth, size)[:, 0].tolist()
    return {"cost": cost(pipeline, targets), "losses": losses, "psnr": quality, "lpips": distance}


# ------------------------------------------------------------------------------------------------------------
# Telling


def rows_of(measured: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Means of all models, beside those of the baseline where it is there.

    Args:
        measured: by option: `trained`, `targets`, and what `measure_option` gives.
    """
    rows, base = [], measured.get(BASELINE)
    for name, values in measured.items():
        walks, revisits = (np.array(values["targets"][key]) for key in ("walks", "revisits"))
        row: dict[str, Any] = {"option": name, **values["trained"], **values["cost"]}

        def add(key: str, found: Any, others: Any, owners: Any, row: dict[str, Any] = row) -> None:
            row[key] = {"mean": float(np.mean(found))}
            if others is not None:
                row[key] |= beside(found, others, owners)

        for key, found in values["losses"].items():
            losses, others = np.array(found), None if base is None else np.array(base["losses"][key])
            for kind, of_kind in (("", ~revisits), ("_revisits", revisits)):
                add(key + kind, losses[of_kind], None if others is None else others[of_kind], walks[of_kind])
        for key in ("psnr", "lpips"):
            add(key, values[key], None if base is None else base[key], walks[revisits])
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]], num_observed: int) -> str:
    """Both tables."""
    costs: list[list[object]] = [
        [
            *(row["option"], row["tokens"], f"{row['megabytes']:.1f}", row["seconds_per_frame"]),
            *([f"{row['peak_megabytes']:.0f}"] if "peak_megabytes" in row else []),
            *(row["seconds_per_step"], row["steps"]),
        ]
        for row in rows
    ]
    peak = ["peak MB"] if "peak_megabytes" in rows[0] else []
    header = ["model", "tokens of context", "MB", "seconds a frame", *peak, "seconds a step", "steps"]
    keys = [f"next_{number}{kind}" for number in (num_observed, SHORT_CONTEXT) for kind in ("", "_revisits")]
    qualities: list[list[object]] = [
        [row["option"], *(told(row[key], 4) for key in keys), told(row["psnr"], 2), told(row["lpips"], 3)]
        for row in rows
    ]
    names = [
        name for number in (num_observed, SHORT_CONTEXT) for name in (f"loss after {number}", "revisits")
    ]
    return (
        table(header, costs)
        + "\n\n"
        + table(["model", *names, "PSNR of revisits", "LPIPS"], qualities)
        + "\n"
    )


def draw(rows: list[dict[str, Any]], num_observed: int, path: Path) -> None:
    """What revisits lose, by tokens and by time."""
    with plotted(path, (15, 4.5), 3) as axes:
        loss = f"next_{num_observed}_revisits"
        for axis, across, key, titles in (
            (axes[0], "tokens", loss, ("tokens of the context", "loss of revisits")),
            (axes[1], "seconds_per_frame", loss, ("seconds a frame", "loss of revisits")),
            (axes[2], "tokens", "psnr", ("tokens of the context", "PSNR of revisits, dB")),
        ):
            axis.set(xlabel=titles[0], title=titles[1])
            if across == "tokens":
                axis.set_xscale("log", base=2)
                axis.xaxis.set_major_formatter("{x:.0f}")
            for row in rows:
                error = row[key].get("standard_error", 0.0)
                axis.errorbar(row[across], row[key]["mean"], error, marker="o", label=row["option"])
        axes[0].legend(fontsize="small")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="folder of a Long pipeline to go on from")
    parser.add_argument("--minutes", type=float, default=15.0, help="for each model")
    parser.add_argument("--num-frames", type=int, default=160, help="of the longest clip")
    parser.add_argument("--options", nargs="+", choices=[*OPTIONS], default=[*OPTIONS])
    parser.add_argument("--walks", type=int, default=32, help="held-out ones that are measured")
    arguments = parse_arguments(parser, FULL, batch_size=8, measured_at_once=8)
    if arguments.num_frames < SHORT_CONTEXT + 2:
        parser.error(f"--num-frames {arguments.num_frames}: it takes {SHORT_CONTEXT + 2} or more")
    lpips = LPIPS()  # first: its weights may be missing, and the rest takes minutes
    checkpoint = None
    if arguments.checkpoint is not None:
        checkpoint = FARTransformer3DModel.from_pretrained(arguments.checkpoint / "transformer").float()
        if not checkpoint.is_long:
            parser.error(f"--checkpoint {arguments.checkpoint} is of a base model; it takes a Long one")
    videos = LatentVideos(arguments.latents / "validation")
    contexts = (arguments.num_frames - 1, SHORT_CONTEXT)
    targets = Targets(videos, arguments.walks, contexts, noisy_frames=1)
    names = ("latents", "checkpoint", "full", "minutes", "walks", "num_frames", "batch_size")
    settings = {name: getattr(arguments, name) for name in (*names, "mixed_precision")}

    def kept_of(name: str) -> Kept:
        return Kept(arguments.output / name / "measured.json", settings)

    trainings = {name: training_of(name, checkpoint, arguments) for name in OPTIONS}
    plan_steps(trainings.values(), arguments.minutes)
    for name in (name for name in OPTIONS if name in arguments.options):
        kept = kept_of(name)
        if "measured" in kept.results:
            continue
        model, trained = train_new(trainings[name])
        kept(
            "measured",
            lambda model=model, trained=trained: {
                "trained": trained,
                "targets": targets.facts,
                **measure_option(model, lpips, targets, arguments),
            },
        )
    found = {name: kept_of(name).results for name in OPTIONS}  # those of another process, too
    rows = rows_of({name: results["measured"] for name, results in found.items() if results})
    text = markdown(rows, contexts[0])
    facts = {name: str(settings[name]) for name in ("checkpoint", "minutes", "num_frames", "walks")}
    write_results(arguments.output, {**facts, "rows": rows}, text)
    print(text)
    if arguments.plot is not None:
        draw(rows, contexts[0], arguments.plot)


if __name__ == "__main__":
    main()
