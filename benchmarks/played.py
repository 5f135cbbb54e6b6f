"""Latency of played frames: a running game of a world model, one action at a time.

    python benchmarks/played.py checkpoints/far-doom-maze-64

Prints JSON: median and 99th percentile of a frame, with decoding and without, and of decoding alone.
"""

import argparse
import json
import statistics
import time

import torch

from diffusers_far import ContextSchedule
from diffusers_far.loading import load_pipeline


def milliseconds(times: list[float]) -> dict[str, float]:
    return {
        "median_ms": 1e3 * statistics.median(times),
        "p99_ms": 1e3 * statistics.quantiles(times, n=100)[98],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="folder or repo id of a pipeline")
    parser.add_argument("--context", type=int, default=256, help="frames before the first played one")
    parser.add_argument("--frames", type=int, default=200, help="played frames")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the checkpoint's")
    parser.add_argument("--refresh-interval", type=int, default=1, help="of ContextSchedule; 0: never")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    pipeline = load_pipeline(arguments.checkpoint, arguments.device, "float32")
    config = pipeline.transformer.config
    size = [side // pipeline.vae_scale_factor for side in pipeline.default_size]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, arguments.context, config.in_channels, *size, generator=generator)
    rollout = pipeline.rollout(
        video_latents=latents.to(arguments.device),
        num_inference_steps=arguments.steps,
        context_schedule=ContextSchedule(refresh_interval=arguments.refresh_interval or None),
        generator=generator,
        output_type="np",
    )
    rollout.step(1)  # encodes the context
    decode, decoding = rollout.decode, []

    def timed(frame: torch.Tensor) -> object:
        began = time.perf_counter()
        pixels = decode(frame)
        decoding.append(time.perf_counter() - began)
        return pixels

    rollout.decode = timed
    frames = []
    for index in range(arguments.frames):
        began = time.perf_counter()
        rollout.step(1 + index % 3)
        frames.append(time.perf_counter() - began)
    undecoded = [frame - decoded for frame, decoded in zip(frames, decoding, strict=True)]
    results = {"steps": rollout.num_inference_steps, "frames_per_second": len(frames) / sum(frames)}
    for name, times in (("frame", frames), ("frame_without_decoding", undecoded), ("decoding", decoding)):
        results |= {f"{name}_{figure}": value for figure, value in milliseconds(times).items()}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
