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
from starlette.middleware import Middleware

from ..loading import load_pipeline
from ..pipeline_far_video import FARVideoPipeline
from ..shipped import ANY_STEP_CHECKPOINT, EPISODES, WORLDS, find
from .compare import compare_tab
from .continue_video import continue_tab
from .lent_gpu import Lend, Lender, LentPlayers
from .play import play_tab
from .players import Players
from .starts import Start, cut_starts, fit_starts, read_episodes
from .uploads import MAX_UPLOAD_MB
from .visitors import Gate, Visitors

TITLE = "FAR: video, frame after frame"
DEFAULT_SIDE = 64  # of frames where nothing else says it
MAX_JOBS_WAITING = 64
# Gradio's own colour of the tab that is open is too faint on white.
CONTRAST = "button[role=tab].selected { color: #b23c05 } .dark button[role=tab].selected { color: #f97316 }"
CLEANING = (600, 3600)  # every ten minutes, videos that are an hour old are removed


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
        pipeline: what plays.
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
            f"# {TITLE}\nThere is no game and no map: a video model draws every picture from those before "
            f"it and from what you press. It knows only {world or 'what it was trained with'}."
        )
        with gr.Tab("Play"):
            play_tab(pipeline, players, starts, size)
        with gr.Tab("Continue a video"):
            continue_tab(pipeline, players, visitors, size)
        if players.games_share_a_device:  # it plays four at once
            with gr.Tab("Compare context"):
                compare_tab(pipeline, players, visitors, starts, size)
        gr.Markdown("To load another model: `diffusers-far play --checkpoint FOLDER`")
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
        css=CONTRAST,
        footer_links=[],
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
    variant: str | None = None,
    world: str | None = None,
    lent_gpu: Lend | None = None,
) -> None:
    """Serve the app until it is interrupted or terminated; no file of it is left behind.

    Args:
        checkpoint: folder or repo id; the shipped one in a checkout.
        episodes: split of a videofolder to start from; None for none.
        device: by default a GPU if there is one.
        host: address to listen on; 0.0.0.0 for all.
        port: by default the first free one from 7860 on.
        max_players: games at once.
        variant: of the checkpoint's weights, such as fp16.
        world: what the model was trained with, in a word or two; known of the shipped models.
        lent_gpu: `spaces.GPU` in a Space on ZeroGPU, where a game has a GPU only while it is played.
    """
    stop, visitors = threading.Event(), Visitors()
    if threading.current_thread() is threading.main_thread():  # others may not
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with tempfile.TemporaryDirectory(prefix="diffusers-far-") as temporary:
        os.environ.setdefault("GRADIO_TEMP_DIR", temporary)  # uploads, and videos for visitors
        pipeline = load_pipeline(checkpoint, device, variant=variant)
        players = Players(max_players)
        if lent_gpu is not None:
            players = LentPlayers(Lender(lent_gpu, pipeline), max_players)
        app = build_app(
            pipeline,
            None if episodes is None else find(episodes, "episodes"),
            players,
            visitors,
            world=world or WORLDS.get(Path(checkpoint).name),
        )
        # Not rendered by a server of Node's, as Spaces may ask for: the game is JavaScript of the page.
        serve(app, visitors, server_name=host, server_port=port, ssr_mode=False)
        try:
            while not stop.wait(3600):
                pass
        except KeyboardInterrupt:
            pass
        finally:
            app.close()
