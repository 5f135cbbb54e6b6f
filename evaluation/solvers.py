"""Which solver, time shift and number of steps a world model samples best with.

    python evaluation/solvers.py checkpoints/far-doom-maze-64 DATA --output RESULTS.json

Predicts the same clips from the same noise with every solver of diffusers that takes flow matching, as
evaluation/world_model.py does, and prints a Markdown table. The cost of a row is its network evaluations per
frame: Heun's method takes two in a step. A model of mean velocities (`use_meanflow`) only knows Euler steps.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout: this file is run as a script

from diffusers_far import FARVideoPipeline
from evaluation.lpips import LPIPS
from evaluation.metrics import psnr, sharpness
from evaluation.world_model import decode, encode, load_clips, perceptual_distance, predict

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SOLVERS: dict[str, Callable[[float], SchedulerMixin]] = {
    "Euler": lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift),
    "Heun": lambda shift: FlowMatchHeunDiscreteScheduler(shift=shift),
    "DPM++ 2M": lambda shift: DPMSolverMultistepScheduler(flow_shift=shift, **FLOW),
    "UniPC": lambda shift: UniPCMultistepScheduler(flow_shift=shift, **FLOW),
}
COLUMNS = (
    "solver",
    "shift",
    "steps",
    "evaluations",
    "psnr_1",
    "psnr_4",
    "psnr_16",
    "psnr",
    "lpips",
    "sharpness",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="folder or repo id of a pipeline")
    parser.add_argument("data", type=Path, help="videofolder with a validation split")
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    parser.add_argument("--solvers", nargs="+", choices=list(SOLVERS), default=list(SOLVERS))
    parser.add_argument("--shifts", type=float, nargs="+", default=[1.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 50])
    parser.add_argument("--context", type=int, default=32, help="observed frames")
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=24)
    arguments = parser.parse_args()

    lpips = LPIPS()
    pipeline = FARVideoPipeline.from_pretrained(arguments.checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    size, num_context = arguments.batch_size, arguments.context
    video, actions = load_clips(arguments.data, num_context + 16, arguments.clips)
    truth, context = video[:, num_context:], encode(pipeline, video[:, :num_context], size)
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    rows = []
    for solver in arguments.solvers:
        for shift in arguments.shifts:
            for steps in arguments.steps:
                pipeline.scheduler = SOLVERS[solver](shift)
                latents = predict(pipeline, context, actions, size, seed=0, num_inference_steps=steps)
                frames = decode(pipeline, latents, size)
                scores = psnr(frames, truth).mean(dim=0)
                pipeline.scheduler.set_timesteps(steps)
                rows.append(
                    {
                        "solver": solver,
                        "shift": shift,
                        "steps": steps,
                        "evaluations": len(pipeline.scheduler.timesteps),
                        **{f"psnr_{ahead}": scores[ahead - 1].item() for ahead in (1, 4, 16)},
                        "psnr": scores.mean().item(),
                        "lpips": perceptual_distance(lpips, frames, truth, 16 * size).mean().item(),
                        "sharpness": sharpness(frames) / sharpness(truth),
                    }
                )
                cells = (
                    f"{value:.4g}" if isinstance(value, float) else str(value) for value in rows[-1].values()
                )
                print("| " + " | ".join(cells) + " |", flush=True)
    if arguments.output is not None:
        partial = arguments.output.with_suffix(".partial")
        partial.write_text(json.dumps(rows, indent=2) + "\n")
        os.replace(partial, arguments.output)


if __name__ == "__main__":
    main()
