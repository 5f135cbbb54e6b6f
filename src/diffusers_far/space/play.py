"""The tab in which visitors play: a page that asks for a frame as soon as the last one came."""

import base64
import binascii
import io
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from diffusers.utils import export_to_video
from PIL import Image

from ..pipeline_far_video import FARVideoPipeline
from .players import BusyError, Game, GameFrame, GameSettings, Players, UnknownPlayerError
from .starts import Start

HERE = Path(__file__).parent
MAX_IMAGE_BYTES = 4 * 2**20
MAX_IMAGE_PIXELS = 5_000_000
MAX_STEPS = 64
FRAMES_PER_SECOND = 10

Message = dict[str, Any]


def play_tab(pipeline: FARVideoPipeline, players: Players, starts: list[Start]) -> gr.HTML:
    """The page and its functions."""
    game = PlayServer(pipeline, players, starts)
    functions = [game.options, game.start, game.step, game.save, game.leave]
    return gr.HTML(
        html_template=(HERE / "play.html").read_text(),
        css_template=(HERE / "play.css").read_text(),
        js_on_load=(HERE / "play.js").read_text(),
        server_functions=[answering(function) for function in functions],
        elem_id="play",
    )


def answering(function: Callable[[Message], Message]) -> Callable[[Message], Message]:
    """The function, with what a visitor can get wrong as `{"error": text}`."""

    def answer(message: Message) -> Message:
        try:
            return function(message)
        except (BusyError, UnknownPlayerError, ValueError) as error:
            return {"error": str(error)}

    answer.__name__ = function.__name__
    return answer


class PlayServer:
    """What the page asks for. A message is a JSON object with the player's own id, `player`."""

    def __init__(self, pipeline: FARVideoPipeline, players: Players, starts: list[Start]) -> None:
        self.pipeline = pipeline
        self.players = players
        self.starts = starts

    def options(self, message: Message) -> Message:
        """What the page can offer."""
        model, config = self.pipeline.transformer, self.pipeline.config
        return {
            "actions": config.action_names,
            "num_actions": model.config.num_actions,
            "guidance": model.config.num_actions is not None,
            "long": model.is_long,
            "num_inference_steps": config.num_inference_steps,
            "flex_rope_slope": config.flex_rope_slope,
            "starts": [picture(start.frames[-1]) for start in self.starts],
            "max_image_bytes": MAX_IMAGE_BYTES,
        }

    def start(self, message: Message) -> Message:
        """A new game from one of `starts`, from an `image` (data URL), or from nothing."""
        settings, seed = game_settings(message.get("settings")), message.get("seed", 0)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed={seed!r} must be a whole number from 0 on")
        frames, actions = self._first_frames(message)
        frame = self.players.start(
            player_id(message), lambda: Game(self.pipeline, frames, actions, settings, seed)
        )
        earlier: Any = [] if frames is None else frames[-frame.number - 1 : -1]
        return reply(frame) | {"earlier": [(number, picture(image)) for number, image in enumerate(earlier)]}

    def _first_frames(self, message: Message) -> tuple[np.ndarray | None, list[int] | None]:
        if message.get("image") is not None:
            return self._uploaded(message["image"]), None
        index = message.get("start")
        if index is None:
            return None, None
        if not isinstance(index, int) or not 0 <= index < len(self.starts):
            raise ValueError(f"start={index!r} must be one of the {len(self.starts)} starts, from 0 on")
        return self.starts[index].frames, self.starts[index].actions

    def _uploaded(self, url: Any) -> np.ndarray:
        """The image of a data URL in the size of the model's videos, `[1, H, W, 3]` uint8."""
        encoded = url.partition("base64,")[2] if isinstance(url, str) else ""
        if len(encoded) > 4 * MAX_IMAGE_BYTES / 3 + 4:
            raise ValueError(f"The image is too large: at most {MAX_IMAGE_BYTES // 2**20} MB.")
        try:
            with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))) as image:
                if image.width * image.height > MAX_IMAGE_PIXELS:
                    raise ValueError(
                        f"The image has {image.width} x {image.height} pixels: at most "
                        f"{MAX_IMAGE_PIXELS // 10**6} million."
                    )
                opened = image.convert("RGB")
        except (OSError, binascii.Error, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError("The file cannot be read as an image.") from error
        size = self.pipeline.config.sample_size
        processor = self.pipeline.video_processor
        return np.array(processor.resize(opened, size, size, resize_mode="crop"))[None]

    def step(self, message: Message) -> Message:
        """The next frame, led to by `action`, with `settings`."""
        action = message.get("action")
        if action is not None and (isinstance(action, bool) or not isinstance(action, int)):
            raise ValueError(f"action={action!r} must be a whole number or nothing")
        return reply(self.players.step(player_id(message), action, game_settings(message.get("settings"))))

    def save(self, message: Message) -> Message:
        """The game so far as an mp4, in a data URL."""
        frames = self.players.recording(player_id(message))
        if not frames:
            raise ValueError("There is nothing to save yet: the game has no frame.")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "play.mp4"
            large = [frame.repeat(4, axis=0).repeat(4, axis=1) / 255 for frame in frames]
            export_to_video(large, str(path), fps=FRAMES_PER_SECOND, quality=8.0, macro_block_size=2)
            return {"video": data_url(path.read_bytes(), "video/mp4")}

    def leave(self, message: Message) -> Message:
        """Make place for somebody else."""
        self.players.leave(player_id(message))
        return {}


def player_id(message: Message) -> str:
    """The id that the page drew; nobody can guess another's."""
    player = message.get("player") if isinstance(message, dict) else None
    if not isinstance(player, str) or not 16 <= len(player) <= 64:
        raise ValueError("player must be a text of 16 to 64 characters")
    return player


def game_settings(values: Any) -> GameSettings:
    """Settings as the page sends them; their ranges are checked where they are used."""
    names = {field.name for field in fields(GameSettings)}
    if not isinstance(values, dict) or set(values) != names:
        raise ValueError(f"settings={values!r} must have {sorted(names)}")
    if not isinstance(values["long_memory"], bool):
        raise ValueError(f"long_memory={values['long_memory']!r} must be true or false")
    steps = values["num_inference_steps"]
    if isinstance(steps, int) and steps > MAX_STEPS:
        raise ValueError(f"num_inference_steps={steps} must be at most {MAX_STEPS} here")
    return GameSettings(**values)


def reply(frame: GameFrame) -> Message:
    """A frame for the page."""
    return {
        "image": picture(frame.image),
        "number": frame.number,
        "long": list(frame.context.long),
        "short": list(frame.context.short),
        "milliseconds": frame.milliseconds,
        "megabytes": frame.cache_megabytes,
    }


def picture(image: np.ndarray) -> str:
    """Data URL of `[H, W, 3]` uint8 pixels."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=92)
    return data_url(file.getvalue(), "image/jpeg")


def data_url(content: bytes, kind: str) -> str:
    """`data:` URL of a file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
