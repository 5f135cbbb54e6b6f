"""Draws the pictures of concepts.md, from the shipped model and the rules in the code.

    python docs/draw_concepts.py     # from the checkout's root; needs the extra "eval"

What is counted or scheduled is asked of the package, so that a picture changes with it. The curves of the
any-step picture are a sketch.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from diffusers_far import ContextSchedule, FARVideoPipeline
from diffusers_far.demo import load_episode

FOLDER = Path(__file__).resolve().parent
CHECKPOINT = "checkpoints/far-doom-maze-64"
EPISODES = Path("data/samples/doom-maze-64/validation")
NEW, SHORT, LONG, GONE = "#d9480f", "#1c7ed6", "#74c0fc", "#dee2e6"

# Paths in place of letters: a page shows them alike everywhere. No date: the same drawing is the same file.
matplotlib.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "concepts", "font.size": 9})


def save(figure: Any, name: str) -> None:
    figure.savefig(FOLDER / f"{name}.svg", bbox_inches="tight", facecolor="white", metadata={"Date": None})
    pyplot.close(figure)


def frame_by_frame(pipe: FARVideoPipeline, video: np.ndarray, actions: list[int]) -> None:
    """The last frames of a context, and what the denoising steps of the next frame make of noise."""
    num_context, num_shown = 32, 4
    steps: list[torch.Tensor] = []

    def keep(pipeline: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(tensors["latents"].clone())
        return tensors

    generator = torch.Generator().manual_seed(0)
    shape = pipe.rollout(video=video[:1]).context_latents.shape
    noise = torch.randn(shape, generator=generator)
    pipe(
        video=video[:num_context],
        actions=actions[: num_context + 1],
        num_frames=num_context + 1,
        num_inference_steps=4,
        latents=noise,
        callback_on_step_end=keep,
    )
    latents = torch.cat([noise, *(step.reshape(noise.shape) for step in steps)])
    scale = pipe.vae.config.scaling_factor
    decoded = pipe.vae.decode(latents[:, 0] / scale, return_dict=False)[0]
    pictures = pipe.video_processor.postprocess(decoded, output_type="np")
    figure, axes = pyplot.subplots(
        1, num_shown + len(pictures) + 1, figsize=(11, 1.6), width_ratios=[1] * num_shown + [0.35] + [1] * 5
    )
    for axis in axes:
        axis.set_axis_off()
    for index in range(num_shown):
        axes[index].imshow(video[num_context - num_shown + index])
        axes[index].set_title(f"frame {num_context - num_shown + index}")
    axes[num_shown].annotate("", (1, 0.5), (0, 0.5), "axes fraction", arrowprops={"width": 2, "color": NEW})
    for index, picture in enumerate(pictures):
        axes[num_shown + 1 + index].imshow(picture)
        title = "noise" if index == 0 else f"step {index}"
        axes[num_shown + 1 + index].set_title(title, color=NEW)
    save(figure, "concept_far")


def long_context() -> None:
    """What the next frame sees, as ContextSchedule says, for a window of 4 and a training length of 10."""
    window, trained, most = 4, 10, 16
    kinds = {
        "default: as many as trained": ContextSchedule(),
        "num_sink_frames=2": ContextSchedule(num_sink_frames=2),
        "max_long_frames=0: window alone": ContextSchedule(max_long_frames=0),
        "unbounded()": ContextSchedule.unbounded(),
    }
    figure, axes = pyplot.subplots(len(kinds), 1, figsize=(9, 4.6), sharex=True)
    for axis, (title, schedule) in zip(axes, kinds.items(), strict=True):
        context = schedule.for_model(window, trained).context(most, window)
        for frame in range(most + 1):
            short, long = frame in context.short, frame in context.long
            color = NEW if frame == most else SHORT if short else LONG if long else GONE
            side = 4 if frame == most or short else 2 if long else 1  # tokens of a frame: 16, 4, or none left
            for row in range(side):
                for column in range(side):
                    corner = (frame + 0.1 + 0.8 * column / side, 0.1 + 0.8 * row / side)
                    size = 0.8 / side - (0.05 if side > 1 else 0)
                    axis.add_patch(Rectangle(corner, size, size, color=color, linewidth=0))
        axis.set(xlim=(0, most + 1), ylim=(0, 1), aspect="equal", yticks=[])
        axis.set_xticks(np.arange(most + 1) + 0.5, [*map(str, range(most)), "new"])
        axis.set_title(title, loc="left")
        axis.tick_params(length=0)
        for side_line in axis.spines.values():
            side_line.set_visible(False)
    save(figure, "concept_long_context")


def flex_rope(num_training_frames: int) -> None:
    """The factor that FlexRoPE puts on the weight of a frame, by distance."""
    distances = np.arange(0, 1001)
    figure, axis = pyplot.subplots(figsize=(7, 2.6))
    for factor, color in ((0, "#868e96"), (1, LONG), (4, NEW), (16, SHORT)):
        slope = factor / num_training_frames
        name = "0 (plain RoPE)" if factor == 0 else f"{factor} / {num_training_frames}"
        axis.plot(distances, np.exp(-slope * distances), color=color, label=name)
    axis.axvline(num_training_frames, color="black", linewidth=0.8, linestyle=":")
    axis.text(num_training_frames + 8, 0.75, "longest clip of the training")
    axis.set(xlabel="frames back", ylabel="factor of the weight", xlim=(0, 1000), ylim=(0, 1.05))
    axis.legend(title="slope", loc="upper right", fontsize=8)
    save(figure, "concept_flex_rope")


def count_tokens(pipe: FARVideoPipeline, video: np.ndarray, use_cache: bool, lengths: list[int]) -> list[int]:
    """Tokens that the blocks compute for the frame after each of these numbers of frames."""
    counts: list[int] = []
    block = pipe.transformer.transformer_blocks[0]

    def count(module: Any, inputs: tuple[Any, ...]) -> None:
        counts.append(sum(stream.shape[1] * stream.shape[2] for stream in inputs[0]))

    hook = block.register_forward_pre_hook(count)
    totals = []
    rollout = pipe.rollout(video=video[: lengths[0] - 1], output_type="latent", use_cache=use_cache)
    rollout.step(1)
    for length in lengths:
        if rollout.num_frames < length:
            missing = video[rollout.num_frames : length - 1]
            if len(missing):
                rollout.append(video=missing)
            rollout.step(1)
        counts.clear()
        rollout.fork().step(1)
        totals.append(sum(counts))
    hook.remove()
    return totals


def cache(pipe: FARVideoPipeline, video: np.ndarray) -> None:
    lengths = [8, 16, 32, 64, 96, 128]
    figure, axis = pyplot.subplots(figsize=(7, 2.6))
    without = count_tokens(pipe, video, False, lengths)
    with_cache = count_tokens(pipe, video, True, lengths)
    print("frames so far:", lengths, "tokens without a cache:", without, "with:", with_cache)
    axis.plot(lengths, without, "o-", color="#868e96", label="use_cache=False")
    axis.plot(lengths, with_cache, "o-", color=NEW, label="with the cache")
    axis.set(xlabel="frames so far", ylabel="tokens computed\nfor the next frame", ylim=(0, None))
    axis.legend()
    save(figure, "concept_cache")


def draw_arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0}
    axis.add_patch(FancyArrowPatch(start, end, color=color, **style))


def any_step() -> None:
    """Two ways along a curved path from noise to a frame; a sketch."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 2.4), sharey=True)
    time = np.linspace(0, 1, 200)

    def path(t: Any) -> Any:
        return 0.15 + 0.7 * t**2 * (3 - 2 * t) + 0.12 * np.sin(np.pi * t)

    def slope(t: float) -> float:
        return float((path(t + 1e-4) - path(t - 1e-4)) / 2e-4)

    for axis in axes:
        axis.plot(time, path(time), color="#868e96")
        axis.set(xlim=(-0.05, 1.05), ylim=(0, 1), yticks=[], xticks=[0, 1])
        axis.set_xticklabels(["noise", "frame"])
    place, num_steps = float(path(0.0)), 5
    for step in range(num_steps):
        start, end = step / num_steps, (step + 1) / num_steps
        after = place + slope(start) / num_steps
        draw_arrow(axes[0], (start, place), (end, after), SHORT)
        place = after
    axes[0].set_title("velocity: the direction here, in small steps")
    for start, end in ((0.0, 0.5), (0.5, 1.0)):
        draw_arrow(axes[1], (start, path(start)), (end, path(end)), NEW)
    axes[1].set_title("any-step: the mean direction to where a step ends")
    save(figure, "concept_any_step")


def main() -> None:
    torch.set_grad_enabled(False)
    pipe = FARVideoPipeline.from_pretrained(CHECKPOINT)
    pipe.set_progress_bar_config(disable=True)
    video, actions = load_episode(EPISODES, 0)
    frame_by_frame(pipe, video, actions)
    long_context()
    flex_rope(pipe.config.num_training_frames)
    cache(pipe, video)
    any_step()


if __name__ == "__main__":
    main()
