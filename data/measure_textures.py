"""How well an autoencoder reconstructs each wall texture and landmark of doom-maze.

    python data/measure_textures.py checkpoints/far-doom-maze-64/vae

Every texture is measured on the same walks through the same mazes, of which it covers all walls; so only the
texture makes a difference. Prints a line per texture, the worst first: PSNR of the reconstruction in dB, and
its sharpness (mean absolute difference of neighboring pixels) as a share of that of the frames.
"""

import argparse
import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC
from doom_maze import play, start_game
from doom_maze_map import LANDMARKS, WALLS, Style, build_maze, write_wad
from doom_maze_walks import ExploreWalk


def record_texture(texture: str, num_episodes: int, num_frames: int) -> np.ndarray:
    """Frames (num_episodes * num_frames, 64, 64, 3) of uint8 from mazes whose walls have one texture."""
    style = Style(walls=(texture,), landmarks=(texture,), landmark_probability=0)
    mazes = [
        build_maze("train", random.Random(f"texture-{i}"), num_textures=1, style=style)
        for i in range(num_episodes)
    ]
    names = [f"M{i:03d}" for i in range(num_episodes)]
    frames = []
    with tempfile.TemporaryDirectory() as folder:
        wad = Path(folder) / "mazes.wad"
        write_wad(wad, zip(names, (maze.map_text for maze in mazes), strict=True))
        game = start_game(wad, names[0])
        for i, (name, maze) in enumerate(zip(names, mazes, strict=True)):
            game.set_doom_map(name)
            game.set_seed(1)
            frames.append(play(game, ExploreWalk(maze, random.Random(f"walk-{i}")), num_frames)[0])
        game.close()
    return np.concatenate(frames)


@torch.inference_mode()
def measure(autoencoder: AutoencoderDC, frames: np.ndarray) -> tuple[float, float]:
    """PSNR in dB over all frames, and the share of their sharpness that is kept."""
    videos = torch.as_tensor(frames).movedim(-1, 1).float() / 255
    reconstructed = torch.cat(
        [autoencoder(2 * part - 1).sample / 2 + 0.5 for part in videos.split(32)]
    ).clamp(0, 1)
    psnr = -10 * torch.log10((reconstructed - videos).square().mean())
    sharpness = [v.diff(dim=-1).abs().mean() + v.diff(dim=-2).abs().mean() for v in (reconstructed, videos)]
    return float(psnr), float(sharpness[0] / sharpness[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how well an autoencoder reconstructs textures.")
    parser.add_argument("autoencoder", help="folder of an AutoencoderDC")
    parser.add_argument("--episodes", type=int, default=3, help="walks per texture")
    parser.add_argument("--frames", type=int, default=40, help="frames per walk")
    args = parser.parse_args()
    for name in ("episodes", "frames"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, but is {getattr(args, name)}")

    autoencoder = AutoencoderDC.from_pretrained(args.autoencoder).eval()
    for kind, textures in (("wall", WALLS), ("landmark", LANDMARKS)):
        rows = [
            (*measure(autoencoder, record_texture(texture, args.episodes, args.frames)), texture)
            for texture in textures
        ]
        for psnr, sharpness, texture in sorted(rows):
            print(f"{kind:8} {texture:9} {psnr:5.1f} dB {sharpness:5.0%}", flush=True)


if __name__ == "__main__":
    main()
