"""What helps a base model whose context is longer than the clips that it was trained on.

    python evaluation/experiments/flex_rope.py LATENTS --autoencoder checkpoints/far-doom-maze-64/vae \
        --output OUTPUT --plot docs/experiments_flex_rope.png

LATENTS is what training.encode_latents wrote of walks that come back (`data/doom_maze.py --walk revisit`), of
300 frames. Two base models (all frames in full, no long-term ones) are trained from nothing on the same clips
of 16 frames, each for `--minutes` of a processor's time (of the clock on a GPU): `base` with rotary positions
(RoPE) in time, height and width; `ALiBi` with those of height and width alone, and for time a bias of the
attention, minus distance times a slope of each head (2 ** (-8 h / heads), arXiv 2108.12409), in training and
after it.

Then they see 16 to 256 frames of held-out walks:

- the loss of the next 4 frames, all noisy at level 0.8: one forward, no noise of sampling;
- PSNR and LPIPS of the next 16 frames, one sample each, decoded, beside the true latents decoded (so that
  what the autoencoder loses does not count).

All targets are the same for all contexts: the frames after the 256th. The ways to use a context are those of
evaluation/beyond_training.py, T being 16:

- `newest`: a sliding window of T frames, the new ones included; `sinks`: the first four frames in it;
- `all`: every frame, plain RoPE; `slope k`: FlexRoPE, k / T per frame of distance; `interpolated`; `RIFLEx`;
- `re-indexed`: distances up to T / 2 as they are, longer ones squeezed below T, anew for each new frame;
- `ALiBi` and `ALiBi newest`: the second model with every frame, and with a window of T.

FlexRoPE's slope is chosen by the loss, mean of all contexts, on the first `--choosing-walks` held-out walks;
all that is reported is of the others. OUTPUT gets results.json and results.md; started again, it goes on.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout: this file is run as a script

from diffusers_far import ContextSchedule, FARTransformer3DModel, FARVideoPipeline
from diffusers_far.attention import FARAttnProcessor
from diffusers_far.evaluation.tables import table
from diffusers_far.lpips import LPIPS
from diffusers_far.matmul_attention import matmul_attention
from diffusers_far.metrics import psnr
from diffusers_far.training.clips import LatentVideos
from evaluation.beyond_training import Way, call_arguments, frequency_for, squeezed, way_loss, ways
from evaluation.experiments.equal_time import (
    NEW_MODEL,
    SIZES,
    Kept,
    Trainer,
    Training,
    Wrapper,
    beside,
    held_out_clips,
    make_pipeline,
    new_model,
    noise_of,
    parse_arguments,
    plan_steps,
    run_options,
    sources_of,
    train_new,
    write_results,
)
from evaluation.plots import colors, plotted
from evaluation.world_model import decode, predict

TRAINED = 16  # frames of a clip
NOISY_FRAMES = 4  # of the loss
PREDICTED = 16
LEAST_APART = 8  # frames between two targets of the loss in a walk
FULL = {"minutes": 60.0, "batch_size": 64, "measured_at_once": 8}


class BiasAttnProcessor(FARAttnProcessor):
    """Attention by matrix products that takes FlexRoPE's bias in training, with a slope of each head.

    Args:
        heads: that the bias is multiplied for, as ALiBi does; None: it is taken as it is.
    """

    def __init__(self, heads: int | None = None) -> None:
        super().__init__()
        self.slopes = None if heads is None else 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        bias = attention_mask
        if bias is not None and bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill(~bias, -torch.inf)
        if bias is not None and self.slopes is not None:
            per_head = bias * self.slopes.to(bias)[None, :, None, None]
            bias = per_head.expand(len(query), -1, -1, -1).flatten(0, 1)[None]
        bias = None if bias is None else bias.to(query.dtype)
        return matmul_attention(query, key, value, bias)


class ChangedTime(nn.Module):
    """Rotary tables of positions whose time is another.

    Args:
        embed: the model's own, of coordinates `[N, 3]` to cosines and sines.
    """

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed

    def time(self, time: Tensor) -> Tensor:
        """Of positions `[N]` in time: here none at all."""
        return torch.zeros_like(time)

    def forward(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        changed = coordinates.clone().float()
        changed[:, 0] = self.time(changed[:, 0])
        return self.embed(changed)


class ReindexedTime(ChangedTime):
    """Positions as the frame at `newest` sees them when far distances are squeezed into the trained ones."""

    newest = 0

    def time(self, time: Tensor) -> Tensor:
        return self.newest - squeezed(self.newest - time, TRAINED, self.newest + 1)


class BiasedTime(Wrapper):
    """A model that is trained with time as a bias alone."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, **conditions: Any) -> Any:
        return self.model(hidden_states, timestep, flex_rope_slope=1.0, **conditions)


def forget_time(model: FARTransformer3DModel) -> FARTransformer3DModel:
    """The model with ALiBi in place of rotary angles of time; with `flex_rope_slope=1` it knows time."""
    model.pos_embed = ChangedTime(model.pos_embed)
    model.set_attn_processor(BiasAttnProcessor(model.config.num_attention_heads))
    return model


def training_of(name: str, arguments: argparse.Namespace) -> Training:
    """How `base` or `ALiBi` is trained."""
    is_alibi = name == "ALiBi"

    def make_model(videos: LatentVideos) -> FARTransformer3DModel:
        model = new_model(videos, SIZES[arguments.full])
        model.set_attn_processor(BiasAttnProcessor())
        return forget_time(model) if is_alibi else model

    options = run_options(arguments, name, num_frames=TRAINED, clean_context_probability=0.5, **NEW_MODEL)
    wrapper = BiasedTime if is_alibi else None
    return Training(lambda options: Trainer(make_model, options, wrapper), options)


# ------------------------------------------------------------------------------------------------------------
# Measuring


def ways_of(num_frames: int, slopes: list[float]) -> dict[str, Way]:
    """All ways of both models, by name."""
    found = {way.name: way for way in ways(num_frames, None, TRAINED, slopes)}
    for name, way in (("ALiBi", "all"), ("ALiBi newest", "newest")):
        found[name] = found[way]._replace(name=name, flex_rope_slope=1.0)
    return found


def next_frames_loss(
    model: FARTransformer3DModel,
    way: Way,
    videos: LatentVideos,
    walks: list[int],
    num_observed: int,
    arguments: argparse.Namespace,
) -> list[float]:
    """Loss of the next frames by target: the first one of all walks, then the second one of all walks."""
    num_frames = num_observed + NOISY_FRAMES
    losses = []
    for index in range(arguments.ends):
        end = max(arguments.contexts) + NOISY_FRAMES + LEAST_APART * index
        for chosen in torch.tensor(walks).split(arguments.measured_at_once):
            latents, actions = held_out_clips(videos, chosen.tolist(), end, num_frames)
            seeds = [10_000 * index + walk for walk in chosen.tolist()]
            noise = noise_of(seeds, latents[0, :NOISY_FRAMES].shape)
            losses += way_loss(model, way, latents, actions, noise, TRAINED).tolist()
    return losses


@contextmanager
def reindexed(model: FARTransformer3DModel) -> Iterator[ReindexedTime]:
    """The model with positions that can be moved."""
    own = model.pos_embed
    model.pos_embed = ReindexedTime(own)
    try:
        yield model.pos_embed
    finally:
        model.pos_embed = own


def predict_reindexed(
    pipeline: FARVideoPipeline, context: Tensor, actions: Tensor, batch_size: int
) -> Tensor:
    """As `predict` with seed 0, with all positions, and so the whole context, anew for each new frame."""
    size = (1, *context.shape[2:])
    sources = sources_of(range(len(context)))  # as in `predict`
    frames = context
    with reindexed(pipeline.transformer) as moved:
        while frames.shape[1] < actions.shape[1]:
            moved.newest = number = frames.shape[1]
            noise = torch.stack([torch.randn(size, generator=source) for source in sources])
            new = [
                predict(
                    pipeline,
                    frames[clips],
                    actions[clips, : number + 1],
                    batch_size,
                    seed=0,
                    latents=noise[clips],
                    context_schedule=ContextSchedule.unbounded(),
                )
                for clips in torch.arange(len(frames)).split(batch_size)
            ]
            frames = torch.cat([frames, torch.cat(new).to(frames)], dim=1)
    return frames[:, context.shape[1] :]


def predict_way(
    pipeline: FARVideoPipeline, name: str, slopes: list[float], latents: Tensor, actions: Tensor, size: int
) -> Tensor:
    """The last frames of clips `[N, F, C, h, w]`, `[N, 16, C, h, w]`, by one of `ways_of`."""
    num_frames, context = latents.shape[1], latents[:, :-PREDICTED]
    if name == "re-indexed":
        return predict_reindexed(pipeline, context, actions, size)
    settings = call_arguments(num_frames, TRAINED, slopes)
    settings |= {"RIFLEx": settings["all"]}
    settings |= {
        f"ALiBi{which}": settings[way] | {"flex_rope_slope": 1.0}
        for which, way in (("", "all"), (" newest", "newest"))
    }
    with frequency_for(pipeline.transformer, name == "RIFLEx", TRAINED, num_frames):
        return predict(pipeline, context, actions, size, seed=0, **settings[name])


def measure_predictions(
    pipeline: FARVideoPipeline,
    lpips: LPIPS,
    name: str,
    slopes: list[float],
    videos: LatentVideos,
    walks: list[int],
    num_observed: int,
    arguments: argparse.Namespace,
) -> dict[str, list[float]]:
    """PSNR of the first new frame, and PSNR and LPIPS, mean of all new frames, by walk."""
    end, size = max(arguments.contexts) + PREDICTED, arguments.measured_at_once
    latents, actions = held_out_clips(videos, walks, end, num_observed + PREDICTED)
    made = predict_way(pipeline, name, slopes, latents, actions, size)
    frames, truth = (
        decode(pipeline, part, PREDICTED * size) for part in (made.float(), latents[:, -PREDICTED:])
    )
    quality, distance = psnr(frames, truth), lpips.by_frame(frames, truth, PREDICTED * size)
    return {
        "psnr_1": quality[:, 0].tolist(),
        "psnr": quality.mean(dim=1).tolist(),
        "lpips": distance.mean(dim=1).tolist(),
    }


# ------------------------------------------------------------------------------------------------------------
# Telling


def rows_of(
    measured: dict[str, dict[str, Any]], contexts: list[int], walks: list[int]
) -> list[dict[str, Any]]:
    """Means by context and way, beside the sliding window's.

    Args:
        measured: by `<context> <way>`: `loss`, `psnr_1`, `psnr` and `lpips`, lists.
    """
    rows = []
    for num_observed in contexts:
        of_context = {
            name.partition(" ")[2]: values
            for name, values in measured.items()
            if name.startswith(f"{num_observed} ")
        }
        for way, values in of_context.items():
            row: dict[str, Any] = {"observed": num_observed, "way": way}
            for name, found in values.items():
                base = of_context["newest"][name]
                owners = walks * (len(found) // len(walks))
                row[name] = {"mean": sum(found) / len(found), **beside(found, base, owners)}
            rows.append(row)
    return rows


def best(rows: list[dict[str, Any]], name: str, largest: bool) -> str:
    """In words: which way is the best by a measure at each context, and whether it is told from a window."""
    lines = []
    for num_observed in dict.fromkeys(row["observed"] for row in rows):
        of_context = [row for row in rows if row["observed"] == num_observed]
        row = (max if largest else min)(of_context, key=lambda row: row[name]["mean"])
        found = row[name]
        told = f"{found['difference']:+.3f} ± {found['standard_error']:.3f} beside the sliding window"
        if row["way"] == "newest":
            told = "the sliding window itself"
        elif abs(found["difference"]) < 2 * found["standard_error"]:
            told += ", which is not told apart from it"
        lines.append(f"- after {num_observed} frames: {row['way']} ({found['mean']:.3f}; {told})")
    return "\n".join(lines)


def markdown(facts: dict[str, Any]) -> str:
    """All tables, and who wins."""
    rows = facts["rows"]
    models = [[name, made["steps"], made["seconds_per_step"]] for name, made in facts["models"].items()]
    cells: list[list[object]] = []
    for row in rows:
        loss, quality, distance = row["loss"], row["psnr"], row["lpips"]
        cells.append(
            [
                *(row["observed"], row["way"], loss["mean"]),
                f"{loss['difference']:+.3f} ± {loss['standard_error']:.3f}",
                *(f"{row['psnr_1']['mean']:.2f}", f"{quality['mean']:.2f}"),
                f"{quality['difference']:+.2f} ± {quality['standard_error']:.2f}",
                distance["mean"],
            ]
        )
    header = ["observed", "way", "loss", "beside window", "PSNR 1", "PSNR", "beside window", "LPIPS"]
    slopes = facts["slopes"]
    parts = [
        table(["model", "steps", "seconds a step"], models),
        f"Loss on the {facts['choosing_walks']} walks that choose the slope, mean of all contexts "
        f"(chosen: {facts['slope']:g} / {TRAINED}):",
        table(["slope, times T", *slopes], [["loss", *slopes.values()]]),
        f"{facts['walks']} other walks:",
        table(header, cells),
        "Lowest loss:",
        best(rows, "loss", largest=False),
        "Highest PSNR:",
        best(rows, "psnr", largest=True),
        "Lowest LPIPS:",
        best(rows, "lpips", largest=False),
    ]
    return "\n\n".join(parts) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss, PSNR and LPIPS by observed frames."""
    with plotted(path, (15, 4.5), 3) as axes:
        names = list(dict.fromkeys(row["way"] for row in rows))
        titles = {"loss": "loss of the next 4 frames", "psnr": "PSNR of 16 frames, dB", "lpips": "LPIPS"}
        for axis, (measure, title) in zip(axes, titles.items(), strict=True):
            axis.set(title=title, xlabel="observed frames")
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
            for color, name in zip(colors(len(names)), names, strict=True):
                points = [(row["observed"], row[measure]["mean"]) for row in rows if row["way"] == name]
                style = "--" if name.startswith("ALiBi") else "-"
                axis.plot(*zip(*points, strict=True), style, marker="o", label=name, color=color)
        axes[0].legend(fontsize="small")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="for each of the two models")
    parser.add_argument("--contexts", type=int, nargs="+", default=[16, 32, 64, 128, 256], help="observed")
    parser.add_argument("--slopes", type=float, nargs="+", default=[0.25, 1.0, 4.0, 16.0], help="times T")
    parser.add_argument("--walks", type=int, default=24, help="held-out ones, those that choose included")
    parser.add_argument("--choosing-walks", type=int, default=8, help="the first of them")
    parser.add_argument("--ends", type=int, default=2, help="targets of the loss in a walk")
    arguments = parse_arguments(parser, FULL | {"walks": 32, "ends": 4})
    if not 1 <= arguments.choosing_walks < arguments.walks:
        parser.error(
            f"--choosing-walks {arguments.choosing_walks}: it takes 1 or more, and fewer than --walks "
            f"{arguments.walks}"
        )
    if min(arguments.contexts) < TRAINED - NOISY_FRAMES + 1:
        parser.error(f"--contexts {arguments.contexts}: each takes more than the {TRAINED - NOISY_FRAMES}")
    lpips = LPIPS()  # first: its weights may be missing, and the rest takes minutes
    videos = LatentVideos(arguments.latents / "validation")
    if len(videos) < arguments.walks:
        parser.error(f"--walks {arguments.walks}: {videos.folder} has {len(videos)}")
    names = ("latents", "full", "minutes", "contexts", "slopes", "walks", "choosing_walks", "ends")
    settings = {name: getattr(arguments, name) for name in (*names, "batch_size", "mixed_precision")}
    kept = Kept(arguments.output / "measured.json", settings)

    models, trained = {}, {}
    trainings = {name: training_of(name, arguments) for name in ("base", "ALiBi")}
    plan_steps(trainings.values(), arguments.minutes)
    for name, training in trainings.items():
        models[name], trained[name] = train_new(training)
    forget_time(models["ALiBi"])
    choosing = list(range(arguments.choosing_walks))
    reported = list(range(arguments.choosing_walks, arguments.walks))
    slope_losses = {}
    for slope in arguments.slopes:
        losses = []
        for num_observed in arguments.contexts:
            way = ways_of(num_observed + NOISY_FRAMES, [slope])[f"slope {slope:g}"]
            measured = kept(
                f"choosing {num_observed} {way.name}",
                lambda way=way, number=num_observed: next_frames_loss(
                    models["base"], way, videos, choosing, number, arguments
                ),
            )
            losses.append(sum(measured) / len(measured))
        slope_losses[f"{slope:g}"] = sum(losses) / len(losses)
    slope = float(min(slope_losses, key=lambda name: slope_losses[name]))

    pipelines = {name: make_pipeline(model, arguments.autoencoder, TRAINED) for name, model in models.items()}
    measured_ways: dict[str, dict[str, Any]] = {}
    for num_observed in sorted(arguments.contexts):
        for way in ways_of(num_observed + NOISY_FRAMES, [slope]).values():
            pipeline = pipelines["ALiBi" if way.name.startswith("ALiBi") else "base"]
            name = f"{num_observed} {way.name}"
            loss = kept(
                f"loss {name}",
                lambda way=way, pipeline=pipeline, number=num_observed: next_frames_loss(
                    pipeline.transformer, way, videos, reported, number, arguments
                ),
            )
            predictions = kept(
                f"predictions {name}",
                lambda way=way, pipeline=pipeline, number=num_observed: measure_predictions(
                    pipeline, lpips, way.name, [slope], videos, reported, number, arguments
                ),
            )
            measured_ways[name] = {"loss": loss, **predictions}
            quality = sum(predictions["psnr"]) / len(reported)
            print(f"{name}: loss {sum(loss) / len(loss):.4f}, {quality:.2f} dB", file=sys.stderr, flush=True)
    facts = {
        "minutes": arguments.minutes,
        "models": trained,
        "slopes": slope_losses,
        "slope": slope,
        "choosing_walks": len(choosing),
        "walks": len(reported),
        "rows": rows_of(measured_ways, sorted(arguments.contexts), reported),
    }
    text = markdown(facts)
    write_results(arguments.output, facts, text)
    print(text)
    if arguments.plot is not None:
        draw(facts["rows"], arguments.plot)


if __name__ == "__main__":
    main()
