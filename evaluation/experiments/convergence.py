"""How fast FAR learns beside a bidirectional video diffusion transformer and an autoregressive one of tokens.

    python evaluation/experiments/convergence.py LATENTS --autoencoder checkpoints/far-doom-maze-64/vae \
        --output OUTPUT --plot docs/experiments_convergence.png

LATENTS is what training.encode_latents wrote of videos with actions. Three models of the same blocks, width
and depth learn from the same clips of 24 frames, 16 tokens a frame, at the same rates, for the same number of
floating-point operations (counted by PyTorch over a whole step). `--minutes` of a processor's time (of the
clock on a GPU) for FAR decide on how many:

- `FAR`: flow matching, each frame with a level of noise of its own, half of them given clean; frames see
  those before them;
- `bidirectional`: flow matching of the last 16 frames together, at one level of noise, after 8 clean ones;
  all frames see each other. It learns the very task that is measured, and no other;
- `tokens`: each token of the latent grid (2 x 2 x 16 numbers) is one of 1,024 codes, found by k-means
  (scipy); the next code is told from all before it, in the order of frames, rows and columns.

At several shares of the operations, each predicts the last 16 frames of held-out clips after 8 (the first two
in 20 steps of UniPC, the third by drawing codes), with its averaged weights. PSNR and LPIPS of the first
frame and of all, beside the true latents, decoded, and FVD of all clips; FVD of so few is far too high and
only compares. `codes` are the true latents as codes: the best that `tokens` can do.

The learning rate never falls, so that each mark is that of a run which ends there. Started again, it goes on.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout: this file is run as a script

from diffusers_far import FARTransformer3DModel
from diffusers_far.evaluation.tables import table
from diffusers_far.flow_matching import CLEAN_TIMESTEP, frame_loss, set_timesteps, velocity_target
from diffusers_far.tokens import patchify, unpatchify
from diffusers_far.training.clips import Clips, LatentVideos
from diffusers_far.training.make_pipeline import make_scheduler
from diffusers_far.training.objectives import draw_noise, noisy_window, velocity
from diffusers_far.training.options import FAROptions
from diffusers_far.whole_files import written_whole
from evaluation.experiments.equal_time import (
    DTYPES,
    NEW_MODEL,
    QUALITY_HEADER,
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
    spread_clips,
    train_to_end,
    write_results,
)
from evaluation.experiments.flex_rope import BiasAttnProcessor
from evaluation.plots import plotted
from evaluation.world_model import predict

KINDS = ("FAR", "bidirectional", "tokens")
OBSERVED, PREDICTED = 8, 16  # frames of a clip
STEPS = 20  # of UniPC
CODES = 1024
CODED_TOKENS = 30_000  # that k-means sees
FULL = {"minutes": 60.0, "batch_size": 64, "measured_at_once": 32, "marks": 6, "clips": 256}


class FullAttnProcessor(BiasAttnProcessor):
    """All frames see each other."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        return super().attend(query, key, value, None)


# ------------------------------------------------------------------------------------------------------------
# Bidirectional


class JointFlowMatching:
    """Velocity of the frames after the observed ones, all at one level of noise.

    Args:
        model: that learns.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def loss(self, clips: Clips, generator: torch.Generator) -> Tensor:
        noise, sigmas = draw_noise(clips, generator)
        sigmas = sigmas[:, :1].expand(sigmas.shape)
        clean = torch.zeros_like(sigmas, dtype=torch.bool)
        clean[:, :OBSERVED] = True
        inputs = noisy_window(clips, noise, sigmas, clean, clips.target)
        prediction = velocity(self.model, clips, *inputs)
        return frame_loss(prediction, velocity_target(clips.target, noise), clean)


@torch.no_grad()
def predict_jointly(
    model: FARTransformer3DModel, context: Tensor, actions: Tensor, sources: list[torch.Generator]
) -> Tensor:
    """One sample of the frames after `context` `[N, 8, C, h, w]`: `[N, 16, C, h, w]`."""
    device = model.device
    context, actions = context.to(device), actions.to(device)
    shape = (PREDICTED, *context.shape[2:])
    made = torch.stack([torch.randn(shape, generator=source) for source in sources]).to(device)
    scheduler = make_scheduler("UniPC")
    num_tokens = PREDICTED * model.tokens_per_frame(*context.shape[-2:])[1]
    set_timesteps(scheduler, STEPS, device, num_tokens, any_step=False)
    for level in scheduler.timesteps:
        timestep = torch.full((len(made), OBSERVED + PREDICTED), CLEAN_TIMESTEP, device=device)
        timestep[:, OBSERVED:] = level
        frames = torch.cat([context, made], dim=1).to(model.dtype)
        found = model(frames, timestep, actions=actions).sample[:, OBSERVED:].float()
        made = scheduler.step(found, level, made, return_dict=False)[0]
    return made


# ------------------------------------------------------------------------------------------------------------
# Tokens


class Codebook:
    """Codes of the tokens of frames.

    Args:
        codes: `[K, C * p * p]`.
        patch: p, latent pixels of a token per side.
    """

    def __init__(self, codes: Tensor, patch: int) -> None:
        self.codes, self.patch = codes, patch

    def encode(self, latents: Tensor) -> Tensor:
        """Nearest codes `[B, F, T]` of frames `[B, F, C, h, w]`."""
        tokens = patchify(latents.float(), self.patch)
        codes = self.codes.to(tokens.device)
        return torch.cdist(tokens.flatten(0, 2), codes).argmin(dim=1).view(tokens.shape[:3])

    def decode(self, codes: Tensor, height: int, width: int) -> Tensor:
        """Frames `[B, F, C, h, w]` of codes `[B, F, T]`."""
        return unpatchify(self.codes.to(codes.device)[codes], self.patch, height, width)


def find_codes(videos: LatentVideos, patch: int) -> Tensor:
    """By k-means over tokens of evenly spread frames."""
    grid = videos.frame_shape[1] // patch * (videos.frame_shape[2] // patch)
    per_video = max(1, CODED_TOKENS // grid // len(videos))
    tokens = []
    for video, number in enumerate(videos.num_frames):
        for frame in torch.linspace(0, number - 1, per_video).long().tolist():
            tokens.append(patchify(videos.clip(video, frame, 1)[None], patch)[0, 0])
    codes, _ = kmeans2(torch.cat(tokens).numpy(), CODES, iter=10, minit="points", seed=0)
    return torch.from_numpy(codes).float()


class KeptTokens:
    """Keys and values of a layer for the tokens so far."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All of them, with new ones `[B, N, heads, head_dim]`."""
        self.keys = key if self.keys is None else torch.cat([self.keys, key], dim=1)
        self.values = value if self.values is None else torch.cat([self.values, value], dim=1)
        return self.keys, self.values


def give_codes(model: FARTransformer3DModel) -> FARTransformer3DModel:
    """The model with codes in place of frames; one more code stands before the first."""
    width = model.proj_out.in_features
    model.x_embedder = nn.Embedding(CODES + 1, width)
    model.proj_out = nn.Linear(width, CODES)
    nn.init.normal_(model.x_embedder.weight, std=0.02)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model


def code_logits(
    model: FARTransformer3DModel,
    before: Tensor,
    actions: Tensor,
    first: int,
    grid: tuple[int, int],
    caches: list[KeptTokens] | None = None,
) -> Tensor:
    """Logits `[B, F, T, K]` of the codes that follow `before` one by one.

    Args:
        before: `[B, F, T]`, for each code the one before it: whole frames, or one code of one frame.
        actions: `[B, F]` that led to the frames.
        first: number of the first code, in all of the video.
        grid: rows and columns of a frame.
        caches: of the layers; None: `before` is all there is.
    """
    num_frames, num_tokens = before.shape[1:]
    rows, columns = grid
    numbers = torch.arange(first, first + num_frames * num_tokens, device=before.device)
    patch, frames = model.config.patch_size, torch.arange(0, first // (rows * columns) + num_frames)
    tables = model.embed_positions(frames.to(before.device), 0, rows * patch, columns * patch)
    rotary = (tables[0][numbers], tables[1][numbers])
    condition = model.embed_condition(torch.zeros_like(actions, dtype=torch.float32), None, actions)
    mask = None
    if len(numbers) > 1:
        mask = (numbers <= numbers[:, None])[None, None]
    streams = [model.x_embedder(before)]
    for index, block in enumerate(model.transformer_blocks):
        streams = block(streams, condition, rotary, mask, None if caches is None else caches[index])
    return model.proj_out(model.norm_out(streams[-1], condition)).float()


def shifted(codes: Tensor) -> Tensor:
    """For each code `[B, F, T]` the one before it."""
    flat = nn.functional.pad(codes.flatten(1), (1, -1), value=CODES)
    return flat.view(codes.shape)


class NextCode:
    """Cross entropy of all codes of a clip.

    Args:
        model: with codes.
        codebook: of them.
        autocast: number format of the forward.
    """

    def __init__(self, model: nn.Module, codebook: Codebook, autocast: Callable[[], Any]) -> None:
        self.model, self.codebook, self.autocast = model, codebook, autocast

    def loss(self, clips: Clips, generator: torch.Generator) -> Tensor:
        codes = self.codebook.encode(clips.latents)
        grid = tuple(side // self.codebook.patch for side in clips.latents.shape[-2:])
        actions = codes.new_full(codes.shape[:2], -1) if clips.actions is None else clips.actions
        with self.autocast():
            logits = code_logits(self.model, shifted(codes), actions, 0, grid)
        return nn.functional.cross_entropy(logits.flatten(0, 2), codes.flatten())


@torch.no_grad()
def predict_codes(
    model: FARTransformer3DModel,
    codebook: Codebook,
    context: Tensor,
    actions: Tensor,
    sources: list[torch.Generator],
) -> Tensor:
    """One sample of the frames after `context` `[N, 8, C, h, w]`: `[N, 16, C, h, w]`."""
    height, width = context.shape[-2:]
    grid = (height // codebook.patch, width // codebook.patch)
    per_frame, actions = grid[0] * grid[1], actions.to(model.device)
    codes = codebook.encode(context.to(model.device))
    caches = [KeptTokens() for _ in model.transformer_blocks]
    code_logits(model, shifted(codes), actions[:, :OBSERVED], 0, grid, caches)
    flat = codes.flatten(1)
    for number in range(OBSERVED * per_frame, (OBSERVED + PREDICTED) * per_frame):
        frame = slice(number // per_frame, number // per_frame + 1)
        logits = code_logits(model, flat[:, -1:, None], actions[:, frame], number, grid, caches)
        chances = logits[:, 0, 0].softmax(dim=-1).cpu()
        drawn = [
            torch.multinomial(row, 1, generator=source) for row, source in zip(chances, sources, strict=True)
        ]
        flat = torch.cat([flat, torch.stack(drawn).to(flat)], dim=1)
    made = flat[:, OBSERVED * per_frame :].unflatten(1, (PREDICTED, per_frame))
    return codebook.decode(made, height, width)


# ------------------------------------------------------------------------------------------------------------
# Training


def make_model(kind: str, videos: LatentVideos, full: bool) -> FARTransformer3DModel:
    """One of `KINDS`, from nothing."""
    model = new_model(videos, SIZES[full])
    model.set_attn_processor(FullAttnProcessor() if kind == "bidirectional" else BiasAttnProcessor())
    return give_codes(model) if kind == "tokens" else model


class Trainer(MarkTrainer):
    """Trains one of `KINDS`."""

    def __init__(self, kind: str, codebook: Codebook, full: bool, options: FAROptions) -> None:
        super().__init__(lambda videos: make_model(kind, videos, full), options)
        if kind == "bidirectional":
            self.objective = JointFlowMatching(self.model)  # type: ignore[assignment]
        elif kind == "tokens":
            autocast = self.run.accelerator.autocast
            self.objective = NextCode(self.network, codebook, autocast)  # type: ignore[assignment]


def plan(codebook: Codebook, arguments: argparse.Namespace) -> dict[str, Any]:
    """By kind: `steps`, a multiple of the marks, and `flops_per_step`."""
    trainings = {kind: training_of(kind, codebook, arguments) for kind in KINDS}
    flops = {kind: flops_per_step(training) for kind, training in trainings.items()}
    (seconds,) = seconds_per_step([trainings["FAR"]])
    total = arguments.minutes * 60 / seconds * flops["FAR"]
    marks = arguments.marks
    return {
        kind: {"steps": marks * max(1, round(total / count / marks)), "flops_per_step": count}
        for kind, count in flops.items()
    } | {"seconds_per_step": {"FAR": round(seconds, 3)}}


def training_of(
    kind: str, codebook: Codebook, arguments: argparse.Namespace, steps: int | None = None
) -> Training:
    """How one of `KINDS` is trained, for so many steps, or for a first look."""
    options = run_options(
        arguments,
        kind,
        num_frames=OBSERVED + PREDICTED,
        clean_context_probability=0.5,
        lr_scheduler="constant_with_warmup",
        **NEW_MODEL,
    )
    if steps is not None:
        options = replace(options, max_train_steps=steps, validation_steps=steps // arguments.marks)
    return Training(lambda options: Trainer(kind, codebook, arguments.full, options), options)


# ------------------------------------------------------------------------------------------------------------
# Measuring


def predictions(
    kind: str,
    model: FARTransformer3DModel,
    codebook: Codebook,
    clips: tuple[Tensor, Tensor],
    arguments: argparse.Namespace,
) -> Tensor:
    """`[N, 16, C, h, w]` of a model.

    Args:
        clips: latents `[N, 24, C, h, w]` and actions `[N, 24]`.
    """
    latents, actions = clips
    size, context = arguments.measured_at_once, latents[:, :OBSERVED]
    if kind == "FAR":
        pipeline = make_pipeline(model, arguments.autoencoder, OBSERVED + PREDICTED)
        return predict(pipeline, context, actions, size, seed=0, num_inference_steps=STEPS)
    make = partial(predict_jointly, model)
    if kind == "tokens":
        make = partial(predict_codes, model, codebook)
    return predict_in_parts(make, context, actions, size)


# ------------------------------------------------------------------------------------------------------------
# Telling


def rows_of(measured: dict[str, dict[str, Any]], walks: list[int]) -> list[dict[str, Any]]:
    """Means and standard errors over the walks of clips, in the order of `measured`."""
    rows = []
    for values in measured.values():
        row: dict[str, Any] = {name: values.get(name) for name in ("kind", "steps", "petaflops")}
        rows.append(row | means(values, walks) | {"fvd": values["fvd"]})
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    cells: list[list[object]] = [
        [row["kind"], row["steps"], row["petaflops"], *quality_cells(row)] for row in rows
    ]
    return table(["model", "steps", "PFLOP", *QUALITY_HEADER], cells) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """All measures by operations."""
    with plotted(path, (18, 4.5), 4) as axes:
        titles = {
            "psnr_1": "PSNR of frame 1, dB",
            "psnr": "PSNR of 16 frames, dB",
            "lpips": "LPIPS",
            "fvd": "FVD",
        }
        for axis, (name, title) in zip(axes, titles.items(), strict=True):
            axis.set(title=title, xlabel="PFLOP of training")
            for kind in dict.fromkeys(row["kind"] for row in rows):
                found = [row for row in rows if row["kind"] == kind]
                values = [row[name]["mean"] if isinstance(row[name], dict) else row[name] for row in found]
                if kind == "codes":
                    axis.axhline(values[0], linestyle="--", color="grey", label=kind)
                else:
                    axis.plot([row["petaflops"] for row in found], values, marker="o", label=kind)
        axes[0].legend(fontsize="small")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="for FAR; the others get as many FLOPs")
    parser.add_argument("--marks", type=int, default=3, help="at which models are measured, evenly spread")
    parser.add_argument("--clips", type=int, default=64, help="held-out ones")
    arguments = parse_arguments(parser, FULL, measured_at_once=16)
    validation, videos = (LatentVideos(arguments.latents / split) for split in ("validation", "train"))
    latents, actions, walks = spread_clips(validation, arguments.clips, OBSERVED + PREDICTED)
    device = device_here()
    true = latents[:, OBSERVED:]
    # First, as weights of what measures may be missing.
    measures = Measures(make_coder(arguments.autoencoder, device), true, arguments.measured_at_once)
    names = ("latents", "full", "minutes", "marks", "clips", "batch_size", "mixed_precision")
    settings = {name: getattr(arguments, name) for name in names}
    kept = Kept(arguments.output / "measured.json", settings)

    patch = SIZES[arguments.full].patch_size
    codes = arguments.output / "codes.safetensors"
    if not codes.exists():
        arguments.output.mkdir(parents=True, exist_ok=True)
        with written_whole(codes) as unfinished:
            save_file({"codes": find_codes(videos, patch)}, unfinished)
    codebook = Codebook(load_file(codes)["codes"], patch)

    planned = kept("plan", lambda: plan(codebook, arguments))
    dtype = DTYPES[arguments.mixed_precision]
    measured: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        steps, folder = planned[kind]["steps"], arguments.output / kind
        if not snapshot(folder, steps).exists():
            train_to_end(training_of(kind, codebook, arguments, steps))
        for mark in range(1, arguments.marks + 1):
            step = steps // arguments.marks * mark

            def measure(kind: str = kind, step: int = step, folder: Path = folder) -> dict[str, Any]:
                model = make_model(kind, videos, arguments.full)
                model.load_state_dict(load_file(snapshot(folder, step)))
                model = model.eval().to(device, dtype)
                petaflops = step * planned[kind]["flops_per_step"] / 1e15
                made = predictions(kind, model, codebook, (latents, actions), arguments)
                return {
                    "kind": kind,
                    "steps": step,
                    "petaflops": petaflops,
                    **measures(measures.decode(made)),
                }

            name = f"{kind} {mark}"
            measured[name] = kept(name, measure)
            print(f"{name}: FVD {measured[name]['fvd']:.0f}", file=sys.stderr, flush=True)

    def measure_codes() -> dict[str, Any]:
        made = codebook.decode(codebook.encode(true), *true.shape[-2:])
        return {"kind": "codes", **measures(measures.decode(made))}

    measured["codes"] = kept("codes", measure_codes)
    rows = rows_of(measured, walks)
    text = markdown(rows)
    facts = {"minutes": arguments.minutes, "clips": arguments.clips, "plan": planned, "rows": rows}
    write_results(arguments.output, facts, text)
    print(text)
    if arguments.plot is not None:
        draw(rows, arguments.plot)


if __name__ == "__main__":
    main()
