"""Figures of all clips, with intervals by bootstrap over videos.

Shapes: V videos, N clips, S samples of a clip, F predicted frames.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..fvd import frechet_distance
from .clips import Clip
from .protocols import EvaluateOptions
from .tables import table

TITLES = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS"}
DIGITS = {"psnr": 2, "ssim": 3, "lpips": 3, "fvd": 1}
BASELINES = {"repeated": "last given frame, repeated", "reconstructed": "autoencoder alone"}
AHEAD = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NUM_RESAMPLES, NUM_FVD_RESAMPLES = 2000, 100
CONFIDENCE = 0.95

Files = Sequence[Mapping[str, Tensor]]  # what was measured of each clip


def bootstrap_mean(values: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The 95% interval of the mean over videos, as percentiles of means over videos drawn with replacement.

    Args:
        values: `[V, ...]`.

    Returns:
        Lower and upper ends, `[...]` each.
    """
    number = len(values)
    draws = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=NUM_RESAMPLES)
    means = np.tensordot(draws / number, values, axes=1)
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [outside, 1 - outside], axis=0)
    return low, high


def by_video(values: np.ndarray, clips: Sequence[Clip]) -> np.ndarray:
    """Means of the clips of each video: `[N, ...]` to `[V, ...]`."""
    names = list(dict.fromkeys(clip.video for clip in clips))
    places = np.array([names.index(clip.video) for clip in clips])
    return np.stack([values[places == place].mean(axis=0) for place in range(len(names))])


def interval(values: np.ndarray) -> list[float] | None:
    """Of the mean of `[V]`; None of a single video."""
    if len(values) < 2:
        return None
    low, high = bootstrap_mean(values)
    return [float(low), float(high)]


def summarize_frames(values: np.ndarray, clips: Sequence[Clip]) -> dict[str, Any]:
    """Mean, and by frame, of `[N, F]`."""
    videos = by_video(values, clips)
    summary: dict[str, Any] = {"mean": float(videos.mean()), "interval": interval(videos.mean(axis=1))}
    summary["by_frame"] = videos.mean(axis=0).tolist()
    ends = bootstrap_mean(videos) if len(videos) > 1 else None
    summary["by_frame_interval"] = None if ends is None else [end.tolist() for end in ends]
    return summary


def summarize_measure(name: str, files: Files, clips: Sequence[Clip]) -> dict[str, Any]:
    """One measure of frames: of the mean sample, of the best sample of each clip, and of the baselines.

    As published, the best sample is that with the best mean over the predicted frames, in this measure.
    `best_by_psnr` takes the one with the best PSNR, whatever the measure.
    """
    values = torch.stack([file[name] for file in files]).double().numpy()  # [N, S, F]
    summary = summarize_frames(values.mean(axis=1), clips)
    if values.shape[1] > 1:
        each = np.arange(len(values))
        scores = values.mean(axis=2)
        best = scores.argmin(axis=1) if name == "lpips" else scores.argmax(axis=1)
        summary["best"] = summarize_frames(values[each, best], clips)
        if name != "psnr" and "psnr" in files[0]:
            quality = torch.stack([file["psnr"] for file in files]).double().numpy().mean(axis=2)
            summary["best_by_psnr"] = summarize_frames(values[each, quality.argmax(axis=1)], clips)
    for baseline in BASELINES:
        if f"{baseline}_{name}" in files[0]:
            frames = torch.stack([file[f"{baseline}_{name}"] for file in files]).double().numpy()
            summary[baseline] = summarize_frames(frames, clips)
    return summary


def summarize_fvd(files: Files, clips: Sequence[Clip], seed: int = 0) -> dict[str, Any]:
    """FVD of each sample's videos, and its mean.

    The interval is 1.96 standard deviations of resampled distances to both sides: these themselves are too
    high, as a video that was drawn twice tells nothing new.
    """
    real = torch.stack([file["real_features"] for file in files])
    made = torch.stack([file["features"] for file in files])  # [N, S, 400]

    def distances(rows: np.ndarray | slice) -> list[float]:
        return [frechet_distance(made[rows, sample], real[rows]) for sample in range(made.shape[1])]

    samples = distances(slice(None))
    names = list(dict.fromkeys(clip.video for clip in clips))
    own = [np.array([row for row, clip in enumerate(clips) if clip.video == name]) for name in names]
    summary: dict[str, Any] = {"mean": float(np.mean(samples)), "interval": None, "by_sample": samples}
    if len(names) > 1:
        rng = np.random.default_rng(seed)
        draws = [rng.integers(len(names), size=len(names)) for _ in range(NUM_FVD_RESAMPLES)]
        means = [np.mean(distances(np.concatenate([own[video] for video in draw]))) for draw in draws]
        spread = 1.96 * float(np.std(means, ddof=1))
        summary["interval"] = [max(0.0, summary["mean"] - spread), summary["mean"] + spread]
    return summary


def summarize(files: Files, clips: Sequence[Clip], options: EvaluateOptions) -> dict[str, Any]:
    """All figures, as results.json has them under `measures`."""
    names = options.measure_names
    summary = {name: summarize_measure(name, files, clips) for name in names if name != "fvd"}
    if "fvd" in names:
        summary["fvd"] = summarize_fvd(files, clips)
    return summary


def with_interval(name: str, mean: float, ends: Sequence[float] | None) -> str:
    """A figure and its interval, rounded as tables show them."""
    digits = DIGITS[name]
    text = f"{mean:.{digits}f}"
    return text if ends is None else f"{text} ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})"


def rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of measures of frames; no rows where FVD alone was measured."""
    measures = {name: results["measures"][name] for name in TITLES if name in results["measures"]}
    if not measures:
        return [], []
    first, samples = next(iter(measures.values())), len(results["seeds"])
    number = len(first["by_frame"])
    lines = []
    for ahead in (*(ahead for ahead in AHEAD if ahead < number), number):
        cells = []
        for name, summary in measures.items():
            ends = summary["by_frame_interval"]
            ends = None if ends is None else [end[ahead - 1] for end in ends]
            cells.append(with_interval(name, summary["by_frame"][ahead - 1], ends))
        lines.append([f"{ahead} frame{'s' if ahead > 1 else ''} ahead", *cells])
    kinds = {"": f"all {number} frames", "best": f"the same, best of {samples} samples"}
    kinds |= {name: f"the same, {words}" for name, words in BASELINES.items()}
    for kind, words in kinds.items():
        if not kind or kind in first:
            parts = [(name, summary[kind] if kind else summary) for name, summary in measures.items()]
            lines.append(
                [words, *(with_interval(name, part["mean"], part["interval"]) for name, part in parts)]
            )
    return ["", *(TITLES[name] for name in measures)], lines


def describe_fvd(results: dict[str, Any]) -> str | None:
    """FVD in one line."""
    if "fvd" not in results["measures"]:
        return None
    fvd = results["measures"]["fvd"]
    line = f"FVD {with_interval('fvd', fvd['mean'], fvd['interval'])}: {results['num_clips']} clips of "
    line += f"{results['num_fvd_frames']} frames"
    if len(fvd["by_sample"]) > 1:
        line += f", mean of {len(fvd['by_sample'])} samples"
    return line + "; it compares with FVD of equally many clips only"


def describe_settings(results: dict[str, Any]) -> str:
    """What was measured, in a sentence or two."""
    told = " and ".join(results["conditions"]) or "nothing else"
    steps = results["num_inference_steps"]
    text = f"Protocol {results['protocol']}: {results['num_clips']} clips of {results['num_videos']} videos "
    text += f"({results['data']}, {results['split']}); {results['num_context']} frames and {told} given, "
    text += f"{results['num_frames'] - results['num_context']} frames predicted; "
    text += f"{len(results['seeds'])} sample{'s' if len(results['seeds']) > 1 else ''} of each"
    text += "" if steps is None else f", {steps} denoising steps"
    text += "" if results["guidance_scale"] == 1 else f", guidance {results['guidance_scale']:g}"
    text += ". In brackets: 95% intervals by bootstrap over videos."
    if results["truth"] == "latents":
        text += " The data are latents: the truth is what the autoencoder makes of them, not the real frames."
    return text


def markdown(results: dict[str, Any]) -> str:
    """What results.md has."""
    parts = [f"# {results['checkpoint']}", describe_settings(results)]
    header, lines = rows(results)
    if lines:
        parts.append(table(header, [list(line) for line in lines]))
    parts += [line for line in [describe_fvd(results)] if line is not None]
    parts.append(
        f"{results['date']}, {results['machine']}, {results['dtype']}; {results['seconds']:.0f} s"
        + (f"; `{results['command']}`" if results["command"] else "")
    )
    return "\n\n".join(parts) + "\n"
