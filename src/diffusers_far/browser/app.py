"""The browser demo of a FAR checkpoint.

diffusers-far play --checkpoint FOLDER_OR_REPO
"""

import os
import signal
import tempfile
import threading
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from starlette.middleware import Middleware

from ..pipeline_far_video import FARVideoPipeline
from ..shipped import ANY_STEP_CHECKPOINT, EPISODES, find
from .compare import compare_tab
from .continue_video import continue_tab
from .play import play_tab
from .players import Players
from .starts import Start, cut_starts, fit_starts, read_episodes
from .uploads import MAX_UPLOAD_MB
from .visitors import Gate, Visitors

TITLE = "FAR: video, frame after frame"
# What the shipped models were trained with, by the name of their folder or repository.
WORLDS = {
    f"far-doom-maze-64{variant}": "mazes" for variant in ("", "-any-step", "-memory", "-memory-any-step")
}
DEFAULT_SIDE = 64  # of frames where nothing else says it
MAX_JOBS_WAITING = 64
CLEANING = (600, 3600)  # every ten minutes, videos that are an hour old are removed


def load(checkpoint: str, device: str | None = None) -> FARVideoPipeline:
    """A pipeline for the demo, in bf16 on a GPU.

    Args:
        checkpoint: folder or repo id.
        device: by default a GPU if there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    pipeline = FARVideoPipeline.from_pretrained(checkpoint, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def frame_size(pipeline: FARVideoPipeline, starts: list[Start]) -> tuple[int, int]:
    """Height and width of games: the checkpoint's, else about those of the episodes."""
    height, width = pipeline.default_size
    if height is not None and width is not None:
        return height, width
    multiple = pipeline.frame_multiple
    height, width = starts[0].frames.shape[1:3] if starts else (DEFAULT_SIDE, DEFAULT_SIDE)
    return max(1, height // multiple) * multiple, max(1, width // multiple) * multiple


def build_app(
    pipeline: FARVideoPipeline,
    episodes: Path | None = None,
    players: Players | None = None,
    visitors: Visitors | None = None,
    world: str | None = None,
) -> gr.Blocks:
    """The app; [`serve`] starts it.

    Args:
        pipeline: see [`load`].
        episodes: split of a videofolder whose frames games may start from.
        players: who plays; by default up to 8.
        visitors: who may ask for what.
        world: what the model was trained with, in a word or two.
    """
    players, visitors = players or Players(), visitors or Visitors()
    starts = cut_starts(read_episodes(episodes)) if episodes is not None else []
    size = frame_size(pipeline, starts)
    starts = fit_starts(starts, size, pipeline.transformer.action_space)
    with gr.Blocks(title=TITLE, delete_cache=CLEANING) as app:
        gr.Markdown(
            f"## {TITLE}\nThis model knows only {world or 'what it was trained with'}. To load another: "
            "`diffusers-far play --checkpoint FOLDER`"
        )
        with gr.Tab("Play"):
            play_tab(pipeline, players, starts, size)
        with gr.Tab("Continue a video"):
            continue_tab(pipeline, players, visitors, size)
        with gr.Tab("Compare context"):
            compare_tab(pipeline, players, visitors, starts, size)
    return app.queue(default_concurrency_limit=2, max_size=MAX_JOBS_WAITING)


def serve(app: gr.Blocks, visitors: Visitors, **options: Any) -> str:
    """Start the app in a thread of its own, with bounds on all requests; its address.

    Args:
        app: see [`build_app`].
        visitors: whom it was built for.
        options: of gradio's `launch`.
    """
    _, url, _ = app.launch(
        prevent_thread_lock=True,
        max_file_size=f"{MAX_UPLOAD_MB}mb",
        app_kwargs={"middleware": [Middleware(Gate, visitors=visitors)]},
        **options,
    )
    return str(url)


def launch(
    checkpoint: str = ANY_STEP_CHECKPOINT,
    episodes: str | None = EPISODES,
    device: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    max_players: int = 8,
) -> None:
    """Serve the app until it is interrupted or terminated; no file of it is left behind.

    Args:
        checkpoint: folder or repo id; the shipped one in a checkout.
        episodes: split of a videofolder to start from; None for none.
        device: by default a GPU if there is one.
        host: address to listen on; 0.0.0.0 for all.
        port: by default the first free one from 7860 on.
        max_players: games at once.
    """
    folder = str(find(checkpoint, "checkpoint")) if checkpoint == ANY_STEP_CHECKPOINT else checkpoint
    stop, visitors = threading.Event(), Visitors()
    if threading.current_thread() is threading.main_thread():  # others may not
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with tempfile.TemporaryDirectory(prefix="diffusers-far-") as temporary:
        os.environ.setdefault("GRADIO_TEMP_DIR", temporary)  # uploads, and videos for visitors
        app = build_app(
            load(folder, device),
            None if episodes is None else find(episodes, "episodes"),
            Players(max_players),
            visitors,
            world=WORLDS.get(Path(folder).name),
        )
        serve(app, visitors, server_name=host, server_port=port)
        try:
            while not stop.wait(3600):
                pass
        except KeyboardInterrupt:
            pass
        finally:
            app.close()
