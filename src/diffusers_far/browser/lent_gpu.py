"""Games on a GPU that is lent, as Spaces on ZeroGPU have it: for some seconds, and in another process.

A loan is one call of a generator under `spaces.GPU`. It begins a game, or goes on where the loan before it
ended. Then it answers one request after the other, until its time is over or nobody asks any more; at its end
it hands the state of the game back, from which the next loan goes on exactly. So a game has one generator at
a time, and a GPU only while it is played.
"""

import contextvars
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Client, Connection, Listener
from types import SimpleNamespace
from typing import Any

import numpy as np
import safetensors.torch
import torch
from gradio.context import LocalContext
from starlette.datastructures import Headers

from ..pipeline_far_video import FARVideoPipeline
from .players import (
    MAX_CONTEXT_FRAMES,
    MAX_RECORDED_FRAMES,
    Game,
    GameFrame,
    GameSettings,
    Players,
    Result,
    VisitorError,
    rollout_settings,
)

LOAN_SECONDS = 30  # ZeroGPU lends sooner what is asked for a short time, and counts the time that was used
SECONDS_TO_END = 3  # that a loan keeps for its last frame, and for handing the game back
SECONDS_TO_REST = 5.0  # without a request, the GPU goes back
SECONDS_TO_ASK = 20.0  # for the first request of a loan, which was taken for it
MAX_HEADERS = 16
MAX_HEADER_LENGTH = 8192

Lend = Callable[..., Callable[[Callable[..., Iterator[Any]]], Callable[..., Iterator[Any]]]]


@dataclass(frozen=True)
class LentGameState:
    """A game between two loans: how it began, with the settings of now, and where it is.

    Args:
        start, actions, settings, seed, size: see [`Game`].
        rollout: its `state_dict`, as safetensors; None of a game that has not begun.
    """

    start: np.ndarray | None
    actions: list[Any] | None
    settings: GameSettings
    seed: int
    size: tuple[int, int] | None
    rollout: bytes | None = None


@dataclass(frozen=True)
class Lost:
    """A loan that has ended without a state."""

    reason: str


class Lender:
    """Who lends.

    Args:
        lend: `spaces.GPU`, or what does the same.
        pipeline: what plays. The processes that have a GPU inherit it.
        loan_seconds: for how long a GPU is asked for.
        seconds_to_rest: see SECONDS_TO_REST.
    """

    def __init__(
        self,
        lend: Lend,
        pipeline: FARVideoPipeline,
        loan_seconds: int = LOAN_SECONDS,
        seconds_to_rest: float = SECONDS_TO_REST,
    ) -> None:
        def play(address: str, state: LentGameState) -> Iterator[Any]:
            """A loan: answers to the requests that come by a socket, and the state at the end."""
            end = time.monotonic() + loan_seconds - SECONDS_TO_END
            with Client(address) as requests:
                try:
                    game = _resumed(pipeline, state)
                except ValueError as error:
                    yield Lost(str(error))
                    return
                yield True
                patience = SECONDS_TO_ASK
                while requests.poll(patience):
                    try:
                        request = requests.recv()
                    except EOFError:
                        break
                    try:
                        answer: Any = game.step(*request)
                    except (ValueError, FloatingPointError) as error:
                        answer = error
                    yield answer
                    patience = max(0.0, min(seconds_to_rest, end - time.monotonic()))
                tensors = {  # safetensors takes no views
                    name: value.cpu().clone(memory_format=torch.contiguous_format)
                    for name, value in game.rollout.state_dict().items()
                }
                yield replace(
                    state,
                    start=None,
                    actions=None,
                    settings=game.settings,
                    rollout=safetensors.torch.save(tensors),
                )

        self.pipeline = pipeline
        self.play = lend(duration=loan_seconds)(play)


def _resumed(pipeline: FARVideoPipeline, state: LentGameState) -> Game:
    game = Game(pipeline, state.start, state.actions, state.settings, state.seed, size=state.size)
    if state.rollout is not None:
        game.rollout.load_state_dict(safetensors.torch.load(state.rollout))
    return game


class Loan:
    """A GPU with a game on it, seen from the process of the app.

    Raises:
        VisitorError: when none is lent.
    """

    def __init__(self, lender: Lender, state: LentGameState) -> None:
        self._answers: queue.Queue[Any] = queue.Queue()
        with Listener(family="AF_UNIX") as listener:
            # All answers are read as they come, also of a game that nobody plays any more: a loan ends by
            # itself, and `spaces` may end another one for a generator that is dropped on its way. In the
            # visitor's context, as the lender wants to know who asks.
            answers = lender.play(listener.address, state)
            read = contextvars.copy_context().run
            threading.Thread(target=read, args=(self._read, answers), name="loan", daemon=True).start()
            first = self._answers.get()
            if isinstance(first, Lost):
                raise VisitorError(first.reason)
            self._requests: Connection = listener.accept()

    def _read(self, answers: Iterator[Any]) -> None:
        try:
            for answer in answers:
                self._answers.put(answer)
            self._answers.put(Lost("The loan has ended."))
        except Exception as error:  # gradio's own has a message; the process was killed, or never had a GPU
            self._answers.put(Lost(str(getattr(error, "message", error))))

    def ask(self, *request: Any) -> Any:
        """A frame, an error, the state of the game if the loan has ended, or that it is lost with it."""
        with suppress(OSError):  # it may have ended: its last answer is there already
            self._requests.send(request)
        answer = self._answers.get()
        if isinstance(answer, (LentGameState, Lost)):
            self._requests.close()
        return answer


class LentGame:
    """A game as [`Game`] is one, on a lent GPU."""

    def __init__(
        self,
        lender: Lender,
        start: np.ndarray | None = None,
        actions: list[Any] | None = None,
        settings: GameSettings | None = None,
        seed: int = 0,
        size: tuple[int, int] | None = None,
    ) -> None:
        self._lender, self._lock = lender, threading.Lock()
        settings = settings or GameSettings(lender.pipeline.config.num_inference_steps)
        if start is not None:
            start = start[-MAX_CONTEXT_FRAMES:]
            actions = None if actions is None else actions[-MAX_CONTEXT_FRAMES:]
        self._state = LentGameState(start, actions, settings, seed, size or lender.pipeline.default_size)
        self._loan: Loan | None = None
        self._frame: GameFrame | None = None
        self._is_lost = False
        self._recording = deque([] if start is None else start, maxlen=MAX_RECORDED_FRAMES)

    @property
    def recording(self) -> list[np.ndarray]:
        """The last frames, `[H, W, 3]` uint8 each."""
        with self._lock:
            return list(self._recording)

    def step(self, action: Any = None, settings: GameSettings | None = None, look: bool = False) -> GameFrame:
        """See [`Game.step`].

        Raises:
            VisitorError: when no GPU is lent, or the game went with one that was taken away.
        """
        with self._lock:
            for _ in range(2):  # the loan at hand may end just now; a new one does not
                if self._is_lost:
                    break
                self._loan = self._loan or Loan(self._lender, self._state)
                answer = self._loan.ask(action, settings, look)
                if isinstance(answer, GameFrame):
                    self._frame = answer
                    self._recording.append(answer.image)
                    return answer
                if isinstance(answer, (ValueError, FloatingPointError)):
                    raise answer
                self._loan = None
                if isinstance(answer, LentGameState):
                    self._state = answer
                else:
                    self._is_lost = True
            raise VisitorError(
                "The GPU was taken away, and the game with it. Press reset to begin a new one."
            )

    def last_frame(self) -> GameFrame:
        """The newest frame. The first one needs no GPU, so that a page opens without one."""
        with self._lock:
            if self._frame is not None:
                return self._frame
            model, count = self._lender.pipeline.transformer, len(self._recording)
            schedule = rollout_settings(self._lender.pipeline, self._state.settings)["context_schedule"]
            context = schedule.context(count, model.short_window)
            height, width = self._state.size or self._lender.pipeline.default_size
            gray = np.full((height, width, 3), 128, np.uint8)
            return GameFrame(self._recording[-1] if count else gray, count - 1, context, 0.0, 0.0)


class LentPlayers(Players):
    """Players whose games have a GPU each while they are played: none waits for another's.

    Args:
        lender: who lends the GPUs.
        max_players: games at once.
    """

    games_share_a_device = False

    def __init__(self, lender: Lender, max_players: int = 8) -> None:
        super().__init__(max_players)
        self.lender = lender

    def new_game(self, pipeline: FARVideoPipeline, *arguments: Any, **options: Any) -> LentGame:
        """A game of the lender's pipeline."""
        return LentGame(self.lender, *arguments, **options)

    def _compute(self, priority: int, function: Callable[[], Result]) -> Result:
        return function()


@contextmanager
def asked_by(headers: Any) -> Iterator[None]:
    """While a visitor asks, of whom the Hub's page says these headers; None for those of the request.

    `spaces` counts a loan against the visitor whom the request at hand names. Gradio adds the Hub's headers
    to requests of its own events, but not to those of the game's page, which brings them in its messages.

    Raises:
        ValueError: for anything but a few short texts.
    """
    if headers is None:
        yield
        return
    if not isinstance(headers, dict) or len(headers) > MAX_HEADERS:
        raise ValueError(f"hub_headers must be an object of at most {MAX_HEADERS} texts")
    if any(not isinstance(value, str) or len(value) > MAX_HEADER_LENGTH for value in headers.values()):
        raise ValueError(f"hub_headers must have texts of at most {MAX_HEADER_LENGTH} characters")
    token = LocalContext.request.set(SimpleNamespace(headers=Headers(headers)))
    try:
        yield
    finally:
        LocalContext.request.reset(token)
