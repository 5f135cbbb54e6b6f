"""Fields of the tabs: a cleared one has its default, and a wrong one is named."""

import math
from typing import Any

import gradio as gr

from .players import VisitorError

MAX_STEPS = 64
MAX_GUIDANCE = 20.0
MAX_SLOPE = 1.0
MAX_SEED = 2**63 - 1
# Of one job, all its frames and pictures together: a minute or two on the slowest machine.
MAX_JOB_STEPS = 6400

class SliderField(gr.Slider):
    """A slider whose value comes as it is: gradio's own refuses a cleared one without saying which it is."""

    is_template = True  # the page shows it as what it derives from

    def preprocess(self, payload: Any) -> Any:
        return payload
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component

class NumberField(gr.Number):
    """A field whose value comes as it is, as for [`SliderField`]."""

    is_template = True

    def preprocess(self, payload: Any) -> Any:
        return payload
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component

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
