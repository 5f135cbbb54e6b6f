"""Measure a model by a published protocol.

    diffusers-far evaluate CHECKPOINT DATA --protocol next --output-dir OUTPUT
    torchrun --nproc-per-node 2 -m diffusers_far.cli evaluate CHECKPOINT DATA ...     # two processes

CHECKPOINT is a folder, a shipped model or a repo of the Hub; DATA is a folder of videos, a repo of the Hub,
or anything else in docs/data.md, or latents that encode_latents wrote. The protocol says how many frames are
given and predicted, of how many videos, how often, and which measures count; an option replaces a number of
it. docs/evaluation.md has the protocols. OUTPUT gets

    results.json    all figures, with 95% intervals by bootstrap over videos
    results.md      the table
    report.html     the table, curves over time, and videos beside the real ones, in one file
    clips/          what was measured of each clip

Clips that are finished are kept: after Ctrl-C, and after a crash, the same command goes on.
"""

import datetime
import importlib.util
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ..demo import side_by_side
from ..loading import check_device, load_pipeline
from ..training.encode_latents import processes
from ..training.options import option, parse
from ..video_files import save_video
from ..whole_files import written_whole
from .clips import Clip, RealClip, RealVideos, open_clips
from .machine import describe
from .measures import Measures, check_measures
from .prediction import Predictor, config_of
from .protocols import EvaluateOptions
from .report import page
from .results import markdown, summarize

FRAME_RATE = 10.0  # of the videos in the report
SHOWN_SIDE = 128  # pixels that the shorter side of a small frame is enlarged to, about
SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal

logger = logging.getLogger("evaluate")

Item = TypeVar("Item")


@dataclass(kw_only=True)
class LoadOptions:
    """How the command loads the checkpoint."""

    device: str | None = option(None, "default: a GPU if there is one, each process its own")
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "of the weights; default: bfloat16 on a GPU, else float32"
    )
    variant: str | None = option(None, "of the weights' files, such as fp16")


def evaluate(
    pipeline: Any,
    data: str | Path,
    protocol: str = "next",
    output_dir: str | Path = "far-evaluation",
    call_arguments: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure a pipeline by a published protocol: what `diffusers-far evaluate` does.

    Args:
        pipeline: FARVideoPipeline, or any with its call: see [`Predictor`].
        data: folder of videos, data set on the Hub, or what else docs/data.md has; or encoded latents.
        protocol: "next", "latte", "mcvd" or "teco".
        output_dir: folder for results.json, results.md and report.html. What is finished in it is kept.
        call_arguments: others for every call, such as `context_schedule`.
        options: as on the command line, with underscores: see [`EvaluateOptions`].

    Returns:
        What results.json has. In several processes, each has all.

    Raises:
        ValueError: before anything is predicted, for options or data that do not fit, for measures whose
            weights are not installed, and for a folder with results of other settings.
    """
    settled = EvaluateOptions(protocol=protocol, output_dir=str(output_dir), **options)  # type: ignore[arg-type]
    videos = prepare(data, settled)
    name = str(getattr(pipeline, "name_or_path", "") or type(pipeline).__name__)
    return run(pipeline, videos, settled, name, str(data), call_arguments)


def prepare(data: str | Path, options: EvaluateOptions) -> RealVideos:
    """All checks that need no pipeline, and the real videos."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('evaluation needs matplotlib: pip install "diffusers-far[eval]"')
    check_measures(options.measure_names)
    output = Path(options.output_dir)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir={options.output_dir!r} is a file; it takes a new folder")
    return open_clips(data, options)


def run(
    pipeline: Any,
    videos: RealVideos,
    options: EvaluateOptions,
    checkpoint: str,
    data: str,
    call_arguments: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Measure what is not measured yet, then write the figures of all; see [`evaluate`]."""
    state = processes()
    predictor = Predictor(pipeline, videos, options, call_arguments)
    if options.resolution is None and not videos.are_latents:
        options.resolution = predictor.default_resolution
    output = Path(options.output_dir)
    claim(output, settings(predictor, videos, options))
    clips, shown = videos.clips, shown_clips(videos.clips, options.num_shown)
    names = list(dict.fromkeys(clip.video for clip in clips))
    number = {name: place for place, name in enumerate(names)}
    own = [clip for clip in clips if number[clip.video] % state.num_processes == state.process_index]
    measure_clips(predictor, videos, own, shown, output)
    state.wait_for_everyone()
    if state.is_main_process:
        files = [load_file(clip_file(output, clip)) for clip in clips]
        results = {
            "checkpoint": checkpoint,
            "data": data,
            **describe_run(predictor, videos, options, command),
            "seconds": float(sum(file["seconds"] for file in files)),
            "measures": summarize(files, clips, options),
            "clips": [
                {"video": clip.video, "start": clip.start}
                | {name: file[name].mean(dim=1).tolist() for name in options.measure_names if name in file}
                for clip, file in zip(clips, files, strict=True)
            ],
        }
        captions = [(f"{clip.video}, from frame {clip.start}", video_file(output, clip)) for clip in shown]
        write(output / "results.json", json.dumps(results, indent=2) + "\n")
        write(output / "results.md", markdown(results))
        write(output / "report.html", page(results, captions))
    state.wait_for_everyone()
    found: dict[str, Any] = json.loads((output / "results.json").read_text())
    return found


def describe_run(
    predictor: Predictor, videos: RealVideos, options: EvaluateOptions, command: str | None
) -> dict[str, Any]:
    """What led to the figures."""
    default_steps = config_of(predictor.pipeline).get("num_inference_steps")
    return {
        "protocol": options.protocol,
        "split": options.split,
        "truth": "latents" if videos.are_latents else "frames",
        "num_videos": len({clip.video for clip in videos.clips}),
        "num_clips": len(videos.clips),
        "num_short_videos": videos.num_short,
        "num_context": options.context,
        "num_frames": options.length,
        "num_fvd_frames": options.num_fvd_frames,
        "frames": options.identity or "as they are",
        "seeds": options.sample_seeds,
        "conditions": predictor.conditions,
        "guidance_scale": predictor.guidance_scale,
        "num_inference_steps": predictor.arguments.get("num_inference_steps", default_steps),
        "call_arguments": {name: repr(value) for name, value in predictor.arguments.items()},
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": describe(predictor.device),
        "torch": torch.__version__,
        "dtype": str(getattr(predictor.pipeline, "dtype", "float32")).removeprefix("torch."),
    }


# ------------------------------------------------------------------------------------------------------------
# The folder


def clip_file(output: Path, clip: Clip) -> Path:
    """What was measured of a clip."""
    return output / "clips" / f"{clip.key}.safetensors"


def video_file(output: Path, clip: Clip) -> Path:
    """A clip beside its prediction."""
    return output / "clips" / f"{clip.key}.mp4"


def write(file: Path, text: str) -> None:
    with written_whole(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def settings(predictor: Predictor, videos: RealVideos, options: EvaluateOptions) -> dict[str, Any]:
    """All that a clip's figures depend on. Which clips there are is none of it: more may be added."""
    return {
        "pipeline": predictor.identity(),
        "data": videos.identity,
        "split": options.split,
        "frames": options.identity,
        "num_context": options.context,
        "num_frames": options.length,
        "fvd_frames": options.prescribed.fvd_frames,
        "seeds": options.sample_seeds,
        "guidance_scale": predictor.guidance_scale,
        "conditions": predictor.conditions,
        "measures": options.measure_names,
    }


def claim(output: Path, wanted: dict[str, Any]) -> None:
    """Make the folder one of these settings, or raise a ValueError if it is one of others."""
    state, file = processes(), output / "settings.json"
    if state.is_main_process and not file.exists():
        if (output / "clips").exists():
            raise ValueError(f"output_dir: {output} has clips, but no settings.json; give a new folder")
        output.mkdir(parents=True, exist_ok=True)
        write(file, json.dumps(wanted, indent=2) + "\n")
    state.wait_for_everyone()
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"output_dir: {file} cannot be read: {error}; give a new folder") from error
    if different := [name for name in wanted if found.get(name) != wanted[name]]:
        raise ValueError(
            f"output_dir: {output} has results of another {' and '.join(different)}; give a new folder, or "
            "remove it"
        )


def is_finished(output: Path, clip: Clip, shown: Sequence[Clip]) -> bool:
    """Whether nothing is left to do for a clip."""
    if clip in shown and not video_file(output, clip).exists():
        return False
    try:
        return "seconds" in load_file(clip_file(output, clip))
    except (SafetensorError, OSError):
        return False


def shown_clips(clips: Sequence[Clip], number: int) -> list[Clip]:
    """So many, evenly spread."""
    number = min(number, len(clips))
    return [clips[i * len(clips) // number] for i in range(number)]


# ------------------------------------------------------------------------------------------------------------
# Measuring


def batches(items: Iterable[Item], size: int) -> Iterable[list[Item]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def measure_clips(
    predictor: Predictor, videos: RealVideos, own: Sequence[Clip], shown: Sequence[Clip], output: Path
) -> None:
    """Predict and measure the clips of this process that are not finished."""
    options, state = predictor.options, processes()
    left = [clip for clip in own if not is_finished(output, clip, shown)]
    if not left:
        return
    if len(left) < len(own):
        logger.warning("%d of %d clips are finished already", len(own) - len(left), len(own))
    measures = Measures(options.measure_names, predictor.device)
    num_samples = len(options.sample_seeds)
    real_clips = videos.read(left, options.frame_options())
    in_place = sys.stderr.isatty()
    measured = 1 + num_samples  # videos of a clip: the real one, too
    with tqdm(
        total=len(own) * measured,
        initial=(len(own) - len(left)) * measured,
        unit="video",
        disable=not state.is_main_process,
        desc="evaluate" if state.num_processes == 1 else f"first of {state.num_processes} processes",
        mininterval=0.2 if in_place else SECONDS_BETWEEN_LINES,
        maxinterval=SECONDS_BETWEEN_LINES,
    ) as bar:
        for group in batches(real_clips, max(1, options.batch_size // num_samples)):
            measure_group(predictor, measures, group, shown, output, bar)


def measure_group(
    predictor: Predictor,
    measures: Measures,
    group: Sequence[RealClip],
    shown: Sequence[Clip],
    output: Path,
    bar: Any,
) -> None:
    """All samples of some clips, and a file for each clip, which appears when it is complete."""
    options = predictor.options
    began = time.perf_counter()
    truths = [predictor.truth(real) for real in group]
    parts: list[list[dict[str, Tensor]]] = [[] for _ in group]
    pictures: dict[int, Tensor] = {}
    items = [(place, seed) for place in range(len(group)) for seed in options.sample_seeds]
    for batch in batches(items, options.batch_size):
        predicted = predictor.predict([(group[place], seed) for place, seed in batch])
        for (place, _), frames in zip(batch, predicted, strict=True):
            pictures.setdefault(place, frames)
            parts[place].append(measure_sample(measures, frames, truths[place], options))
            bar.update()
    shared = (time.perf_counter() - began) / len(group)
    for place, (real, truth) in enumerate(zip(group, truths, strict=True)):
        began = time.perf_counter()
        tensors = {name: torch.cat([part[name] for part in parts[place]]) for name in parts[place][0]}
        tensors |= measure_real(predictor, measures, real, truth)
        tensors["seconds"] = torch.tensor(shared + time.perf_counter() - began)
        file = clip_file(output, real.clip)
        file.parent.mkdir(parents=True, exist_ok=True)
        if real.clip in shown:
            show(truth, pictures[place], options, video_file(output, real.clip))
        with written_whole(file) as unfinished:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished)
        bar.update()


def measure_sample(
    measures: Measures, frames: Tensor, truth: Tensor, options: EvaluateOptions
) -> dict[str, Tensor]:
    """Measures `[1, F]` of predicted frames `[F, 3, H, W]`, and features `[1, 400]`."""
    values = {}
    if options.context:
        values = measures.by_frame(frames[None], truth[options.context :])
    if measures.i3d is not None:
        given = truth[options.length - options.num_fvd_frames : options.context]  # none where all are new
        values["features"] = measures.features(torch.cat([given, frames])[None])
    return values


def measure_real(
    predictor: Predictor, measures: Measures, real: RealClip, truth: Tensor
) -> dict[str, Tensor]:
    """Features `[400]` of the real video, and measures `[F]` of what needs no prediction."""
    options, values = predictor.options, {}
    if measures.i3d is not None:
        values["real_features"] = measures.features(truth[None, options.length - options.num_fvd_frames :])[0]
    if options.context:
        target = truth[options.context :]
        others = {"repeated": truth[options.context - 1].expand_as(target)}
        reconstruction = predictor.reconstruction(real)
        if reconstruction is not None:
            others["reconstructed"] = reconstruction
        for kind, frames in others.items():
            found = measures.by_frame(frames[None], target)
            values |= {f"{kind}_{name}": value[0] for name, value in found.items()}
    return values


def show(truth: Tensor, predicted: Tensor, options: EvaluateOptions, file: Path) -> None:
    """Write a video of the real frames beside given and predicted ones."""
    whole = torch.cat([truth[: options.context], predicted])
    left, right = (video.movedim(1, -1).numpy() for video in (truth, whole))
    zoom = max(1, SHOWN_SIDE // min(truth.shape[-2:]))
    save_video(side_by_side(left, right, options.context, zoom), file, options.fps or FRAME_RATE)


# ------------------------------------------------------------------------------------------------------------
# The command


def main(command_line: Sequence[str]) -> None:
    """The command, without its name."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    program = "diffusers-far evaluate"
    checkpoint, data, options, load = parse(
        command_line, (EvaluateOptions, LoadOptions), __doc__, ("checkpoint", "data"), program
    )
    state = processes()
    level = logging.WARNING if state.is_main_process else logging.ERROR  # all find the same
    logging.basicConfig(level=level, format="%(message)s")
    videos = prepare(data, options)
    device = load.device
    if device is not None:
        check_device(device)
    elif state.num_processes > 1:
        device = str(state.device)
    pipeline = load_pipeline(checkpoint, device, load.dtype, load.variant)
    command = shlex.join([*program.split(), *command_line])
    results = run(pipeline, videos, options, checkpoint, data, command=command)
    if state.is_main_process:
        print(markdown(results))
        print(f"{Path(options.output_dir) / 'report.html'} has curves and videos")
