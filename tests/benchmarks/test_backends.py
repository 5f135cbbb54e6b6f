"""benchmarks/backends.py and export.py on a tiny model; nothing is compiled, speeds are checked for sense."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests import tiny_models as tm
from tests.python_process import run_python

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "tiny"
    pipe = tm.pipeline(tm.long_transformer(num_actions=6, num_layers=1), num_training_frames=14)
    pipe.save_pretrained(folder)
    return folder


def run(
    repository: Path, script: str, *arguments: object, **environ: str
) -> subprocess.CompletedProcess[str]:
    command = [f"benchmarks/{script}.py", *map(str, arguments)]
    return run_python(command, cwd=repository, env=os.environ | environ)


def test_backends_make_the_same_frames(repository: Path, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "results" / "backends"
    options = ["--frames", 6, "--warm-up", 1, "--num-threads", 1, "--min-run-time", 0.01]
    case = ["--case", f"{checkpoint}:2", "--backends", "eager onnx", "--output", output]
    done = run(repository, "backends", *case, *options)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.with_suffix(".json").read_text())
    eager, onnx = results["rows"]
    assert (eager["backend"], onnx["backend"], onnx["steps"]) == ("eager", "onnx", 2)
    assert eager["levels"] == 0 < onnx["levels"] < 0.01
    assert eager["context_frames"] == 14  # as the model was trained with
    for row in (eager, onnx):
        assert 0 < row["frame_ms"] <= row["slowest_ms"] and row["ready_seconds"] > 0
        assert row["frames_per_second"] >= 1e3 / row["slowest_ms"]
    assert onnx["speedup"] == pytest.approx(eager["frame_ms"] / onnx["frame_ms"])
    autoencoder = results["autoencoder"]
    assert [(row["batch"], row["layout"], row["dtype"]) for row in autoencoder[:4]] == [
        (1, layout, dtype)
        for layout in ("contiguous", "channels_last")
        for dtype in ("float32", "bfloat16 autocast")
    ]
    plain, halved, laid_out, both = autoencoder[4:]
    assert plain["levels"] == 0 and laid_out["levels"] < 0.01 < halved["levels"] and both["levels"] < 2
    table = output.with_suffix(".md").read_text()
    assert results["machine"] in table and "1 threads" in results["machine"]
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 2 + 2 + 2 + 8


@pytest.mark.parametrize(
    ("options", "environ", "message"),
    [
        (["--backends", "eager jax"], {}, "--backends: got 'eager jax'; it takes some of eager compile aoti"),
        (
            ["--case", "5"],
            {},
            "--case: got 5; it takes CHECKPOINT:STEPS, such as checkpoints/far-doom-maze-64:5",
        ),
        (
            ["--backends", "aoti"],
            {"CXX": "/no/g++"},
            "compile and aoti need a C++ compiler, and none was found",
        ),
    ],
)
def test_what_it_cannot_do_is_told(
    repository: Path, tmp_path: Path, options: list[str], environ: dict[str, str], message: str
) -> None:
    done = run(repository, "backends", "--output", tmp_path / "results", *options, **environ)
    assert done.returncode == 1 and message in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())


def test_size_and_error_of_an_export(repository: Path, checkpoint: Path) -> None:
    options = ["--given", 3, "--frames", 2, "--num-threads", 1, "--dtypes", "float32 float16"]
    done = run(repository, "export", checkpoint, *options)
    assert done.returncode == 0, done.stderr
    single, half = map(json.loads, done.stdout.splitlines()[-2:])
    assert (single["dtype"], half["dtype"]) == ("float32", "float16")
    assert 0 < single["largest_error"] < 1e-4 < half["largest_error"] < 0.05
    assert 0 < half["megabytes"]["decode.onnx"] < 0.7 * single["megabytes"]["decode.onnx"]
