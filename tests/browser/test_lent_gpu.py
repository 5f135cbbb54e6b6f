"""Games on lent GPUs, with a double of `spaces`: what they make, and what becomes of a GPU that goes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest

from diffusers_far import FARVideoPipeline
from diffusers_far.browser.continue_video import continue_video
from diffusers_far.browser.lent_gpu import (
    SECONDS_TO_END,
    Lender,
    LentGame,
    LentPlayers,
    asked_by,
)
from diffusers_far.browser.play import PlayServer
from diffusers_far.browser.players import Game, GameSettings, Players, VisitorError
from diffusers_far.browser.starts import Start
from diffusers_far.video_files import save_video
from tests.browser.double import spaces
from tests.tiny_models import long_transformer, pipeline

SETTINGS = GameSettings(num_inference_steps=2)
GUIDED = GameSettings(num_inference_steps=3, guidance_scale=2.0, long_memory=False)
START = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
START_ACTIONS = [0, 1, 2, 3, 0, 1]
ONE_FRAME = SECONDS_TO_END  # a loan that is over after its first frame
PLAYER = "p" * 16


@pytest.fixture(scope="module")
def pipe() -> FARVideoPipeline:
    return pipeline(long_transformer(num_actions=4))


@pytest.fixture(autouse=True)
def no_loans() -> Iterator[None]:
    spaces.loans.clear()
    spaces.processes.clear()
    yield
    for process in spaces.processes:
        process.kill()


@pytest.mark.parametrize("start", [None, START], ids=["from-nothing", "from-frames"])
@pytest.mark.parametrize("loan_seconds", [60, ONE_FRAME], ids=["one-loan", "many-loans"])
def test_a_lent_game_is_a_game(pipe: FARVideoPipeline, start: np.ndarray | None, loan_seconds: int) -> None:
    """Frame by frame, before the first one too, over changes of the settings, however often the GPU goes."""
    actions = None if start is None else START_ACTIONS
    game = Game(pipe, start, actions, SETTINGS, seed=5)
    lent = LentGame(Lender(spaces.GPU, pipe, loan_seconds), start, actions, SETTINGS, seed=5)
    first, expected = lent.last_frame(), game.last_frame()
    assert np.array_equal(first.image, expected.image)
    assert (first.number, first.context) == (expected.number, expected.context)
    assert not spaces.loans
    steps = [(1, None), (2, None), (1, GUIDED), (3, None), (0, SETTINGS), (1, None)]
    for action, settings in steps:
        frame, expected = lent.step(action, settings, look=True), game.step(action, settings, look=True)
        assert np.array_equal(frame.image, expected.image)
        assert (frame.number, frame.context) == (expected.number, expected.context)
        assert frame.attention == pytest.approx(expected.attention, rel=1e-4)
    assert np.array_equal(np.stack(lent.recording), np.stack(game.recording))
    assert lent.last_frame().number == frame.number
    assert len(spaces.loans) == 1 if loan_seconds == 60 else len(spaces.loans) > 1


def test_a_wrong_action_leaves_the_game_as_it_was(pipe: FARVideoPipeline) -> None:
    lender = Lender(spaces.GPU, pipe)
    one, other = (LentGame(lender, START, START_ACTIONS, SETTINGS, seed=5) for _ in range(2))
    with pytest.raises(ValueError, match="action"):
        one.step(7)
    assert np.array_equal(one.step(1).image, other.step(1).image)
    assert len(spaces.loans) == 2  # both at a time


def test_a_game_goes_with_a_gpu_that_is_taken_away(pipe: FARVideoPipeline) -> None:
    game = LentGame(Lender(spaces.GPU, pipe), None, None, SETTINGS)
    game.step(1)
    spaces.processes[0].kill()
    for _ in range(2):
        with pytest.raises(VisitorError, match="The GPU was taken away"):
            game.step(1)
    assert len(game.recording) == 1 and len(spaces.loans) == 1


def test_a_loan_that_is_refused_can_be_asked_for_again(pipe: FARVideoPipeline) -> None:
    refused = []

    def lend(duration: int) -> Any:
        def decorate(task: Any) -> Any:
            lent = spaces.GPU(duration=duration)(task)

            def run(*arguments: Any) -> Iterator[Any]:
                if not refused:
                    refused.append(duration)
                    raise gr.Error("No GPU for you today.")
                yield from lent(*arguments)

            return run

        return decorate

    game = LentGame(Lender(lend, pipe), START, START_ACTIONS, SETTINGS, seed=5)
    with pytest.raises(VisitorError, match="No GPU for you today"):
        game.step(1)
    assert np.array_equal(
        game.step(1).image, Game(pipe, START, START_ACTIONS, SETTINGS, seed=5).step(1).image
    )


def test_a_video_is_continued_on_one_loan(pipe: FARVideoPipeline, tmp_path: Path) -> None:
    video = tmp_path / "walk.mp4"
    save_video(START / 255, video, 10)
    fields = (str(video), "crop to fill", 4, 3, "1 2 3", 2, 0.0, 5)

    def frames(players: Players) -> np.ndarray:
        made = continue_video(pipe, players, (64, 64), tmp_path, *fields)
        return np.stack([image for image, _, path in made if path is None])

    assert np.array_equal(frames(LentPlayers(Lender(spaces.GPU, pipe))), frames(Players()))
    assert len(spaces.loans) == 1


def test_who_asks_for_a_loan(pipe: FARVideoPipeline) -> None:
    """The page brings what the Hub says of the visitor; other headers than short texts are refused."""
    server = PlayServer(pipe, LentPlayers(Lender(spaces.GPU, pipe)), [Start(START, START_ACTIONS)])
    assert server.options({})["lent_gpu"] is True
    settings = {**vars(SETTINGS)}
    server.start({"player": PLAYER, "settings": settings, "start": 0})
    message = {"player": PLAYER, "settings": settings, "action": 1}
    assert server.step(message | {"hub_headers": {"X-IP-Token": "me"}})["number"] == 6
    assert spaces.loans == [{"duration": 30, "visitor": "me"}]
    for headers in ("me", {"x-ip-token": 3}, {"x-ip-token": "x" * 10_000}, {str(i): "" for i in range(20)}):
        with pytest.raises(ValueError, match="hub_headers must"), asked_by(headers):
            pass
