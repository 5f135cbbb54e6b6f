"""The tab in which visitors have their own video continued."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from ..demo import side_by_side
from ..pipeline_far_video import FARVideoPipeline
from ..video_files import save_video
from .forms import (
    MAX_NEW_FRAMES,
    MAX_SEED,
    action_table,
    check_work,
    default_slope,
    example_actions,
    game_settings,
    known_actions,
    new_frames_field,
    sampling_fields,
    slider,
    whole_number,
)
from .pictures import FRAMES_PER_SECOND, enlarged
from .players import Players, VisitorError
from .uploads import FITS, MAX_UPLOAD_FRAMES, MAX_UPLOAD_MB, read_upload
from .visitors import Visitors, job

MAX_CONTEXT_FRAMES = 64


def continue_tab(
    pipeline: FARVideoPipeline, players: Players, visitors: Visitors, size: tuple[int, int]
) -> None:
    """Components and events of the tab."""
    with gr.Row():
        with gr.Column():
            file = gr.File(
                label=f"Video (mp4 or gif, at most {MAX_UPLOAD_MB} MB and {MAX_UPLOAD_FRAMES} frames)",
                file_types=[".mp4", ".gif", ".webm", ".mov", ".mkv", ".webp"],
                elem_id="continue-file",
            )
            fit = gr.Radio(
                list(FITS),
                value="crop to fill",
                label=f"Fit to {size[1]} x {size[0]}",
                info="How a video of another shape is made to fit.",
            )
            num_context = slider(
                1,
                MAX_CONTEXT_FRAMES,
                32,
                step=1,
                label="Frames of the video that the model sees, at most",
                info="More of them tell the model more of the place, and cost more time.",
            )
            num_new = new_frames_field("continue-new")
            actions = gr.Textbox(
                value=example_actions(pipeline, 8, 4),
                label="Actions of the new frames; the last one goes on",
                info=f"What to do in each new frame, with counts: {known_actions(pipeline)}.",
                visible=pipeline.transformer.action_space is not None,
            )
            steps, slope, seed = sampling_fields(pipeline, default_slope(pipeline))
            button = gr.Button("Continue", variant="primary", elem_id="continue-run")
        with gr.Column():
            frame = gr.Image(label="Newest frame", height=320, elem_id="continue-frame")
            status = gr.Markdown(elem_id="continue-status")
            video = gr.Video(
                label="Result (left: the truth, where the video goes on)", elem_id="continue-video"
            )

    def run(request: gr.Request, *values: Any) -> Iterator[tuple[Any, str, str | None]]:
        yield from job(
            visitors, request, lambda folder: continue_video(pipeline, players, size, folder, *values)
        )

    inputs = [file, fit, num_context, num_new, actions, steps, slope, seed]
    button.click(run, inputs, [frame, status, video])


def continue_video(
    pipeline: FARVideoPipeline,
    players: Players,
    size: tuple[int, int],
    folder: Path,
    file: str | None,
    fit: str,
    num_context: int | None,
    num_new: int | None,
    actions: str | None,
    steps: int | None,
    slope: float | None,
    seed: int | None,
) -> Iterator[tuple[np.ndarray, str, str | None]]:
    """New frames of a visitor's video as they come: (frame, what it is, path of the mp4 at the end).

    Raises:
        ValueError: with a message for the visitor.
    """
    if file is None:
        raise VisitorError("Upload a video first.")
    num_new = whole_number("New frames", num_new, 32, 1, MAX_NEW_FRAMES)
    num_context = whole_number("Frames of the video", num_context, 32, 1, MAX_CONTEXT_FRAMES)
    seed = whole_number("Seed", seed, 0, 0, MAX_SEED)
    settings = game_settings(pipeline, steps, slope)
    check_work(num_new, 1, settings.num_inference_steps)
    table = action_table(pipeline, actions, num_new)
    upload = read_upload(file, *size, fit)
    # The end of the video is the context, unless enough is left of it to compare with.
    num_context = min(num_context, len(upload))
    end = num_context if len(upload) >= num_context + num_new else len(upload)
    context, truth = upload[end - num_context : end], upload[end : end + num_new]
    game = players.run(lambda: players.new_game(pipeline, context, None, settings, seed, size=size))
    made: list[np.ndarray] = []
    for count, action in enumerate(table, start=1):
        made.append(players.run(game.step, action).image)
        yield enlarged(made[-1]), f"Frame {count} of {num_new}, after {num_context} of the video", None
    shown = np.concatenate([context, np.stack(made)]) / 255
    left = np.concatenate([context, truth, np.stack(made)[len(truth) :] * 0 + 128]) / 255
    path = folder / "continued.mp4"
    save_video(side_by_side(left, shown, num_context), path, FRAMES_PER_SECOND)
    compared = f", the first {len(truth)} beside the truth" if len(truth) else ""
    yield enlarged(made[-1]), f"{num_new} frames after {num_context} of the video{compared}", str(path)
