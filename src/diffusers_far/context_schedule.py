"""ContextSchedule: which frames are the context of the next one, and at which level."""

from dataclasses import dataclass
from typing import NamedTuple


class ContextFrames(NamedTuple):
    """Positions in the video of the frames that the next frame sees, oldest first."""

    long: tuple[int, ...]
    short: tuple[int, ...]


@dataclass(frozen=True)
class ContextSchedule:
    """What stays short-term, becomes long-term, or is dropped as a video grows.

    With no bound all frames are kept, as published: a base model keeps each in full, a Long model keeps the
    last `short_window` (the frame being denoised included) in full and all older ones as long-term frames.
    With bounds a rollout runs in constant memory, however long.

    Args:
        max_short_frames: short-term frames, the one being denoised included. For a base model this is a
            sliding window. For a Long model it may only narrow its trained window.
        max_long_frames: long-term frames kept by a Long model, the oldest going first; 0 keeps none.
        num_sink_frames: so many of the first frames are never dropped; they count towards the bound of their
            level.
        refresh_interval: a short-term frame depends on the long-term ones before it, so a cached Long model
            computes its window anew each time that so many frames have left it: 1 is exact. With more, or
            with None (never), the frames of the window stay as they were when they were new: an approximation
            that saves most of what a new frame's context costs.
    """

    max_short_frames: int | None = None
    max_long_frames: int | None = None
    num_sink_frames: int = 0
    refresh_interval: int | None = 1

    def __post_init__(self) -> None:
        if self.max_short_frames is not None and self.max_short_frames < 1:
            raise ValueError(
                f"max_short_frames={self.max_short_frames} must be at least 1, or None for no bound"
            )
        if self.max_long_frames is not None and self.max_long_frames < 0:
            raise ValueError(
                f"max_long_frames={self.max_long_frames} must be at least 0, or None for no bound"
            )
        if self.num_sink_frames < 0:
            raise ValueError(f"num_sink_frames={self.num_sink_frames} must be at least 0")
        if self.refresh_interval is not None and self.refresh_interval < 1:
            raise ValueError(
                f"refresh_interval={self.refresh_interval} must be at least 1, or None for never"
            )
        for name, bound in (
            ("max_short_frames", self.max_short_frames),
            ("max_long_frames", self.max_long_frames),
        ):
            if bound is not None and 0 < bound <= self.num_sink_frames:
                raise ValueError(f"num_sink_frames={self.num_sink_frames} must be less than {name}={bound}")

    def context(self, num_frames: int, short_window: int | None = None) -> ContextFrames:
        """Context of frame `num_frames`, when frames 0 to `num_frames - 1` exist.

        Args:
            num_frames: frames so far.
            short_window: the window of a Long model; None for a base model.
        """
        if short_window is None:
            bound = None if self.max_short_frames is None else self.max_short_frames - 1
            return ContextFrames((), self._newest(num_frames, bound))
        window = short_window if self.max_short_frames is None else min(self.max_short_frames, short_window)
        first_short = max(0, num_frames - (window - 1))
        return ContextFrames(
            self._newest(first_short, self.max_long_frames), tuple(range(first_short, num_frames))
        )

    def _newest(self, num_frames: int, bound: int | None) -> tuple[int, ...]:
        """The sink frames and the newest of `num_frames` frames, at most `bound` in all."""
        if bound is None or num_frames <= bound:
            return tuple(range(num_frames))
        sinks = min(self.num_sink_frames, bound)
        return (*range(sinks), *range(num_frames - (bound - sinks), num_frames))
