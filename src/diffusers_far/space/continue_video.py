"""The tab in which visitors have their own video continued."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from ..demo import side_by_side
from ..inputs import parse_actions
from ..pipeline_far_video import FARVideoPipeline
from ..video_files import save_video
from .fields import (
    MAX_SEED,
    MAX_SLOPE,
    MAX_STEPS,
    NumberField,
    SliderField,
    check_work,
    number,
    whole_number,
)
from .players import Game, GameSettings, Players, VisitorError
from .uploads import FITS, MAX_UPLOAD_FRAMES, MAX_UPLOAD_MB, read_upload
from .visitors import UnreadError, Visitors

MAX_NEW_FRAMES = 200
MAX_CONTEXT_FRAMES = 64
FRAMES_PER_SECOND = 10


def continue_tab(
    pipeline: FARVideoPipeline, players: Players, visitors: Visitors, size: tuple[int, int]
) -> None:
    """Components and events of the tab."""
    config, num_actions = pipeline.config, pipeline.transformer.config.num_actions
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
            num_context = SliderField(
                1,
                MAX_CONTEXT_FRAMES,
                32,
                step=1,
                label="Frames of the video that the model sees, at most",
                info="More of them tell the model more of the place, and cost more time.",
            )
            num_new = SliderField(
                1,
                MAX_NEW_FRAMES,
                32,
                step=1,
                label="New frames",
                info=f"How many frames the model adds; {FRAMES_PER_SECOND} are a second.",
                elem_id="continue-new",
            )
            actions = gr.Textbox(
                value=example_actions(config.action_names),
                label="Actions of the new frames; the last one goes on",
                info=f"What to do in each new frame, with counts: {known_actions(pipeline)}.",
                visible=num_actions is not None,
            )
            steps, slope, seed = sampling_fields(pipeline, config.flex_rope_slope)
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


def job(visitors: Visitors, request: gr.Request, work: Callable[[Path], Iterator[Any]]) -> Iterator[Any]:
    """What the work makes, as long as the visitor reads it, in a folder that is gone afterwards."""
    page, address = request.session_hash or "", request.client.host if request.client else ""
    try:
        with (
            visitors.job(page, address) as check,
            tempfile.TemporaryDirectory(prefix="diffusers-far-") as folder,
        ):
            for made in work(Path(folder)):
                yield made
                check()
    except UnreadError:
        return
    except FloatingPointError as error:
        text = "No picture came out with these settings: choose a smaller slope."
        raise gr.Error(text, print_exception=False) from error
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error


def sampling_fields(pipeline: FARVideoPipeline, slope: float) -> tuple[SliderField, SliderField, NumberField]:
    """What the tabs have in common: denoising steps, slope and seed."""
    return (
        SliderField(
            1,
            MAX_STEPS,
            pipeline.config.num_inference_steps,
            step=1,
            label="Denoising steps",
            info="More steps make a frame a little better and take longer.",
        ),
        SliderField(
            0,
            0.3,
            slope,
            step=0.01,
            label="FlexRoPE slope",
            info="How fast the model forgets older frames; 0 is not at all.",
        ),
        NumberField(0, precision=0, minimum=0, label="Seed", info="The same seed gives the same video."),
    )


def game_settings(pipeline: FARVideoPipeline, steps: Any, slope: Any) -> GameSettings:
    """Settings of the fields that the tabs have in common."""
    config = pipeline.config
    return GameSettings(
        whole_number("Denoising steps", steps, config.num_inference_steps, 1, MAX_STEPS),
        flex_rope_slope=number("FlexRoPE slope", slope, config.flex_rope_slope, 0, MAX_SLOPE),
    )


def known_actions(pipeline: FARVideoPipeline) -> str:
    """The actions of a model, by name or number."""
    names, num_actions = pipeline.config.action_names, pipeline.transformer.config.num_actions
    return ", ".join(names) if names else f"0 to {(num_actions or 1) - 1}"


def example_actions(names: list[str] | None) -> str:
    """A text for the field of actions."""
    return f"{names[1]}*8 {names[2]}*4 {names[1]}" if names and len(names) > 2 else "0"


def action_table(pipeline: FARVideoPipeline, script: str | None, num_frames: int) -> list[int | None]:
    """The actions of the field, one per frame."""
    names, num_actions = pipeline.config.action_names, pipeline.transformer.config.num_actions
    if num_actions is None:
        return [None] * num_frames
    return [*parse_actions(script or "", names, num_actions, num_frames)]


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
    game = players.run(lambda: Game(pipeline, context, None, settings, seed, size=size))
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


def enlarged(image: np.ndarray, zoom: int = 4) -> np.ndarray:
    """`[H, W, 3]` with every pixel a square of `zoom` pixels."""
    return image.repeat(zoom, axis=0).repeat(zoom, axis=1)
