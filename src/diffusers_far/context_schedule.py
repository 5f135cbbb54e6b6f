"""ContextSchedule: which frames are the context of the next one, at which level, and at which position."""

from dataclasses import dataclass, replace
from numbers import Integral
from typing import Literal, NamedTuple

Bound = int | None | Literal["trained"]


class ContextFrames(NamedTuple):
    """The frames that the next frame sees, by their index in the video, oldest first.

    `positions` are the places in time that RoPE and FlexRoPE give them, long-term frames first.
    """

    long: tuple[int, ...]
    short: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class ContextSchedule:
    """What stays short-term, becomes long-term, or is dropped as a video grows.

    A base model keeps each frame of its context in full. A Long model keeps the last `short_window` frames
    (the one being denoised included) in full, and older ones as long-term frames. By default both keep as
    many frames as the model was trained with, and the oldest go first: distances in time that a model never
    saw harm it. `ContextSchedule.unbounded()` keeps everything for ever, as the published code does.

    Args:
        max_short_frames: newest short-term frames, the one being denoised included. For a base model this is
            a sliding window. For a Long model it may only narrow its trained window. None: no bound.
        max_long_frames: newest long-term frames kept by a Long model; 0 keeps none, None all.
        num_sink_frames: so many of the first frames of the video are kept on top of the newest ones. Once
            frames between them and the newest ones are gone, they take the places right before these.
        refresh_interval: a short-term frame depends on the long-term ones before it, so a cached Long model
            computes its window anew each time that so many frames have left it: 1 is exact. With more, or
            with None (never), the frames of the window stay as they were when they were new: an approximation
            that saves most of what a new frame's context costs.

    Raises:
        ValueError: for a bound that is no whole number, or too small.
    """

    max_short_frames: Bound = "trained"
    max_long_frames: Bound = "trained"
    num_sink_frames: int = 0
    refresh_interval: int | None = 1

    def __post_init__(self) -> None:
        for name, least, others in (
            ("max_short_frames", 1, (None, "trained")),
            ("max_long_frames", 0, (None, "trained")),
            ("num_sink_frames", 0, ()),
            ("refresh_interval", 1, (None,)),
        ):
            value = getattr(self, name)
            if isinstance(value, str | None) and value in others:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                words = ["an integer of at least " + str(least), *map(repr, others)]
                raise ValueError(f"{name}={value!r} must be {' or '.join(words)}")

    @classmethod
    def unbounded(cls, **settings: int | None) -> "ContextSchedule":
        """Keep every frame, also beyond the number that the model was trained with."""
        return cls(max_short_frames=None, max_long_frames=None, **settings)  # type: ignore[arg-type]

    def for_model(self, short_window: int | None, num_training_frames: int | None) -> "ContextSchedule":
        """The same schedule with numbers in place of "trained".

        Args:
            short_window: the window of a Long model; None for a base model.
            num_training_frames: frames of the longest clip that the model was trained with; None if unknown:
                then there is no bound.
        """
        short, long = self.max_short_frames, self.max_long_frames
        left = None if num_training_frames is None else num_training_frames - self.num_sink_frames
        if short == "trained":
            short = max(1, left) if left is not None and short_window is None else None
        if long == "trained":
            window = min(short_window or 0, short or short_window or 0)
            long = max(0, left - window) if left is not None else None
        return replace(self, max_short_frames=short, max_long_frames=long)

    def most_frames(self, short_window: int | None, num_training_frames: int | None) -> int | None:
        """Frames of the longest context, the new one included; None if there is no bound.

        Args:
            short_window, num_training_frames: as in [`for_model`](ContextSchedule.for_model).
        """
        settled = self.for_model(short_window, num_training_frames)
        short, long = settled.max_short_frames, settled.max_long_frames
        if short_window is None:
            return None if short is None else int(short) + self.num_sink_frames
        if long is None:
            return None
        return min(short_window, int(short or short_window)) + int(long) + self.num_sink_frames

    def context(self, num_frames: int, short_window: int | None = None) -> ContextFrames:
        """Context of frame `num_frames`, when frames 0 to `num_frames - 1` exist.

        Args:
            num_frames: frames so far.
            short_window: the window of a Long model; None for a base model.
        """
        bounds = self.max_short_frames, self.max_long_frames
        max_short, max_long = (None if isinstance(bound, str) else bound for bound in bounds)
        window = min((bound for bound in (max_short, short_window) if bound is not None), default=None)
        first_short = 0 if window is None else max(0, num_frames - (window - 1))
        first_kept = first_short
        if short_window is not None:
            first_kept = 0 if max_long is None else max(0, first_short - max_long)
        num_sinks = min(self.num_sink_frames, first_kept)
        sinks, newest = range(num_sinks), range(first_kept, num_frames)
        positions = (*range(first_kept - num_sinks, first_kept), *newest)
        if short_window is None:
            return ContextFrames((), (*sinks, *newest), positions)
        long = (*sinks, *range(first_kept, first_short))
        return ContextFrames(long, tuple(range(first_short, num_frames)), positions)
