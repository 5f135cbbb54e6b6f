"""What the page of the Play tab may send, and what it is told when it sends nonsense."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import HTTPException
from PIL import Image

from diffusers_far import FARVideoPipeline
from diffusers_far.actions import ActionSpace
from diffusers_far.browser import forms, play
from diffusers_far.browser.app import frame_size
from diffusers_far.browser.play import PlayServer, answering
from diffusers_far.browser.players import Players
from diffusers_far.browser.starts import Start, cut_starts, fit_starts, read_episodes
from diffusers_far.video_files import save_video
from tests.tiny_models import long_transformer, pipeline, transformer

PLAYER = "0123456789abcdef"
SETTINGS = {"num_inference_steps": 1, "guidance_scale": 1, "flex_rope_slope": 0, "long_memory": True}
START = Start(np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8), [0, 1, 2, 3, 0, 1])


@pytest.fixture(scope="module")
def pipe() -> FARVideoPipeline:
    return pipeline(long_transformer(num_actions=4))


@pytest.fixture
def server(pipe: FARVideoPipeline) -> PlayServer:
    return PlayServer(pipe, Players(), [START])


def begin(server: PlayServer, **message: Any) -> dict[str, Any]:
    return server.start({"player": PLAYER, "settings": SETTINGS, "start": 0} | message)


def image_url(width: int = 8, height: int = 8) -> str:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_a_game_by_messages(server: PlayServer) -> None:
    reply = begin(server)
    assert reply["number"] == 5 and reply["short"] == [3, 4, 5] and reply["long"] == [0, 1, 2]
    assert [number for number, _ in reply["earlier"]] == [0, 1, 2, 3, 4]
    reply = server.step({"player": PLAYER, "action": 2, "settings": SETTINGS})
    assert reply["number"] == 6 and reply["image"].startswith("data:image/jpeg;base64,")
    assert reply["attention"] is None
    reply = server.step({"player": PLAYER, "action": 2, "settings": SETTINGS, "look": True})
    shares = dict(reply["attention"])
    assert sorted(shares) == list(range(7)) and 0 < sum(shares.values()) < 1
    assert server.save({"player": PLAYER})["video"].startswith("data:video/mp4;base64,")
    assert server.leave({"player": PLAYER}) == {} and server.players.num_players == 0


def test_fields_begin_with_a_number_where_the_checkpoint_says_auto() -> None:
    for default, slope in (("auto", 0.0), (0.2, 0.2)):
        pipe = pipeline(long_transformer(num_actions=4), num_training_frames=8, flex_rope_slope=default)
        assert PlayServer(pipe, Players(), []).options({})["flex_rope_slope"] == slope
        assert forms.game_settings(pipe, 1, None).flex_rope_slope == slope  # an empty field


def test_options_of_a_model_without_actions() -> None:
    options = PlayServer(pipeline(transformer()), Players(), []).options({})
    assert (options["actions"], options["num_actions"], options["starts"]) == (None, None, [])
    assert not options["guidance"] and not options["long"]


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"player": "short"}, "player must be"),
        ({"player": None}, "player must be"),
        ({"start": 1}, "start=1"),
        ({"start": "0"}, "start='0'"),
        ({"start": False}, "start=False"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"seed": 10**400}, "seed=a number of more than 40 digits"),
        ({"settings": {}}, "settings={}"),
        ({"settings": [1] * 1000}, "settings=[1"),
        ({"settings": SETTINGS | {"num_inference_steps": 1000}}, "num_inference_steps=1000"),
        ({"settings": SETTINGS | {"num_inference_steps": "8"}}, "num_inference_steps='8'"),
        ({"settings": SETTINGS | {"guidance_scale": -1}}, "guidance_scale=-1"),
        ({"settings": SETTINGS | {"guidance_scale": 1e308}}, "guidance_scale=1e+308"),
        ({"settings": SETTINGS | {"guidance_scale": float("nan")}}, "guidance_scale=nan"),
        ({"settings": SETTINGS | {"guidance_scale": 10**400}}, "guidance_scale=a number"),
        ({"settings": SETTINGS | {"flex_rope_slope": 1e300}}, "flex_rope_slope=1e+300"),
        ({"settings": SETTINGS | {"long_memory": "yes"}}, "long_memory='yes'"),
    ],
)
def test_messages_that_the_page_never_sends(server: PlayServer, message: dict[str, Any], error: str) -> None:
    with pytest.raises(HTTPException) as refused:
        answering(server.start)({"player": PLAYER, "settings": SETTINGS, "start": 0} | message)
    assert refused.value.status_code == 422
    assert error in refused.value.detail and len(refused.value.detail) < 200
    assert server.players.num_players == 0


@pytest.mark.parametrize(
    ("image", "error"),
    [
        ("/etc/passwd", "cannot be read as an image"),
        (3, "cannot be read as an image"),
        ("data:image/png;base64,AAAA", "cannot be read as an image"),
        ("data:image/png;base64," + "A" * 6_000_000, "too large: at most 4 MB"),
        (image_url(4000, 4000), "4000 x 4000 pixels"),
        (image_url(20000, 20000), "too many pixels: at most 15 million"),
    ],
)
def test_images_that_are_refused(server: PlayServer, image: Any, error: str) -> None:
    message = {"player": PLAYER, "settings": SETTINGS, "start": 0, "image": image}
    reply = answering(server.start)(message)
    assert set(reply) == {"error"} and error in reply["error"]
    assert server.players.num_players == 0


@pytest.mark.parametrize("message", [None, [], "player", 3, {}])
def test_a_message_of_another_shape(server: PlayServer, message: Any) -> None:
    for function in (server.options, server.start, server.step, server.save, server.leave):
        if message == {} and function == server.options:
            continue
        with pytest.raises(HTTPException) as refused:
            answering(function)(message)
        assert refused.value.status_code == 422


def test_a_look_that_the_page_never_asks_for(server: PlayServer) -> None:
    begin(server)
    with pytest.raises(HTTPException, match="look=1 must be true or false"):
        answering(server.step)({"player": PLAYER, "settings": SETTINGS, "look": 1})


def test_a_game_that_is_not_there(server: PlayServer) -> None:
    message = {"player": PLAYER, "action": 1, "settings": SETTINGS}
    assert "has ended" in answering(server.step)(message)["error"]
    begin(server, start=None)
    assert "nothing to save" in answering(server.save)(message)["error"]
    for action in ("1", 9, True, 10**400):
        with pytest.raises(HTTPException, match="action="):
            answering(server.step)(message | {"action": action})
    assert answering(server.step)(message)["number"] == 0


def test_settings_that_the_model_cannot_take() -> None:
    server = PlayServer(pipeline(transformer()), Players(), [])
    with pytest.raises(HTTPException, match="guidance_scale=2"):
        answering(server.start)({"player": PLAYER, "settings": SETTINGS | {"guidance_scale": 2}})


def test_a_picture_that_does_not_come_out() -> None:
    """A model that makes NaN: the visitor is told, and the game goes on from where it was."""
    server = PlayServer(pipeline(transformer(num_actions=4, std=1e20)), Players(), [START])
    begin(server)
    for _ in range(2):
        reply = answering(server.step)({"player": PLAYER, "action": 1, "settings": SETTINGS})
        assert "No picture came out" in reply["error"]


def test_pages_show_what_the_players_said(server: PlayServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is not the visitor's is not told as one."""
    monkeypatch.setattr(play, "reply", lambda frame: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answering(server.start)({"player": PLAYER, "settings": SETTINGS, "start": 0})


def test_starts_are_spread_over_the_episodes() -> None:
    episodes = [Start(np.zeros((100, 1, 1, 3), np.uint8) + index, list(range(100))) for index in range(2)]
    starts = cut_starts(episodes, num_starts=4, num_frames=20)
    assert [(int(start.frames[0, 0, 0, 0]), start.actions[0]) for start in starts] == [
        (0, 0),
        (1, 0),
        (0, 40),
        (1, 40),
    ]
    assert {len(start.frames) for start in starts} == {20}
    assert cut_starts([]) == []


@pytest.mark.parametrize("long", [False, True], ids=["base", "long"])
def test_a_model_of_another_size(tmp_path: Path, long: bool) -> None:
    """Frames of 96 x 64, as the episodes have them, whose actions this model does not know."""
    folder = tmp_path / "episodes"
    folder.mkdir()
    frames = np.random.default_rng(0).integers(0, 256, (8, 70, 100, 3), dtype=np.uint8)
    save_video(frames / 255, folder / "one.mp4", 10)
    (folder / "metadata.jsonl").write_text('{"file_name": "one.mp4", "actions": [0, 1, 2, 3, 4, 5, 5, 5]}\n')
    pipe = pipeline((long_transformer if long else transformer)(num_actions=4), sample_size=None)
    starts = cut_starts(read_episodes(folder), num_starts=1)
    size = frame_size(pipe, starts)
    assert size == (64, 96)
    starts = fit_starts(starts, size, ActionSpace(4))
    assert starts[0].frames.shape == (8, 64, 96, 3) and starts[0].actions is None
    assert fit_starts(cut_starts(read_episodes(folder)), size, ActionSpace(6))[0].actions == [
        0,
        1,
        2,
        3,
        4,
        5,
        5,
        5,
    ]
    server = PlayServer(pipe, Players(), starts, size)
    for message, number in (({"start": 0}, 8), ({"start": None}, 0), ({"image": image_url(30, 20)}, 1)):
        answering(server.start)({"player": PLAYER, "settings": SETTINGS} | message)
        reply = answering(server.step)({"player": PLAYER, "action": 3, "settings": SETTINGS})
        assert reply["number"] == number
        content = base64.b64decode(reply["image"].partition("base64,")[2])
        assert Image.open(io.BytesIO(content)).size == (96, 64)
        assert server.save({"player": PLAYER})["video"]
    assert frame_size(pipe, []) == (64, 64)


NAMED = {
    "groups": [{"keyboard": ["none", "walk", "jump"]}, {"mouse": ["none", "left"]}],
    "vector": ["x", "y"],
}
SPACES = {
    "groups": {"num_actions": [3, 2]},
    "vector": {"action_dim": 2, "action_mean": [5.0, 0.0], "action_std": [2.0, 1.0]},
}


@pytest.mark.parametrize(
    ("kind", "action", "others", "wrong"),
    [
        ("groups", [2, 1], [[0, 1], [2, -1]], [1, [1], [3, 0], [0, 0.5], [True, 0], "ab"]),
        (
            "vector",
            [4.5, -1],
            [[5, 0], [4.5, 1]],
            [1.0, [1.0], [1.0, None], [1.0, 1e300], [1.0, float("nan")]],
        ),
    ],
)
def test_games_of_groups_and_vectors(kind: str, action: Any, others: list[Any], wrong: list[Any]) -> None:
    pipe = pipeline(transformer(**SPACES[kind]), action_names=NAMED[kind])
    starts = [Start(START.frames, [action] * 6), START]
    starts = fit_starts(starts, (64, 64), pipe.transformer.action_space)
    assert starts[0].actions == [action] * 6 and starts[1].actions is None
    server = PlayServer(pipe, Players(), starts)
    options = server.options({"player": PLAYER})
    assert options["guidance"] and options["actions"] is None and options["num_actions"] is None
    if kind == "groups":
        assert options["groups"] == [
            {"name": "keyboard", "actions": ["none", "walk", "jump"]},
            {"name": "mouse", "actions": ["none", "left"]},
        ]
    else:
        assert options["numbers"][0] == {"name": "x", "value": 5.0, "least": -1.0, "most": 11.0}
    images = []
    for choice in (action, *others, None):
        begin(server)
        images.append(server.step({"player": PLAYER, "action": choice, "settings": SETTINGS})["image"])
    assert len(set(images)) == len(images)
    for choice in wrong:
        with pytest.raises(HTTPException, match="action"):
            answering(server.step)({"player": PLAYER, "action": choice, "settings": SETTINGS})


@pytest.mark.parametrize("kind", SPACES)
def test_texts_of_groups_and_vectors_in_the_other_tabs(kind: str) -> None:
    for names in (NAMED[kind], None):
        pipe = pipeline(transformer(**SPACES[kind]), action_names=names)
        table = forms.action_table(pipe, forms.example_actions(pipe, 2, 1), 4)
        expected = [[2, 0], [2, 0], [0, 0], [0, 0]] if kind == "groups" else [[5.0, 0.0]] * 4
        assert table == expected
        with pytest.raises(ValueError, match="is not an action"):
            forms.action_table(pipe, "fly", 4)
    assert forms.known_actions(pipeline(transformer())) == ""
