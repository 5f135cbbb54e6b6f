"""The tab in which visitors play: a page that asks for a frame as soon as the last one came."""

import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from fastapi import HTTPException

from ..actions import ActionSpace
from ..inputs import group_names
from ..pipeline_far_video import FARVideoPipeline
from ..video_files import save_video
from .forms import MAX_GUIDANCE, MAX_SEED, MAX_SLOPE, MAX_STEPS, default_slope, shown
from .lent_gpu import asked_by
from .pictures import FRAMES_PER_SECOND, data_url, enlarged, picture
from .players import GameFrame, GameSettings, Players, VisitorError
from .starts import Start
from .uploads import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, read_image

HERE = Path(__file__).parent
RANGE = 3.0  # of the sliders of a vector, in deviations of the training data
MAX_NUMBER = 1e30  # of a vector; float32 holds a little more

Message = dict[str, Any]


def play_tab(
    pipeline: FARVideoPipeline, players: Players, starts: list[Start], size: tuple[int, int]
) -> gr.HTML:
    """The page and its functions."""
    game = PlayServer(pipeline, players, starts, size)
    functions = [game.options, game.start, game.step, game.save, game.leave]
    # The page's script is no module, so what it shares with web/ joins it without its exports.
    shared = (HERE / "directions.js").read_text().replace("export ", "")
    return gr.HTML(
        html_template=(HERE / "play.html").read_text(),
        css_template=(HERE / "play.css").read_text(),
        js_on_load=shared + (HERE / "play.js").read_text(),
        server_functions=[answering(function) for function in functions],
        elem_id="play",
    )


def answering(function: Callable[[Message], Message]) -> Callable[[Message], Message]:
    """The function for the page.

    What a visitor can get wrong becomes `{"error": text}`, which the page shows; a message that the page
    never sends becomes a status of 422 with the reason.
    """

    def answer(message: Message) -> Message:
        try:
            if not isinstance(message, dict):
                raise ValueError("the message must be an object, with player as one of its entries")
            return function(message)
        except VisitorError as error:
            return {"error": str(error)}
        except FloatingPointError:
            return {"error": "No picture came out with these settings. Move them back, and go on."}
        except ValueError as error:
            raise HTTPException(422, str(error)) from error

    answer.__name__ = function.__name__
    return answer


class PlayServer:
    """What the page asks for. A message is a JSON object with the player's own id, `player`."""

    def __init__(
        self,
        pipeline: FARVideoPipeline,
        players: Players,
        starts: list[Start],
        size: tuple[int, int] | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.players = players
        self.starts = starts
        self.size = size or pipeline.default_size

    def options(self, message: Message) -> Message:
        """What the page can offer."""
        model, config = self.pipeline.transformer, self.pipeline.config
        space, names = model.action_space, config.action_names
        is_single = space is not None and not space.shape
        return {
            "actions": names if is_single else None,
            "num_actions": space.sizes[0] if space is not None and is_single else None,
            "groups": groups(space, names) if space is not None and space.is_grouped else None,
            "numbers": numbers(space, names) if space is not None and space.is_vector else None,
            "guidance": space is not None,
            "long": model.is_long,
            "lent_gpu": not self.players.games_share_a_device,
            "num_inference_steps": config.num_inference_steps,
            "flex_rope_slope": default_slope(self.pipeline),
            "starts": [picture(start.frames[-1]) for start in self.starts],
            "max_image_bytes": MAX_IMAGE_BYTES,
            "max_image_pixels": MAX_IMAGE_PIXELS,
        }

    def start(self, message: Message) -> Message:
        """A new game from one of `starts`, from an `image` (data URL), or from nothing."""
        settings, seed = game_settings(message.get("settings")), message.get("seed", 0)
        check_range("seed", seed, 0, MAX_SEED, whole=True)
        frames, actions = self._first_frames(message)
        frame = self.players.start(
            player_id(message),
            lambda: self.players.new_game(self.pipeline, frames, actions, settings, seed, size=self.size),
        )
        earlier: Any = [] if frames is None else frames[-frame.number - 1 : -1]
        return reply(frame) | {"earlier": [(number, picture(image)) for number, image in enumerate(earlier)]}

    def _first_frames(self, message: Message) -> tuple[np.ndarray | None, list[Any] | None]:
        if message.get("image") is not None:
            return read_image(message["image"], *self.size)[None], None
        index = message.get("start")
        if index is None:
            return None, None
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(self.starts):
            raise ValueError(f"start={shown(index)} must be one of the {len(self.starts)} starts, from 0 on")
        return self.starts[index].frames, self.starts[index].actions

    def step(self, message: Message) -> Message:
        """The next frame, led to by `action`, with `settings`; with `look`, where it looks."""
        action = message.get("action")
        if action is not None:
            check_action(action, self.pipeline.transformer.action_space)
        look = message.get("look", False)
        if not isinstance(look, bool):
            raise ValueError(f"look={shown(look)} must be true or false")
        settings = game_settings(message.get("settings"))
        with asked_by(message.get("hub_headers")):
            return reply(self.players.step(player_id(message), action, settings, look))

    def save(self, message: Message) -> Message:
        """The game so far as an mp4, in a data URL."""
        frames = self.players.recording(player_id(message))
        if not frames:
            raise VisitorError("There is nothing to save yet: the game has no frame.")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "play.mp4"
            save_video(map(enlarged, frames), path, FRAMES_PER_SECOND)
            return {"video": data_url(path.read_bytes(), "video/mp4")}

    def leave(self, message: Message) -> Message:
        """Make place for somebody else."""
        self.players.leave(player_id(message))
        return {}


def groups(space: ActionSpace, names: Any) -> list[dict[str, Any]]:
    """Groups of actions, each with its name and those of its actions, for the page."""
    named = group_names(names or [f"group {group}" for group in range(len(space.sizes))])
    return [
        {"name": name, "actions": values or [str(value) for value in range(size)]}
        for (name, values), size in zip(named, space.sizes, strict=True)
    ]


def numbers(space: ActionSpace, names: Any) -> list[dict[str, Any]]:
    """The numbers of a vector, each with its name, what it mostly is, and the range of its slider."""
    count = space.shape[0]
    mean, std = space.mean or (0.0,) * count, space.std or (1.0,) * count
    named = names or [f"number {index}" for index in range(count)]
    return [
        {"name": name, "value": middle, "least": middle - RANGE * spread, "most": middle + RANGE * spread}
        for name, middle, spread in zip(named, mean, std, strict=True)
    ]


def check_action(action: Any, space: ActionSpace | None) -> None:
    """Raise a ValueError for an action that the page never sends for such a model."""
    if space is None or not space.shape:
        check_range("action", action, -1, (space.sizes[0] if space else 1) - 1, whole=True)
        return
    if not isinstance(action, list) or len(action) != space.shape[0]:
        raise ValueError(f"action={shown(action)} must be a list of {space.shape[0]}: the model has {space}")
    for index, value in enumerate(action):
        if space.is_vector:
            check_range(f"action[{index}]", value, -MAX_NUMBER, MAX_NUMBER)
        else:
            check_range(f"action[{index}]", value, -1, space.sizes[index] - 1, whole=True)


def player_id(message: Message) -> str:
    """The id that the page drew; nobody can guess another's."""
    player = message.get("player")
    if not isinstance(player, str) or not 16 <= len(player) <= 64:
        raise ValueError("player must be a text of 16 to 64 characters")
    return player


def game_settings(values: Any) -> GameSettings:
    """Settings as the page sends them."""
    names = {field.name for field in fields(GameSettings)}
    if not isinstance(values, dict) or set(values) != names:
        raise ValueError(f"settings={shown(values)} must have {sorted(names)}")
    if not isinstance(values["long_memory"], bool):
        raise ValueError(f"long_memory={shown(values['long_memory'])} must be true or false")
    check_range("num_inference_steps", values["num_inference_steps"], 1, MAX_STEPS, whole=True)
    check_range("guidance_scale", values["guidance_scale"], 0, MAX_GUIDANCE)
    check_range("flex_rope_slope", values["flex_rope_slope"], 0, MAX_SLOPE)
    return GameSettings(**values)


def check_range(name: str, value: Any, least: float, most: float, whole: bool = False) -> None:
    """Raise a ValueError for what is no number, or out of range."""
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        kind = "whole number" if whole else "number"
        raise ValueError(f"{name}={shown(value)} must be a {kind} from {least} to {most}")


def reply(frame: GameFrame) -> Message:
    """A frame for the page."""
    return {
        "image": picture(frame.image),
        "number": frame.number,
        "long": list(frame.context.long),
        "short": list(frame.context.short),
        "milliseconds": frame.milliseconds,
        "megabytes": frame.cache_megabytes,
        "attention": None if frame.attention is None else list(frame.attention.items()),
    }
