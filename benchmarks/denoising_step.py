"""Time of a cached denoising step, and of a played frame of the shipped model.

    python benchmarks/denoising_step.py [--published CHECKOUT] [--checkpoint checkpoints/far-doom-maze-64]

With the path of a checkout of the published code (showlab/FAR, which needs einops), its cached step is timed
beside ours in the same run, on the same weights, and the outputs are compared. Prints a Markdown table and,
with --output, writes the figures as JSON.
"""

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from diffusers_far import FARTransformer3DModel, FARVideoPipeline
from diffusers_far.flow_matching import CLEAN_TIMESTEP
from diffusers_far.key_map import published_state_dict

GRID = 8  # latent pixels per side
NUM_STEPS = 50  # of a frame, the published default
TIMESTEP = 500.0


def milliseconds(function: Callable[[], object], min_run_time: float) -> float:
    """Median time of a call on all threads of torch."""
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_run_time).median * 1000


def build_model(long: bool) -> FARTransformer3DModel:
    """A model of FAR-B's size (Long with four actions, as published) with random weights everywhere."""
    torch.manual_seed(0)
    model = FARTransformer3DModel(long_patch_size=4, num_actions=4) if long else FARTransformer3DModel()
    for parameter in model.parameters():  # AdaLN and head start at zero: the comparison would be empty
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def our_step(
    model: FARTransformer3DModel, frames: Tensor
) -> tuple[Callable[[], Tensor], Callable[[], list[Tensor]]]:
    """A step of the last of `frames` `[1, F, C, H, W]`, all others in the cache; what its steps share."""
    num_context = frames.shape[1] - 1
    num_long = max(0, num_context - (model.short_window - 1)) if model.short_window else 0
    cache = model.create_cache(1, GRID, GRID)
    clean = torch.full((1, num_context), CLEAN_TIMESTEP)
    actions = torch.zeros(1, num_context, dtype=torch.long) if model.config.num_actions else None
    model(frames[:, :-1], clean, actions=actions, cache=cache, num_long_frames=num_long)
    cache.append(range(num_long), range(num_long, num_context))
    last, levels = frames[:, -1:], torch.full((1, NUM_STEPS), TIMESTEP)
    actions = torch.zeros(1, NUM_STEPS, dtype=torch.long) if model.config.num_actions else None
    modulation = [layer[:, :1] for layer in model.modulation(levels, actions=actions)]
    return (
        lambda: model(last, levels[:, :1], cache=cache, modulation=modulation).sample,
        lambda: model.modulation(levels, actions=actions),
    )


def published_step(model: FARTransformer3DModel, frames: Tensor, checkout: Path) -> Callable[[], Tensor]:
    """The same step by the published code, with the weights of `model`."""
    sys.path.insert(0, str(checkout))
    from far.models.far_long_model import FAR_Long
    from far.models.far_model import FAR

    if model.is_long:
        theirs = FAR_Long(condition_cfg={"type": "action", "num_action_classes": 4})
        conditions = {"action": torch.zeros(1, frames.shape[1], dtype=torch.long)}
    else:
        theirs, conditions = FAR(), None
    theirs.load_state_dict(published_state_dict(model.state_dict(), model.config))
    theirs.eval()
    timestep = torch.full((1, frames.shape[1]), CLEAN_TIMESTEP)
    timestep[:, -1] = TIMESTEP
    cache = {"is_cache_step": True, "kv_cache": {}, "cached_seqlen": 0, "multi_level_cache_init": False}

    def step() -> Tensor:
        nonlocal cache
        output, cache = theirs(
            frames, timestep=timestep, context_cache=cache, conditions=conditions, return_dict=False
        )
        cache["is_cache_step"] = False
        return output

    step()  # fills their cache
    return step


def played_frame(checkpoint: str, num_context: int) -> Callable[[], object]:
    """A new frame of a running game, decoded to pixels, with the checkpoint's default steps."""
    pipeline = FARVideoPipeline.from_pretrained(checkpoint)
    config = pipeline.transformer.config
    size = pipeline.config.sample_size // pipeline.vae_scale_factor
    latents = torch.randn(1, num_context, config.in_channels, size, size)
    rollout = pipeline.rollout(
        video_latents=latents, generator=torch.Generator().manual_seed(0), output_type="np"
    )
    return lambda: rollout.step(1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--published", type=Path, help="checkout of the published code to time beside ours")
    parser.add_argument("--checkpoint", help="pipeline whose played frames are timed")
    parser.add_argument("--context", type=int, nargs="+", default=[24, 128], help="frames of context")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="least time spent on each figure")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, object]] = []
    for long in (False, True):
        model = build_model(long)
        for num_context in arguments.context:
            frames = torch.randn(1, num_context + 1, model.config.in_channels, GRID, GRID)
            ours, modulation = our_step(model, frames)
            ours_ms = milliseconds(ours, arguments.seconds)
            ours_ms += milliseconds(modulation, arguments.seconds) / NUM_STEPS
            row: dict[str, object] = {
                "model": "FAR-B-Long" if long else "FAR-B",
                "context": num_context,
                "ours_ms": ours_ms,
            }
            if arguments.published:
                theirs = published_step(model, frames, arguments.published)
                row["largest_difference"] = (ours() - theirs()).abs().max().item()
                row["published_ms"] = milliseconds(theirs, arguments.seconds)
                row["ratio"] = row["ours_ms"] / row["published_ms"]
            rows.append(row)
    if arguments.checkpoint:
        for num_context in arguments.context:
            frame = played_frame(arguments.checkpoint, num_context)
            frame()  # encodes the context
            rows.append(
                {
                    "model": f"{Path(arguments.checkpoint).name}, played frame",
                    "context": num_context,
                    "ours_ms": milliseconds(frame, arguments.seconds),
                }
            )

    machine = f"{platform.processor() or platform.machine()}, {arguments.threads} threads, fp32"
    print(f"torch {torch.__version__}, {machine}, {datetime.date.today()}\n")
    names = ["model", "context", "ours_ms", "published_ms", "ratio", "largest_difference"]
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        cells = [row.get(name, "") for name in names]
        print(
            "| "
            + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells)
            + " |"
        )
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
