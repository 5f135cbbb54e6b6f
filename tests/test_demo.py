"""The demo as a reader runs it: the shipped model, a held-out episode, an mp4."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from diffusers_far import cli, demo
from diffusers_far.video_files import read_video
from tests.python_process import run_python

ROOT = Path(__file__).resolve().parents[1]


def test_demo_writes_truth_beside_prediction(tmp_path):
    output = tmp_path / "demo.mp4"
    options = ["--num-frames", "36", "--num-inference-steps", "2", "--output", str(output)]
    done = run_python(["-m", "diffusers_far.cli", "demo", *options], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 predicted" in done.stdout
    frames = read_video(output).astype(float)
    assert len(frames) == 36
    truth, prediction = np.split(frames[:, 8:-8], 2, axis=2)
    error = np.abs(truth - prediction)[..., 8:-8, :].mean(axis=(1, 2, 3))
    assert error[:32].max() < 20  # the context went through the autoencoder only
    assert [path.name for path in tmp_path.iterdir()] == ["demo.mp4"]  # nothing half-written is left


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere"], "--checkpoint: nowhere is neither a folder"),
        (["--episodes", "nowhere"], "--episodes: nowhere is not there"),
        (["--episode", "99"], "--episode: got 99"),
        (["--num-frames", "1000"], "must lie within"),
        (["--num-frames", "32"], "must lie within"),
        (["--num-context", "0"], "must lie within"),
        (["--output", "demo.txt"], "demo.txt must end with one of .mp4"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(cli.main, ["demo", *arguments])
    assert result.exit_code == 1 and message in result.output
    assert result.output.startswith("Error: ") and len(result.output.splitlines()) == 1


def test_side_by_side_marks_context_and_prediction():
    truth, prediction = np.zeros((3, 4, 4, 3)), np.ones((3, 4, 4, 3))
    joined = demo.side_by_side(truth, prediction, num_context=1)
    assert joined.shape == (3, 24, 48, 3)
    assert joined[0, 0, 24:].tolist() == [[0.2, 0.8, 0.3]] * 24
    assert joined[1, 0, 24:].tolist() == [[0.9, 0.2, 0.2]] * 24
    assert joined[:, 4:-4, 28:-4].min() == 1
