"""The command `diffusers-far`: what the Python API does, under the same names."""

import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from . import __version__
from .loading import check_device, load_pipeline
from .presets import PRESETS
from .shipped import ANY_STEP_CHECKPOINT, CHECKPOINT, EPISODES, find

if TYPE_CHECKING:
    import numpy as np

INTERRUPTED = 130  # what shells expect after Ctrl-C
NUM_NEW_FRAMES = 32
MAX_GIVEN_FRAMES = 600
FRAME_RATE = 10  # of videos made from nothing, and where a file does not say
DTYPES = ("float32", "bfloat16", "float16")
EXPORT_DTYPES = ("float32", "float16", "int8")

FILE = click.Path(dir_okay=False, path_type=Path)
KEPT = "Of the context: a number, all, or as many as the model was trained with."
VARIANT = click.option("--variant", help="Of the weights' files, such as fp16.")
DEVICE = click.option("--device", help="Default: a GPU if there is one.")


class FrameCount(click.ParamType):  # type: ignore[type-arg] # generic only in newer releases
    """What `ContextSchedule` takes: a number, "trained", or None, which is written "all"."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in ("trained", "all", None):
            return "trained" if value == "trained" else None
        return click.INT.convert(value, param, ctx)


class Slope(click.ParamType):  # type: ignore[type-arg]
    """A number, or "auto"."""

    name = "slope"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else click.FLOAT.convert(value, param, ctx)


class Command(click.Command):
    """A wrong argument, file or disk ends with one line instead of a traceback, and with exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, FloatingPointError) as error:
            raise click.ClickException(" ".join(str(error).split())) from error


class Commands(click.Group):
    command_class = Command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """FAR, the frame-autoregressive video model: continue videos, play world models, train your own.

    \b
    diffusers-far demo
    diffusers-far continue walk.mp4 --num-frames 64 --actions "forward*16 left*6" --output longer.mp4
    diffusers-far play
    diffusers-far train my-videos
    diffusers-far COMMAND --help
    """


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """The arguments of a pipeline call that commands share."""
    options = [
        click.option("--checkpoint", default=CHECKPOINT, show_default=True, help="Folder or repo id."),
        click.option(
            "--output", type=FILE, default="far.mp4", show_default=True, help="Name of an mp4, webm or gif."
        ),
        click.option(
            "--num-frames",
            type=int,
            help=f"Given ones included; default: {NUM_NEW_FRAMES} more than are given.",
        ),
        click.option(
            "--actions",
            help='Of the new frames, such as "forward*8 left*4", "forward+left*8" of groups of actions or '
            '"x=0.5+y=-1*8" of vectors; or an .npy of them, [T, ...]. The last one goes on.',
        ),
        click.option("--class-labels", type=int, help="Class of the video."),
        click.option("--guidance-scale", type=float, default=1.0, show_default=True),
        click.option("--num-inference-steps", type=int, help="Per frame; default: the checkpoint's."),
        click.option("--flex-rope-slope", type=Slope(), help="A number, or auto. Default: the checkpoint's."),
        click.option(
            "--max-short-frames", type=FrameCount(), default="trained", show_default=True, help=KEPT
        ),
        click.option("--max-long-frames", type=FrameCount(), default="trained", show_default=True, help=KEPT),
        click.option("--num-sink-frames", type=int, default=0, show_default=True),
        click.option("--refresh-interval", type=int, default=1, show_default=True, help="0: never."),
        click.option("--height", type=int, help="Of new frames, in pixels; default: the checkpoint's."),
        click.option("--width", type=int, help="As --height. With one of them, the result has this size."),
        click.option("--seed", type=int, default=0, show_default=True),
        click.option(
            "--fps",
            type=click.FloatRange(0, 1000, min_open=True),
            help=f"Frames per second; default: the given video's; {FRAME_RATE} without one.",
        ),
        DEVICE,
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
    make_video(None, 0, **options)


@main.command("continue")
@click.argument("video", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--num-context",
    type=click.IntRange(1),
    default=MAX_GIVEN_FRAMES,
    show_default=True,
    help="Last frames of VIDEO to use, at most.",
)
@sampling_options
def continue_video(video: Path, num_context: int, **options: Any) -> None:
    """Continue VIDEO, an mp4, gif or another common kind.

    The result begins with the last frames of VIDEO as they are, and has its size and frame rate. The model
    works at the size that it was trained at: of frames of another shape it sees the middle, and draws there.

    \b
    diffusers-far continue walk.mp4
    diffusers-far continue walk.mp4 --num-context 32 --num-frames 64 --actions "forward*16 left*6"
    """
    make_video(video, num_context, **options)


def make_video(
    video: Path | None,
    num_context: int,
    checkpoint: str,
    output: Path,
    num_frames: int | None,
    actions: str | None,
    seed: int,
    fps: float | None,
    device: str | None,
    dtype: str,
    variant: str | None,
    height: int | None,
    width: int | None,
    max_short_frames: Any,
    max_long_frames: Any,
    num_sink_frames: int,
    refresh_interval: int,
    **options: Any,
) -> None:
    """Write the given frames and then, as they come, new ones; after Ctrl-C, the frames so far."""
    import numpy as np  # after --help, which should come at once
    import torch

    from .context_schedule import ContextSchedule
    from .inputs import check_size, fit_frame, parse_actions
    from .video_files import VideoFile, VideoWriter

    check_output_option(output)
    if video is not None and output.exists() and output.samefile(video):
        raise ValueError(f"--output: {output} is the video to continue; take another name")
    file = None if video is None else VideoFile(video)
    schedule = ContextSchedule(max_short_frames, max_long_frames, num_sink_frames, refresh_interval or None)
    pipeline = load_pipeline(checkpoint, device, dtype, variant)
    config, space = pipeline.config, pipeline.transformer.action_space
    if actions is not None and space is None:
        raise ValueError("--actions: this model has no actions")
    table: Any = None
    if actions is not None and actions.endswith(".npy"):
        table = read_actions(Path(actions), space)
    elif actions is not None:
        table = parse_actions(actions, config.action_names, space, max(1, num_frames or NUM_NEW_FRAMES))
    # The default schedule keeps no more frames than these, so the model needs no others.
    num_seen = config.num_training_frames if schedule == ContextSchedule() else None
    num_seen = min(num_context, num_seen or num_context)
    seen = np.empty(0)  # the last of the given frames, in a ring
    size = (height or pipeline.default_size[0], width or pipeline.default_size[1])  # where the model works
    keep_size = height is None and width is None
    code = 0

    with VideoWriter(output, fps or (file and file.frame_rate) or FRAME_RATE) as writer:
        for frame in () if file is None else file.last_frames(num_context):
            size = (size[0] or frame.shape[0], size[1] or frame.shape[1])
            check_size(*size, pipeline.frame_multiple)
            if writer.num_frames == 0:
                seen = np.empty((num_seen, *size, 3), np.uint8)
            place = writer.num_frames % num_seen
            seen[place] = fit_frame(frame, *size)
            writer.write(frame if keep_size else seen[place])
        num_given = writer.num_frames
        if num_given > num_seen:
            seen = np.roll(seen, -(num_given % num_seen), axis=0)
        shape = frame.shape[:2] if num_given and keep_size else None
        num_new = NUM_NEW_FRAMES if num_frames is None else num_frames - num_given
        if num_new < 1:
            raise ValueError(f"--num-frames {num_frames} must be more than the {num_given} frames given")
        if shape is not None and shape[0] * size[1] != shape[1] * size[0]:
            click.echo("The model sees the middle of the frames, and draws there.", err=True)
        frames = pipeline.stream(
            actions=None if table is None else (table[min(i, len(table) - 1)] for i in range(num_new)),
            num_new_frames=num_new,
            video=seen[:num_given] if num_given else None,
            height=size[0],
            width=size[1],
            context_schedule=schedule,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            **options,
        )
        progress = Progress(num_new)
        try:
            for number, made in enumerate(frames, 1):
                writer.write(made[0] if shape is None else in_the_middle(made[0], *shape))
                progress(number)
        except KeyboardInterrupt:
            code = INTERRUPTED
        except FloatingPointError as error:  # the frames before it are kept
            click.echo(f"Error: {error}", err=True)
            code = 1
    if writer.num_frames:
        click.echo(f"{output}: {writer.num_frames} frames, {num_given} of them given")
    sys.exit(code)


def read_actions(file: Path, space: Any) -> Any:
    """Actions `[T, ...]` of an .npy, checked; `space` is what the model takes."""
    import numpy as np
    import torch

    from .inputs import action_tensor

    try:
        actions = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"--actions: {file} cannot be read as an .npy: {error}") from error
    if actions.ndim < 1 or not len(actions) or actions.shape[1:] != space.shape:
        takes = "".join(f", {side}" for side in space.shape)
        raise ValueError(f"--actions: {file} has shape {list(actions.shape)}; it takes [T{takes}]")
    shape = (1, len(actions))
    checked = action_tensor(f"--actions: {file}", actions[None], space, shape, torch.device("cpu"))
    return None if checked is None else checked[0]


def check_output_option(output: Path) -> None:
    """Raise a ValueError unless a video can be written to `output`."""
    from .video_files import check_output

    try:
        check_output(output)
    except ValueError as error:
        raise ValueError(f"--output: {error}") from error


def in_the_middle(frame: "np.ndarray", height: int, width: int) -> "np.ndarray":
    """A new frame `[h, w, 3]`, enlarged to where a frame of `height` x `width` was cropped for the model."""
    import numpy as np
    from PIL import Image

    scale = min(height / frame.shape[0], width / frame.shape[1])
    size = (round(frame.shape[0] * scale), round(frame.shape[1] * scale))
    image = Image.fromarray((frame * 255).round().clip(0, 255).astype(np.uint8))
    whole = np.zeros((height, width, 3), np.uint8)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    whole[top : top + size[0], left : left + size[1]] = np.asarray(image.resize(size[::-1]))
    return whole


class Progress:
    """Says how many frames there are: in place on a terminal, elsewhere in a line every few seconds."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.in_place = sys.stderr.isatty()
        self.started = self.said = time.monotonic()

    def __call__(self, number: int) -> None:
        now = time.monotonic()
        if number < self.total and now - self.said < (0.1 if self.in_place else 5):
            return
        self.said = now
        rate = number / max(now - self.started, 1e-6)
        line = f"{number} of {self.total} new frames, {rate:.1f} frames/s"
        is_last = not self.in_place or number == self.total
        click.echo(f"\r{line}" if self.in_place else line, nl=is_last, err=True)


@main.command()
@click.option("--checkpoint", default=CHECKPOINT, show_default=True, help="Of a model with actions.")
@click.option("--episodes", default=EPISODES, show_default=True, help="Split of a videofolder with actions.")
@click.option("--episode", type=int, default=0, show_default=True, help="Which of its episodes.")
@click.option("--start", type=int, default=0, show_default=True, help="First frame of the context.")
@click.option("--num-context", type=int, default=32, show_default=True, help="Frames that the model sees.")
@click.option("--num-frames", type=int, default=64, show_default=True, help="Context included.")
@click.option("--num-inference-steps", type=int, help="Per frame; default: the checkpoint's.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--output", type=FILE, default="demo.mp4", show_default=True, help="Name of an mp4, webm or gif."
)
@DEVICE
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

    from .demo import load_episode, side_by_side
    from .video_files import save_video

    check_output_option(output)
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


@main.command()
@click.argument("transformer", type=Path, required=False, metavar="[FAR.pth]")
@click.option("--autoencoder", type=Path, metavar="DCAE.pth", help="Published autoencoder.")
@click.option(
    "--preset", type=click.Choice(list(PRESETS)), metavar="NAME", help=f"One of {', '.join(PRESETS)}."
)
@click.option("--config", type=Path, metavar="FAR.json", help="The authors' configuration.")
@click.option("--autoencoder-config", type=Path, metavar="DCAE.json", help="Of diffusers' AutoencoderDC.")
@click.option(
    "--num-training-frames",
    type=click.IntRange(1),
    help="Of the longest training clip; with --config (default: unknown).",
)
@click.option("--reverse", type=Path, metavar="DIR", help="Convert this pipeline folder back.")
@click.option("--output", type=Path, required=True, help="Pipeline folder, or FAR.pth with --reverse.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the weights; default: as in the files.")
def convert(
    transformer: Path | None,
    autoencoder: Path | None,
    preset: str | None,
    config: Path | None,
    autoencoder_config: Path | None,
    num_training_frames: int | None,
    reverse: Path | None,
    output: Path,
    dtype: str | None,
) -> None:
    """Convert published FAR checkpoints to a pipeline folder of diffusers-far, and back.

    \b
    diffusers-far convert FAR.pth --autoencoder DCAE.pth --preset far-b-long-dmlab --output DIR
    diffusers-far convert FAR.pth --autoencoder DCAE.pth --config FAR.json --autoencoder-config DCAE.json \\
        --output DIR
    diffusers-far convert --reverse DIR --output FAR.pth --autoencoder DCAE.pth

    In a checkout, `python conversion/convert_far.py` does the same. The files are PyTorch or safetensors
    files. FAR.json has the authors' keys (`short_term_ctx_winsize`, `condition_cfg`, `context_patch_size`,
    ...); a `slope_scale` other than 0 becomes the pipeline's default `flex_rope_slope`. DCAE.json is a
    configuration of diffusers' `AutoencoderDC`. Every tensor must be known and of the right shape, or nothing
    is written.

    The way back writes the published names. Our models do not have `context_proj_out`, which published Long
    files have and neither loss nor sampling uses: it is written as zeros, so that the authors' code loads the
    file.
    """
    configs = (config, autoencoder_config)
    if reverse is not None:
        if transformer or preset or dtype or any(configs):
            raise click.UsageError("--reverse goes with --output and --autoencoder only")
    elif transformer is None or autoencoder is None:
        raise click.UsageError("needs FAR.pth and --autoencoder DCAE.pth")
    elif (preset is None and not all(configs)) or (preset is not None and any(configs)):
        raise click.UsageError("needs either --preset, or both --config and --autoencoder-config")
    if num_training_frames is not None and config is None:
        raise click.UsageError("--num-training-frames goes with --config: presets know it")

    import torch
    from safetensors import SafetensorError

    from .convert_published import convert_back, convert_files

    try:
        if reverse is not None:
            zeros = convert_back(reverse, output, autoencoder)
            click.echo(f"{output}: written" + (f", with zeros for {', '.join(zeros)}" if zeros else ""))
            return
        assert transformer is not None and autoencoder is not None
        pipeline = convert_files(
            transformer,
            autoencoder,
            output,
            preset_name=preset,
            config_file=config,
            autoencoder_config_file=autoencoder_config,
            num_training_frames=num_training_frames,
            dtype=None if dtype is None else getattr(torch, dtype),
        )
    except (RuntimeError, SafetensorError) as error:  # of files that PyTorch or safetensors cannot read
        raise ValueError(str(error)) from error
    millions = sum(parameter.numel() for parameter in pipeline.transformer.parameters()) / 1e6
    click.echo(f"{output}: written, transformer of {millions:.1f} million parameters")


@main.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="VIDEOS [OPTIONS]")
def train(words: tuple[str, ...]) -> None:
    """Train a model on VIDEOS: a folder, or a repo of the Hub.

    \b
    diffusers-far train my-videos --output-dir my-model --max-minutes 60
    diffusers-far train my-videos --pretrained FOLDER_OR_REPO --lora-rank 16 --max-minutes 10
    diffusers-far train my-videos --dry-run
    """
    try:
        from .training.train_folder import main as train_folder

        code = train_folder(words)
    except ModuleNotFoundError as error:
        if error.name not in ("datasets", "peft", "pyarrow", "torchmetrics", "yaml"):
            raise
        raise ValueError(f'training needs {error.name}: pip install "diffusers-far[train]"') from error
    sys.exit(code)


@main.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="CHECKPOINT DATA [OPTIONS]")
def evaluate(words: tuple[str, ...]) -> None:
    """Measure CHECKPOINT on DATA by a published protocol: PSNR, SSIM, LPIPS, FVD.

    \b
    diffusers-far evaluate checkpoints/far-doom-maze-64 my-videos --protocol next --output-dir figures
    """
    try:
        from .evaluation.run import main as evaluate_model

        evaluate_model(words)
    except ModuleNotFoundError as error:
        if error.name not in ("datasets", "pyarrow", "torchmetrics", "yaml"):
            raise
        raise ValueError(f'evaluation needs {error.name}: pip install "diffusers-far[eval]"') from error


@main.command()
@click.option("--checkpoint", default=ANY_STEP_CHECKPOINT, show_default=True)
@click.option("--episodes", default=EPISODES, show_default=True, help="Videofolder to start from.")
@DEVICE
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 for all addresses.")
@click.option("--port", type=click.IntRange(1, 65535), help="Default: the first free one from 7860 on.")
@click.option("--max-players", type=click.IntRange(1), default=8, show_default=True)
@click.option("--static", is_flag=True, help="The page without a server: the browser runs the model.")
@click.option(
    "--dtype",
    type=click.Choice(EXPORT_DTYPES),
    default="float16",
    show_default=True,
    help="Of the export that --static serves.",
)
def play(static: bool, dtype: str, **options: Any) -> None:
    """Serve the browser demo: play a world model, continue a video, compare kinds of context.

    With --static, the visitor's browser runs the model, exported into the cache at first need; the checkpoint
    may be a folder that `diffusers-far export` wrote.

    \b
    diffusers-far play
    diffusers-far play --checkpoint far-b-long-minecraft --device cuda --host 0.0.0.0
    diffusers-far play --static
    """
    given = click.get_current_context().get_parameter_source
    ignored = ("device", "max_players") if static else ("dtype",)
    for name in ignored:
        if given(name) is ParameterSource.COMMANDLINE:
            text = f"--{name.replace('_', '-')} goes {'without' if static else 'with'} --static"
            raise click.UsageError(text)
    if static:
        checkpoint = options["checkpoint"]
        for name in ("dtype", "episodes") if (Path(checkpoint) / "rollout.json").is_file() else ():
            if given(name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"--{name} goes with a checkpoint, and {checkpoint} is an export")
        serve_static(checkpoint, options["episodes"], dtype, options["host"], options["port"])
        return
    try:
        from .browser.app import launch
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError('the browser demo needs gradio: pip install "diffusers-far[app]"') from error
    if options["device"] is not None:
        check_device(options["device"])
    launch(**options)


def serve_static(checkpoint: str, episodes: str, dtype: str, host: str, port: int | None) -> None:
    """Serve the page of web/ with a model until Ctrl-C."""
    from .browser.static_page import find_page, make_server

    page = find_page("static")
    model = Path(checkpoint)
    if not (model / "rollout.json").is_file():
        need_export()
        from .browser.starts import starts_for_export
        from .export.kept_export import kept_export

        pipeline = load_pipeline(checkpoint, "cpu", "float32")
        folder = find(episodes, "episodes")
        starts = starts_for_export(folder, pipeline.default_size, pipeline.transformer.action_space)
        click.echo("Exporting the model, unless the cache has it; about a minute the first time", err=True)
        model = kept_export(pipeline, dtype, starts)
    server = make_server(page, model, host, port)
    click.echo(f"Play at http://{host}:{server.server_port}/ until Ctrl-C; model: {model}")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


@main.command()
@click.argument("checkpoint")
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--format",
    type=click.Choice(("onnx",)),
    default="onnx",
    show_default=True,
    help="Of files.",
)
@click.option("--dtype", type=click.Choice(EXPORT_DTYPES), default="float32", show_default=True)
@click.option("--episodes", help="Videofolder to cut starts of games from; default: no starts.")
@click.option("--packed", is_flag=True, help="Also compressed copies of the files, which the page loads.")
@click.option("--height", type=int, help="Of the frames, in pixels; default: the checkpoint's.")
@click.option("--width", type=int, help="As --height.")
@click.option(
    "--num-inference-steps",
    type=int,
    multiple=True,
    help="That a player may choose from; repeat it. Default: 1, 2, 4, 8 and the checkpoint's.",
)
@click.option("--max-short-frames", type=FrameCount(), default="trained", show_default=True, help=KEPT)
@click.option("--max-long-frames", type=FrameCount(), default="trained", show_default=True, help=KEPT)
@VARIANT
def export(
    checkpoint: str,
    output: Path,
    format: str,
    dtype: str,
    variant: str | None,
    episodes: str | None,
    max_short_frames: Any,
    max_long_frames: Any,
    num_inference_steps: tuple[int, ...],
    packed: bool,
    **size: int | None,
) -> None:
    """Write CHECKPOINT, a folder or repo id, to the new folder OUTPUT as graphs that run without PyTorch.

    \b
    diffusers-far export checkpoints/far-doom-maze-64-any-step my-game --dtype int8
    """
    need_export()
    from .browser.starts import starts_for_export
    from .context_schedule import ContextSchedule
    from .export import export_onnx

    pipeline = load_pipeline(checkpoint, "cpu", "float32", variant)
    schedule = ContextSchedule(max_short_frames, max_long_frames)
    steps = num_inference_steps or None
    default_height, default_width = pipeline.default_size
    frame_size = size["height"] or default_height, size["width"] or default_width
    starts = []
    if episodes is not None:
        space = pipeline.transformer.action_space
        starts = starts_for_export(find(episodes, "episodes"), frame_size, space)
    export_onnx(
        pipeline,
        output,
        dtype,
        num_inference_steps=steps,
        context_schedule=schedule,
        starts=starts,
        packed=packed,
        **size,
    )
    megabytes = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    click.echo(f"{output}: written, {format} in {dtype}, {megabytes:.1f} MB")


def need_export() -> None:
    """Raise a ValueError where a package is missing that the export needs."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f'the export needs {name}: pip install "diffusers-far[onnx]"')


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
@click.argument("checkpoint")
@click.argument("repo_id")
@click.option("--private", is_flag=True, help="If the repository is new.")
@click.option("--token", help="Default: that of `hf auth login`.")
@VARIANT
@click.option("--revision", help="Of a model: branch; created where it does not exist.")
@click.option(
    "--sample-video",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Of a model: to add as sample.mp4.",
)
@click.option(
    "--space",
    type=click.Choice(("gradio", "static")),
    help="Upload a Space with the model: the app of `play`, or a page without a server.",
)
@click.option(
    "--dry-run", type=click.Path(path_type=Path), metavar="FOLDER", help="Only write the Space here."
)
@click.option("--title", help="Of the Space; default: the last part of REPO_ID.")
@click.option("--license", help="Of the Space; default: the license of the model's card.")
@click.option("--hardware", help="Of a gradio Space: cpu-basic (default), zero-a10g (ZeroGPU), t4-small, ...")
@click.option(
    "--episodes",
    help="Of the Space: videofolder to start games from. Default: the shipped one for shipped models.",
)
@click.option("--dtype", type=click.Choice(EXPORT_DTYPES), help="Of a static Space; default: float16.")
@click.option("--page", help="Of a static Space: the folder that `make web` made; default: web/dist.")
def push(
    checkpoint: str,
    repo_id: str,
    private: bool,
    token: str | None,
    variant: str | None,
    revision: str | None,
    sample_video: Path | None,
    space: str | None,
    dry_run: Path | None,
    **space_options: str | None,
) -> None:
    """Upload the pipeline folder CHECKPOINT to REPO_ID on the Hub, with a model card if it has none.

    With --space, upload a Space in which people play CHECKPOINT: a folder, which goes into the Space, or a
    repo id, which a gradio Space loads. docs/spaces.md tells more.

    \b
    diffusers-far push runs/my-model me/my-model --private
    diffusers-far push runs/my-model me/my-game --space gradio --hardware zero-a10g
    diffusers-far push me/my-model me/my-game --space static --dry-run my-game
    """
    of_space = {"dry_run": dry_run, **space_options}
    of_model = {"revision": revision, "sample_video": sample_video}
    for name, value in (of_model if space else of_space).items():
        if value is not None:
            raise click.UsageError(
                f"--{name.replace('_', '-')} goes {'without' if space else 'with'} --space"
            )
    if space is None:
        if not Path(checkpoint).is_dir():
            raise click.UsageError(f"CHECKPOINT: {checkpoint} is not there; it takes a pipeline folder")
        from .hub import push_folder, told_in_our_words

        pipeline = load_pipeline(checkpoint, "cpu", variant=variant)
        with told_in_our_words(repo_id):
            click.echo(push_folder(checkpoint, repo_id, pipeline, private, revision, token, sample_video))
        return
    if space == "static":
        need_export()
    from .space import push_space, write_space

    if dry_run is not None:
        write_space(dry_run, checkpoint, repo_id, space, variant=variant, **space_options)
        click.echo(f"{dry_run}: written")
        return
    with tempfile.TemporaryDirectory() as folder:
        written = write_space(
            Path(folder) / "space", checkpoint, repo_id, space, variant=variant, **space_options
        )
        click.echo(push_space(written, repo_id, space, private, space_options["hardware"], token))


if __name__ == "__main__":
    main()
