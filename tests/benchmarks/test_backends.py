"""benchmarks/backends.py and export.py on a tiny model; nothing is compiled, speeds are checked for sense."""

import json
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


def run(repository: Path, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run_python([f"benchmarks/{script}.py", *map(str, arguments)], cwd=repository)


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
    ("options", "message"),
    [
        (["--backends", "eager jax"], "--backends: got 'eager jax'; it takes some of eager compile aoti"),
        (["--case", "5"], "--case: got 5; it takes CHECKPOINT:STEPS, such as checkpoints/far-doom-maze-64:5"),
    ],
)
def test_wrong_options_are_told(repository: Path, tmp_path: Path, options: list[str], message: str) -> None:
    done = run(repository, "backends", "--output", tmp_path / "results", *options)
    assert done.returncode == 1 and message in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())


def test_a_missing_compiler_is_told(repository: Path, tmp_path: Path) -> None:
    code = "import runpy, sys, torch._inductor.config as config; config.cpp.cxx = ('/no/g++',)\n"
    code += "sys.path.insert(0, 'benchmarks'); runpy.run_path('benchmarks/backends.py', run_name='__main__')"
    options = ["--output", str(tmp_path / "results"), "--backends", "aoti"]
    done = run_python(["-c", code, *options], cwd=repository)
    assert done.returncode == 1
    assert "compile and aoti need a C++ compiler, and none was found" in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())


def test_size_and_error_of_an_export(repository: Path, checkpoint: Path) -> None:
    options = ["--given", 3, "--frames", 2, "--num-threads", 1, "--dtypes", "float16"]
    done = run(repository, "export", checkpoint, *options)
    assert done.returncode == 0, done.stderr
    half = json.loads(done.stdout.splitlines()[-1])
    assert half["dtype"] == "float16" and 1e-5 < half["largest_error"] < 0.05
    assert sum(half["megabytes"].values()) > half["megabytes"]["decode.onnx"] > 0
