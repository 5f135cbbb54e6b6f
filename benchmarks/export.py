"""Size and error of exported graphs against the rollout in PyTorch: the figures of docs/export.md.

python benchmarks/export.py checkpoints/far-doom-maze-64-any-step --given 16 --frames 16
"""

import json
import tempfile
from pathlib import Path

import click
import numpy as np
import torch

from diffusers_far import FARVideoPipeline, read_video
from diffusers_far.export import ExportedRollout, export_onnx, seeded_noise
from diffusers_far.shipped import EPISODES


def relative_rms(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the error as a share of that of what is expected."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def compare(
    pipe: FARVideoPipeline, folder: Path, video: np.ndarray, actions: list[int], given: int, frames: int
) -> dict[str, float]:
    """Errors of the first new frame and of a game."""
    exported = ExportedRollout(folder, seed=0, num_threads=torch.get_num_threads())
    rollout = pipe.rollout(video=video[:given], context_actions=[actions[:given]], output_type="latent")
    for frame, action in zip(video[:given], actions, strict=False):
        exported.append(frame, action)
    errors, pixel_errors = [], []
    for index in range(frames):
        action = actions[given + index]
        noise = seeded_noise(0, exported.num_frames, exported.config["latent_shape"])
        found = exported.step_latents(action, noise)
        expected = rollout.step_latents(torch.tensor([action]), torch.from_numpy(noise)[None, None])[:, 0]
        errors.append(relative_rms(found, expected[0].numpy()))
        with torch.no_grad():
            decoded = pipe.decode_latents(expected)
        pixels = pipe.video_processor.postprocess(decoded, output_type="pt")[0].numpy()
        shown = exported.decode(found).transpose(2, 0, 1)
        pixel_errors.append(float(np.abs(shown - pixels).mean()) * 255)
    return {
        "first_frame_error": errors[0],
        "largest_error": max(errors),
        "first_frame_pixel_levels": pixel_errors[0],
        "largest_pixel_levels": max(pixel_errors),
    }


@click.command()
@click.argument("checkpoint")
@click.option("--episodes", default=EPISODES, show_default=True)
@click.option("--given", default=16, show_default=True, help="Real frames before the game.")
@click.option("--frames", default=16, show_default=True, help="Of the game.")
@click.option("--num-threads", default=2, show_default=True)
@click.option("--dtypes", default="float32 float16 int8", show_default=True)
def main(checkpoint: str, episodes: str, given: int, frames: int, num_threads: int, dtypes: str) -> None:
    """A line of JSON per dtype: megabytes of each file, and the errors of latents and pixels."""
    torch.set_num_threads(num_threads)
    pipe = FARVideoPipeline.from_pretrained(checkpoint)
    first = json.loads((Path(episodes) / "metadata.jsonl").read_text().splitlines()[0])
    video = read_video(Path(episodes) / first["file_name"])
    for dtype in dtypes.split():
        with tempfile.TemporaryDirectory() as parent:
            folder = export_onnx(pipe, Path(parent) / "onnx", dtype)
            sizes = {path.name: round(path.stat().st_size / 1e6, 2) for path in folder.iterdir()}
            result = compare(pipe, folder, video, first["actions"], given, frames)
        click.echo(json.dumps({"dtype": dtype, "megabytes": sizes} | result))


if __name__ == "__main__":
    main()
