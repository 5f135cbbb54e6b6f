"""The tab that shows what kinds of context do: one start, one seed, the same actions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from ..pipeline_far_video import FARVideoPipeline
from ..video_files import save_video
from .forms import (
    MAX_NEW_FRAMES,
    MAX_SEED,
    action_table,
    check_work,
    example_actions,
    game_settings,
    known_actions,
    new_frames_field,
    sampling_fields,
    whole_number,
)
from .pictures import FRAMES_PER_SECOND, enlarged, picture
from .players import GameSettings, Players, VisitorError
from .starts import Start
from .visitors import Visitors, job

DEFAULT_SLOPE = 0.05
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


def compare_tab(
    pipeline: FARVideoPipeline,
    players: Players,
    visitors: Visitors,
    starts: list[Start],
    size: tuple[int, int],
) -> None:
    """Components and events of the tab."""
    is_long = pipeline.transformer.is_long
    with gr.Row():
        start = gr.Dropdown(
            [(f"Real frames {number + 1}", number) for number in range(len(starts))] + [("Nothing", -1)],
            value=0 if starts else -1,
            label="Start",
            info="The frames that all four videos begin with.",
        )
        actions = gr.Textbox(
            value=example_actions(pipeline, 16, 6),
            label="Actions; the last one goes on",
            info=f"What to do in each new frame, with counts: {known_actions(pipeline)}.",
            visible=pipeline.transformer.action_space is not None,
        )
        num_new = new_frames_field("compare-new")
    with gr.Row():
        steps, slope, seed = sampling_fields(pipeline, DEFAULT_SLOPE)
    button = gr.Button("Compare", variant="primary", elem_id="compare-run")
    pictures = gr.HTML(elem_id="compare-pictures")
    video = gr.Video(label="All of them", elem_id="compare-video")

    def run(request: gr.Request, *values: Any) -> Iterator[tuple[str, str | None]]:
        titles = kinds_of_context(is_long, 1, 0.0)
        works = job(
            visitors, request, lambda folder: compare(pipeline, players, starts, size, folder, *values)
        )
        for images, path in works:
            figures = "".join(
                f'<figure style="margin:0"><img src="{picture(enlarged(image))}" alt="{title}">'
                f"<figcaption>{title}</figcaption></figure>"
                for title, image in zip(titles, images, strict=True)
            )
            yield f'<div style="display:flex;flex-wrap:wrap;gap:8px">{figures}</div>', path

    button.click(run, [start, actions, num_new, slope, steps, seed], [pictures, video])


def compare(
    pipeline: FARVideoPipeline,
    players: Players,
    starts: list[Start],
    size: tuple[int, int],
    folder: Path,
    start: int | None,
    actions: str | None,
    num_new: int | None,
    slope: float | None,
    steps: int | None,
    seed: int | None,
) -> Iterator[tuple[list[np.ndarray], str | None]]:
    """The newest frame of each kind of context, as they come, and the mp4 at the end.

    Raises:
        ValueError: with a message for the visitor.
    """
    num_new = whole_number("New frames", num_new, 32, 1, MAX_NEW_FRAMES)
    start = -1 if start is None else start
    if isinstance(start, bool) or not isinstance(start, int) or not -1 <= start < len(starts):
        raise VisitorError(f"Start: it takes 0 to {len(starts) - 1}, or -1 for nothing.")
    seed = whole_number("Seed", seed, 0, 0, MAX_SEED)
    settings = game_settings(pipeline, steps, DEFAULT_SLOPE if slope is None else slope)
    kinds = kinds_of_context(
        pipeline.transformer.is_long, settings.num_inference_steps, settings.flex_rope_slope
    )
    check_work(num_new, len(kinds), settings.num_inference_steps)
    table = action_table(pipeline, actions, num_new)
    frames, led_by = (starts[start].frames, starts[start].actions) if start >= 0 else (None, None)
    games = [
        players.run(lambda kind=kind: players.new_game(pipeline, frames, led_by, kind, seed, size=size))
        for kind in kinds.values()
    ]
    rows: list[np.ndarray] = []
    for action in table:
        images = [players.run(game.step, action).image for game in games]
        rows.append(
            np.concatenate([np.pad(enlarged(image), ((0, 0), (0, GAP), (0, 0))) for image in images], 1)
        )
        yield images, None
    path = folder / "compared.mp4"
    save_video(np.stack(rows) / 255, path, FRAMES_PER_SECOND)
    yield images, str(path)
