"""Games: what a frame is made of, how long a game lives, and that no visitor disturbs another."""

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from diffusers_far import ContextSchedule, FARVideoPipeline
from diffusers_far.browser.players import BusyError, Game, GameSettings, Players, UnknownPlayerError
from tests.tiny_models import generator, long_transformer, pipeline, transformer

SETTINGS = GameSettings(num_inference_steps=2)
START = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
START_ACTIONS = [0, 1, 2, 3, 0, 1]


@pytest.fixture(scope="module")
def pipe() -> FARVideoPipeline:
    return pipeline(long_transformer(num_actions=4))


def play(game: Game, actions: list[int]) -> np.ndarray:
    return np.stack([game.step(action).image for action in actions])


def rolled(pipe: FARVideoPipeline, actions: list[int], **settings: Any) -> np.ndarray:
    """The same game by the pipeline alone."""
    schedule = ContextSchedule(max_long_frames=60, refresh_interval=None)  # and a window of 4
    defaults = {"num_inference_steps": 2, "context_schedule": schedule, "generator": generator(5)}
    settings = defaults | {"output_type": "np"} | settings
    if "video" in settings:
        settings |= {"context_actions": START_ACTIONS}
    rollout = pipe.rollout(**settings)
    return np.stack([(255 * rollout.step(action)[0]).round().astype(np.uint8) for action in actions])


@pytest.mark.parametrize("start", [None, START], ids=["from-nothing", "from-frames"])
def test_a_game_is_a_rollout(pipe: FARVideoPipeline, start: np.ndarray | None) -> None:
    actions = [1, 1, 2, 3, 0, 1, 2]
    game = Game(pipe, start, None if start is None else START_ACTIONS, SETTINGS, seed=5)
    expected = rolled(pipe, actions, **({} if start is None else {"video": start}))
    assert np.array_equal(play(game, actions), expected)


@pytest.mark.parametrize(
    ("changed", "arguments"),
    [
        (GameSettings(3), {"num_inference_steps": 3}),
        (GameSettings(2, guidance_scale=2.0), {"guidance_scale": 2.0}),
        (GameSettings(2, flex_rope_slope=0.2), {"flex_rope_slope": 0.2}),
        (
            GameSettings(2, long_memory=False),
            {"context_schedule": ContextSchedule(max_long_frames=0, refresh_interval=None)},
        ),
    ],
)
def test_settings_change_on_the_way(
    pipe: FARVideoPipeline, changed: GameSettings, arguments: dict[str, Any]
) -> None:
    game = Game(pipe, START, START_ACTIONS, SETTINGS, seed=5)
    images = [game.step(2, changed).image, game.step(1, changed).image]
    assert np.array_equal(np.stack(images), rolled(pipe, [2, 1], video=START, **arguments))
    back = game.step(1, SETTINGS)
    assert back.number == 8 and game.settings == SETTINGS


def test_bad_settings_and_actions_leave_the_game_as_it_was(pipe: FARVideoPipeline) -> None:
    games = [Game(pipe, START, START_ACTIONS, SETTINGS, seed=5) for _ in range(2)]
    with pytest.raises(ValueError, match="num_inference_steps=0"):
        games[0].step(1, GameSettings(0))
    with pytest.raises(ValueError, match="action"):
        games[0].step(7)
    assert np.array_equal(play(games[0], [1, 2]), play(games[1], [1, 2]))


def test_what_a_frame_tells(pipe: FARVideoPipeline) -> None:
    game = Game(pipe, START, START_ACTIONS, SETTINGS, max_context_frames=8)
    first = game.last_frame()
    assert np.array_equal(first.image, START[-1])
    assert (first.number, first.context.long, first.context.short) == (5, (0, 1, 2), (3, 4, 5))
    for _ in range(9):
        frame = game.step(1)
    assert frame.number == 14 and frame.context.short == (12, 13, 14)
    assert frame.context.long == (8, 9, 10, 11)  # with a window of 4, the new frame in it
    assert frame.milliseconds > 0 and frame.cache_megabytes > 0
    frame = game.step(1, GameSettings(1, long_memory=False))
    assert (frame.context.long, frame.context.short) == ((), (13, 14, 15))
    frame = game.step(1, GameSettings(1))  # remembers again
    assert (frame.context.long, frame.context.short) == ((10, 11, 12, 13), (14, 15, 16))
    assert Game(pipe, settings=SETTINGS).last_frame().number == -1


@pytest.mark.parametrize("long", [False, True], ids=["base", "long"])
def test_a_game_runs_in_constant_memory(long: bool) -> None:
    pipe = pipeline((long_transformer if long else transformer)(num_actions=4, num_layers=1))
    game = Game(pipe, settings=GameSettings(1), max_context_frames=6, max_recorded_frames=10)
    sizes = []
    for index in range(40):
        frame = game.step(index % 4)
        sizes.append((frame.cache_megabytes, len(game.recording), len(game.rollout._latents)))
    assert sizes[20:] == sizes[20:21] * 20
    assert sizes[-1][1] == 10


def test_places_are_limited_and_given_back(pipe: FARVideoPipeline) -> None:
    now = [0.0]
    players = Players(max_players=2, seconds_to_rest=60, seconds_to_live=600, clock=lambda: now[0])
    new = lambda: Game(pipe, settings=SETTINGS)  # noqa: E731
    players.start("anna", new)
    players.start("bert", new)
    with pytest.raises(BusyError, match="All 2 places are taken"):
        players.start("cleo", new)
    players.start("anna", new)  # a new game in the place that one has
    assert players.num_players == 2
    now[0] = 50
    players.step("anna", 1)
    now[0] = 70  # bert has rested for too long
    players.start("cleo", new)
    with pytest.raises(UnknownPlayerError):
        players.step("bert", 1)
    players.step("anna", 1)
    players.leave("anna")
    players.leave("anna")
    with pytest.raises(UnknownPlayerError):
        players.recording("anna")
    assert players.num_players == 1


def test_a_game_survives_a_long_rest_where_nobody_needs_its_place(pipe: FARVideoPipeline) -> None:
    now = [0.0]
    players = Players(clock=lambda: now[0])
    players.start("anna", lambda: Game(pipe, settings=SETTINGS))
    now[0] = 5 * 60
    assert players.step("anna", 1).number == 0
    now[0] += 10 * 3600
    with pytest.raises(UnknownPlayerError):
        players.step("anna", 1)


def test_a_game_that_fails_to_begin_costs_nobody_a_place(pipe: FARVideoPipeline) -> None:
    now = [0.0]
    players = Players(max_players=1, clock=lambda: now[0])
    players.start("anna", lambda: Game(pipe, settings=SETTINGS))
    now[0] = 100
    with pytest.raises(ValueError, match="num_inference_steps"):
        players.start("bert", lambda: Game(pipe, settings=GameSettings(0)))
    assert players.step("anna", 1).number == 0


def test_games_go_first(pipe: FARVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many frames of other tabs are waiting."""
    players, order, begun, go = Players(), [], threading.Event(), threading.Event()
    players.start("anna", lambda: Game(pipe, settings=SETTINGS))
    monkeypatch.setattr(Game, "step", lambda game, *arguments: order.append("game"))

    def block() -> None:
        begun.set()
        go.wait(60)

    def ask(function: Callable[..., Any], *arguments: Any) -> None:
        threads.append(threading.Thread(target=function, args=arguments))
        threads[-1].start()

    def wait_for(num_waiting: int) -> None:
        while players._tasks.qsize() < num_waiting:
            threads[0].join(0.01)

    threads: list[threading.Thread] = []
    ask(players.run, block)
    assert begun.wait(60)
    for number in range(5):
        ask(players.run, order.append, number)
        wait_for(number + 1)
    ask(players.step, "anna", 1)
    wait_for(6)
    go.set()
    for thread in threads:
        thread.join(60)
    assert order == ["game", 0, 1, 2, 3, 4]


def test_a_broken_game_harms_nobody(pipe: FARVideoPipeline) -> None:
    players = Players()
    players.start("anna", lambda: Game(pipe, settings=SETTINGS, seed=5))

    def fail() -> Game:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        players.start("bert", fail)
    assert players.num_players == 1
    with pytest.raises(ValueError):
        players.step("anna", 99)
    assert np.array_equal(players.step("anna", 1).image, rolled(pipe, [1])[0])


def together(functions: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)


def test_eight_at_once_get_their_own_frames_in_turn(pipe: FARVideoPipeline) -> None:
    players, made, order = Players(max_players=8), {}, []

    def visit(number: int) -> None:
        name = f"player {number}"
        players.start(name, lambda: Game(pipe, START, START_ACTIONS, SETTINGS, seed=number))
        frames = []
        for index in range(6):
            frames.append(players.step(name, (number + index) % 4).image)
            order.append(number)
        made[number] = np.stack(frames)

    together([lambda number=number: visit(number) for number in range(8)])
    for number in range(8):
        actions = [(number + index) % 4 for index in range(6)]
        alone = rolled(pipe, actions, video=START, generator=torch.Generator().manual_seed(number))
        assert np.array_equal(made[number], alone)
    waits = []  # how many others were served between two frames of one player
    for number in range(8):
        turns = [turn for turn, who in enumerate(order) if who == number]
        waits += [after - before for before, after in itertools.pairwise(turns)]
    assert max(waits) <= 16  # nobody waits for more than everybody's turn, and one in flight
