"""The command `diffusers-far`: what the Python API does, under the same names."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from . import __version__

CHECKPOINT = "checkpoints/far-doom-maze-64"
EPISODES = "data/samples/doom-maze-64/validation"
INTERRUPTED = 130  # what shells expect after Ctrl-C
OUTPUT = click.Path(dir_okay=False, path_type=Path)
OUTPUT_HELP = "Name of an mp4, webm or gif."
VARIANT = click.option("--variant", help="Of the weights' files, such as fp16.")
DTYPES = ("float32", "bfloat16", "float16")


class Commands(click.Group):
    """A wrong argument, file or disk ends with one line instead of a traceback, and with exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            raise click.ClickException(" ".join(str(error).split())) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """FAR, the frame-autoregressive video model: continue videos, play world models, convert checkpoints.

    \b
    diffusers-far demo
    diffusers-far continue walk.mp4 --num-frames 64 --actions "forward*16 left*6" --output longer.mp4
    diffusers-far play
    diffusers-far COMMAND --help
    """


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """The arguments of a pipeline call that commands share."""
    options = [
        click.option("--checkpoint", default=CHECKPOINT, show_default=True, help="Folder or repo id."),
        click.option(
            "--output", type=click.Path(dir_okay=False, path_type=Path), default="far.mp4", show_default=True
        ),
        click.option("--num-frames", type=int, default=32, show_default=True, help="Context included."),
        click.option(
            "--actions", help='Of the new frames, such as "forward*8 left*4"; the last one goes on.'
        ),
        click.option("--class-labels", type=int, help="Class of the video."),
        click.option("--guidance-scale", type=float, default=1.0, show_default=True),
        click.option("--num-inference-steps", type=int, help="Per frame; default: the checkpoint's."),
        click.option("--flex-rope-slope", type=float, help="Default: the checkpoint's."),
        click.option("--max-short-frames", type=int, help="Of the context; default: all."),
        click.option("--max-long-frames", type=int, help="Of the context; default: all."),
        click.option("--num-sink-frames", type=int, default=0, show_default=True),
        click.option("--refresh-interval", type=int, default=1, show_default=True, help="0: never."),
        click.option("--height", type=int, help="In pixels; default: the checkpoint's."),
        click.option("--width", type=int, help="In pixels; default: the checkpoint's."),
        click.option("--seed", type=int, default=0, show_default=True),
        click.option("--fps", type=click.IntRange(1, 120), default=10, show_default=True, help="Of the mp4."),
        click.option("--device", help="Default: a GPU if there is one."),
        click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True),
        VARIANT,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@sampling_options
def generate(**options: Any) -> None:
    """Make a video from nothing, or of a class.

    \b
    diffusers-far generate --checkpoint far-b-ucf101 --class-labels 3 --guidance-scale 2 --num-frames 16
    """
    make_video(None, None, **options)


@main.command("continue")
@click.argument("video", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--num-context", type=click.IntRange(1), help="Last frames of VIDEO to use; default: all.")
@sampling_options
def continue_video(video: Path, num_context: int | None, **options: Any) -> None:
    """Continue VIDEO, an mp4, gif or another file that PyAV reads.

    \b
    diffusers-far continue walk.mp4 --num-context 32 --num-frames 64 --actions "forward*16 left*6"
    """
    make_video(video, num_context, **options)


def make_video(
    video: Path | None,
    num_context: int | None,
    checkpoint: str,
    output: Path,
    num_frames: int,
    actions: str | None,
    seed: int,
    fps: int,
    device: str | None,
    dtype: str,
    variant: str | None,
    max_short_frames: int | None,
    max_long_frames: int | None,
    num_sink_frames: int,
    refresh_interval: int,
    **options: Any,
) -> None:
    """Call the pipeline, and write what it made; after Ctrl-C, the frames so far."""
    import torch  # after --help, which should come at once

    from .context_schedule import ContextSchedule
    from .inputs import parse_actions
    from .video_files import check_output, read_video, save_video

    check_output(output)
    context = None if video is None else read_video(video)[-(num_context or 0) :]
    pipeline = load_pipeline(checkpoint, device, dtype, variant)
    num_given, table = 0 if context is None else len(context), None
    if actions is not None:
        num_actions = pipeline.transformer.config.num_actions
        if num_actions is None:
            raise ValueError("--actions: this model has no actions")
        new = parse_actions(
            actions, pipeline.config.action_names, num_actions, max(1, num_frames - num_given)
        )
        table = [-1] * num_given + new  # nobody knows what led to the given frames
    schedule = ContextSchedule(max_short_frames, max_long_frames, num_sink_frames, refresh_interval or None)
    code = 0
    try:
        frames = pipeline(
            video=context,
            num_frames=num_frames,
            actions=table,
            context_schedule=schedule,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            **options,
        ).frames
    except KeyboardInterrupt:
        frames, code = pipeline.frames_so_far("np"), INTERRUPTED
    if frames.shape[1] > 0:
        save_video(frames[0], output, fps)
        click.echo(f"{output}: {frames.shape[1]} frames, {num_given} of them given")
    sys.exit(code)


def load_pipeline(
    checkpoint: str, device: str | None = None, dtype: str = "float32", variant: str | None = None
) -> Any:
    """A pipeline from a folder or a repo id."""
    import torch

    from .pipeline_far_video import FARVideoPipeline

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = str(locate(checkpoint))
    options = {"dtype": getattr(torch, dtype), "variant": variant}
    return FARVideoPipeline.from_pretrained(folder, **options).to(device)


def locate(checkpoint: str) -> str | Path:
    """A folder as given or, for the shipped models, in the checkout; else a repo id."""
    shipped = Path(__file__).resolve().parents[2] / checkpoint
    if Path(checkpoint).exists() or not shipped.exists():
        looks_local = checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") != 1
        if looks_local and not Path(checkpoint).exists():
            raise ValueError(
                f"--checkpoint: {checkpoint} is neither a folder nor a repo id such as name/model"
            )
        return checkpoint
    return shipped


PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@main.command()
@click.option("--checkpoint", default=CHECKPOINT, show_default=True, help="Of a model with actions.")
@click.option("--episodes", default=EPISODES, show_default=True, help="Split of a videofolder with actions.")
@click.option("--episode", type=int, default=0, show_default=True, help="Which of its episodes.")
@click.option("--start", type=int, default=0, show_default=True, help="First frame of the context.")
@click.option("--num-context", type=int, default=32, show_default=True, help="Frames that the model sees.")
@click.option("--num-frames", type=int, default=64, show_default=True, help="Context included.")
@click.option("--num-inference-steps", type=int, help="Per frame; default: the checkpoint's.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--output", type=OUTPUT, default="demo.mp4", show_default=True, help=OUTPUT_HELP)
@click.option("--device", help="Default: a GPU if there is one.")
def demo(
    checkpoint: str,
    episodes: str,
    episode: int,
    start: int,
    num_context: int,
    num_frames: int,
    num_inference_steps: int | None,
    seed: int,
    output: Path,
    device: str | None,
) -> None:
    """Continue a held-out episode of a real maze with the shipped model, truth beside prediction.

    \b
    diffusers-far demo --output demo.mp4
    """
    import torch

    from .demo import find, load_episode, side_by_side
    from .video_files import check_output, save_video

    check_output(output)
    video, actions = load_episode(find(episodes, "episodes"), episode)
    end = start + num_frames
    if start < 0 or num_context < 1 or num_frames <= num_context or end > len(video):
        raise ValueError(
            f"--start {start} --num-context {num_context} --num-frames {num_frames} must lie within the "
            f"{len(video)} frames of the episode, with frames left to predict"
        )
    pipeline = load_pipeline(checkpoint, device)
    clip, started = video[start:end], time.perf_counter()
    prediction = pipeline(
        video=clip[:num_context],
        actions=actions[start:end],
        num_frames=num_frames,
        num_inference_steps=num_inference_steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames[0]
    seconds, num_new = time.perf_counter() - started, num_frames - num_context
    save_video(side_by_side(clip / 255.0, prediction, num_context), output, 10)
    click.echo(
        f"{output}: {num_context} frames of context, then {num_new} predicted from their actions "
        f"(left: truth) in {seconds:.1f} s, {num_new / seconds:.1f} frames/s with decoding"
    )


@main.command(context_settings=PASS_ON, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def convert(arguments: tuple[str, ...]) -> None:
    """Convert published checkpoints to a pipeline folder, and back."""
    from .convert_published import main as run

    sys.exit(run(list(arguments)))


@main.command()
@click.option("--checkpoint", default="checkpoints/far-doom-maze-64-any-step", show_default=True)
@click.option("--episodes", default=EPISODES, show_default=True, help="Videofolder to start from.")
@click.option("--device", help="Default: a GPU if there is one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 for all addresses.")
@click.option("--port", type=click.IntRange(1, 65535), help="Default: the first free one from 7860 on.")
@click.option("--max-players", type=click.IntRange(1), default=8, show_default=True)
def play(**options: Any) -> None:
    """Serve the browser demo: play a world model, continue a video, compare kinds of context.

    \b
    diffusers-far play
    diffusers-far play --checkpoint far-b-long-minecraft --device cuda --host 0.0.0.0
    """
    try:
        from .space.app import launch
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError('the browser demo needs gradio: pip install "diffusers-far[app]"') from error
    launch(**options)


@main.command()
@click.argument("checkpoint")
@VARIANT
def info(checkpoint: str, variant: str | None) -> None:
    """What CHECKPOINT, a folder or repo id, is: sizes, conditions, defaults, memory of its context.

    \b
    diffusers-far info checkpoints/far-doom-maze-64
    """
    pipeline = load_pipeline(checkpoint, "cpu", variant=variant)
    from .hub import describe_pipeline

    for name, value in describe_pipeline(pipeline).items():
        click.echo(f"{name:20} {value}")


@main.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("repo_id")
@click.option("--private", is_flag=True, help="If the repository is new.")
@click.option("--revision", help="Branch; created where it does not exist.")
@click.option("--token", help="Default: that of `hf auth login`.")
@click.option(
    "--sample-video",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="To add as sample.mp4.",
)
@VARIANT
def push(checkpoint: Path, repo_id: str, variant: str | None, **options: Any) -> None:
    """Upload the pipeline folder CHECKPOINT to REPO_ID on the Hub, with a model card if it has none.

    \b
    diffusers-far push runs/my-model me/my-model --private
    """
    from .hub import push_folder

    pipeline = load_pipeline(str(checkpoint), "cpu", variant=variant)
    click.echo(push_folder(checkpoint, repo_id, pipeline, **options))


if __name__ == "__main__":
    main()
