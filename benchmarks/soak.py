"""Eight simulated players at once: errors, fairness, frames a second, memory.

    python benchmarks/soak.py checkpoints/far-doom-maze-64-any-step --frames 2000

Each player is a thread that asks for a frame as soon as the last one came, as the page of the demo does.
Prints a line of JSON every now and then (frames of the slowest and of the fastest player, memory of the
process), and a last one: frames a second of all players together, errors, the longest wait for a frame, and
how much memory has grown since a third of the frames (recordings are full after 600).
"""

import argparse
import json
import os
import threading
import time
from pathlib import Path

import torch

from diffusers_far.browser.players import Game, GameSettings, Players
from diffusers_far.loading import load_pipeline


def resident_mb() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Player(threading.Thread):
    """Walks forward, with a turn now and then."""

    def __init__(self, name: str, players: Players, num_frames: int) -> None:
        super().__init__(daemon=True)
        self.id, self.players, self.num_frames = name, players, num_frames
        self.made, self.longest_wait, self.errors = 0, 0.0, 0

    def run(self) -> None:
        while self.made < self.num_frames:
            began = time.perf_counter()
            try:
                self.players.step(self.id, 1 + (self.made // 8) % 3)
            except Exception as error:
                self.errors += 1
                print(json.dumps({"player": self.id, "error": repr(error)}), flush=True)
                return
            self.longest_wait = max(self.longest_wait, time.perf_counter() - began)
            self.made += 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="folder or repo id of an action-conditioned pipeline")
    parser.add_argument("--frames", type=int, default=2000, help="of each player")
    parser.add_argument("--players", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1, help="denoising steps per frame")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=float, default=30.0, help="seconds between lines")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    pipeline, players = load_pipeline(arguments.checkpoint), Players(max_players=arguments.players)
    visitors = [Player(f"player {n}", players, arguments.frames) for n in range(arguments.players)]
    for seed, visitor in enumerate(visitors):
        settings = GameSettings(arguments.steps)
        players.start(
            visitor.id, lambda seed=seed, settings=settings: Game(pipeline, None, None, settings, seed)
        )
    began, early = time.perf_counter(), None
    for visitor in visitors:
        visitor.start()
    while any(visitor.is_alive() for visitor in visitors):
        visitors[0].join(arguments.every)
        made = [visitor.made for visitor in visitors]
        line = {"slowest": min(made), "fastest": max(made), "resident_mb": round(resident_mb(), 1)}
        print(json.dumps({"seconds": round(time.perf_counter() - began), **line}), flush=True)
        if early is None and min(made) >= arguments.frames // 3:
            early = resident_mb()
        if not visitors[0].is_alive():
            for visitor in visitors:
                visitor.join(arguments.every)
    seconds = time.perf_counter() - began
    print(
        json.dumps(
            {
                "frames": sum(visitor.made for visitor in visitors),
                "frames_per_second": sum(visitor.made for visitor in visitors) / seconds,
                "errors": sum(visitor.errors for visitor in visitors),
                "longest_wait_ms": 1e3 * max(visitor.longest_wait for visitor in visitors),
                "grown_mb_since_a_third": None if early is None else resident_mb() - early,
            }
        )
    )


if __name__ == "__main__":
    main()
