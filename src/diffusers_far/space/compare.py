"""The tab that shows what kinds of context do: one start, one seed, the same actions."""

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from ..inputs import parse_actions
from ..pipeline_far_video import FARVideoPipeline
from ..video_files import save_video
from .continue_video import FRAMES_PER_SECOND, MAX_NEW_FRAMES, enlarged
from .play import picture
from .players import Game, GameSettings, Players
from .starts import Start

GAP = 8  # pixels between the pictures of the mp4


def kinds_of_context(is_long: bool, steps: int, slope: float) -> dict[str, GameSettings]:
    """What is compared, by its name."""
    everything = "Long short-term context" if is_long else "All frames"
    return {
        f"{everything}, plain RoPE": GameSettings(steps),
        f"{everything}, FlexRoPE": GameSettings(steps, flex_rope_slope=slope),
        "Window only, plain RoPE": GameSettings(steps, long_memory=False),
        "Window only, FlexRoPE": GameSettings(steps, flex_rope_slope=slope, long_memory=False),
    }


def compare_tab(pipeline: FARVideoPipeline, players: Players, starts: list[Start]) -> None:
    """Components and events of the tab."""
    config, num_actions = pipeline.config, pipeline.transformer.config.num_actions
    names, is_long = config.action_names, pipeline.transformer.is_long
    with gr.Row():
        start = gr.Dropdown(
            [(f"Real frames {number + 1}", number) for number in range(len(starts))] + [("Nothing", -1)],
            value=0 if starts else -1,
            label="Start",
        )
        actions = gr.Textbox(
            value=f"{names[1]}*16 {names[2]}*6 {names[1]}" if names and len(names) > 2 else "0",
            label="Actions; the last one goes on",
            visible=num_actions is not None,
        )
        num_new = gr.Slider(1, MAX_NEW_FRAMES, 32, step=1, label="New frames", elem_id="compare-new")
    with gr.Row():
        slope = gr.Slider(0.01, 0.3, 0.05, step=0.01, label="FlexRoPE slope")
        steps = gr.Slider(1, 64, config.num_inference_steps, step=1, label="Denoising steps")
        seed = gr.Number(0, precision=0, minimum=0, label="Seed")
    button = gr.Button("Compare", variant="primary", elem_id="compare-run")
    pictures = gr.HTML(elem_id="compare-pictures")
    video = gr.Video(label="All of them", elem_id="compare-video")

    def run(*values: Any) -> Iterator[tuple[str, str | None]]:
        try:
            for images, path in compare(pipeline, players, starts, *values):
                titles = kinds_of_context(is_long, 1, 0.0)
                figures = "".join(
                    f'<figure style="margin:0"><img src="{picture(enlarged(image))}" alt="{title}">'
                    f"<figcaption>{title}</figcaption></figure>"
                    for title, image in zip(titles, images, strict=True)
                )
                yield f'<div style="display:flex;flex-wrap:wrap;gap:8px">{figures}</div>', path
        except ValueError as error:
            raise gr.Error(str(error)) from error

    button.click(run, [start, actions, num_new, slope, steps, seed], [pictures, video])


def compare(
    pipeline: FARVideoPipeline,
    players: Players,
    starts: list[Start],
    start: int,
    actions: str,
    num_new: int,
    slope: float,
    steps: int,
    seed: int,
) -> Iterator[tuple[list[np.ndarray], str | None]]:
    """The newest frame of each kind of context, as they come, and the mp4 at the end.

    Raises:
        ValueError: with a message for the visitor.
    """
    if not 1 <= num_new <= MAX_NEW_FRAMES:
        raise ValueError(f"New frames: {num_new}, it takes 1 to {MAX_NEW_FRAMES}.")
    if not -1 <= start < len(starts):
        raise ValueError(f"Start: {start}, it takes 0 to {len(starts) - 1}, or -1 for nothing.")
    num_actions = pipeline.transformer.config.num_actions
    table: Any = itertools.repeat(None)
    if num_actions is not None:
        table = parse_actions(actions, pipeline.config.action_names, num_actions, num_new)
    begin = (starts[start].frames, starts[start].actions) if start >= 0 else (None, None)
    kinds = kinds_of_context(pipeline.transformer.is_long, int(steps), slope)
    games = [players.run(Game, pipeline, *begin, settings, int(seed)) for settings in kinds.values()]
    rows: list[np.ndarray] = []
    for _, action in zip(range(num_new), table, strict=False):
        images = [players.run(game.step, action).image for game in games]
        rows.append(
            np.concatenate([np.pad(enlarged(image), ((0, 0), (0, GAP), (0, 0))) for image in images], 1)
        )
        yield images, None
    path = Path(tempfile.mkdtemp(prefix="diffusers-far-")) / "compared.mp4"
    save_video(np.stack(rows) / 255, path, FRAMES_PER_SECOND)
    yield images, str(path)
