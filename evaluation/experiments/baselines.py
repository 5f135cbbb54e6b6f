"""FAR beside other ways to predict video, on the same walks with the same actions.

    python evaluation/experiments/baselines.py LATENTS --autoencoder checkpoints/far-doom-maze-64/vae \
        --output OUTPUT --plot docs/experiments_baselines.png

LATENTS is what training.encode_latents wrote of videos with actions. Models of about as many weights learn
from the same clips of 32 frames, for the same number of floating-point operations (counted by PyTorch over a
whole step). `--minutes` of a processor's time (of the clock on a GPU) for FAR decide on how many:

- `FAR`: flow matching, each frame with a level of noise of its own, half of them given clean;
- `UNet`: diffusion of the next frame, as in DIAMOND, out of diffusers' parts: a `UNet2DModel` gets the noisy
  latents of a frame with those of the last four stacked as channels, their actions as planes that are one
  where an action was, and the action of the frame as class. It learns every frame of a clip but the first
  four, by flow matching, and is sampled frame by frame with FAR's solver and number of steps: only the
  network differs;
- `SimVP`: of the package vpredicto: convolutions that tell 16 frames from 16 in one forward, in pixels, by
  squared error, without noise. It knows no actions, so it gets them as channels of its input: frame t has,
  after its three colours, planes of the action of observed frame t, and of predicted frame t. So it has
  3 + 2A channels in and out, and the first three of these are the picture;
- `repeat`: the last observed frame, again and again.

Each predicts the last 16 frames of held-out clips after 16. PSNR and LPIPS of the first frame and of all,
beside the true latents, decoded, and FVD of all clips; FVD of so few is far too high and only compares.
LATENTS has no pixels: those that SimVP learns from are the true latents, decoded (OUTPUT/pixels, 8 bits). So
it has the slight advantage of learning the very frames that all are measured by.

Speed and memory are of a process of its own that predicts one clip again and again, from pixels to pixels:
for FAR and UNet the autoencoder's encoding and decoding counts. Speed is the median, of the clock, after a
warm-up. Memory is the peak beyond what the process had after its imports; on a GPU, the peak that PyTorch had
there. Loading is a part of it. Both are of the machine in results.json.

SimVP takes vpredicto and two packages that it imports, without what they ask for, as the model needs none of
that: pip install --no-deps vpredicto==0.2.1 scikit-image lazy-loader

Started again, it goes on; with other `--models`, too.
"""

import argparse
import io
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import FrozenDict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout: this file is run as a script

from diffusers_far import FARVideoPipeline
from diffusers_far.attention import FARAttnProcessor
from diffusers_far.evaluation.tables import table
from diffusers_far.flow_matching import add_noise, set_timesteps, velocity_target
from diffusers_far.training.clips import Clips, LatentVideos, action_options
from diffusers_far.training.make_pipeline import make_scheduler
from diffusers_far.training.objectives import draw_noise
from diffusers_far.training.options import FAROptions
from diffusers_far.transformer_far import LATER_OPTIONS
from diffusers_far.whole_files import written_whole
from evaluation.experiments.equal_time import (
    DTYPES,
    NEW_MODEL,
    QUALITY_HEADER,
    SAMPLING_STEPS,
    SIZES,
    Kept,
    MarkTrainer,
    Measures,
    Training,
    device_here,
    flops_per_step,
    make_coder,
    make_pipeline,
    means,
    new_model,
    parse_arguments,
    predict_in_parts,
    quality_cells,
    run_options,
    seconds_per_step,
    snapshot,
    sources_of,
    spread_clips,
    train_to_end,
    write_results,
)
from evaluation.plots import plotted
from evaluation.world_model import decode, predict

KINDS = ("FAR", "UNet", "SimVP")
OBSERVED = PREDICTED = 16  # frames of a clip; SimVP takes as many as it gives
BEFORE = 4  # frames that UNet sees
# Small, and for a GPU: about as many weights as FAR's.
UNETS = {False: (64, 128), True: (256, 448)}  # channels of UNet's levels
GROUPS = 8  # of channels that UNet normalizes together
SIMVPS = {
    False: {"hid_S": 16, "hid_T": 56, "N_S": 4, "N_T": 5},
    True: {"hid_S": 16, "hid_T": 264, "N_S": 4, "N_T": 4},
}
INSTALL = "pip install --no-deps vpredicto==0.2.1 scikit-image lazy-loader"
TIMED = 5  # predictions whose median counts
FULL = {"minutes": 60.0, "batch_size": 64, "measured_at_once": 32, "clips": 256}


# ------------------------------------------------------------------------------------------------------------
# Models


class Baseline(nn.Module):
    """A model of another kind, as the trainer of FAR takes it.

    Args:
        num_actions: A.
        sizes: that tell it from others.
    """

    short_window = None

    def __init__(self, num_actions: int, **sizes: Any) -> None:
        super().__init__()
        absent = dict.fromkeys((*LATER_OPTIONS, "num_classes"))
        self.config = FrozenDict(absent | {"num_actions": num_actions} | sizes)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def action_planes(actions: Tensor, num_actions: int, height: int, width: int) -> Tensor:
    """`[..., A, H, W]` of actions `[...]`: one in the plane of the action; all zero for -1."""
    ones = actions[..., None] == torch.arange(num_actions, device=actions.device)
    return ones[..., None, None].expand(*ones.shape, height, width)


class NextFrameUNet(Baseline):
    """Velocity of a noisy frame after four clean ones.

    Args:
        frame_shape: (C, h, w) of latents; h and w even.
        num_actions: A.
        channels: of its levels, two.
    """

    def __init__(
        self, frame_shape: tuple[int, int, int], num_actions: int, channels: tuple[int, int]
    ) -> None:
        super().__init__(num_actions, frame_shape=frame_shape, channels=channels)
        num_latents, height, width = frame_shape
        self.unet = UNet2DModel(
            sample_size=(height, width),
            in_channels=num_latents * (1 + BEFORE) + num_actions * BEFORE,
            out_channels=num_latents,
            block_out_channels=channels,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=32,
            # As in DIAMOND, the class scales and shifts what was normalized. By default it is added before,
            # and groups of so few channels normalize most of it away.
            resnet_time_scale_shift="scale_shift",
            norm_num_groups=GROUPS,
            num_class_embeds=num_actions + 1,  # the last: none
        )

    def forward(self, noisy: Tensor, timestep: Tensor, before: Tensor, actions: Tensor) -> Tensor:
        """`[B, C, h, w]`.

        Args:
            noisy: `[B, C, h, w]`.
            timestep: `[B]`, 1000 times the share of noise.
            before: `[B, 4, C, h, w]`, clean.
            actions: `[B, 5]` that led to these frames and to the noisy one, -1 for none.
        """
        count = self.config.num_actions
        past = action_planes(actions[:, :-1], count, *noisy.shape[-2:]).to(noisy.dtype)
        inputs = torch.cat([noisy, before.flatten(1, 2), past.flatten(1, 2)], dim=1)
        labels = torch.where(actions[:, -1] < 0, count, actions[:, -1])
        return self.unet(inputs, timestep, class_labels=labels).sample


class ActionSimVP(Baseline):
    """Frames after observed ones, as many, with actions as planes.

    Args:
        frame_shape: (3, H, W) of pixels; H and W multiples of four.
        num_actions: A.
        sizes: of vpredicto's SimVP.
    """

    def __init__(self, frame_shape: tuple[int, int, int], num_actions: int, **sizes: int) -> None:
        super().__init__(num_actions, frame_shape=frame_shape, **sizes)
        from vpredicto.models.SimVP import SimVP

        colours, height, width = frame_shape
        with redirect_stdout(io.StringIO()):  # it tells its sizes
            shape = (OBSERVED, colours + 2 * num_actions, height, width)
            self.simvp = SimVP(shape, **sizes, device="cpu")

    def forward(self, frames: Tensor, actions: Tensor) -> Tensor:
        """Predicted frames `[B, 16, 3, H, W]`.

        Args:
            frames: observed, `[B, 16, 3, H, W]` in [0, 1].
            actions: `[B, 32]` that led to these and to the predicted ones, -1 for none.
        """
        planes = action_planes(actions, self.config.num_actions, *frames.shape[-2:]).to(frames.dtype)
        inputs = torch.cat([frames, planes[:, :OBSERVED], planes[:, OBSERVED:]], dim=2)
        return self.simvp(inputs)[:, :, : frames.shape[2]]


def missing_package() -> str | None:
    """What hinders SimVP from being imported."""
    try:
        import vpredicto.models.SimVP  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def count_actions(videos: LatentVideos) -> int:
    """A of videos whose frames all have one of A actions.

    Raises:
        ValueError: for others.
    """
    known = [values for values in videos.actions if values is not None]
    found = action_options(known).get("num_actions") if len(known) == len(videos) else None
    if not isinstance(found, int):
        raise ValueError(f"latents: {videos.folder} has no actions, or others; it takes one number per frame")
    return found


def make_model(kind: str, videos: LatentVideos, full: bool) -> Any:
    """One of `KINDS`, from nothing.

    Args:
        videos: latents, or of SimVP pixels.
    """
    num_actions = count_actions(videos)
    if kind == "FAR":
        return new_model(videos, SIZES[full])
    torch.manual_seed(0)
    if kind == "UNet":
        return NextFrameUNet(videos.frame_shape, num_actions, UNETS[full])
    return ActionSimVP(videos.frame_shape, num_actions, **SIMVPS[full])


# ------------------------------------------------------------------------------------------------------------
# Training


class NextFrames:
    """Velocities of all frames of a clip but the first four, each after four clean ones.

    Args:
        model: that learns.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def loss(self, clips: Clips, generator: torch.Generator) -> Tensor:
        drawn = draw_noise(clips, generator)
        noise, sigmas, frames = (part[:, BEFORE:] for part in (*drawn, clips.latents))
        before = clips.latents[:, :-1].unfold(1, BEFORE, 1).movedim(-1, 2)  # [B, F - 4, 4, C, h, w]
        assert clips.actions is not None
        actions = clips.actions.unfold(1, BEFORE + 1, 1)
        inputs = (add_noise(frames, noise, sigmas), sigmas * 1000, before, actions)
        found = self.model(*(part.flatten(0, 1) for part in inputs))
        return (found.float() - velocity_target(frames, noise).flatten(0, 1)).square().mean()


class Pixels:
    """Squared error of the last 16 frames of a clip of pixels from 0 to 255.

    Args:
        model: that learns.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def loss(self, clips: Clips, generator: torch.Generator) -> Tensor:
        frames = clips.latents / 255
        found = self.model(frames[:, :OBSERVED], clips.actions)
        return (found.float() - frames[:, OBSERVED:]).square().mean()


class Trainer(MarkTrainer):
    """Trains one of `KINDS`."""

    def __init__(self, kind: str, full: bool, options: FAROptions) -> None:
        super().__init__(lambda videos: make_model(kind, videos, full), options)
        if kind == "UNet":
            self.objective = NextFrames(self.model)  # type: ignore[assignment]
        elif kind == "SimVP":
            self.objective = Pixels(self.model)  # type: ignore[assignment]


def training_of(kind: str, arguments: argparse.Namespace, steps: int | None = None) -> Training:
    """How one of `KINDS` is trained, for so many steps, or for a first look."""
    rates: dict[str, dict[str, Any]] = {
        "FAR": NEW_MODEL,
        "UNet": {"learning_rate": arguments.unet_rate},
        "SimVP": {"learning_rate": arguments.simvp_rate, "latents": str(arguments.output / "pixels")},
    }
    length = OBSERVED + PREDICTED
    options = run_options(arguments, kind, num_frames=length, clean_context_probability=0.5, **rates[kind])
    if steps is not None:
        options = replace(options, max_train_steps=steps, validation_steps=steps)
    return Training(lambda options: Trainer(kind, arguments.full, options), options)


def write_pixels(latents: Path, pixels: Path, coder: FARVideoPipeline, clips_at_once: int) -> None:
    """Decode latents, split by split, to files as theirs: `latents` are uint8 `[T, 3, H, W]` there."""
    for split in ("train", "validation"):
        videos = LatentVideos(latents / split)
        for index, path in enumerate(videos.paths):
            destination = pixels / split / path.relative_to(videos.folder)
            if destination.exists():
                continue
            whole = videos.clip(index, 0, videos.num_frames[index])
            frames = decode(coder, whole[None], clips_at_once * PREDICTED)[0]
            content = {"latents": (frames * 255).round().byte().contiguous()}
            if (actions := videos.actions[index]) is not None:
                content["actions"] = actions
            destination.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(destination) as unfinished:
                save_file(content, unfinished)


# ------------------------------------------------------------------------------------------------------------
# Predicting


def load_model(kind: str, arguments: argparse.Namespace, step: int, device: torch.device) -> Any:
    """The averaged weights of a run after so many steps, in the format of training."""
    folder = Path(training_of(kind, arguments).options.latents)
    model = make_model(kind, LatentVideos(folder / "train"), arguments.full)
    model.load_state_dict(load_file(snapshot(arguments.output / kind, step)))
    if kind == "FAR":
        model.set_attn_processor(FARAttnProcessor())  # what sampling is fastest with
    return model.eval().to(device, DTYPES[arguments.mixed_precision])


@torch.no_grad()
def roll_out(
    model: NextFrameUNet, context: Tensor, actions: Tensor, sources: list[torch.Generator], steps: int
) -> Tensor:
    """One sample of the frames after `context` `[N, F, C, h, w]`, each made of its own last ones.

    Args:
        actions: `[N, F + G]`.
        sources: of the noise of each clip.
        steps: of UniPC, of a frame.

    Returns:
        `[N, G, C, h, w]`.
    """
    device = next(model.parameters()).device
    frames, actions, dtype = context.to(device), actions.to(device), model.dtype
    for number in range(context.shape[1], actions.shape[1]):
        noise = [torch.randn(frames.shape[2:], generator=source) for source in sources]
        made, scheduler = torch.stack(noise).to(device), make_scheduler("UniPC")
        set_timesteps(scheduler, steps, device, made[0, 0].numel(), any_step=False)
        before, known = frames[:, -BEFORE:].to(dtype), actions[:, number - BEFORE : number + 1]
        for level in scheduler.timesteps:
            found = model(made.to(dtype), level.expand(len(made)), before, known).float()
            made = scheduler.step(found, level, made, return_dict=False)[0]
        frames = torch.cat([frames, made[:, None]], dim=1)
    return frames[:, context.shape[1] :]


@torch.no_grad()
def predict_pixels(model: ActionSimVP, frames: Tensor, actions: Tensor) -> Tensor:
    """Frames `[N, 16, 3, H, W]` in [0, 1] after as many observed ones."""
    device = next(model.parameters()).device
    return model(frames.to(device, model.dtype), actions.to(device)).float().clamp(0, 1).cpu()


def predict_latents(
    kind: str, model: Any, context: Tensor, actions: Tensor, arguments: argparse.Namespace
) -> Tensor:
    """Latents `[N, 16, C, h, w]` that FAR or UNet makes after observed ones."""
    size, steps = arguments.measured_at_once, arguments.steps
    if kind == "FAR":
        pipeline = make_pipeline(model, arguments.autoencoder, OBSERVED + PREDICTED)
        return predict(pipeline, context, actions, size, seed=0, num_inference_steps=steps)
    return predict_in_parts(
        lambda *part: roll_out(model, *part, steps=steps), context, actions, clips_at_once=size
    )


def predictions(
    kind: str, model: Any, clips: tuple[Tensor, Tensor], measures: Measures, arguments: argparse.Namespace
) -> Tensor:
    """Frames `[N, 16, 3, H, W]` in [0, 1].

    Args:
        clips: latents `[N, 32, C, h, w]` and actions `[N, 32]`.
    """
    context, actions = clips[0][:, :OBSERVED], clips[1]
    if kind != "SimVP":
        return measures.decode(predict_latents(kind, model, context, actions, arguments))
    parts = zip(*(part.split(arguments.measured_at_once) for part in (context, actions)), strict=True)
    return torch.cat([predict_pixels(model, measures.decode(seen), known) for seen, known in parts])


# ------------------------------------------------------------------------------------------------------------
# Speed and memory


def memory(name: str) -> float:
    """MB of this process by a name of Linux: VmRSS now, VmHWM at most."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def cost(kind: str, arguments: argparse.Namespace, step: int) -> dict[str, float]:
    """Frames per second of a prediction of one clip, from pixels to pixels, and the peak of memory.

    The process is to have done nothing but its imports.
    """
    device = device_here()
    before = memory("VmRSS")
    model = load_model(kind, arguments, step, device)
    coder = None
    if kind == "FAR":
        coder = make_pipeline(model, arguments.autoencoder, OBSERVED + PREDICTED)
    elif kind == "UNet":
        coder = make_coder(arguments.autoencoder, device)
    height, width = LatentVideos(Path(training_of(kind, arguments).options.latents) / "train").frame_shape[1:]
    if coder is not None:
        ratio = coder.vae.spatial_compression_ratio
        height, width = height * ratio, width * ratio
    observed = torch.rand(1, OBSERVED, 3, height, width, generator=torch.Generator().manual_seed(0))
    actions = torch.zeros(1, OBSERVED + PREDICTED, dtype=torch.long)

    @torch.no_grad()
    def once() -> Tensor:
        if coder is None:
            return predict_pixels(model, observed, actions)
        latents = coder.vae.encode(observed[0].to(device) * 2 - 1).latent[None]
        context = latents * coder.vae.config.scaling_factor
        if kind == "FAR":
            made = predict(coder, context, actions, 1, seed=0, num_inference_steps=arguments.steps)
        else:
            made = roll_out(model, context, actions, sources_of([0]), arguments.steps)
        return decode(coder, made.float(), PREDICTED)

    once()
    seconds = []
    for _ in range(TIMED):
        started = time.perf_counter()
        once()  # ends with frames on the CPU: a GPU has done its work, too
        seconds.append(time.perf_counter() - started)
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else memory("VmHWM") - before
    return {"frames_per_second": PREDICTED / statistics.median(seconds), "memory_mb": peak}


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives in a process that has only done its imports."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


# ------------------------------------------------------------------------------------------------------------
# Telling


def rows_of(measured: dict[str, dict[str, Any]], walks: list[int]) -> list[dict[str, Any]]:
    """Means and standard errors over the walks of clips, in the order of `measured`."""
    return [values | means(values, walks) for values in measured.values()]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The tables."""
    quality: list[list[object]] = [[row["kind"], *quality_cells(row)] for row in rows]
    costs: list[list[object]] = [
        [
            row["kind"],
            f"{row['parameters'] / 1e6:.2f} M",
            row["steps"],
            f"{row['flops_per_step'] / 1e9:.0f}",
            f"{row['petaflops']:.3g}",
            f"{row['frames_per_second']:.1f}",
            f"{row['memory_mb']:.0f}",
        ]
        for row in rows
        if "parameters" in row
    ]
    second = [
        "model",
        "weights",
        "steps",
        "GFLOP of a step",
        "PFLOP of all",
        "frames per second",
        "memory, MB",
    ]
    return table(["model", *QUALITY_HEADER], quality) + "\n\n" + table(second, costs) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """PSNR and LPIPS by frame, and FVD by speed."""
    with plotted(path, (15, 4.5), 3) as axes:
        titles = {"psnr_by_frame": "PSNR, dB", "lpips_by_frame": "LPIPS"}
        for axis, (name, title) in zip(axes[:2], titles.items(), strict=True):
            axis.set(title=title, xlabel="frame of the prediction")
            for row in rows:
                style = {"linestyle": "--", "color": "grey"} if row["kind"] == "repeat" else {"marker": "."}
                axis.plot(range(1, len(row[name]) + 1), row[name], label=row["kind"], **style)
        axes[2].set(title="FVD", xlabel="frames per second")
        axes[2].set_xscale("log")
        for row in rows:
            if "frames_per_second" in row:
                axes[2].plot([row["frames_per_second"]], [row["fvd"]], marker="o", linestyle="")
            else:
                axes[2].axhline(row["fvd"], linestyle="--", color="grey")
        axes[0].legend(fontsize="small")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="for FAR; the others get as many FLOPs")
    parser.add_argument("--models", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--clips", type=int, default=64, help="held-out ones")
    parser.add_argument("--steps", type=int, default=SAMPLING_STEPS, help="of UniPC, of a frame")
    parser.add_argument("--unet-rate", type=float, default=6e-4, help="learning rate of UNet (AdamW)")
    parser.add_argument("--simvp-rate", type=float, default=1e-3, help="learning rate of SimVP (AdamW)")
    arguments = parse_arguments(parser, FULL, measured_at_once=16)
    if "SimVP" in arguments.models and (missing := missing_package()):
        parser.error(f"--models SimVP: {missing}; {INSTALL}, or give --models FAR UNet")
    device = device_here()
    coder = make_coder(arguments.autoencoder, device)
    validation = LatentVideos(arguments.latents / "validation")
    latents, actions, walks = spread_clips(validation, arguments.clips, OBSERVED + PREDICTED)
    # First, as weights of what measures may be missing.
    measures = Measures(coder, latents[:, OBSERVED:], arguments.measured_at_once)
    settings = {
        name: getattr(arguments, name)
        for name in ("latents", "full", "minutes", "clips", "steps", "unet_rate", "simvp_rate", "batch_size")
    }
    settings["mixed_precision"] = arguments.mixed_precision
    kept = Kept(arguments.output / "measured.json", settings)

    def plan(kind: str) -> dict[str, float]:
        return {"flops_per_step": flops_per_step(training_of(kind, arguments))}

    def plan_far() -> dict[str, float]:
        (seconds,) = seconds_per_step([training_of("FAR", arguments)])
        return {**plan("FAR"), "seconds_per_step": seconds}

    far = kept("plan FAR", plan_far)
    flops = arguments.minutes * 60 / far["seconds_per_step"] * far["flops_per_step"]  # that all get
    if "SimVP" in arguments.models:
        write_pixels(arguments.latents, arguments.output / "pixels", coder, arguments.measured_at_once)
    for kind in KINDS:
        if kind not in arguments.models:
            continue
        per_step = kept(f"plan {kind}", lambda kind=kind: plan(kind))["flops_per_step"]
        steps = max(1, round(flops / per_step))
        if not snapshot(arguments.output / kind, steps).exists():
            train_to_end(training_of(kind, arguments, steps))

        def measure(kind: str = kind, steps: int = steps, per_step: int = per_step) -> dict[str, Any]:
            model = load_model(kind, arguments, steps, device)
            row: dict[str, Any] = {"kind": kind, "steps": steps, "flops_per_step": per_step}
            row["petaflops"] = steps * per_step / 1e15
            row["parameters"] = sum(weights.numel() for weights in model.parameters())
            return row | measures(predictions(kind, model, (latents, actions), measures, arguments))

        kept(kind, measure)
        kept(f"cost {kind}", lambda kind=kind, steps=steps: in_new_process(cost, kind, arguments, steps))
        print(f"{kind}: FVD {kept.results[kind]['fvd']:.0f}", file=sys.stderr, flush=True)

    def measure_repeat() -> dict[str, Any]:
        last = measures.decode(latents[:, OBSERVED - 1 : OBSERVED])
        return {"kind": "repeat", **measures(last.expand_as(measures.truth).contiguous())}

    kept("repeat", measure_repeat)
    # All that are there, those of other `--models`, too.
    found = kept.results
    names = [name for name in (*KINDS, "repeat") if name in found]
    measured = {name: found[name] | found.get(f"cost {name}", {}) for name in names}
    rows = rows_of(measured, walks)
    text = markdown(rows)
    facts = {name: getattr(arguments, name) for name in ("minutes", "clips", "steps")}
    facts["autoencoder_parameters"] = sum(weights.numel() for weights in coder.vae.parameters())
    facts["seconds_per_step_of_FAR"] = round(far["seconds_per_step"], 3)
    write_results(arguments.output, facts | {"rows": rows}, text)
    print(text)
    if arguments.plot is not None:
        draw(rows, arguments.plot)


if __name__ == "__main__":
    main()
