"""With which solver, time shift, number of steps and refreshing of its window a world model samples best.

    python evaluation/sampling.py checkpoints/far-doom-maze-64 DATA --output RESULTS.json

Predicts the same clips from the same noise with every solver of diffusers that takes flow matching, as
evaluation/world_model.py does, and prints a Markdown table: network evaluations per frame (Heun's method
takes two in a step), quality, and the time of a frame of one clip (in batches, on all threads). A model of
mean velocities (`use_meanflow`) only knows Euler steps.
"""

import argparse
import itertools
import json
import sys
import time
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

from diffusers_far import ContextSchedule, FARVideoPipeline
from diffusers_far.lpips import LPIPS
from diffusers_far.metrics import psnr, sharpness
from diffusers_far.whole_files import written_whole
from evaluation.world_model import decode, encode, load_clips, predict

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
    "refresh",
    "evaluations",
    "psnr_1",
    "psnr_4",
    "psnr_16",
    "psnr",
    "lpips",
    "sharpness",
    "ms",
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
    parser.add_argument(
        "--refresh-intervals", type=int, nargs="+", default=[1], help="of ContextSchedule; 0: never"
    )
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
    axes = (arguments.solvers, arguments.shifts, arguments.steps, arguments.refresh_intervals)
    for solver, shift, steps, refresh in itertools.product(*axes):
        pipeline.scheduler = SOLVERS[solver](shift)
        schedule = ContextSchedule(refresh_interval=refresh or None)
        options = {"num_inference_steps": steps, "context_schedule": schedule}
        began = time.perf_counter()
        latents = predict(pipeline, context, actions, size, seed=0, **options)
        seconds = time.perf_counter() - began
        frames = decode(pipeline, latents, size)
        scores = psnr(frames, truth).mean(dim=0)
        pipeline.scheduler.set_timesteps(steps)
        evaluations = len(pipeline.scheduler.timesteps)
        row = {
            "solver": solver,
            "shift": shift,
            "steps": steps,
            "refresh": refresh,
            "evaluations": evaluations,
        }
        row |= {f"psnr_{ahead}": scores[ahead - 1].item() for ahead in (1, 4, 16)}
        row |= {"psnr": scores.mean().item()}
        row |= {"lpips": lpips.by_frame(frames, truth, 16 * size).mean().item()}
        row |= {"sharpness": sharpness(frames) / sharpness(truth)}
        row |= {"ms": 1e3 * seconds / latents.shape[:2].numel()}
        rows.append(row)
        cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
        print("| " + " | ".join(cells) + " |", flush=True)
    if arguments.output is not None:
        with written_whole(arguments.output) as partial:
            partial.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
