"""Fields of the tabs: a cleared one has its default, and a wrong one is named."""

import math
from typing import Any

import gradio as gr

from ..inputs import describe_actions, group_names, parse_actions
from ..pipeline_far_video import FARVideoPipeline
from .pictures import FRAMES_PER_SECOND
from .players import GameSettings, VisitorError

MAX_NEW_FRAMES = 200
MAX_STEPS = 64
MAX_GUIDANCE = 20.0
MAX_SLOPE = 1.0
MAX_SEED = 2**63 - 1
# Of one job, all its frames and pictures together: a minute or two on the slowest machine.
MAX_JOB_STEPS = 6400


def slider(least: float, most: float, value: float, **options: Any) -> gr.Slider:
    """A slider whose value comes as it is: gradio's own refuses a cleared one without saying which it is."""
    field = gr.Slider(least, most, value, **options)
    # No class of its own: beside each, gradio writes a stub, which outlives changes of the module.
    field.preprocess = _as_it_is
    return field


def number_field(value: float, **options: Any) -> gr.Number:
    """A field for a number, whose value comes as it is, as for [`slider`]."""
    field = gr.Number(value, **options)
    field.preprocess = _as_it_is
    return field


def _as_it_is(payload: Any) -> Any:
    return payload


def number(label: str, value: Any, default: float, least: float, most: float) -> float:
    """The number in a field.

    Raises:
        VisitorError: for anything else, or one that is out of range.
    """
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise VisitorError(f"{label}: {shown(value)}, it takes a number from {least:g} to {most:g}.")
    return float(value)


def whole_number(label: str, value: Any, default: int, least: int, most: int) -> int:
    """The whole number in a field; errors as of [`number`]."""
    if value is None:
        return default
    is_whole = isinstance(value, int) or (
        isinstance(value, float) and math.isfinite(value) and value % 1 == 0
    )
    if isinstance(value, bool) or not is_whole or not least <= value <= most:
        raise VisitorError(f"{label}: {shown(value)}, it takes a whole number from {least} to {most}.")
    return int(value)


def check_work(num_frames: int, num_pictures: int, num_steps: int) -> None:
    """Raise a VisitorError for a job that would keep others waiting."""
    total = num_frames * num_pictures * num_steps
    if total > MAX_JOB_STEPS:
        raise VisitorError(
            f"{num_frames} frames of {num_pictures} videos in {num_steps} denoising steps each are {total} "
            f"steps: at most {MAX_JOB_STEPS} at once. Choose fewer frames or steps."
        )


def shown(value: Any, length: int = 40) -> str:
    """A value in a message, cut short."""
    if isinstance(value, int) and abs(value) >= 10**length:
        return "a number of more than " + str(length) + " digits"
    text = repr(value)
    return text if len(text) <= length else text[:length] + "..."


def new_frames_field(elem_id: str) -> gr.Slider:
    """How long a video to make."""
    return slider(
        1,
        MAX_NEW_FRAMES,
        32,
        step=1,
        label="New frames",
        info=f"How many frames the model adds; {FRAMES_PER_SECOND} are a second.",
        elem_id=elem_id,
    )


def sampling_fields(pipeline: FARVideoPipeline, slope: float) -> tuple[gr.Slider, gr.Slider, gr.Number]:
    """What the tabs have in common: denoising steps, slope and seed."""
    return (
        slider(
            1,
            MAX_STEPS,
            pipeline.config.num_inference_steps,
            step=1,
            label="Denoising steps",
            info="More steps make a frame a little better and take longer.",
        ),
        slider(
            0,
            0.3,
            slope,
            step=0.01,
            label="FlexRoPE slope",
            info="How fast the model forgets older frames; 0 is not at all.",
        ),
        number_field(0, precision=0, minimum=0, label="Seed", info="The same seed gives the same video."),
    )


def default_slope(pipeline: FARVideoPipeline) -> float:
    """The slope that the fields begin with; a game keeps no more than was trained, where "auto" is 0."""
    slope = pipeline.config.flex_rope_slope
    return 0.0 if slope == "auto" else float(slope)


def game_settings(pipeline: FARVideoPipeline, steps: Any, slope: Any) -> GameSettings:
    """Settings of the fields that the tabs have in common."""
    config = pipeline.config
    return GameSettings(
        whole_number("Denoising steps", steps, config.num_inference_steps, 1, MAX_STEPS),
        flex_rope_slope=number("FlexRoPE slope", slope, default_slope(pipeline), 0, MAX_SLOPE),
    )


def known_actions(pipeline: FARVideoPipeline) -> str:
    """What a text of actions is made of; empty for a model without actions."""
    space = pipeline.transformer.action_space
    return "" if space is None else describe_actions(pipeline.config.action_names, space)


def example_actions(pipeline: FARVideoPipeline, first: int, second: int) -> str:
    """A text for the field of actions: so many frames of one, and then of another."""
    names, space = pipeline.config.action_names, pipeline.transformer.action_space
    if space is not None and space.is_vector:
        return f"{names[0] if names else 0}={space.mean[0] if space.mean else 0:g}"
    if space is not None and space.is_grouped:
        name, values = group_names(names)[0] if names else ("0", None)
        last, none = (values[-1], values[0]) if values else (space.sizes[0] - 1, 0)
        return f"{name}={last}*{first} {name}={none}"
    return f"{names[1]}*{first} {names[2]}*{second} {names[1]}" if names and len(names) > 2 else "0"


def action_table(pipeline: FARVideoPipeline, script: str | None, num_frames: int) -> list[Any]:
    """The actions of the field, one per frame."""
    space = pipeline.transformer.action_space
    if space is None:
        return [None] * num_frames
    return parse_actions(script or "", pipeline.config.action_names, space, num_frames)
