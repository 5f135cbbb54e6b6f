"""Whether more context helps, and what a Long world model remembers of it.

    python evaluation/context_curve.py CHECKPOINT DATA --output RESULTS.json --plot RESULTS.png

DATA is a videofolder whose validation split has `actions` and `poses` ([x, y, degrees] of each frame) in its
metadata.jsonl, as data/doom_maze.py records it. Seeds are fixed. Four parts:

- `curve`: the same 16 target frames of every clip after 8 to 256 observed frames. `all` keeps every frame;
  `default` keeps what the checkpoint keeps by default; `window` drops the long-term frames. At the longest
  contexts also: `shuffled` permutes the long-term frames in time, `other` takes those of another episode
  (frames and actions; those that are long-term when the prediction starts). PSNR and LPIPS (AlexNet) over
  all targets, and over revisits alone: targets whose view was last seen 9 to 250 frames before, in an
  observed frame, and not in the last 8 observed ones.
- `scripted`: with `--scripted`, a recording of walks that look away and come back (`script` and
  `return_frame` in its metadata): the 16 frames from `return_frame` on after all frames before it.
- `rollout`: long rollouts with the default context, actions of the episodes repeated in a cycle. In blocks of
  100 frames: sharpness, colour spread and wall colours (see `appearance`), beside those of the real episodes.
- `loss`: the loss of a noisy window after right and wrong long-term frames (`diffusers_far.memory_loss`).

Writes all figures as JSON and a plot, and prints Markdown tables. Two processes of one thread each are the
fastest on two cores: `OMP_NUM_THREADS=1`, one with `--parts curve`, one with `--parts scripted rollout loss`.
"""

import argparse
import datetime
import json
import shlex
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout: this file is run as a script

from data.doom_maze_files import revisited_frames
from diffusers_far import ContextSchedule, FARTransformer3DModel, FARVideoPipeline
from diffusers_far.evaluation.machine import describe
from diffusers_far.evaluation.tables import table
from diffusers_far.lpips import LPIPS
from diffusers_far.memory_loss import change_long_frames, memory_loss
from diffusers_far.metrics import psnr, sharpness
from diffusers_far.video_files import read_video
from diffusers_far.whole_files import written_whole
from evaluation.plots import plotted
from evaluation.world_model import by_frames_ahead, decode, encode, predict

PARTS = ("curve", "scripted", "rollout", "loss")
SCHEDULES = {  # what a pipeline call gets as context_schedule
    "all": ContextSchedule.unbounded(),
    "default": None,
    "window": ContextSchedule(max_long_frames=0),
    "shuffled": ContextSchedule.unbounded(),
    "other": ContextSchedule.unbounded(),
}
TARGETS = 16  # predicted frames of a clip
LONGEST_GAP = 250  # frames since a view was last seen, of what counts as a revisit
BLOCK = 100  # frames of a rollout whose looks are measured together
WALL_COLOUR, WALL_SHARE = 0.1, 0.02  # radius in RGB, and share of the pieces of wall, of a wall colour


@dataclass
class Episode:
    """One video: frames uint8 `[T, 3, H, W]`, scaled latents `[T, C, h, w]`, actions `[T]`, its metadata."""

    frames: Tensor
    latents: Tensor
    actions: Tensor
    metadata: dict[str, Any]


def load_episodes(
    pipeline: FARVideoPipeline, data: Path, batch_size: int, limit: int | None = None
) -> list[Episode]:
    """Episodes of the validation split of `data`, encoded once; the first `limit` of them.

    Raises:
        ValueError: when there is no metadata, or a row lacks actions.
    """
    path = data / "validation" / "metadata.jsonl"
    if not path.is_file():
        raise ValueError(
            f"data={str(data)!r}: there is no {path}; it takes a videofolder with validation split"
        )
    episodes = []
    for line in path.read_text().splitlines()[:limit]:
        row = json.loads(line)
        if "actions" not in row:
            raise ValueError(f"data={str(data)!r}: {row['file_name']} has no actions in its metadata")
        frames = torch.from_numpy(read_video(path.parent / row["file_name"])).movedim(-1, 1)
        latents = encode(pipeline, frames[:, None].float() / 255, batch_size)[:, 0]
        episodes.append(Episode(frames, latents, torch.tensor(row["actions"]), row))
    return episodes


def observed_revisits(poses: np.ndarray, start: int, window: int) -> np.ndarray:
    """`[16]` bool: the target frames from `start` on whose view must be remembered from observed frames."""
    gaps = revisited_frames(poses[: start + TARGETS], window, TARGETS, start)[start:]
    return (gaps > 0) & (gaps <= LONGEST_GAP)


class Measure:
    """Decodes predictions and compares them with the truth.

    Args:
        pipeline: whose autoencoder decodes.
        batch_size: clips at once.
    """

    def __init__(self, pipeline: FARVideoPipeline, batch_size: int) -> None:
        self.pipeline = pipeline
        self.batch_size = batch_size
        self.lpips = LPIPS()

    def __call__(self, latents: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        """PSNR in dB and LPIPS, `[N, F]` each, of latents `[N, F, C, h, w]` beside frames in [0, 1]."""
        frames = decode(self.pipeline, latents, TARGETS * self.batch_size)
        return psnr(frames, truth), self.lpips.by_frame(frames, truth, TARGETS * self.batch_size)


def figures(quality: Tensor, distance: Tensor, revisits: Tensor | None = None) -> dict[str, Any]:
    """Means of PSNR and LPIPS `[N, F]`, over the revisits `[N, F]` too, and their standard errors by clip."""
    by_clip = quality.mean(dim=1)
    row: dict[str, Any] = {
        "psnr": by_frames_ahead(quality),
        "psnr_standard_error": by_clip.std().item() / len(by_clip) ** 0.5 if len(by_clip) > 1 else None,
        "lpips": distance.mean().item(),
    }
    if revisits is not None:
        some = bool(revisits.any())  # JSON has no NaN
        row["revisit_psnr"] = quality[revisits].mean().item() if some else None
        row["revisit_lpips"] = distance[revisits].mean().item() if some else None
    return row | {"psnr_by_clip": [round(value, 3) for value in by_clip.tolist()]}


def predict_after(
    pipeline: FARVideoPipeline,
    latents: Tensor,
    actions: Tensor,
    num_observed: int,
    mode: str,
    generator: torch.Generator,
    options: argparse.Namespace,
) -> Tensor:
    """What comes after the first `num_observed` frames, in a context of one of the kinds in `SCHEDULES`.

    Args:
        latents, actions: of clips, `[N, T, C, h, w]` and `[N, T]`, the frames to predict included.
        generator: of the shuffling.
    """
    if mode in ("shuffled", "other"):
        window = pipeline.transformer.short_window
        num_long = max(0, num_observed - (window - 1))  # the frame to come is one of the window
        latents, actions = change_long_frames(latents, actions, num_long, mode, generator)
    return predict(
        pipeline,
        latents[:, :num_observed],
        actions,
        options.batch_size,
        options.seed,
        context_schedule=SCHEDULES[mode],
    )


def measure_curve(
    pipeline: FARVideoPipeline, episodes: list[Episode], measure: Measure, options: argparse.Namespace
) -> dict[str, Any]:
    """Part `curve`: rows by mode and number of observed frames."""
    longest, window = max(options.contexts), pipeline.transformer.short_window
    spread = range(longest, min(len(episode.frames) for episode in episodes) - TARGETS + 1, TARGETS)
    rounds = min(len(spread), max(1, options.clips // len(episodes)))
    if not rounds:
        raise ValueError(
            f"contexts={options.contexts}: some episodes have less than {longest + TARGETS} frames"
        )
    starts = [spread[i] for i in np.linspace(0, len(spread) - 1, rounds).astype(int)]
    # Whole rounds over the episodes: neighbours are of different ones, as "other" takes it.
    clips = [(episode, start) for start in starts for episode in episodes]
    latents, actions, frames = (
        torch.stack([getattr(episode, name)[start - longest : start + TARGETS] for episode, start in clips])
        for name in ("latents", "actions", "frames")
    )
    truth = frames[:, longest:].float() / 255
    revisits = torch.from_numpy(
        np.stack([observed_revisits(np.array(e.metadata["poses"]), start, window) for e, start in clips])
    )
    rows = [
        {
            "mode": "reconstruction",
            "observed": None,
            **figures(*measure(latents[:, longest:], truth), revisits),
        }
    ]
    for mode in options.modes:
        contexts = {"window": [longest], "all": options.contexts, "default": options.contexts}
        for observed in contexts.get(mode, options.changed_contexts):
            began = time.perf_counter()
            clip = slice(longest - observed, None)
            generator = torch.Generator().manual_seed(options.seed)
            made = predict_after(
                pipeline, latents[:, clip], actions[:, clip], observed, mode, generator, options
            )
            row = {"mode": mode, "observed": window - 1 if mode == "window" else observed}
            row |= figures(*measure(made, truth), revisits)
            rows.append(row | {"seconds": round(time.perf_counter() - began, 1)})
            print(f"{mode} {observed}: {row['psnr']['mean']:.2f} dB", file=sys.stderr, flush=True)
    return {
        "clips": len(clips),
        "target_frames": revisits.numel(),
        "revisited_frames": int(revisits.sum()),
        "rows": rows,
    }


def measure_scripted(
    pipeline: FARVideoPipeline, episodes: list[Episode], measure: Measure, options: argparse.Namespace
) -> dict[str, Any]:
    """Part `scripted`: rows by script and mode."""
    groups: dict[str, dict[int, list[Episode]]] = defaultdict(lambda: defaultdict(list))
    for episode in episodes:
        name, back = (episode.metadata.get(key) for key in ("script", "return_frame"))
        if name is None or back is None or not 0 < back <= len(episode.frames) - TARGETS:
            raise ValueError(
                f"scripted: {episode.metadata['file_name']} has script={name!r} and return_frame={back!r}; "
                f"it takes both, and {TARGETS} of {len(episode.frames)} frames from return_frame on"
            )
        groups[name][back].append(episode)
    rows = []
    for script, by_return in groups.items():
        for mode in ("all", "window", "shuffled"):
            generator = torch.Generator().manual_seed(options.seed)
            scores = []
            for back, walks in by_return.items():  # walks of one batch have equally many observed frames
                latents, actions, frames = (
                    torch.stack([getattr(walk, name)[: back + TARGETS] for walk in walks])
                    for name in ("latents", "actions", "frames")
                )
                made = predict_after(pipeline, latents, actions, back, mode, generator, options)
                scores.append(measure(made, frames[:, back:].float() / 255))
            quality, distance = (torch.cat(part) for part in zip(*scores, strict=True))
            returns = sorted(back for back, walks in by_return.items() for _ in walks)
            row = {"script": script, "mode": mode, "walks": len(quality), "return_frames": returns}
            rows.append(row | figures(quality, distance))
            print(f"{script} {mode}: {quality.mean():.2f} dB", file=sys.stderr, flush=True)
    return {"rows": rows}


def wall_colours(frames: Tensor) -> int:
    """How many colours of wall frames `[F, 3, H, W]` in [0, 1] show: a count of textures.

    The middle quarter of a frame's height, where walls stand near and far, is cut in eight pieces. Of the
    mean colours of all pieces of all frames, the one with the most others within 0.1 (in RGB) is counted and
    taken away with these, for as long as that takes 2% of all pieces or more. A blurred wall has one colour.
    """
    height = frames.shape[-2]
    middle = frames[..., 3 * height // 8 : 5 * height // 8, :]
    pieces = functional.adaptive_avg_pool2d(middle, (1, 8)).squeeze(2).movedim(1, -1).flatten(0, 1)
    near = torch.cdist(pieces, pieces) < WALL_COLOUR
    left = torch.ones(len(pieces), dtype=torch.bool)
    colours = 0
    while left.any():
        sizes = (near & left).sum(dim=1)
        most = int(sizes.argmax())
        if sizes[most] < WALL_SHARE * len(pieces):
            break
        colours += 1
        left &= ~near[most]
    return colours


def appearance(frames: Tensor) -> dict[str, float]:
    """What frames `[F, 3, H, W]` in [0, 1] look like together.

    `sharpness`: mean difference of neighbouring pixels; `colour_spread`: standard deviation of a channel over
    all pixels of all frames, mean of the channels (it holds both what varies within frames and between them);
    `wall_colours`: see there.
    """
    return {
        "sharpness": sharpness(frames),
        "colour_spread": frames.transpose(0, 1).flatten(1).std(dim=1).mean().item(),
        "wall_colours": float(wall_colours(frames)),
    }


def mean_appearance(blocks: list[Tensor]) -> dict[str, float]:
    """Means of `appearance` over blocks of frames."""
    each = [appearance(block) for block in blocks]
    return {name: sum(values[name] for values in each) / len(each) for name in each[0]}


def measure_rollout(
    pipeline: FARVideoPipeline, episodes: list[Episode], options: argparse.Namespace
) -> dict[str, Any]:
    """Part `rollout`: looks by block of frames, and as a share of the real episodes'."""
    began = time.perf_counter()
    size, num_context = min(BLOCK, options.rollout_frames), options.rollout_context
    real = [block for e in episodes for block in (e.frames.float() / 255).split(size) if len(block) == size]
    shortest = min(len(episode.frames) for episode in episodes)
    if not real or shortest < num_context:
        raise ValueError(
            f"data: the shortest episode has {shortest} frames; a rollout takes {num_context} to start from "
            f"and {size} to compare with"
        )
    total = num_context + options.rollout_frames
    cycle = torch.stack([e.actions[torch.arange(total) % len(e.actions)] for e in episodes])
    context = torch.stack([episode.latents[:num_context] for episode in episodes])
    made = predict(pipeline, context, cycle, options.batch_size, options.seed)
    frames = decode(pipeline, made, TARGETS * options.batch_size)
    truth = mean_appearance(real)
    rows = []
    for start in range(0, options.rollout_frames - size + 1, size):
        looks = mean_appearance(list(frames[:, start : start + size]))
        shares = {f"{name}_share": value / truth[name] for name, value in looks.items()}
        rows.append({"first": start + 1, "last": start + size, **looks, **shares})
    return {
        "rollouts": len(episodes),
        "observed": num_context,
        "real": truth,
        "rows": rows,
        "seconds": round(time.perf_counter() - began, 1),
    }


def measure_loss(
    pipeline: FARVideoPipeline, episodes: list[Episode], options: argparse.Namespace
) -> dict[str, Any]:
    """Part `loss`: rows by number of frames, those of the window included."""
    shortest = min(len(episode.frames) for episode in episodes)
    rows = []
    for num_frames in options.loss_frames:
        starts = range(0, shortest - num_frames + 1, num_frames)
        clips = [(e, start) for start in starts for e in episodes][: max(options.clips, len(episodes))]
        if not clips:
            raise ValueError(f"loss_frames={num_frames}: some episodes have {shortest} frames only")
        latents, actions = (
            torch.stack([getattr(episode, name)[start : start + num_frames] for episode, start in clips])
            for name in ("latents", "actions")
        )
        generator = torch.Generator().manual_seed(options.seed)
        losses = memory_loss(pipeline.transformer, latents, actions, num_frames, generator)
        rows.append({"frames": num_frames, "clips": len(clips), **losses})
    return {"rows": rows}


def tables(results: dict[str, Any]) -> str:
    """The figures of all parts as Markdown."""
    parts = []
    if curve := results.get("curve"):
        parts.append(
            f"{curve['clips']} clips; "
            f"{curve['revisited_frames']} of {curve['target_frames']} target frames are revisits"
        )
        header = ["context", "observed", "PSNR 1", "16", "mean", "+-", "LPIPS", "revisits PSNR", "LPIPS"]
        rows = [
            [row["mode"], row["observed"], row["psnr"]["1"], row["psnr"]["16"], row["psnr"]["mean"]]
            + [row[name] for name in ("psnr_standard_error", "lpips", "revisit_psnr", "revisit_lpips")]
            for row in curve["rows"]
        ]
        parts.append(table(header, rows))
    if scripted := results.get("scripted"):
        rows = [
            [
                row["script"],
                row["mode"],
                row["walks"],
                row["psnr"]["mean"],
                row["psnr_standard_error"],
                row["lpips"],
            ]
            for row in scripted["rows"]
        ]
        parts.append(table(["script", "context", "walks", "PSNR", "+-", "LPIPS"], rows))
    if rollout := results.get("rollout"):
        names = list(rollout["real"])
        rows = [
            [f"{row['first']} to {row['last']}", *(row[name] for name in names)] for row in rollout["rows"]
        ]
        shares = [[f"{row[f'{name}_share']:.0%}" for name in names] for row in rollout["rows"]]
        rows = [[*row, *share] for row, share in zip(rows, shares, strict=True)]
        rows.append(["real", *rollout["real"].values(), *["100%"] * len(names)])
        parts.append(table(["frames", *names, *["share"] * len(names)], rows))
    if loss := results.get("loss"):
        for row in loss["rows"]:
            values = ", ".join(f"{name} {row[name]:.3f}" for name in list(row)[2:])
            parts.append(f"loss of a noisy window, {row['frames']} frames, {row['clips']} clips: {values}")
    return "\n\n".join(parts)


def draw(results: dict[str, Any], path: Path) -> None:
    """Plot the curve and the rollout."""
    with plotted(path, (18, 4), 4) as axes:
        names = {"psnr": "PSNR, dB", "lpips": "LPIPS", "revisit_psnr": "PSNR of revisits, dB"}
        rows = [row for row in results.get("curve", {"rows": []})["rows"] if row["observed"] is not None]
        for axis, (name, title) in zip(axes, names.items(), strict=False):
            axis.set(title=title, xlabel="observed frames")
            for mode in dict.fromkeys(row["mode"] for row in rows):
                points = {
                    row["observed"]: row[name]["mean"] if name == "psnr" else row[name]
                    for row in sorted(rows, key=lambda row: row["observed"])
                    if row["mode"] == mode and row[name] is not None
                }
                if mode == "window":
                    for value in points.values():
                        axis.axhline(value, linestyle="--", color="grey", label=mode)
                elif points:
                    axis.plot(list(points), list(points.values()), marker="o", label=mode)
            if axis.get_legend_handles_labels()[0]:
                axis.set_xscale("log", base=2)
                axis.legend()
        axes[3].set(title="rollout, share of real", xlabel="frame")
        if rollout := results.get("rollout"):
            ends = [row["last"] for row in rollout["rows"]]
            for name in rollout["real"]:
                shares = [row[f"{name}_share"] for row in rollout["rows"]]
                axes[3].plot(ends, shares, marker="o", label=name.replace("_", " "))
            axes[3].axhline(1, linestyle="--", color="grey")
            axes[3].set_ylim(bottom=0)
            axes[3].legend()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="folder or repo id of a pipeline")
    parser.add_argument("data", type=Path, help="videofolder with a validation split: actions and poses")
    parser.add_argument("--scripted", type=Path, help="a second one, of scripted walks")
    parser.add_argument("--transformer", help="other transformer weights, such as a training run's `ema`")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--plot", type=Path, help="PNG file")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all, scripted with --scripted")
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[8, 32, 64, 128, 256], help="observed frames"
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=list(SCHEDULES),
        default=["all", "default", "window", "shuffled", "other"],
    )
    parser.add_argument(
        "--changed-contexts", type=int, nargs="+", help="of shuffled and other; default: the longest one"
    )
    parser.add_argument("--clips", type=int, default=48, help="at most, in whole rounds over the episodes")
    parser.add_argument("--rollout-frames", type=int, default=1000)
    parser.add_argument("--rollout-context", type=int, default=32, help="observed frames before a rollout")
    parser.add_argument("--rollouts", type=int, default=4, help="episodes that are rolled out")
    parser.add_argument("--loss-frames", type=int, nargs="+", default=[96, 256], help="window included")
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.changed_contexts = options.changed_contexts or [max(options.contexts)]
    if options.parts is None:
        options.parts = [part for part in PARTS if part != "scripted" or options.scripted]
    if "scripted" in options.parts and options.scripted is None:
        parser.error("--parts scripted takes --scripted FOLDER, a recording of scripted walks")
    counts = ("contexts", "changed_contexts", "loss_frames", "batch_size", "rollouts")
    for name in (*counts, "rollout_frames", "rollout_context", "clips"):
        least = 2 if name == "clips" else 1  # "other" takes two episodes
        if np.min(getattr(options, name)) < least:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} {getattr(options, name)}: it takes {least} or more")
    if max(options.changed_contexts) > max(options.contexts):
        parser.error(f"--changed-contexts {options.changed_contexts}: the longest of --contexts is the most")
    return options


def main() -> None:
    options = parse_arguments()
    began = time.perf_counter()
    pipeline = FARVideoPipeline.from_pretrained(options.checkpoint)
    if options.transformer is not None:
        pipeline.transformer = FARTransformer3DModel.from_pretrained(options.transformer).eval()
    if not pipeline.transformer.is_long:
        raise ValueError(f"checkpoint={options.checkpoint!r} is a base model: it has no long-term frames")
    pipeline.set_progress_bar_config(disable=True)
    measure = Measure(pipeline, options.batch_size)  # first: LPIPS may be missing, and the rest takes minutes
    results: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "cpu": describe(pipeline.device),
        "threads": torch.get_num_threads(),
        "checkpoint": options.checkpoint,
        "transformer": options.transformer,
        "steps": pipeline.config.num_inference_steps,
    }
    parts = set(options.parts)
    episodes: list[Episode] = []
    if parts & {"curve", "rollout", "loss"}:
        limit = options.clips if parts & {"curve", "loss"} else options.rollouts
        episodes = load_episodes(pipeline, options.data, TARGETS * options.batch_size, limit)
        lacking = [episode.metadata["file_name"] for episode in episodes if "poses" not in episode.metadata]
        if lacking and "curve" in parts:
            raise ValueError(f"data={str(options.data)!r}: {lacking[0]} has no poses in its metadata")
    for part in (part for part in PARTS if part in parts):
        if part == "curve":
            results[part] = measure_curve(pipeline, episodes, measure, options)
        elif part == "scripted":
            walks = load_episodes(pipeline, options.scripted, TARGETS * options.batch_size)
            results[part] = measure_scripted(pipeline, walks, measure, options)
        elif part == "rollout":
            results[part] = measure_rollout(pipeline, episodes[: options.rollouts], options)
        else:
            results[part] = measure_loss(pipeline, episodes, options)
        results["seconds"] = round(time.perf_counter() - began, 1)
        results["processor_seconds"] = round(time.process_time(), 1)  # holds on a busy machine, too
        if options.output is not None:  # after every part: the next one takes minutes
            with written_whole(options.output) as partial:
                partial.write_text(json.dumps(results, indent=2) + "\n")
    print(tables(results))
    spent = f"{results['seconds']:.0f} s, {results['processor_seconds']:.0f} s of processors"
    print(f"\n{results['cpu']}, {results['threads']} threads: {spent}")
    if options.plot is not None:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
