"""What helps a context that is longer than the clips of training: FlexRoPE, other positions, or forgetting.

    python evaluation/beyond_training.py CHECKPOINT DATA --output RESULTS.json --plot RESULTS.png

DATA is a videofolder whose validation split has long episodes with actions, such as

    python data/doom_maze.py DATA --train 0 --validation 16 --frames 1020 --seed 3

Two measures of a Long model after all frames of contexts of several lengths, with the same targets for all:

- the loss of a noisy window (as in `diffusers_far.memory_loss`): one forward each, no noise of sampling;
- PSNR and LPIPS of 16 predicted frames, for what a pipeline can do by its arguments.

The ways, T being the frames of the longest clip of training (`num_training_frames`):

- `newest`: the last T frames, the default; `sinks`: the first four on top; `window`: no long-term frames;
- `all`: every frame, with plain RoPE; `slope k`: with FlexRoPE, k / T per frame of distance;
- `interpolated`: RoPE's positions divided so that the longest distance is T;
- `RIFLEx` (arXiv 2502.15894): the frequency of time whose period is nearest to T is lowered to one period in
  the whole context;
- `re-indexed`: distances up to T / 2 as they are, longer ones squeezed between T / 2 and T.

RESULTS.json is written after every row, and the same command goes on with what is in it.
"""

import argparse
import datetime
import json
import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout: this file is run as a script

from diffusers_far import ContextSchedule, FARTransformer3DModel, FARVideoPipeline
from diffusers_far.evaluation.machine import describe
from diffusers_far.evaluation.tables import table
from diffusers_far.memory_loss import window_loss
from diffusers_far.whole_files import written_whole
from evaluation.context_curve import TARGETS, Measure, load_episodes
from evaluation.plots import colors, plotted
from evaluation.world_model import predict

NUM_SINKS = 4
APART = 8  # frames between the targets of an episode


class Way(NamedTuple):
    """How a long context is given to the model.

    `kept` are the frames that it sees, of those of the clip; `positions` their places in time.
    """

    name: str
    kept: Tensor
    positions: Tensor
    flex_rope_slope: float = 0.0
    rope_interpolation: float = 1.0
    is_riflex: bool = False


def squeezed(distance: Tensor, trained: int, num_frames: int) -> Tensor:
    """Distances in time up to `num_frames`, of which those over half of `trained` end below `trained`."""
    half = trained / 2
    return torch.where(distance > half, half + (distance - half) * half / (num_frames - half), distance)


def ways(num_frames: int, window: int | None, trained: int, slopes: list[float]) -> Iterator[Way]:
    """All ways to show `num_frames` frames, the window included, to a model trained with `trained`.

    Args:
        window: of a Long model; None for a base model, whose window is what it was trained with.
    """
    places = torch.arange(num_frames)
    if window is not None:
        yield Way("window", places[-window:], places[-window:])
    newest = places[-trained:]
    yield Way("newest", newest, newest)
    if num_frames <= trained:
        return
    kept = places[-(trained - NUM_SINKS) :]
    before = torch.arange(-NUM_SINKS, 0) + kept[0]
    yield Way("sinks", torch.cat([places[:NUM_SINKS], kept]), torch.cat([before, kept]))
    yield Way("all", places, places)
    for slope in slopes:
        yield Way(f"slope {slope:g}", places, places, flex_rope_slope=slope / trained)
    yield Way("interpolated", places, places, rope_interpolation=num_frames / trained)
    yield Way("RIFLEx", places, places, is_riflex=True)
    distance = squeezed((num_frames - 1 - places).float(), trained, num_frames)
    yield Way("re-indexed", places, num_frames - 1 - distance)


class LoweredFrequency(nn.Module):
    """Rotary tables of positions whose time is lowered in one frequency, as RIFLEx does.

    Args:
        embed: the model's own, of coordinates `[N, 3]` to cosines and sines `[N, head_dim]`.
        axis_dim: channels of time, the first of a head.
        trained: frames of the longest clip of training.
        num_frames: frames of the context.
    """

    def __init__(self, embed: nn.Module, axis_dim: int, trained: int, num_frames: int) -> None:
        super().__init__()
        self.embed = embed
        frequencies = 10000.0 ** (-torch.arange(0, axis_dim, 2) / axis_dim)
        pair = int((2 * math.pi / frequencies - trained).abs().argmin())
        self.channels = slice(2 * pair, 2 * pair + 2)
        self.ratio = min(1.0, float(2 * math.pi / num_frames / frequencies[pair]))

    def forward(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.embed(coordinates)
        slower = coordinates.clone().float()
        slower[:, 0] *= self.ratio
        for table_of, other in zip((cos, sin), self.embed(slower), strict=True):
            table_of[:, self.channels] = other[:, self.channels]
        return cos, sin


@contextmanager
def frequency_for(
    model: FARTransformer3DModel, is_riflex: bool, trained: int, num_frames: int
) -> Iterator[None]:
    """The model with RIFLEx's frequency, where that is wanted."""
    own = model.pos_embed
    if is_riflex:
        model.pos_embed = LoweredFrequency(own, model.config.axes_dims_rope[0], trained, num_frames)
    try:
        yield
    finally:
        model.pos_embed = own


def way_loss(
    model: FARTransformer3DModel, way: Way, latents: Tensor, actions: Tensor, noise: Tensor, trained: int
) -> Tensor:
    """Velocity loss `[N]` of the noisy last window of clips `[N, F, C, h, w]`.

    Args:
        noise: `[N, window, C, h, w]`.
    """
    with frequency_for(model, way.is_riflex, trained, latents.shape[1]):
        return window_loss(
            model,
            latents[:, way.kept],
            actions[:, way.kept],
            noise,
            frame_positions=way.positions.to(model.device),
            flex_rope_slope=way.flex_rope_slope,
            rope_interpolation=way.rope_interpolation,
        )


def measure_losses(
    pipeline: FARVideoPipeline,
    latents: Tensor,
    actions: Tensor,
    options: argparse.Namespace,
    done: set[tuple[int, str]],
) -> Iterator[dict[str, Any]]:
    """Rows by number of frames and way; all with the same targets, `options.ends` in every episode.

    Args:
        done: numbers of frames and names of ways that are left out.
    """
    model, trained = pipeline.transformer, pipeline.config.num_training_frames
    window = model.short_window
    ends = [latents.shape[1] - APART * index for index in range(options.ends)]
    shape = (len(ends), len(latents), window, *latents.shape[2:])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(options.seed))
    for num_frames in options.lengths:
        for way in ways(num_frames, window, trained, options.slopes):
            if (num_frames, way.name) in done:
                continue
            losses = [
                way_loss(
                    model,
                    way,
                    latents[clips, end - num_frames : end],
                    actions[clips, end - num_frames : end],
                    noise[index, clips],
                    trained,
                )
                for index, end in enumerate(ends)
                for clips in torch.arange(len(latents)).split(options.batch_size)
            ]
            by_clip = torch.cat(losses)
            row = {"frames": num_frames, "way": way.name, "loss": by_clip.mean().item()}
            print(f"{num_frames} {way.name}: {row['loss']:.4f}", file=sys.stderr, flush=True)
            yield row | {"by_clip": [round(value, 4) for value in by_clip.tolist()]}


def call_arguments(num_frames: int, trained: int, slopes: list[float]) -> dict[str, dict[str, Any]]:
    """What a pipeline is called with, by name of the way, for a video of `num_frames` frames in the end."""
    unbounded = ContextSchedule.unbounded()
    return {
        "newest": {},
        "sinks": {"context_schedule": ContextSchedule(num_sink_frames=NUM_SINKS)},
        "all": {"context_schedule": unbounded},
        **{
            f"slope {slope:g}": {"context_schedule": unbounded, "flex_rope_slope": slope / trained}
            for slope in slopes
        },
        "interpolated": {"context_schedule": unbounded, "rope_interpolation": num_frames / trained},
    }


def measure_predictions(
    pipeline: FARVideoPipeline,
    frames: Tensor,
    latents: Tensor,
    actions: Tensor,
    options: argparse.Namespace,
    done: set[str],
) -> Iterator[dict[str, Any]]:
    """Rows by way, but for those in `done`: the last frames of every episode after the longest context."""
    measure, trained = Measure(pipeline, options.batch_size), pipeline.config.num_training_frames
    length = max(options.lengths)
    settings = {
        "window": {"context_schedule": ContextSchedule(max_long_frames=0)},
        **call_arguments(length, trained, options.slopes),
    }
    truth = frames[:, -TARGETS:].float() / 255
    for name, arguments in settings.items():
        if name in done:
            continue
        made = predict(
            pipeline,
            latents[:, -length:-TARGETS],
            actions[:, -length:],
            options.batch_size,
            options.seed,
            **arguments,
        )
        quality, distance = measure(made, truth)
        row = {"way": name, "psnr": quality.mean().item(), "lpips": distance.mean().item()}
        print(f"{name}: {row['psnr']:.2f} dB, LPIPS {row['lpips']:.3f}", file=sys.stderr, flush=True)
        yield row | {"psnr_by_clip": [round(value, 3) for value in quality.mean(dim=1).tolist()]}


def begin(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Results without rows, or those that the same command left unfinished.

    Raises:
        ValueError: for results of another command, or of another torch or machine.
    """
    command = shlex.join(["python", *sys.argv])
    results = {"command": command, "date": datetime.date.today().isoformat(), "torch": torch.__version__}
    results |= {"cpu": describe(device), "threads": torch.get_num_threads(), "losses": [], "predictions": []}
    if not options.output.exists():
        return results
    before: dict[str, Any] = json.loads(options.output.read_text())
    for name in ("command", "torch", "cpu", "threads"):
        if before.get(name) != results[name]:
            raise ValueError(
                f"output={str(options.output)!r} has {name}={before.get(name)!r}, and this run has "
                f"{results[name]!r}; give the same, or another output"
            )
    return before


def save(results: dict[str, Any], output: Path) -> None:
    with written_whole(output) as partial:
        partial.write_text(json.dumps(results, indent=2) + "\n")


def draw(results: dict[str, Any], path: Path) -> None:
    """Plot the losses by length."""
    with plotted(path, (8, 4.5)) as (axis,):
        axis.set(title="loss of a noisy window", xlabel="frames of context and window")
        axis.set(ylabel="velocity loss")
        by_name: dict[str, list[tuple[int, float]]] = {}
        for row in results["losses"]:
            by_name.setdefault(row["way"], []).append((row["frames"], row["loss"]))
        for color, (name, points) in zip(colors(len(by_name)), by_name.items(), strict=True):
            axis.plot(*zip(*points, strict=True), marker="o", label=name, color=color)
        axis.legend(fontsize="small")


def difference(row: dict[str, Any], other: dict[str, Any], name: str) -> str:
    """Of two rows clip by clip: mean and standard error."""
    values = torch.tensor(row[name]) - torch.tensor(other[name])
    return f"{values.mean():+.3f} ± {values.std() / len(values) ** 0.5:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="folder or repo id of a pipeline of a Long model")
    parser.add_argument("data", type=Path, help="videofolder with a validation split of long episodes")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--plot", type=Path, help="PNG file")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1000], help="window included")
    parser.add_argument("--slopes", type=float, nargs="+", default=[0.25, 1.0, 4.0, 16.0], help="times T")
    parser.add_argument("--ends", type=int, default=3, help="targets of the loss in every episode")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    pipeline = FARVideoPipeline.from_pretrained(options.checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    if not pipeline.transformer.is_long or pipeline.config.num_training_frames is None:
        raise ValueError(f"checkpoint={options.checkpoint!r} must be a Long model with num_training_frames")
    results = begin(options, pipeline.device)  # before the minutes of encoding
    episodes = load_episodes(pipeline, options.data, 64)
    needed = max(options.lengths) + APART * (options.ends - 1)
    if (shortest := min(len(episode.frames) for episode in episodes)) < needed:
        raise ValueError(f"data={str(options.data)!r} has episodes of {shortest} frames; it takes {needed}")
    latents, actions, frames = (
        torch.stack([getattr(episode, name)[:shortest] for episode in episodes])
        for name in ("latents", "actions", "frames")
    )

    losses, predictions = results["losses"], results["predictions"]
    done = {(row["frames"], row["way"]) for row in losses}
    for row in measure_losses(pipeline, latents, actions, options, done):
        losses.append(row)
        save(results, options.output)
    done_ways = {row["way"] for row in predictions}
    for row in measure_predictions(pipeline, frames, latents, actions, options, done_ways):
        predictions.append(row)
        save(results, options.output)
    base = {row["frames"]: row for row in losses if row["way"] == "newest"}
    rows: list[list[object]] = [
        [row["frames"], row["way"], row["loss"], difference(row, base[row["frames"]], "by_clip")]
        for row in losses
    ]
    print(table(["frames", "way", "loss", "beside newest"], rows))
    newest = next(row for row in predictions if row["way"] == "newest")
    rows = [
        [row["way"], row["psnr"], difference(row, newest, "psnr_by_clip"), row["lpips"]]
        for row in predictions
    ]
    print("\n" + table(["way", "PSNR", "beside newest", "LPIPS"], rows))
    if options.plot is not None:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
