"""How well an action-conditioned model foresees held-out episodes.

    python evaluation/world_model.py checkpoints/far-doom-maze-64 DATA --output RESULTS.json

Clips of `context + predicted` frames are cut from the validation episodes of a videofolder (`actions` in its
metadata; `actions[t]` led to frame t). Measured, per frame on [0, 1] and averaged over frames and clips:

- PSNR of the autoencoder's reconstruction, of "repeat the last frame", of one sample per clip, and of the
  best of several samples of a clip (by its mean over the predicted frames);
- whether the picture turns and zooms as the action says: in frames where the true video shows it clearly, the
  share of predicted frames whose measured shift (or zoom) has the same sign, and the same of the
  reconstruction, as a measure of the measure;
- LPIPS (AlexNet) of reconstruction and prediction, and their sharpness as a share of the true frames';
- time per clip and sample, on all threads.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Video, load_dataset
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout: this file is run as a script

from diffusers_far import FARVideoPipeline
from diffusers_far.lpips import LPIPS
from diffusers_far.metrics import horizontal_shift, psnr, sharpness, zoom
from diffusers_far.video_files import read_video
from diffusers_far.whole_files import written_whole

FORWARD, LEFT, RIGHT = 1, 2, 3
CLEAR_SHIFT = 3  # pixels between two frames from which a turn of the true video is clear
AHEAD = (1, 2, 4, 8, 16)


def load_clips(data: Path, num_frames: int, num_clips: int) -> tuple[Tensor, Tensor]:
    """Evenly spread clips of the validation split: frames `[N, T, 3, H, W]` in [0, 1] and actions `[N, T]`.

    Raises:
        ValueError: when the episodes are too few or too short.
    """
    table = load_dataset("videofolder", data_dir=str(data), split="validation")
    table = table.cast_column("video", Video(decode=False))
    per_episode = -(-num_clips // len(table))
    videos, actions = [], []
    for row in table:
        frames = torch.from_numpy(read_video(row["video"]["path"])).movedim(-1, 1)
        starts = range(
            0, len(frames) - num_frames + 1, max(1, (len(frames) - num_frames) // max(1, per_episode - 1))
        )
        for start in list(starts)[:per_episode]:
            videos.append(frames[start : start + num_frames])
            actions.append(torch.tensor(row["actions"][start : start + num_frames]))
    if len(videos) < num_clips:
        raise ValueError(f"num_clips={num_clips}: {data} has only {len(videos)} clips of {num_frames} frames")
    keep = torch.linspace(0, len(videos) - 1, num_clips).long().tolist()
    return torch.stack([videos[i] for i in keep]).float() / 255, torch.stack([actions[i] for i in keep])


@torch.no_grad()
def encode(pipeline: FARVideoPipeline, video: Tensor, batch_size: int) -> Tensor:
    """Scaled latents `[N, T, C, h, w]` of clips `[N, T, 3, H, W]`."""
    return torch.cat([pipeline.encode_video(clips) for clips in video.split(batch_size)])


@torch.no_grad()
def decode(pipeline: FARVideoPipeline, latents: Tensor, batch_size: int) -> Tensor:
    """Frames `[N, T, 3, H, W]` in [0, 1] of latents `[N, T, C, h, w]`."""
    chunks = latents.flatten(0, 1).to(pipeline.device).split(batch_size)
    frames = [pipeline.decode_latents(chunk).cpu() for chunk in chunks]
    return (torch.cat(frames) / 2 + 0.5).clamp(0, 1).unflatten(0, latents.shape[:2])


def predict(
    pipeline: FARVideoPipeline,
    context: Tensor,
    actions: Tensor,
    batch_size: int,
    seed: int,
    **options: Any,
) -> Tensor:
    """One sample of what follows the context `[N, T, C, h, w]` of each clip, `[N, F, C, h, w]`."""
    samples = []
    for start in range(0, len(context), batch_size):
        clips = slice(start, start + batch_size)
        seeds = range(seed * 100_000 + start, seed * 100_000 + start + len(context[clips]))
        frames = pipeline(
            video_latents=context[clips],
            actions=actions[clips],
            num_frames=actions.shape[1],
            generator=[torch.Generator().manual_seed(number) for number in seeds],
            output_type="latent",
            **options,
        ).frames
        samples.append(frames[:, context.shape[1] :])
    return torch.cat(samples)


def motion_agreement(truth: Tensor, prediction: Tensor, actions: Tensor) -> dict[str, float]:
    """Share of clear turns and walks of the truth that the prediction repeats, by the sign of shift and zoom.

    Args:
        truth, prediction: `[N, F, 3, H, W]`; the first frame is the last one of the context in both.
        actions: `[N, F - 1]` that led to the frames after the first.
    """
    pairs = [(video[:, :-1].flatten(0, 1), video[:, 1:].flatten(0, 1)) for video in (truth, prediction)]
    actions = actions.flatten()
    true_shift, shift = (horizontal_shift(*pair) for pair in pairs)
    true_zoom, zoomed = (zoom(*pair) - 1 for pair in pairs)
    # Turning left moves the picture to the right.
    wanted = (actions == LEFT).int() - (actions == RIGHT).int()
    clear_turn = (wanted != 0) & (true_shift * wanted >= CLEAR_SHIFT)
    clear_walk = (actions == FORWARD) & (true_zoom > 0)
    return {
        "clear_turns": int(clear_turn.sum()),
        "turns_as_told": (shift * wanted > 0)[clear_turn].float().mean().item(),
        "clear_walks": int(clear_walk.sum()),
        "walks_as_told": (zoomed > 0)[clear_walk].float().mean().item(),
    }


def by_frames_ahead(values: Tensor) -> dict[str, float]:
    """Mean over clips of `[N, F]` values at some frames ahead and over all F."""
    row = {str(ahead): values[:, ahead - 1].mean().item() for ahead in AHEAD if ahead <= values.shape[1]}
    return row | {"mean": values.mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="folder or repo id of a pipeline")
    parser.add_argument("--lora", help="folder or repo id of a LoRA for it")
    parser.add_argument("data", type=Path, help="videofolder with a validation split")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--context", type=int, default=32, help="observed frames")
    parser.add_argument("--predicted", type=int, default=16, help="frames to predict")
    parser.add_argument("--clips", type=int, default=216)
    parser.add_argument("--samples", type=int, default=4, help="samples per clip for the best-of figure")
    parser.add_argument("--steps", type=int, default=None, help="denoising steps; default: the checkpoint's")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=36)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    lpips = LPIPS()  # first: its weights may be missing, and the rest takes minutes
    pipeline = FARVideoPipeline.from_pretrained(arguments.checkpoint)
    if arguments.lora is not None:
        pipeline.load_lora_weights(arguments.lora)
    pipeline.set_progress_bar_config(disable=True)
    num_context = arguments.context
    video, actions = load_clips(arguments.data, num_context + arguments.predicted, arguments.clips)
    truth, last = video[:, num_context:], video[:, num_context - 1 : num_context]
    options = {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance}
    latents = encode(pipeline, video, arguments.batch_size)
    decoded = decode(pipeline, latents[:, num_context:], arguments.batch_size)
    started = time.perf_counter()
    samples = []
    for sample in range(arguments.samples):
        seed = arguments.seed + sample
        predicted = predict(
            pipeline, latents[:, :num_context], actions, arguments.batch_size, seed, **options
        )
        samples.append(decode(pipeline, predicted, arguments.batch_size))
    seconds = time.perf_counter() - started
    scores = torch.stack([psnr(sample, truth) for sample in samples])  # [samples, N, F]
    best = scores.mean(dim=2).argmax(dim=0)
    results = {
        "checkpoint": str(arguments.checkpoint),
        "lora": arguments.lora,
        "clips": len(video),
        "context": num_context,
        "steps": arguments.steps or pipeline.config.num_inference_steps,
        "guidance": arguments.guidance,
        "samples": arguments.samples,
        "psnr_reconstruction": by_frames_ahead(psnr(decoded, truth)),
        "psnr_repeat_last": by_frames_ahead(psnr(last.expand_as(truth), truth)),
        "psnr_one_sample": by_frames_ahead(scores[0]),
        f"psnr_best_of_{arguments.samples}": by_frames_ahead(scores[best, torch.arange(len(video))]),
        **{
            name: motion_agreement(
                torch.cat([last, truth], 1), torch.cat([last, frames], 1), actions[:, num_context:]
            )
            for name, frames in (("motion", samples[0]), ("motion_reconstruction", decoded))
        },
        **{
            f"lpips_{name}": by_frames_ahead(lpips.by_frame(frames, truth, 16 * arguments.batch_size))
            for name, frames in (("reconstruction", decoded), ("one_sample", samples[0]))
        },
        "sharpness_reconstruction": sharpness(decoded) / sharpness(truth),
        "sharpness_one_sample": sharpness(samples[0]) / sharpness(truth),
        "seconds_per_clip": seconds / len(video) / arguments.samples,
    }
    text = json.dumps(results, indent=2)
    print(text)
    if arguments.output is not None:
        with written_whole(arguments.output) as partial:
            partial.write_text(text + "\n")


if __name__ == "__main__":
    main()
