"""The experiment on FAR beside other predictors of video, with tiny models and walks."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusers_far.flow_matching import add_noise
from diffusers_far.metrics import psnr
from diffusers_far.training.clips import Clips, LatentVideos
from evaluation.experiments import baselines, equal_time
from tests import tiny_models

OBSERVED = PREDICTED = 5
ACTIONS = 3
SHAPE = (tiny_models.CHANNELS, tiny_models.GRID, tiny_models.GRID)


class Means(nn.Module):
    """Features of videos as cheap as can be."""

    def forward(self, videos: Tensor) -> Tensor:
        return videos.mean(dim=(1, 3, 4))


@pytest.fixture(autouse=True)
def short_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "seconds_per_step", lambda trainings: [0.1])  # 6 steps
    monkeypatch.setattr(equal_time, "I3D", Means)
    monkeypatch.setattr(baselines, "OBSERVED", OBSERVED)
    monkeypatch.setattr(baselines, "PREDICTED", PREDICTED)
    monkeypatch.setattr(baselines, "TIMED", 1)
    monkeypatch.setitem(baselines.UNETS, False, (32, 32))
    monkeypatch.setitem(baselines.SIMVPS, False, {"hid_S": 8, "hid_T": 16, "N_S": 2, "N_T": 2})


@pytest.fixture
def command(
    walks: Path, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """The command line, with other arguments at its end."""

    def set_command(*more: str) -> None:
        arguments = [str(walks), "--autoencoder", str(autoencoder), "--output", str(tmp_path / "output")]
        arguments += ["--minutes", "0.01", "--clips", "4", "--steps", "2", "--batch-size", "2"]
        arguments += ["--measured-at-once", "3", "--mixed-precision", "no", *more]
        monkeypatch.setattr(sys, "argv", ["baselines", *arguments])

    return set_command


def unet() -> baselines.NextFrameUNet:
    torch.manual_seed(0)
    return baselines.NextFrameUNet(SHAPE, ACTIONS, (32, 32)).eval()


def constant_actions(number: int, frames: int) -> Tensor:
    return torch.full((1, frames), number)


@pytest.mark.filterwarnings("ignore:.*resume")
@pytest.mark.usefixtures("tiny_experiment")
def test_far_and_unet_learn_for_as_many_operations_and_once(
    command: Callable[..., None],
    walks: Path,
    autoencoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(baselines, "in_new_process", lambda function, *arguments: function(*arguments))
    command("--models", "FAR", "UNet", "--plot", str(tmp_path / "plot.png"))
    baselines.main()

    output = tmp_path / "output"
    results = json.loads((output / "results.json").read_text())
    far, unet, repeat = results["rows"]
    assert [row["kind"] for row in results["rows"]] == ["FAR", "UNet", "repeat"]
    assert far["steps"] == 6 and far["psnr"]["mean"] != unet["psnr"]["mean"]
    for row in (far, unet):
        assert row["petaflops"] == pytest.approx(row["steps"] * row["flops_per_step"] / 1e15)
        assert row["frames_per_second"] > 0 and row["memory_mb"] > 0 and row["parameters"] > 0
        assert len(row["psnr_by_frame"]) == len(row["lpips_by_frame"]) == PREDICTED
        assert row["psnr_by_frame"][0] == pytest.approx(sum(measured(output, row["kind"], "psnr_1")) / 4)
    assert abs(unet["petaflops"] - far["petaflops"]) <= unet["flops_per_step"] / 1e15
    assert "steps" not in repeat
    latents, _, _ = equal_time.spread_clips(LatentVideos(walks / "validation"), 4, OBSERVED + PREDICTED)
    coder = equal_time.make_coder(autoencoder, torch.device("cpu"))
    last, *true = baselines.decode(coder, latents[:, OBSERVED - 1 :], 8).unbind(1)
    expected = [psnr(last[:, None], frame[:, None]).mean().item() for frame in true]
    assert repeat["psnr_by_frame"] == pytest.approx(expected, rel=1e-4)
    text = (output / "results.md").read_text()
    assert text.count("| FAR |") == text.count("| UNet |") == 2 and text.count("| repeat |") == 1
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(baselines, "Trainer", None)  # not made again
    monkeypatch.setattr(baselines, "make_model", None)
    baselines.main()
    assert json.loads((output / "results.json").read_text())["rows"] == results["rows"]
    command("--models", "FAR")  # those of before stay
    baselines.main()
    assert json.loads((output / "results.json").read_text())["rows"] == results["rows"]
    command("--models", "FAR", "--unet-rate", "1e-4")
    with pytest.raises(ValueError, match=r"unet_rate=0.0001.* has results of unet_rate=0.0006"):
        baselines.main()


def measured(output: Path, kind: str, name: str) -> list[float]:
    return json.loads((output / "measured.json").read_text())["results"][kind][name]


@pytest.mark.filterwarnings("ignore:.*resume")
@pytest.mark.usefixtures("tiny_experiment")
def test_training_that_was_interrupted_goes_on(
    command: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        baselines, "in_new_process", lambda *arguments: {"frames_per_second": 1.0, "memory_mb": 1.0}
    )
    steps, interrupted = [], True
    own = baselines.Trainer.step

    def step(trainer: Any, index: int) -> dict[str, float]:
        if trainer.options.validation_steps:  # not a first look
            steps.append(index)
            if interrupted and index == 3:
                trainer.run._own_signal = 2
        return own(trainer, index)

    monkeypatch.setattr(baselines.Trainer, "step", step)
    command("--models", "FAR")
    with pytest.raises(SystemExit, match="FAR: interrupted; start again"):
        baselines.main()
    interrupted = False
    baselines.main()
    assert steps == [0, 1, 2, 3, 4, 5]


def test_clips_are_spread_over_walks_and_errors_are_of_the_means_of_walks(walks: Path) -> None:
    videos = LatentVideos(walks / "validation")
    latents, actions, owners = equal_time.spread_clips(videos, 4, OBSERVED + PREDICTED)
    assert owners == [0, 1, 2, 0] and actions.shape == (4, OBSERVED + PREDICTED)
    assert not torch.equal(latents[0], latents[3])
    found = equal_time.over_walks([1.0, 2.0, 3.0, 3.0], owners)
    assert found["mean"] == pytest.approx(7 / 3)
    assert found["standard_error"] == pytest.approx(1 / 3)


@torch.no_grad()
def test_actions_of_the_new_frame_and_of_those_before_reach_unet() -> None:
    model, frames = unet(), tiny_models.latents(1, baselines.BEFORE)
    noisy, timestep = tiny_models.latents(1, 1, seed=3)[:, 0], torch.tensor([300.0])
    actions = constant_actions(1, baselines.BEFORE + 1)
    expected = model(noisy, timestep, frames, actions)
    for place in range(baselines.BEFORE + 1):
        for other in (0, 2, -1):
            changed = actions.clone()
            changed[:, place] = other
            found = model(noisy, timestep, frames, changed)
            assert tiny_models.relative_error(found, expected) > 0.001
    for place in range(baselines.BEFORE):
        moved = frames.clone()
        moved[:, place] += 1
        assert tiny_models.relative_error(model(noisy, timestep, moved, actions), expected) > 0.001


def test_planes_are_one_where_the_action_is() -> None:
    planes = baselines.action_planes(torch.tensor([[0, 2, -1]]), ACTIONS, 2, 4)
    assert planes.shape == (1, 3, ACTIONS, 2, 4)
    assert planes.float().mean(dim=(3, 4)).tolist() == [[[1, 0, 0], [0, 0, 1], [0, 0, 0]]]


def test_unet_learns_each_frame_from_the_four_before_it() -> None:
    """A model that is told the answer has no loss; what it gets is of the right frames."""
    latents = tiny_models.latents(2, 7)
    actions = torch.arange(14).view(2, 7)
    calls = {}

    class Model(nn.Module):
        def forward(self, noisy: Tensor, timestep: Tensor, before: Tensor, actions: Tensor) -> Tensor:
            calls.update(noisy=noisy, timestep=timestep, before=before, actions=actions)
            level = (timestep / 1000)[:, None, None, None]
            return (noisy - latents[:, 4:].flatten(0, 1)) / level  # noise - frame

    clips = Clips(latents, 7, actions, None, ())
    loss = baselines.NextFrames(Model()).loss(clips, tiny_models.generator())
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert calls["actions"].tolist()[:2] == [[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]]
    assert calls["actions"].tolist()[5] == [9, 10, 11, 12, 13]
    assert torch.equal(calls["before"][1], latents[0, 1:5]) and torch.equal(
        calls["before"][5], latents[1, 2:6]
    )
    assert len(calls["timestep"].unique()) > 1


def test_a_rollout_is_made_of_its_own_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    model, context = unet(), tiny_models.latents(1, OBSERVED)
    actions = torch.randint(ACTIONS, (1, OBSERVED + PREDICTED), generator=tiny_models.generator())
    seen = []
    own = model.forward

    def forward(noisy: Tensor, timestep: Tensor, before: Tensor, known: Tensor) -> Tensor:
        seen.append((before, known))
        return own(noisy, timestep, before, known)

    monkeypatch.setattr(model, "forward", forward)
    made = baselines.roll_out(model, context, actions, [tiny_models.generator(5)], 2)
    assert made.shape == (1, PREDICTED, *SHAPE) and len(seen) == 2 * PREDICTED
    frames = torch.cat([context, made], dim=1)
    for index, (before, known) in enumerate(seen):
        number = OBSERVED + index // 2
        assert torch.equal(before, frames[:, number - baselines.BEFORE : number])
        assert torch.equal(known, actions[:, number - baselines.BEFORE : number + 1])

    again = baselines.roll_out(model, context, actions, [tiny_models.generator(5)], 2)
    assert torch.equal(again, made)
    actions[:, OBSERVED + 2] = (actions[:, OBSERVED + 2] + 1) % ACTIONS
    other = baselines.roll_out(model, context, actions, [tiny_models.generator(5)], 2)
    assert torch.equal(other[:, :2], made[:, :2])
    for frame in range(2, PREDICTED):
        assert not torch.allclose(other[:, frame], made[:, frame])


def test_a_rollout_finds_the_frame_of_a_model_that_knows_it() -> None:
    """With the true velocity, any solver ends at the frame."""
    truth = tiny_models.latents(1, 1, seed=7)[0]

    class Knows(nn.Module):
        dtype = torch.float32

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, noisy: Tensor, timestep: Tensor, before: Tensor, actions: Tensor) -> Tensor:
            return (noisy - truth) / (timestep / 1000)[:, None, None, None]

    context, actions = tiny_models.latents(1, OBSERVED), constant_actions(0, OBSERVED + 1)
    made = baselines.roll_out(Knows(), context, actions, [tiny_models.generator()], 4)
    assert tiny_models.relative_error(made[:, 0], truth) < 0.01
    start = add_noise(truth[None], tiny_models.latents(1, 1, seed=8), torch.ones(1, 1))
    assert tiny_models.relative_error(start[:, 0], truth) > 0.5


def test_pixels_are_the_decoded_latents(walks: Path, autoencoder: Path, tmp_path: Path) -> None:
    coder = equal_time.make_coder(autoencoder, torch.device("cpu"))
    baselines.write_pixels(walks, tmp_path / "pixels", coder, 2)
    for split in ("train", "validation"):
        source, pixels = LatentVideos(walks / split), LatentVideos(tmp_path / "pixels" / split)
        assert pixels.frame_shape == (3, 64, 64) and pixels.num_frames == source.num_frames
        assert [path.name for path in pixels.paths] == [path.name for path in source.paths]
        expected = baselines.decode(coder, source.clip(1, 2, 3)[None], 3)[0]
        assert (pixels.clip(1, 2, 3) / 255 - expected).abs().max() <= 0.51 / 255
        assert torch.equal(pixels.actions[1], source.actions[1])
    kept = tmp_path / "pixels" / "train" / "0.safetensors"
    save_file({**load_file(kept), "mark": torch.ones(1)}, kept)
    baselines.write_pixels(walks, tmp_path / "pixels", coder, 2)
    assert "mark" in load_file(kept)  # not written again


def simvp() -> baselines.ActionSimVP:
    torch.manual_seed(0)
    return baselines.ActionSimVP((3, 16, 16), ACTIONS, **baselines.SIMVPS[False]).eval()


@torch.no_grad()
def test_actions_of_observed_and_predicted_frames_reach_simvp(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vpredicto", reason=baselines.INSTALL)
    model = simvp()
    assert capsys.readouterr().out == ""
    frames = torch.rand(1, OBSERVED, 3, 16, 16, generator=tiny_models.generator())
    actions = constant_actions(1, OBSERVED + PREDICTED)
    expected = model(frames, actions)
    assert expected.shape == (1, PREDICTED, 3, 16, 16)
    for place in (0, OBSERVED - 1, OBSERVED, OBSERVED + PREDICTED - 1):
        changed = actions.clone()
        changed[:, place] = 2
        assert tiny_models.relative_error(model(frames, changed), expected) > 1e-4


@pytest.mark.filterwarnings("ignore:.*resume")
@pytest.mark.usefixtures("tiny_experiment")
def test_simvp_joins_results_that_are_there(
    command: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vpredicto", reason=baselines.INSTALL)
    monkeypatch.setattr(baselines, "in_new_process", lambda function, *arguments: function(*arguments))
    command("--models", "SimVP")
    baselines.main()
    row, _ = json.loads((tmp_path / "output" / "results.json").read_text())["rows"]
    far = json.loads((tmp_path / "output" / "measured.json").read_text())["results"]["plan FAR"]
    assert row["kind"] == "SimVP" and row["frames_per_second"] > 0
    assert abs(row["petaflops"] - 6 * far["flops_per_step"] / 1e15) <= row["flops_per_step"] / 1e15
    command("--models", "FAR")
    baselines.main()
    rows = json.loads((tmp_path / "output" / "results.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["FAR", "SimVP", "repeat"] and rows[1] == row


def test_a_new_process_is_another_one() -> None:
    assert baselines.in_new_process(os.getpid) != os.getpid()


def test_memory_at_most_is_no_less_than_now() -> None:
    assert 0 < baselines.memory("VmRSS") <= baselines.memory("VmHWM")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--models", "GAN"], "invalid choice: 'GAN'"),
        (["--clips", "1"], "--clips 1: FVD takes 2 or more"),
        (["--steps", "0"], "--steps 0: it takes 1 or more"),
        (["--minutes", "0"], "--minutes 0.0: it takes more than 0"),
        (["--unet-rate", "-1"], "--unet-rate -1.0: it takes more than 0"),
    ],
)
def test_arguments_that_cannot_be_are_named(
    more: list[str], message: str, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(*more)
    with pytest.raises(SystemExit):
        baselines.main()
    assert message in capsys.readouterr().err


def test_simvp_without_its_package_says_what_to_install(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vpredicto.models.SimVP", None)
    monkeypatch.setitem(sys.modules, "vpredicto", None)
    command()
    with pytest.raises(SystemExit):
        baselines.main()
    assert f"{baselines.INSTALL}, or give --models FAR UNet" in capsys.readouterr().err


def test_walks_without_actions_or_too_short_are_refused(walks: Path, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        for path in (walks / split).iterdir():
            content = load_file(path)
            del content["actions"]
            save_file(content, path)
    with pytest.raises(ValueError, match="train has no actions, or others; it takes one number per frame"):
        baselines.make_model("UNet", LatentVideos(walks / "train"), False)
    with pytest.raises(ValueError, match="it takes 12 or more, with actions"):
        equal_time.spread_clips(LatentVideos(walks / "validation"), 2, OBSERVED + PREDICTED)
