"""FramePlan: which graph runs when, on which frames, into which slot. The logic of an exported rollout.

It touches no numbers of the model, so another language can follow it line by line; docs/export.md has it in
words. Ages count back from the frame that a call is about: a frame `a` before it has age `a`; -1 is a slot
or place without a frame.
"""

from typing import Any, NamedTuple

MISSING = -1
MAX_REWIND = 1024


class Call(NamedTuple):
    """One run of a graph.

    Args:
        graph: "commit" or "step".
        frames: numbers of the frames that it takes, -1 where there is none. A step: the frame to make.
            A commit of a base model: the one to keep. A commit of a Long model: the one that becomes
            long-term, then those of the window, oldest first.
        frame_ages: of these, counted back from the frame to make; -1 where there is none.
        slot: of the ring, that the commit writes its first frame into; -1: none.
        ring_ages: of the frames in the ring's slots, counted as `frame_ages`; -1: not seen.
        window_ages: of the frames in the window that a step of a Long model sees.
    """

    graph: str
    frames: tuple[int, ...]
    frame_ages: tuple[int, ...]
    slot: int
    ring_ages: tuple[int, ...]
    window_ages: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """As JSON has it: with lists."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in self._asdict().items()}


class FramePlan:
    """The calls that make the frames of a video.

    Args:
        ring_frames: frames that the ring of keys and values remembers: all of the context of a base model,
            the long-term ones of a Long model; 0 for none.
        window_frames: short-term frames of the context of a Long model; 0 for a base model.
        max_rewind: frames that can be taken back. What older frames need is kept no more.
    """

    def __init__(self, ring_frames: int, window_frames: int, max_rewind: int = MAX_REWIND) -> None:
        self.ring_frames = ring_frames
        self.window_frames = window_frames
        self.max_rewind = max_rewind
        self.num_slots = max(1, ring_frames)  # graphs have no empty inputs
        self.reset()

    def reset(self) -> None:
        """Forget all frames."""
        self.num_frames = 0
        self.first_kept = 0  # the oldest frame whose latents may be needed again
        self.slots = [MISSING] * self.num_slots  # number of the frame in each slot of the ring
        self.window: tuple[int, ...] | None = None  # frames of the window as it was computed last

    def add_frame(self) -> int:
        """A frame is there now, made or given; its number."""
        self.num_frames += 1
        context = self.ring_frames + self.window_frames
        self.first_kept = max(self.first_kept, self.num_frames - self.max_rewind - context)
        return self.num_frames - 1

    @property
    def rewindable(self) -> int:
        """How many frames can be taken back: up to the first, or as far as the context is kept."""
        context = self.ring_frames + self.window_frames
        return self.num_frames - (self.first_kept + context if self.first_kept else 0)

    def rewind(self, num_frames: int) -> None:
        """Take back the last frames. What the ring has of earlier ones stays; `next_frame` plans the rest.

        Raises:
            ValueError: for more than `rewindable`.
        """
        if not 0 <= num_frames <= self.rewindable:
            raise ValueError(
                f"num_frames={num_frames} must be 0 to {self.rewindable}: "
                f"there are {self.num_frames} frames, and max_rewind={self.max_rewind}"
            )
        self.num_frames -= num_frames
        self.slots = [frame if frame < self.num_frames else MISSING for frame in self.slots]
        if self.window is not None and any(frame >= self.num_frames for frame in self.window):
            self.window = None  # other frames of these numbers may come

    @property
    def first_window_frame(self) -> int:
        """The oldest frame of the window of the next frame; of a base model, which has none, the next one."""
        return max(0, self.num_frames - self.window_frames)

    @property
    def first_frame(self) -> int:
        """The oldest frame that the next frame sees. Latents of older ones are needed no more."""
        return max(0, self.first_window_frame - self.ring_frames)

    def next_frame(self) -> list[Call]:
        """The calls that lead to the next frame, in order: commits, then the step, to be run once per
        denoising step. Once they are planned, the ring is taken to be as they leave it.
        """
        new, first, end = self.num_frames, self.first_frame, self.first_window_frame
        # 1. Frames that are out of the context are seen no more, also not by frames that are kept now.
        self.slots = [frame if first <= frame < end else MISSING for frame in self.slots]
        # 2. Frames of the ring that are not in it yet are committed, oldest first.
        pending = [frame for frame in range(first, end) if frame not in self.slots]
        window = tuple(frame if frame >= 0 else MISSING for frame in range(new - self.window_frames, new))
        if self.window_frames and not pending and window != self.window and new > 0:
            pending = [MISSING]  # nothing becomes long-term, but the window is another
        calls = []
        for frame in pending:
            slot = MISSING if frame == MISSING else frame % self.num_slots
            frames = (frame, *window) if self.window_frames else (frame,)
            calls.append(self._call("commit", frames, slot))
            if slot != MISSING:
                self.slots[slot] = frame
        self.window = window
        # 3. The frame is made from noise, seeing the ring and the window.
        return [*calls, self._call("step", (new,), MISSING)]

    def _call(self, graph: str, frames: tuple[int, ...], slot: int) -> Call:
        window = () if graph == "commit" or self.window is None else self.window
        return Call(graph, frames, self._ages(frames), slot, self._ages(self.slots), self._ages(window))

    def _ages(self, frames: Any) -> tuple[int, ...]:
        return tuple(MISSING if frame == MISSING else self.num_frames - frame for frame in frames)
