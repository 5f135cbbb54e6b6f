"""training/run.py: clock, logs, checkpoints that are whole, exact resuming, and what would be spoilt."""

import json
import math
import os
import pickle
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_far.training.options import FAROptions, ModelOptions, parse
from diffusers_far.training.run import Run
from diffusers_far.training.train_far import FARTrainer
from tests.python_process import PythonProcess, run_python
from tests.tiny_latents import LONG, averaged_weights, read_log, run_options, write_latents


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents"))


def trainer(command: list[str]) -> FARTrainer:
    return FARTrainer(*parse(command, (ModelOptions, FAROptions), None))


def run(command: list[str]) -> bool:
    return trainer(command).train()


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("checkpoint-*"))


def assert_equal_weights(one: Path, other: Path) -> None:
    expected = averaged_weights(other)
    for name, value in averaged_weights(one).items():
        assert torch.equal(value, expected[name]), name


# ----------------------------------------------------------------------------------------------------
# Going on


@pytest.mark.parametrize("kind", [[], LONG], ids=["base", "long"])
def test_a_killed_run_resumes_to_the_same_weights(
    latents: Path, tmp_path: Path, kind: list[str], repository: Path
) -> None:
    more = [*kind, "--max_train_steps", "30", "--save_steps", "2", "--gradient_accumulation_steps", "2"]
    more += ["--own_context_probability", "0.5", *(["--muon_learning_rate", "1e-2"] if kind else [])]
    run(run_options(latents, tmp_path / "unbroken", *more))

    command = run_options(latents, tmp_path / "broken", *more)
    process = PythonProcess(["-m", "training.train_far", *command], repository)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "broken").glob("checkpoint-0*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert read_log(tmp_path / "broken")[-1]["step"] < 30

    run([*command, "--resume_from", "latest"])
    assert_equal_weights(tmp_path / "broken", tmp_path / "unbroken")
    assert not list((tmp_path / "broken").glob(".*"))


def earlier_format(checkpoint: Path) -> None:
    """Make of a checkpoint one in which accelerate keeps averaged weights and clock, as it used to be."""
    state = json.loads((checkpoint / "run.json").read_text())
    averaged = load_file(checkpoint / "averaged.safetensors")
    ema = {"decay": 0.9999, "optimization_step": state["step"], "shadow_params": list(averaged.values())}
    # The file has the weights by name, the list has them in the order of the model.
    order = list(torch.load(checkpoint / "order.pt"))
    ema["shadow_params"] = [averaged[name] for name in order]
    torch.save(ema, checkpoint / "custom_checkpoint_0.pkl")
    torch.save({"step": state["step"], "seconds": state["seconds"]}, checkpoint / "custom_checkpoint_1.pkl")
    for name in ("run.json", "averaged.safetensors", "order.pt"):
        (checkpoint / name).unlink()


@pytest.mark.parametrize("earlier", [False, True], ids=["now", "earlier"])
def test_a_resumed_run_equals_an_unbroken_one(latents: Path, tmp_path: Path, earlier: bool) -> None:
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    first = trainer(run_options(latents, unbroken, "--save_steps", "4", *LONG))
    first.train()
    shutil.copytree(unbroken / "checkpoint-0000004", resumed / "checkpoint-0000004")
    if earlier:
        order = [name for name, _ in first.run.model.named_parameters()]
        torch.save(order, resumed / "checkpoint-0000004/order.pt")
        earlier_format(resumed / "checkpoint-0000004")
    again = trainer(run_options(latents, resumed, "--resume-from", "latest", *LONG))
    again.train()
    assert again.run.clock.seconds > 0 and read_log(resumed)[0]["step"] == 5
    assert_equal_weights(resumed, unbroken)


def test_latest_without_checkpoints_starts_anew(latents: Path, tmp_path: Path) -> None:
    run(run_options(latents, tmp_path, "--resume_from", "latest"))
    assert names(tmp_path) == ["checkpoint-0000006"]


def test_a_finished_run_that_is_resumed_keeps_its_checkpoint_and_completes_its_weights(
    latents: Path, tmp_path: Path
) -> None:
    run(run_options(latents, tmp_path))
    before, written = averaged_weights(tmp_path), (tmp_path / "checkpoint-0000006/run.json").read_text()
    shutil.rmtree(tmp_path / "ema")  # killed after the checkpoint
    assert run(run_options(latents, tmp_path, "--resume_from", "latest"))
    assert all(torch.equal(value, before[name]) for name, value in averaged_weights(tmp_path).items())
    assert (tmp_path / "checkpoint-0000006/run.json").read_text() == written


def test_a_replacement_that_was_interrupted_is_finished(latents: Path, tmp_path: Path) -> None:
    """Killed between the two renames of a folder, or while a new one is written."""
    run(run_options(latents, tmp_path))
    expected = averaged_weights(tmp_path)
    (tmp_path / "ema").rename(tmp_path / ".ema.being-replaced")
    (tmp_path / ".checkpoint-0000007.being-written").mkdir()
    exported = (tmp_path / ".ema.being-replaced").stat().st_ino
    resumed = trainer(run_options(latents, tmp_path, "--resume_from", "latest"))
    resumed.save_weights = lambda: None
    resumed.train()
    assert (tmp_path / "ema").stat().st_ino == exported
    assert all(torch.equal(value, expected[name]) for name, value in averaged_weights(tmp_path).items())
    assert not list(tmp_path.glob(".*")) and names(tmp_path) == ["checkpoint-0000006"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(
    latents: Path, tmp_path: Path, repository: Path, number: signal.Signals
) -> None:
    command = run_options(latents, tmp_path, "--max_train_steps", "100000")
    process = PythonProcess(["-m", "training.train_far", *command], repository)
    process.wait_for_line("step=1 ")
    process.send_signal(number)
    if number == signal.SIGTERM:  # which a cluster's scheduler and a launcher may both send
        time.sleep(0.05)
        process.send_signal(number)
    process.communicate(timeout=120)
    ended_later = {-signal.SIGTERM} if number == signal.SIGTERM else set()  # all was saved by then
    assert process.returncode in {128 + number} | ended_later
    last = read_log(tmp_path)[-1]["step"]
    assert names(tmp_path) == [f"checkpoint-{last:07d}"]
    assert (tmp_path / "ema" / "config.json").exists()


def test_a_full_disk_leaves_the_last_checkpoint(latents: Path, tmp_path: Path, repository: Path) -> None:
    """Files may have 16 kB: enough for the log, not for weights."""
    output = tmp_path / "run"
    run(run_options(latents, output, "--max_train_steps", "2"))
    before = {
        file: file.read_bytes() for file in (output / "checkpoint-0000002").rglob("*") if file.is_file()
    }
    command = run_options(latents, output, "--max_train_steps", "4", "--resume_from", "latest")
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({2**14}, {2**14}))"
    code = f"{limit}; from diffusers_far.training.train_far import main; main({command})"
    result = run_python(["-c", code], repository)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    expected = "OSError: step 4: .*run/checkpoint-0000004 cannot be written .*; last checkpoint: .*0000002\n"
    assert re.search(expected, result.stderr)
    assert names(output) == ["checkpoint-0000002"] and not list(output.glob(".*"))
    assert all(file.read_bytes() == content for file, content in before.items())
    run(command)
    assert names(output) == ["checkpoint-0000002", "checkpoint-0000004"]


# ----------------------------------------------------------------------------------------------------
# Checkpoints


def test_those_saved_last_are_kept_and_other_folders_left_alone(latents: Path, tmp_path: Path) -> None:
    """Saved last, not of the highest step: a run may go on from an earlier checkpoint."""
    run(run_options(latents, tmp_path, "--save_steps", "2", "--keep_checkpoints", "3"))
    for other in ("checkpoint-5-backup", "checkpoint-0000002.old"):
        (tmp_path / other).mkdir()
    resume = ["--resume_from", str(tmp_path / "checkpoint-0000002")]
    run(run_options(latents, tmp_path, *resume, "--max_train_steps", "3", "--save_steps", "1"))
    kept = ["checkpoint-0000003", "checkpoint-0000006"]
    assert names(tmp_path) == sorted([*kept, "checkpoint-0000002.old", "checkpoint-5-backup"])
    latest = trainer(run_options(latents, tmp_path, "--resume_from", "latest")).run.checkpoints()[-1]
    assert latest.name == "checkpoint-0000003"


DAMAGE: dict[str, Callable[[Path], object]] = {
    "half of the model": lambda folder: cut(folder / "model.safetensors"),
    "half of the optimizer": lambda folder: cut(folder / "optimizer.bin"),
    "no averaged weights": lambda folder: (folder / "averaged.safetensors").unlink(),
    "an empty clock": lambda folder: (folder / "run.json").write_text(""),
    "nothing": lambda folder: [file.unlink() for file in folder.iterdir()],
}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture(scope="module")
def saved(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run(run_options(latents, folder, "--save_steps", "3"))
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(
    latents: Path, saved: Path, tmp_path: Path, damage: str
) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    DAMAGE[damage](tmp_path / "checkpoint-0000006")
    message = r"checkpoint-0000006 is damaged \(.+\); before it was saved .*checkpoint-0000003"
    with pytest.raises(ValueError, match=message):
        run(run_options(latents, tmp_path, "--resume_from", "latest"))
    assert run(run_options(latents, tmp_path, "--resume_from", str(tmp_path / "checkpoint-0000003")))


class Attack:
    """What a pickle runs when it is read without care."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.target}",)

    def __init__(self, target: Path) -> None:
        self.target = target


@pytest.mark.parametrize("file", ["custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl"])
def test_resuming_runs_no_code_of_the_checkpoint(
    latents: Path, saved: Path, tmp_path: Path, file: str
) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    checkpoint, target = tmp_path / "checkpoint-0000006", tmp_path / "it-was-run"
    for content in (
        lambda file: file.write(pickle.dumps(Attack(target))),
        lambda file: torch.save(Attack(target), file),
    ):
        with (checkpoint / file).open("wb") as stream:
            content(stream)
        if file.startswith("custom"):
            (checkpoint / "run.json").unlink(missing_ok=True)  # then it is read as one of the earlier format
        try:
            run(run_options(latents, tmp_path, "--resume_from", "latest"))
        except ValueError as error:
            assert "is damaged" in str(error)
        assert not target.exists()


# ----------------------------------------------------------------------------------------------------
# What would be lost or mixed


def test_a_used_output_dir_is_refused(latents: Path, saved: Path) -> None:
    with pytest.raises(
        ValueError, match=r"output_dir='.*' was used: it has checkpoint-0000006; it takes a new"
    ):
        trainer(run_options(latents, saved))


def test_a_run_goes_on_with_the_same_model_and_data_only(latents: Path, saved: Path, tmp_path: Path) -> None:
    resume = ["--resume_from", "latest"]
    before = {file: file.read_bytes() for file in saved.glob("*.json*")}
    with pytest.raises(
        ValueError, match="num_layers=1 of the model, which is 2 now; it takes the same model"
    ):
        run(run_options(latents, saved, *resume, "--num_layers", "2"))
    other = shutil.copytree(latents, tmp_path / "other")
    (other / "train/00000.safetensors").rename(other / "train/renamed.safetensors")
    with pytest.raises(
        ValueError, match="was trained with other data; it takes the same data, or a new output"
    ):
        run(run_options(other, saved, *resume))
    assert {file: file.read_bytes() for file in saved.glob("*.json*")} == before


def test_bad_checkpoints_are_named(latents: Path, tmp_path: Path) -> None:
    for name in ("nowhere", str(latents)):
        with pytest.raises(ValueError, match=f"resume_from='{name}' is not a folder checkpoint-<step>"):
            trainer(run_options(latents, tmp_path, "--resume_from", name))


def test_a_loss_that_is_not_finite_stops_the_run(latents: Path, tmp_path: Path) -> None:
    spoilt = trainer(run_options(latents, tmp_path, "--save_steps", "2"))
    loss = spoilt.loss
    spoilt.loss = lambda clips, index: loss(clips, index) * (math.nan if index == 3 else 1)
    message = r"step 3: loss is nan; last checkpoint: .*checkpoint-0000002; of .*train/0.*from frame"
    with pytest.raises(FloatingPointError, match=message):
        spoilt.train()
    assert names(tmp_path) == ["checkpoint-0000002"]
    assert all(value.isfinite().all() for value in averaged_weights(tmp_path).values())


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(_: object, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(_: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.nan


def test_a_gradient_that_is_not_finite_stops_the_run(latents: Path, tmp_path: Path) -> None:
    spoilt = trainer(run_options(latents, tmp_path))
    loss = spoilt.loss
    spoilt.loss = lambda clips, index: NanGradient.apply(loss(clips, index))
    with pytest.raises(
        FloatingPointError, match="step 0: norm of the gradient is nan; last checkpoint: none"
    ):
        spoilt.train()


def test_weights_that_are_not_finite_are_not_saved(latents: Path, tmp_path: Path) -> None:
    spoilt = trainer(run_options(latents, tmp_path, "--save_steps", "1"))
    step = spoilt.step

    def spoil(index: int) -> dict[str, float]:
        values = step(index)
        if spoilt.run.clock.step == 1:
            next(spoilt.run.model.parameters()).data[:] = math.inf
        return values

    spoilt.step = spoil
    with pytest.raises(
        FloatingPointError, match=r"step 2: .* is (nan|inf); last checkpoint: .*checkpoint-0000001"
    ):
        spoilt.train()
    assert names(tmp_path) == ["checkpoint-0000001"]


# ----------------------------------------------------------------------------------------------------
# Clock


def rates(latents: Path, output: Path, seconds: tuple[float, ...], *more: str) -> list[float]:
    clock = trainer(
        run_options(latents, output, "--max_minutes", "10", "--max_train_steps", "100000", *more)
    ).run.clock
    found = []
    for clock.seconds in seconds:
        found.append(clock.learning_rate_share)
    assert clock.over
    return found


def test_the_learning_rate_follows_the_clock(latents: Path, tmp_path: Path) -> None:
    found = rates(
        latents, tmp_path, (0, 30, 60, 330, 600), "--lr_scheduler", "cosine", "--warmup_ratio", "0.1"
    )
    assert found == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0], abs=1e-3)


def test_a_rate_that_is_constant_until_the_last_part(latents: Path, tmp_path: Path) -> None:
    schedule = ["--lr_scheduler", "warmup_stable_decay", "--warmup_ratio", "0.1", "--decay_ratio", "0.4"]
    found = rates(latents, tmp_path, (30, 60, 200, 360, 480, 600), *schedule)
    assert found == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.5, 0.0], abs=1e-3)


def test_draws_depend_on_batch_seed_and_process(latents: Path, tmp_path: Path) -> None:
    made: Run = trainer(run_options(latents, tmp_path)).run
    first = torch.randn(3, generator=made.generator(5))
    assert torch.equal(first, torch.randn(3, generator=made.generator(5)))
    for other in (made.generator(6), made.generator(5, seed=1)):
        assert not torch.equal(first, torch.randn(3, generator=other))
