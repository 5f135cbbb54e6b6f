"""Frames a second of the shipped models by what computes them, and the autoencoder in four ways.

    python benchmarks/backends.py --output RESULTS

Backends are PyTorch as it is ("eager"), with compiled blocks ("compile"), AOTInductor ("aoti": the modules
of an export, compiled ahead of time) and ONNX Runtime ("onnx": the export itself), on the CPU. A frame is
timed from its action to its pixels, once the context is full. All make the same frames from the same noise,
a few each in turn, so that what else the machine does hits them alike. Writes RESULTS.json and RESULTS.md.
"""

import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import torch
from machine import seconds
from run import shown, write

from diffusers_far import FARVideoPipeline, read_video
from diffusers_far.evaluation.machine import describe
from diffusers_far.evaluation.tables import table
from diffusers_far.export import ExportedRollout, export_onnx, seeded_noise
from diffusers_far.export.onnx_export import GraphModule, graph_modules
from diffusers_far.loading import load_pipeline
from diffusers_far.shipped import EPISODES, find

CASES = (
    "checkpoints/far-doom-maze-64:5",
    "checkpoints/far-doom-maze-64-any-step:1",
    "checkpoints/far-doom-maze-64-any-step:2",
)
BACKENDS = ("eager", "compile", "aoti", "onnx")
SEED = 0
TURN = 5  # frames that a backend makes before the next one's turn
BATCHES = (1, 16)  # frames that the autoencoder takes at once
Maker = Callable[[Any, np.ndarray], np.ndarray]  # action, noise [C, h, w] to pixels [H, W, 3] in [0, 1]


def check_compiler() -> None:
    """Raise an error where there is none for C++."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise click.ClickException(
            "--backends: compile and aoti need a C++ compiler, and none was found; install g++ (Debian: "
            'apt-get install g++), name yours in the variable CXX, or leave them out: --backends "eager onnx"'
        ) from error


class CompiledGraph:
    """A graph by AOTInductor, which `ExportedRollout` runs as it runs a session of ONNX Runtime."""

    def __init__(self, graph: GraphModule, file: Path) -> None:
        self.examples = graph.inputs
        program = torch.export.export(graph.module.eval(), tuple(graph.inputs.values()))
        torch._inductor.aoti_compile_and_package(program, package_path=str(file))
        self.model = torch._inductor.aoti_load_package(str(file))

    def run(self, names: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs in order. An export has no inputs that it does not read; here they are zeros."""
        given = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
        made = self.model(*(given.get(name, example) for name, example in self.examples.items()))
        return [one.numpy() for one in (made if isinstance(made, list | tuple) else [made])]


def in_pytorch(
    checkpoint: str, latents: torch.Tensor, actions: list[Any], steps: int, compiled: bool
) -> Maker:
    """A rollout in PyTorch, after frames of given scaled latents `[T, C, h, w]`."""
    pipe = load_pipeline(checkpoint, "cpu", "float32")
    if compiled:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    rollout = pipe.rollout(
        video_latents=latents[None],
        context_actions=[actions],
        num_inference_steps=steps,
        output_type="latent",
    )

    def make(action: Any, noise: np.ndarray) -> np.ndarray:
        made = rollout.step_latents(torch.tensor([action]), torch.from_numpy(noise)[None, None])
        return pipe.video_processor.postprocess(pipe.decode_latents(made[:, 0]), output_type="np")[0]

    return make


def exported(
    pipe: FARVideoPipeline,
    folder: Path,
    latents: torch.Tensor,
    actions: list[Any],
    steps: int,
    compiled: bool,
) -> Maker:
    """The same by an export: its graphs by AOTInductor, or in ONNX Runtime."""
    game = ExportedRollout(folder, SEED, num_inference_steps=steps, num_threads=torch.get_num_threads())
    if compiled:
        rollout = pipe.rollout(batch_size=1, output_type="latent")
        for name, graph in graph_modules(pipe, rollout).items():
            if name != "encode":
                game._sessions[name] = CompiledGraph(graph, folder / f"{name}.pt2")
    for frame, action in zip(latents, actions, strict=True):
        game.append_latents(frame.numpy(), action)
    return lambda action, noise: game.decode(game.step_latents(action, noise))


def measure(
    checkpoint: str,
    steps: int,
    backends: list[str],
    episode: tuple[np.ndarray, list[Any]],
    frames: int,
    warm_up: int,
) -> list[dict[str, Any]]:
    """A row per backend."""
    torch.compiler.reset()  # the blocks of one model alone take most of the 8 graphs that may be compiled
    pipe = load_pipeline(checkpoint, "cpu", "float32")
    video, actions = episode
    with tempfile.TemporaryDirectory() as parent:
        folder = export_onnx(pipe, Path(parent) / "export")
        config = json.loads((folder / "rollout.json").read_text())
        given = min(config["ring_frames"] + config["window_frames"] + 1, len(video))
        latents = pipe.encode_video(video[:given])[0]
        makers, rows = [], []
        for backend in backends:
            began, compiled = time.perf_counter(), backend in ("compile", "aoti")
            start = latents, actions[:given], steps, compiled
            maker = (
                in_pytorch(checkpoint, *start)
                if backend in ("eager", "compile")
                else exported(pipe, folder, *start)
            )
            makers.append(maker)
            rows.append(
                {"checkpoint": checkpoint, "steps": steps, "backend": backend, "context_frames": given}
            )
            rows[-1]["ready_seconds"] = time.perf_counter() - began
        times: list[list[float]] = [[] for _ in backends]
        errors = [0.0 for _ in backends]
        for first in range(0, warm_up + frames, TURN):
            made = []
            for maker, spent in zip(makers, times, strict=True):
                pictures = []
                for index in range(first, min(first + TURN, warm_up + frames)):
                    noise = seeded_noise(SEED, given + index, config["latent_shape"])
                    began = time.perf_counter()
                    pictures.append(maker(actions[(given + index) % len(actions)], noise))
                    spent.append(time.perf_counter() - began)
                made.append(np.stack(pictures))
            errors = [
                max(error, 255 * float(np.abs(one - made[0]).mean()))
                for error, one in zip(errors, made, strict=True)
            ]
    for row, spent, error in zip(rows, times, errors, strict=True):
        row["ready_seconds"] += sum(spent[:warm_up])
        row["frame_ms"] = 1e3 * statistics.median(spent[warm_up:])
        row["slowest_ms"] = 1e3 * max(spent[warm_up:])
        row["frames_per_second"] = frames / sum(spent[warm_up:])
        row["speedup"] = rows[0]["frame_ms"] / row["frame_ms"]
        row["levels"] = error
    return rows


def measure_autoencoder(checkpoint: str, video: np.ndarray, min_run_time: float) -> list[dict[str, Any]]:
    """Milliseconds of a frame, and by how many of 255 levels its reconstruction is another."""
    pipe = load_pipeline(checkpoint, "cpu", "float32")
    rows = []
    for batch in BATCHES:
        expected = None
        for layout in (torch.contiguous_format, torch.channels_last):
            vae = pipe.vae.to(memory_format=layout)
            pixels = torch.from_numpy(video[:batch]).movedim(-1, 1) / 127.5 - 1
            pixels = pixels.contiguous(memory_format=layout)
            for bfloat16 in (False, True):
                with torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext():
                    latents = vae.encode(pixels).latent
                    decoded = vae.decode(latents).sample.float()
                    expected = decoded if expected is None else expected
                    names = {"vae": vae, "pixels": pixels, "latents": latents}
                    encode, decode = (
                        1e3 * seconds(f"vae.{call}", min_run_time, **names) / batch
                        for call in ("encode(pixels)", "decode(latents)")
                    )
                rows.append(
                    {
                        "batch": batch,
                        "layout": "channels_last" if layout == torch.channels_last else "contiguous",
                        "dtype": "bfloat16 autocast" if bfloat16 else "float32",
                        "encode_ms": encode,
                        "decode_ms": decode,
                        "levels": 127.5 * (decoded - expected).abs().mean().item(),
                    }
                )
    return rows


def table_of(rows: list[dict[str, Any]]) -> str:
    return table(list(rows[0]), [[shown(value) for value in row.values()] for row in rows])


@click.command()
@click.option("--output", type=Path, required=True, help="Path of the results without its ending.")
@click.option("--case", "cases", multiple=True, metavar="CHECKPOINT:STEPS", default=CASES, show_default=True)
@click.option("--backends", default=" ".join(BACKENDS), show_default=True, help="The first is the measure.")
@click.option("--episodes", default=EPISODES, show_default=True, help="Whose first frames are the context.")
@click.option("--frames", default=60, show_default=True, help="That are timed.")
@click.option("--warm-up", default=10, show_default=True, help="Frames before them.")
@click.option("--num-threads", default=2, show_default=True)
@click.option("--min-run-time", default=1.0, show_default=True, help="Seconds of each of the autoencoder's.")
@torch.no_grad()
def main(
    output: Path,
    cases: tuple[str, ...],
    backends: str,
    episodes: str,
    frames: int,
    warm_up: int,
    num_threads: int,
    min_run_time: float,
) -> None:
    """Write OUTPUT.json and OUTPUT.md."""
    names = backends.split()
    if not names or set(names) - set(BACKENDS):
        raise click.ClickException(f"--backends: got {backends!r}; it takes some of {' '.join(BACKENDS)}")
    if {"compile", "aoti"} & set(names):
        check_compiler()
    torch.set_num_threads(num_threads)
    folder = find(episodes, "episodes")
    first = json.loads((folder / "metadata.jsonl").read_text().splitlines()[0])
    episode = read_video(folder / first["file_name"]), first["actions"]
    machine = (
        f"{describe(torch.device('cpu'))}, {num_threads} threads, float32; torch {torch.__version__}, "
        f"onnxruntime {onnxruntime.__version__}, {datetime.date.today()}"
    )
    results: dict[str, Any] = {"machine": machine, "rows": []}
    for case in cases:
        checkpoint, _, steps = case.rpartition(":")
        if not checkpoint or not steps.isdecimal():
            raise click.ClickException(f"--case: got {case}; it takes CHECKPOINT:STEPS, such as {CASES[0]}")
        rows = measure(checkpoint, int(steps), names, episode, frames, warm_up)
        results["rows"] += rows
        click.echo("\n".join(map(json.dumps, rows)))
    results["autoencoder"] = measure_autoencoder(cases[0].rpartition(":")[0], episode[0], min_run_time)
    write(output, results, [machine, table_of(results["rows"]), table_of(results["autoencoder"])])


if __name__ == "__main__":
    main()
