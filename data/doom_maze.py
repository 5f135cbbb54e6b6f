"""Record the doom-maze data set: 64 x 64 video of random mazes, with the action behind every frame.

    python data/doom_maze.py doom-maze-64 --train 700 --validation 64 --frames 300 --seed 0 --workers 2

An episode is a walk through a fresh maze, recorded with ViZDoom and the Freedoom textures that come with it.
It depends on its number, its split and the settings (all options but the counts) and on nothing else. So a
folder can be resumed after any interruption and extended with a larger `--train`, and the number of workers
changes nothing but the time. `--walk` picks the walker: `revisit` is for learning to remember, best in small
mazes (`--maze-nodes 3 5`), and `scripted` for measuring it (see doom_maze_walks.py). `--texture-set other`
is a world of other walls, floors and ceilings, to fine-tune a model on. The data card (README_doom_maze.md,
filled in) documents the format. Needs `vizdoom`.

With `--sample-of RECORDING --episodes 3 17`, these validation episodes of a recording are copied to OUTPUT.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import psutil
import vizdoom
from doom_maze_files import (
    SPLITS,
    STATE_FOLDER,
    TEXTURE_SETS,
    WALKS,
    Settings,
    copy_sample,
    prepare_folder,
    record_path,
    video_path,
    write_metadata,
    write_text,
)
from doom_maze_map import (
    MAX_TEXTURES,
    MEMORABLE,
    NODES_PER_SIDE,
    ORIGINAL,
    OTHER,
    Maze,
    Style,
    build_maze,
    write_wad,
)
from doom_maze_walks import (
    DEGREES_PER_FRAME,
    FRAMES_AFTER_RETURN,
    MIN_SCRIPTED_FRAMES,
    NOOP,
    SCRIPTS,
    ExploreWalk,
    RevisitWalk,
    ScriptedWalk,
    cell_at,
)

TICS_PER_FRAME = 4  # a tic is 1/35 s
WARM_UP_TICS = 10  # before the first frame: the engine ignores what a player does in the first tics of a map
SPEED = 12.5  # in the engine's units: 16 map units a frame once up to speed
TURN = DEGREES_PER_FRAME / TICS_PER_FRAME  # degrees a tic; the engine counts turns to the right
BUTTON_VALUES = ([0, 0], [SPEED, 0], [0, -TURN], [0, TURN], [SPEED, -TURN], [SPEED, TURN])  # by action

FRAME_SIZE = 64
SUPERSAMPLING = 3  # pixels rendered per pixel of a frame and axis: textures are sampled without a filter
FIELD_OF_VIEW = 106  # degrees over the 4:3 screen, 90 over its central square

FRAMES_PER_SECOND = 15  # of the files only: played at this rate, motion looks natural
# About 43 dB, a key frame every 60 frames. No B-frames: with them, the encoder's output varies between runs.
CODEC_OPTIONS = {"crf": "10", "tune": "psnr", "preset": "fast", "g": "60", "bf": "0"}

LEAST_NODES = 3  # with 3 there are about 30 layouts, up to rotation and reflection; with fewer, next to none
MOST_NODES = 20
MAX_EPISODES = 100_000  # of a split: file names have five digits
EPISODES_PER_GAME = 25  # maps loaded by one engine process, whose start takes about a second


@dataclass(frozen=True)
class Job:
    """Episodes of one split for one engine process."""

    output: Path
    split: str
    episodes: list[int]
    settings: Settings


def start_game(wad: Path, first_map: str) -> vizdoom.DoomGame:
    """An engine process that renders the maps of `wad`: nothing but walls, floors and ceilings."""
    game = vizdoom.DoomGame()
    game.set_doom_config_path(str(wad.with_suffix(".ini")))  # or the engine writes one to the current folder
    game.set_doom_scenario_path(str(wad))
    game.set_doom_map(first_map)
    game.set_mode(vizdoom.Mode.PLAYER)
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_256X192)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_render_hud(False)
    game.set_render_weapon(False)
    game.set_render_crosshair(False)
    game.set_render_messages(False)
    game.set_episode_timeout(0)
    game.set_episode_start_time(1)
    button, variable = vizdoom.Button, vizdoom.GameVariable
    game.set_available_buttons([button.MOVE_FORWARD_BACKWARD_DELTA, button.TURN_LEFT_RIGHT_DELTA])
    for delta in game.get_available_buttons():
        game.set_button_max_value(delta, 0)  # no limit
    game.set_available_game_variables([variable.POSITION_X, variable.POSITION_Y, variable.ANGLE])
    game.add_game_args(f"+movebob 0 +stillbob 0 +fov {FIELD_OF_VIEW}")
    folder = Path.cwd()
    os.chdir(wad.parent)  # the engine makes a folder where it starts
    try:
        game.init()
    finally:
        os.chdir(folder)
    return game


def play(
    game: vizdoom.DoomGame, walker: ExploreWalk | RevisitWalk, num_frames: int
) -> tuple[np.ndarray, list[int], list[list[float]]]:
    """Frames (num_frames, 64, 64, 3) of uint8, the action that led to each, and the pose at each."""
    frames = np.empty((num_frames, FRAME_SIZE, FRAME_SIZE, 3), np.uint8)
    actions: list[int] = []
    poses: list[list[float]] = []
    game.new_episode()
    game.make_action(BUTTON_VALUES[NOOP], WARM_UP_TICS)
    for t in range(num_frames):
        action = NOOP if t == 0 else walker(*poses[-1])
        if t > 0:
            game.make_action(BUTTON_VALUES[action], TICS_PER_FRAME)
        state = game.get_state()
        frames[t] = downscale(state.screen_buffer)
        actions.append(action)
        poses.append([round(float(value), 3) for value in state.game_variables])
    return frames, actions, poses


def downscale(screen: np.ndarray) -> np.ndarray:
    """The central square of a 4:3 screen as a frame, every pixel the rounded mean of a block of pixels."""
    side = FRAME_SIZE * SUPERSAMPLING
    left = (screen.shape[1] - side) // 2
    blocks = screen[:, left : left + side].reshape(FRAME_SIZE, SUPERSAMPLING, FRAME_SIZE, SUPERSAMPLING, 3)
    sums = blocks.sum(axis=(1, 3), dtype=np.uint16)
    return ((sums + SUPERSAMPLING**2 // 2) // SUPERSAMPLING**2).astype(np.uint8)


def encode(frames: np.ndarray, path: Path) -> None:
    """Write frames (num_frames, H, W, 3) of uint8 as an H.264 file without chroma subsampling."""
    with av.open(path, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=CODEC_OPTIONS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        stream.thread_count = 1  # with more, the bytes depend on the machine
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def decode(path: Path) -> np.ndarray:
    """The frames of a video (num_frames, H, W, 3), uint8."""
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def record_job(job: Job) -> int:
    """Record the episodes of a job, each written as a whole or not at all; returns their number."""
    settings = job.settings
    with tempfile.TemporaryDirectory(dir=job.output / STATE_FOLDER) as folder:
        mazes = [
            build_maze(
                job.split,
                episode_rng(job, episode, "maze"),
                settings.textures,
                settings.maze_nodes,
                style_of(settings),
            )
            for episode in job.episodes
        ]
        names = [f"M{slot:03d}" for slot in range(len(mazes))]
        wad = Path(folder) / "mazes.wad"
        write_wad(wad, zip(names, (maze.map_text for maze in mazes), strict=True))

        game = start_game(wad, names[0])
        for episode, name, maze in zip(job.episodes, names, mazes, strict=True):
            game.set_doom_map(name)
            game.set_seed(1)  # all that is random is decided here; the engine starts every map alike
            walker = make_walker(job, episode, maze)
            frames, actions, poses = play(game, walker, settings.frames)

            video = video_path(job.output, job.split, episode)
            part = Path(folder) / video.name
            encode(frames, part)
            seen = {cell_at(x, y) for x, y, _ in poses}
            record = {
                "file_name": video.name,
                "episode": episode,
                "seed": settings.seed,
                "actions": actions,
                "poses": poses,
                "maze": maze.rows(),
                "visited_fraction": round(len(seen) / len(maze.open_cells), 4),
                "psnr": round(psnr(frames, decode(part)), 2),
            }
            if isinstance(walker, ScriptedWalk):
                record |= script_record(walker, settings.frames)
            write_text(record_path(job.output, job.split, episode), json.dumps(record))
            part.replace(video)  # last: an episode with a video is finished
        game.close()
    return len(job.episodes)


def style_of(settings: Settings) -> Style:
    if settings.texture_set == "other":
        return OTHER
    return ORIGINAL if settings.walk == "explore" else MEMORABLE


def make_walker(job: Job, episode: int, maze: Maze) -> ExploreWalk | RevisitWalk:
    rng = episode_rng(job, episode, "walk")
    if job.settings.walk == "scripted":
        return ScriptedWalk(maze, rng, SCRIPTS[episode % len(SCRIPTS)])
    return (RevisitWalk if job.settings.walk == "revisit" else ExploreWalk)(maze, rng)


def script_record(walker: ScriptedWalk, num_frames: int) -> dict[str, str | int]:
    """What the metadata says of a scripted walk; fails if the script did not end early enough."""
    start, end = walker.start_frame, walker.return_frame
    if start is None or end is None or end + FRAMES_AFTER_RETURN >= num_frames:
        raise RuntimeError(f"the walk {walker.script} did not return in time: from {start} to {end}")
    return {"script": walker.script, "start_frame": start, "return_frame": end}


def episode_rng(job: Job, episode: int, purpose: str) -> random.Random:
    return random.Random(f"{job.settings.seed}-{job.split}-{episode}-{purpose}")


def psnr(frames: np.ndarray, decoded: np.ndarray) -> float:
    """Peak signal-to-noise ratio over all frames, in dB."""
    return float(10 * np.log10(255**2 / np.mean((frames.astype(np.float32) - decoded) ** 2)))


def record_all(output: Path, num_episodes: dict[str, int], settings: Settings, num_workers: int) -> None:
    """Record the episodes that `output` still lacks, then write its metadata and data card."""
    prepare_folder(output, settings)
    jobs = []
    for split in SPLITS:
        missing = [i for i in range(num_episodes[split]) if not video_path(output, split, i).exists()]
        size = min(EPISODES_PER_GAME, math.ceil(len(missing) / num_workers)) or 1
        jobs += [Job(output, split, missing[i : i + size], settings) for i in range(0, len(missing), size)]

    num_missing, num_done, started = sum(len(job.episodes) for job in jobs), 0, time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=exit_with_parent)
    try:
        for future in as_completed([pool.submit(record_job, job) for job in jobs]):
            num_done += future.result()
            rate = num_done * settings.frames / (time.monotonic() - started)
            print(f"recorded {num_done} of {num_missing} episodes, {rate:.0f} frames/s", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    write_metadata(output)


def exit_with_parent() -> None:
    """Make this worker end when the recorder is killed, and the engine that it started."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # only workers run this

    def watch() -> None:
        parent.join()
        for engine in psutil.Process().children():
            engine.kill()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(description="Record the doom-maze data set, or copy a sample of it.")
    option = parser.add_argument
    option("output", type=Path, help="folder of the recording; one that was interrupted is resumed")
    option("--train", type=int, default=700, help="episodes of the train split")
    option("--validation", type=int, default=64, help="episodes of the validation split")
    option("--frames", type=int, default=300, help="frames per episode")
    option("--seed", type=int, default=0, help="with the same seed, the same episodes are recorded")
    option("--textures", type=int, default=4, help="regions of a maze that have textures of their own")
    option(
        "--texture-set",
        choices=TEXTURE_SETS,
        default="standard",
        help="other: a world of textures that no shipped model was trained on",
    )
    option("--walk", choices=WALKS, default="explore", help="how the walker walks (doom_maze_walks.py)")
    option(
        "--maze-nodes",
        type=int,
        nargs=2,
        default=NODES_PER_SIDE,
        metavar=("LEAST", "MOST"),
        help="nodes per side of a maze, which has 2 n + 1 cells per side (default: 4 5)",
    )
    option("--workers", type=int, default=2, help="processes that record side by side")
    option("--sample-of", type=Path, metavar="RECORDING", help="copy episodes of a recording instead")
    option("--episodes", type=int, nargs="+", help="validation episodes that --sample-of copies")
    args = parser.parse_args()

    if (args.sample_of is None) != (args.episodes is None):
        raise ValueError("--sample-of and --episodes must be given together")
    if args.sample_of is not None:
        copy_sample(args.sample_of, args.output, args.episodes)
        return
    for name, low, high in (
        ("train", 0, MAX_EPISODES),
        ("validation", 0, MAX_EPISODES),
        ("frames", MIN_SCRIPTED_FRAMES if args.walk == "scripted" else 1, None),
        ("textures", 1, MAX_TEXTURES),
        ("workers", 1, None),
    ):
        value = getattr(args, name)
        if value < low or (high is not None and value > high):
            bound = f"at least {low}" if high is None else f"between {low} and {high}"
            walk = " with --walk scripted" if name == "frames" and low > 1 else ""
            raise ValueError(f"--{name} must be {bound}{walk}, but is {value}")
    least, most = args.maze_nodes
    if not LEAST_NODES <= least <= most <= MOST_NODES:
        raise ValueError(
            f"--maze-nodes must be two numbers from {LEAST_NODES} to {MOST_NODES}, the smaller first, "
            f"but is {least} {most}"
        )
    num_episodes = {"train": args.train, "validation": args.validation}
    if not any(num_episodes.values()):
        raise ValueError("--train and --validation are both 0: there is nothing to record")
    settings = Settings(args.seed, args.frames, args.textures, args.walk, (least, most), args.texture_set)
    record_all(args.output.resolve(), num_episodes, settings, args.workers)


if __name__ == "__main__":
    main()
