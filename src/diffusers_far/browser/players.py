"""Games of a world model, one per visitor, in one process on one device."""

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from ..context_schedule import ContextFrames, ContextSchedule
from ..pipeline_far_video import FARVideoPipeline

Result = TypeVar("Result")


class VisitorError(ValueError):
    """What a visitor can bring about with the page, and is told in words."""


class BusyError(VisitorError):
    """All places are taken."""


class UnknownPlayerError(VisitorError):
    """The game does not exist (any more)."""


GAME, JOB = 0, 1  # what comes first on the device
MAX_CONTEXT_FRAMES = 64
MAX_RECORDED_FRAMES = 600


@dataclass(frozen=True)
class GameSettings:
    """What a player may change at any time; arguments of [`FARVideoPipeline.rollout`].

    Args:
        num_inference_steps: denoising steps per frame.
        guidance_scale: 1 for none.
        flex_rope_slope: 0 for plain RoPE.
        long_memory: whether frames before the last `short_window` are seen: as long-term frames by a Long
            model, in full by a base model.
    """

    num_inference_steps: int = 8
    guidance_scale: float = 1.0
    flex_rope_slope: float = 0.0
    long_memory: bool = True


@dataclass(frozen=True)
class GameFrame:
    """A frame of a game.

    Args:
        image: `[H, W, 3]` uint8.
        number: of the frame in the game, 0 for the first one shown.
        context: the frames that the next one will see, numbered in the same way.
        milliseconds: that the model took, decoding included; 0 for a frame that it did not make.
        cache_megabytes: keys and values of the context.
        attention: share of its attention that the frame pays to each frame of its context, where asked for.
    """

    image: np.ndarray
    number: int
    context: ContextFrames
    milliseconds: float
    cache_megabytes: float
    attention: dict[int, float] | None = None


class Playable(Protocol):
    """What a game has, wherever it runs."""

    @property
    def recording(self) -> Iterable[np.ndarray]:
        """The last frames, `[H, W, 3]` uint8 each."""

    def step(self, action: Any = None, settings: GameSettings | None = None, look: bool = False) -> GameFrame:
        """The next frame; see [`Game.step`]."""

    def last_frame(self) -> GameFrame:
        """The newest frame; a gray one if there is none yet."""


def rollout_settings(
    pipeline: FARVideoPipeline, settings: GameSettings, max_context_frames: int = MAX_CONTEXT_FRAMES
) -> dict[str, Any]:
    """The arguments of a game's rollout.

    Args:
        pipeline: whose rollout it is.
        settings: of the game.
        max_context_frames: see [`Game`].
    """
    # Without refreshing the window a frame comes sooner, and looks the same.
    schedule = ContextSchedule(refresh_interval=None)
    if not settings.long_memory:
        window = pipeline.transformer.config.short_window
        schedule = ContextSchedule(window, max_long_frames=0, refresh_interval=None)
    most = min(pipeline.config.num_training_frames or max_context_frames, max_context_frames)
    return {
        "guidance_scale": settings.guidance_scale,
        "num_inference_steps": settings.num_inference_steps,
        "flex_rope_slope": settings.flex_rope_slope,
        "context_schedule": schedule.for_model(pipeline.transformer.short_window, most),
    }


class Game:
    """One running video, in constant memory.

    Args:
        pipeline: of an action-conditioned model, or one without conditions.
        start: frames to begin with, `[T, H, W, 3]` uint8, or None to begin from nothing.
        actions: that led to them; `[T, ...]`, or None.
        settings: see there.
        seed: of the noise.
        max_context_frames: that a context has at most, the new frame included, where the checkpoint does not
            ask for fewer (`num_training_frames`).
        max_recorded_frames: that `recording` keeps.
        size: height and width of the frames in pixels; by default the checkpoint's `sample_size`.
    """

    def __init__(
        self,
        pipeline: FARVideoPipeline,
        start: np.ndarray | None = None,
        actions: list[Any] | None = None,
        settings: GameSettings | None = None,
        seed: int = 0,
        max_context_frames: int = MAX_CONTEXT_FRAMES,
        max_recorded_frames: int = MAX_RECORDED_FRAMES,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.size = size or pipeline.default_size
        self.settings = settings or GameSettings(pipeline.config.num_inference_steps)
        self.max_context_frames = max_context_frames
        if start is not None:
            start = start[-max_context_frames:]
            actions = None if actions is None else actions[-max_context_frames:]
        self.recording: deque[np.ndarray] = deque([] if start is None else start, maxlen=max_recorded_frames)
        self.rollout = pipeline.rollout(
            video=start,
            context_actions=actions if start is not None else None,
            generator=torch.Generator().manual_seed(seed),
            max_rewind_frames=max_context_frames,  # long-term memory that is switched on again is there
            height=self.size[0],
            width=self.size[1],
            output_type="np",
            **rollout_settings(pipeline, self.settings, max_context_frames),
        )

    def step(self, action: Any = None, settings: GameSettings | None = None, look: bool = False) -> GameFrame:
        """The next frame.

        Args:
            action: that leads to it.
            settings: from now on; the context is computed anew where they changed.
            look: measure which frames of the context it looks at.

        Raises:
            ValueError: for an action or a setting that the model does not take.
        """
        began = time.perf_counter()
        if settings is not None and settings != self.settings:
            self.rollout.change(**rollout_settings(self.pipeline, settings, self.max_context_frames))
            self.settings = settings
        image = self.rollout.step(action)[0]
        self.recording.append((255 * image).round().astype(np.uint8))
        frame = self.last_frame(1e3 * (time.perf_counter() - began))
        return replace(frame, attention=self.rollout.frame_attention()) if look else frame

    def last_frame(self, milliseconds: float = 0.0) -> GameFrame:
        """The newest frame; a gray one if there is none yet."""
        cache, context = self.rollout.cache, self.rollout.context
        if not self.recording:
            return GameFrame(np.full((*self.size, 3), 128, np.uint8), -1, context, 0.0, 0.0)
        megabytes = 0.0 if cache is None else cache.num_bytes / 2**20
        return GameFrame(self.recording[-1], self.rollout.num_frames - 1, context, milliseconds, megabytes)


class Players:
    """The games of all visitors.

    One thread computes, in the order in which frames are asked for: everybody gets a turn, and no two games
    touch the model at once. Games go first, before the other tabs.

    Args:
        max_players: games at once.
        seconds_to_rest: after its last frame, a game makes place for another if all places are taken.
        seconds_to_live: of a game after its last frame, where nobody needs its place.
        clock: seconds.
    """

    games_share_a_device = True

    def __init__(
        self,
        max_players: int = 8,
        seconds_to_rest: float = 60.0,
        seconds_to_live: float = 1800.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_players = max_players
        self.seconds_to_rest = seconds_to_rest
        self.seconds_to_live = seconds_to_live
        self._clock = clock
        self._games: dict[str, tuple[Playable, float]] = {}
        self._lock = threading.Lock()
        self._tasks: queue.PriorityQueue[tuple[int, int, Callable[[], None]]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        threading.Thread(target=self._work, name="model", daemon=True).start()

    @property
    def num_players(self) -> int:
        """Games that have not run out."""
        with self._lock:
            self._forget_idle()
            return len(self._games)

    def start(self, player: str, make_game: Callable[[], Playable]) -> GameFrame:
        """Begin a player's game, in place of one that this player may have.

        Raises:
            BusyError: when all places are taken.
        """
        return self._compute(GAME, lambda: self._start(player, make_game))

    def _start(self, player: str, make_game: Callable[[], Playable]) -> GameFrame:
        with self._lock:
            self._find_place(player)
        game = make_game()
        with self._lock:
            leaving = self._find_place(player)
            if leaving is not None:
                del self._games[leaving]
            self._games[player] = (game, self._clock())
        return game.last_frame()

    def _find_place(self, player: str) -> str | None:
        """Whose game has to make place, if any has to."""
        self._forget_idle()
        if player in self._games or len(self._games) < self.max_players:
            return None
        oldest = self._clock() - self.seconds_to_rest
        resting = [(last, other) for other, (_, last) in self._games.items() if last < oldest]
        if not resting:
            raise BusyError(
                f"All {self.max_players} places are taken. Try again in a minute: a game that rests for "
                f"{self.seconds_to_rest:.0f} seconds makes place."
            )
        return min(resting)[1]

    def new_game(self, pipeline: FARVideoPipeline, *arguments: Any, **options: Any) -> Playable:
        """A game; arguments as of [`Game`]."""
        return Game(pipeline, *arguments, **options)

    def step(
        self,
        player: str,
        action: Any = None,
        settings: GameSettings | None = None,
        look: bool = False,
    ) -> GameFrame:
        """The next frame of a player's game.

        Raises:
            UnknownPlayerError: when there is no such game, or it has run out.
            ValueError: see [`Game.step`].
        """
        game = self._game(player)
        return self._compute(GAME, lambda: game.step(action, settings, look))

    def recording(self, player: str) -> list[np.ndarray]:
        """The last frames of a player's game, `[H, W, 3]` uint8 each."""
        game = self._game(player)
        return self._compute(GAME, lambda: list(game.recording))

    def leave(self, player: str) -> None:
        """Give a place back."""
        with self._lock:
            self._games.pop(player, None)

    def _game(self, player: str) -> Playable:
        with self._lock:
            self._forget_idle()
            if player not in self._games:
                raise UnknownPlayerError("This game has ended, after a rest. Press reset to begin a new one.")
            game, _ = self._games[player]
            self._games[player] = (game, self._clock())
            return game

    def _forget_idle(self) -> None:
        oldest = self._clock() - self.seconds_to_live
        self._games = {player: entry for player, entry in self._games.items() if entry[1] >= oldest}

    def _work(self) -> None:
        while True:
            self._tasks.get()[-1]()

    def _compute(self, priority: int, function: Callable[[], Result]) -> Result:
        future: Future[Result] = Future()

        def task() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # is raised where the result is waited for
                future.set_exception(error)

        self._tasks.put((priority, next(self._numbers), task))
        return future.result()

    def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Compute something else on the same thread, when no game waits for a frame."""
        return self._compute(JOB, lambda: function(*arguments))
