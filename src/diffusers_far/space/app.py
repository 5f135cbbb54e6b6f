"""The browser demo of a FAR checkpoint.

diffusers-far play --checkpoint FOLDER_OR_REPO
"""

from pathlib import Path

import gradio as gr
import torch

from ..demo import EPISODES, find
from ..pipeline_far_video import FARVideoPipeline
from .compare import compare_tab
from .continue_video import continue_tab
from .play import play_tab
from .players import Players
from .starts import cut_starts, read_episodes
from .uploads import MAX_UPLOAD_MB

CHECKPOINT = "checkpoints/far-doom-maze-64-any-step"
TITLE = "FAR: video, frame after frame"


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
    if pipeline.config.sample_size is None:
        raise ValueError(f"checkpoint={checkpoint!r} has no sample_size in its model_index.json")
    return pipeline


def build_app(
    pipeline: FARVideoPipeline, episodes: Path | None = None, players: Players | None = None
) -> gr.Blocks:
    """The app.

    Args:
        pipeline: see [`load`].
        episodes: split of a videofolder whose frames games may start from.
        players: who plays; by default up to 8.
    """
    players = players or Players()
    starts = cut_starts(read_episodes(episodes)) if episodes is not None else []
    with gr.Blocks(title=TITLE) as app:
        gr.Markdown(f"# {TITLE}")
        with gr.Tab("Play"):
            gr.Markdown(
                "Arrow keys or WASD, or the buttons. The model makes up all of the picture, one frame after "
                "the other, from the frames before it and from what you press."
            )
            play_tab(pipeline, players, starts)
        with gr.Tab("Continue a video"):
            continue_tab(pipeline, players)
        with gr.Tab("Compare context"):
            compare_tab(pipeline, players, starts)
    return app.queue(default_concurrency_limit=2, max_size=16)


def launch(
    checkpoint: str = CHECKPOINT,
    episodes: str | None = EPISODES,
    device: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    max_players: int = 8,
) -> None:
    """Serve the app until it is interrupted.

    Args:
        checkpoint: folder or repo id; the shipped one in a checkout.
        episodes: split of a videofolder to start from; None for none.
        device: by default a GPU if there is one.
        host: address to listen on; 0.0.0.0 for all.
        port: by default the first free one from 7860 on.
        max_players: games at once.
    """
    folder = str(find(checkpoint, "checkpoint")) if checkpoint == CHECKPOINT else checkpoint
    app = build_app(
        load(folder, device),
        None if episodes is None else find(episodes, "episodes"),
        Players(max_players),
    )
    app.launch(server_name=host, server_port=port, max_file_size=f"{MAX_UPLOAD_MB}mb")
