"""The tab in which visitors have their own video continued."""

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from ..demo import side_by_side
from ..inputs import parse_actions
from ..pipeline_far_video import FARVideoPipeline
from ..video_files import save_video
from .players import Game, GameSettings, Players
from .uploads import FITS, MAX_UPLOAD_FRAMES, MAX_UPLOAD_MB, read_upload

MAX_NEW_FRAMES = 200
FRAMES_PER_SECOND = 10


def continue_tab(pipeline: FARVideoPipeline, players: Players) -> None:
    """Components and events of the tab."""
    config, num_actions = pipeline.config, pipeline.transformer.config.num_actions
    names = config.action_names
    with gr.Row():
        with gr.Column():
            file = gr.File(
                label=f"Video (mp4 or gif, at most {MAX_UPLOAD_MB} MB and {MAX_UPLOAD_FRAMES} frames)",
                file_types=[".mp4", ".gif", ".webm", ".mov", ".mkv", ".webp"],
                elem_id="continue-file",
            )
            fit = gr.Radio(
                list(FITS), value="crop to fill", label=f"Fit to {config.sample_size} x {config.sample_size}"
            )
            num_context = gr.Slider(
                1, 64, 32, step=1, label="Frames of the video that the model sees, at most"
            )
            num_new = gr.Slider(1, MAX_NEW_FRAMES, 32, step=1, label="New frames", elem_id="continue-new")
            actions = gr.Textbox(
                value=f"{names[1]}*8 {names[2]}*4 {names[1]}" if names and len(names) > 2 else "0",
                label="Actions of the new frames; the last one goes on",
                info=f"Of {', '.join(names) if names else f'0 to {num_actions - 1}'}" if num_actions else "",
                visible=num_actions is not None,
            )
            steps = gr.Slider(1, 64, config.num_inference_steps, step=1, label="Denoising steps")
            slope = gr.Slider(0, 0.3, config.flex_rope_slope, step=0.01, label="FlexRoPE slope")
            seed = gr.Number(0, precision=0, minimum=0, label="Seed")
            button = gr.Button("Continue", variant="primary", elem_id="continue-run")
        with gr.Column():
            frame = gr.Image(label="Newest frame", height=320, elem_id="continue-frame")
            status = gr.Markdown(elem_id="continue-status")
            video = gr.Video(
                label="Result (left: the truth, where the video goes on)", elem_id="continue-video"
            )

    def run(*values: Any) -> Iterator[tuple[Any, str, str | None]]:
        try:
            yield from continue_video(pipeline, players, *values)
        except ValueError as error:
            raise gr.Error(str(error)) from error

    inputs = [file, fit, num_context, num_new, actions, steps, slope, seed]
    button.click(run, inputs, [frame, status, video])


def continue_video(
    pipeline: FARVideoPipeline,
    players: Players,
    file: str | None,
    fit: str,
    num_context: int,
    num_new: int,
    actions: str,
    steps: int,
    slope: float,
    seed: int,
) -> Iterator[tuple[np.ndarray, str, str | None]]:
    """New frames of a visitor's video as they come: (frame, what it is, path of the mp4 at the end).

    Raises:
        ValueError: with a message for the visitor.
    """
    if file is None:
        raise ValueError("Upload a video first.")
    size, num_actions = pipeline.config.sample_size, pipeline.transformer.config.num_actions
    if not 1 <= num_new <= MAX_NEW_FRAMES:
        raise ValueError(f"New frames: {num_new}, it takes 1 to {MAX_NEW_FRAMES}.")
    table: Any = itertools.repeat(None)
    if num_actions is not None:
        table = parse_actions(actions, pipeline.config.action_names, num_actions, num_new)
    upload = read_upload(file, size, size, fit)
    # The end of the video is the context, unless enough is left of it to compare with.
    num_context = min(num_context, len(upload))
    end = num_context if len(upload) >= num_context + num_new else len(upload)
    context, truth = upload[end - num_context : end], upload[end : end + num_new]
    settings = GameSettings(int(steps), flex_rope_slope=slope)
    game = players.run(Game, pipeline, context, None, settings, int(seed))
    made: list[np.ndarray] = []
    for number, action in zip(range(1, num_new + 1), table, strict=False):
        made.append(players.run(game.step, action).image)
        yield enlarged(made[-1]), f"Frame {number} of {num_new}, after {num_context} of the video", None
    shown = np.concatenate([context, np.stack(made)]) / 255
    left = np.concatenate([context, truth, np.stack(made)[len(truth) :] * 0 + 128]) / 255
    path = Path(tempfile.mkdtemp(prefix="diffusers-far-")) / "continued.mp4"
    save_video(side_by_side(left, shown, num_context), path, FRAMES_PER_SECOND)
    compared = f", the first {len(truth)} beside the truth" if len(truth) else ""
    yield enlarged(made[-1]), f"{num_new} frames after {num_context} of the video{compared}", str(path)


def enlarged(image: np.ndarray, zoom: int = 4) -> np.ndarray:
    """`[H, W, 3]` with every pixel a square of `zoom` pixels."""
    return image.repeat(zoom, axis=0).repeat(zoom, axis=1)
