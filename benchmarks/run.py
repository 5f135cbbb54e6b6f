"""FAR's speed and memory: ours beside the published code, and beside what the machine can do at best.

    python benchmarks/run.py --output RESULTS [--published CHECKOUT] [--checkpoint PIPELINE]

Every case is measured in a process of its own under /usr/bin/time, ours and the published code's one after
the other on the same weights, noise and actions, and what they computed is compared. Writes RESULTS.json and
RESULTS.md. Speed-ups hold for the run they come from; absolute times also hang on what else the machine does.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
from cases import Case
from machine import bandwidth_gb, matmul_gflops

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout: this file is run as a script

from diffusers_far.evaluation.machine import describe
from diffusers_far.evaluation.tables import table
from diffusers_far.whole_files import written_whole

HERE = Path(__file__).resolve().parent
FRAMES = [
    Case("frame", context=24, steps=10),
    Case("frame", context=128, steps=10),
    Case("frame", context=24, steps=10, batch=4),
    Case("frame", long=True, context=24, steps=25),
    Case("frame", long=True, context=64, steps=25),
    Case("frame", long=True, context=128, steps=25),
]
TRAINING = [Case("training", batch=2, frames=16)]


def rollouts(lengths: list[int]) -> list[Case]:
    """The published protocol (scripts/speed_test.py): 4 videos, 25 steps, a window of 16 frames or all."""
    kinds = [{"short_window": 16}, {"short_window": 256}]
    return [
        Case("rollout", long=True, batch=4, frames=n, steps=25, **kind) for n in lengths for kind in kinds
    ]


def run_case(case: Case, options: list[str]) -> tuple[dict[str, float], torch.Tensor]:
    """Figures of a case by one side, and what it computed."""
    with tempfile.TemporaryDirectory() as folder:
        made, peak = Path(folder) / "made.pt", Path(folder) / "peak"
        command = ["/usr/bin/time", "--format", "%M", "--output", str(peak), sys.executable]
        command += [str(HERE / "measure.py"), json.dumps(asdict(case)), "--output", str(made), *options]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        figures = json.loads(result.stdout.splitlines()[-1])
        figures["peak_mb"] = float(peak.read_text()) / 1024
        return figures, torch.load(made)


def limit_ms(case: Case, ours: dict[str, float], gflops: float, bandwidth: float) -> float | None:
    """The roofline: no frame or training step can take less, as the machine was measured."""
    if case.task == "training":
        return 1e3 * ours["step_gflop"] / gflops
    if case.task == "frame":
        return 1e3 * max(ours["frame_gflop"] / gflops, case.steps * ours["step_mb"] / 1e3 / bandwidth)
    return None


def measure(
    case: Case, options: list[str], published: Path | None, gflops: float, gb: float
) -> dict[str, Any]:
    """One row: both sides, and their quotients."""
    ours, made = run_case(case, options)
    main = "seconds" if case.task == "rollout" else "step_ms" if case.task == "training" else "frame_ms"
    limit = limit_ms(case, ours, gflops, gb)
    row: dict[str, Any] = {**asdict(case), "model": case.model, "ours": ours, "limit_ms": limit}
    if limit is not None:
        row["share_of_limit"] = limit / ours[main]
    if published is not None:
        theirs, expected = run_case(case, [*options, "--published", str(published)])
        row |= {"published": theirs, "speedup": theirs[main] / ours[main]}
        row["largest_difference"] = (made - expected).abs().max().item()
        row["memory_ratio"] = ours["peak_mb"] / theirs["peak_mb"]
    return row


COLUMNS = {
    "frame": ["model", "batch", "context", "steps", "frame_ms", "commit_ms", "step_ms"],
    "rollout": ["model", "batch", "frames", "steps", "seconds", "frames_per_second"],
    "training": ["model", "batch", "frames", "step_ms"],
}
SHARED = ["peak_mb", "speedup", "memory_ratio", "share_of_limit", "largest_difference"]


def table_of(task: str, rows: list[dict[str, Any]]) -> str:
    """Markdown; figures that both sides have are written "ours / published"."""
    names = [*COLUMNS[task], *SHARED]
    lines: list[list[object]] = []
    for row in rows:
        cells: list[object] = []
        for name in names:
            sides = [row[side][name] for side in ("ours", "published") if name in row.get(side, ())]
            cells.append(" / ".join(map(shown, sides or [row.get(name, "")])))
        lines.append(cells)
    return table(names, lines)


def shown(value: Any) -> str:
    """Three digits of a fraction, all of a whole number."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def write(output: Path, results: dict[str, Any], texts: list[str]) -> None:
    """OUTPUT.json and OUTPUT.md."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for ending, text in ((".json", json.dumps(results, indent=2)), (".md", "\n\n".join(texts))):
        with written_whole(output.with_suffix(ending)) as partial:
            partial.write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="path of the results without its ending")
    parser.add_argument("--published", type=Path, help="checkout of the published code")
    parser.add_argument("--checkpoint", help="pipeline whose played frames are timed")
    parser.add_argument("--tasks", nargs="+", choices=list(COLUMNS), default=list(COLUMNS))
    parser.add_argument("--rollouts", type=int, nargs="*", default=[16], help="lengths; published: 16 to 256")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true", help="compile our blocks")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    gflops, gb = matmul_gflops(device, dtype), bandwidth_gb(device)
    machine = (
        f"{describe(device)}, {arguments.threads} threads, {arguments.dtype}: {gflops:.0f} GFLOP/s in a "
        f"matrix product, {gb:.0f} GB/s; torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"{datetime.date.today()}"
    )
    options = ["--threads", str(arguments.threads), "--device", arguments.device, "--dtype", arguments.dtype]
    options += ["--compile"] * arguments.compile
    cases = {"frame": FRAMES, "rollout": rollouts(arguments.rollouts), "training": TRAINING}
    tables, results = [machine], {"machine": machine, "rows": []}
    print(machine, flush=True)
    for task in arguments.tasks:
        rows = []
        for case in cases[task]:
            rows.append(measure(case, options, arguments.published, gflops, gb))
            print(json.dumps(rows[-1]), flush=True)
        tables.append(table_of(task, rows))
        results["rows"] += rows
    if arguments.checkpoint:
        command = [sys.executable, str(HERE / "played.py"), arguments.checkpoint]
        command += ["--threads", str(arguments.threads), "--device", arguments.device]
        text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
        results["played"] = played = json.loads(text)
        tables.append("\n".join(f"- {name}: {shown(value)}" for name, value in played.items()))
    write(arguments.output, results, tables)


if __name__ == "__main__":
    main()
