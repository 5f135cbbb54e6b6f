"""Training in several processes, joined by gloo, is training in one process with a larger batch."""

import shutil
import signal
from pathlib import Path

import pytest
import torch

from diffusers_far import FARTransformer3DModel
from diffusers_far.training.clips import ClipBatches, LatentVideos
from diffusers_far.training.options import FAROptions, ModelOptions, parse
from diffusers_far.training.train_far import FARTrainer
from diffusers_far.training.train_folder import kept_for_backward
from tests.tiny_latents import LONG, averaged_weights, read_log, run_options, write_latents
from tests.tiny_models import relative_error
from tests.training.processes import finish, start

CLIPS = 6  # of a step, of all processes
# All that draws random numbers: lengths, noise, dropped conditions, and chances for a whole batch.
OPTIONS = [*LONG, "--own_context_probability", "0.5", "--noisy_window_probability", "0.3"]
OPTIONS += ["--condition_dropout", "0.3", "--validation_steps", "4", "--validation_batches", "2"]


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents"))


def command(latents: Path, output: Path, num_processes: int, *more: str) -> list[str]:
    batch = ["--batch_size", str(CLIPS // num_processes)]
    return run_options(latents, output, *OPTIONS, *batch, "--max_train_steps", "8", *more)


def run(command: list[str]) -> bool:
    return FARTrainer(*parse(command, (ModelOptions, FAROptions), None)).train()


def assert_same_curve(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for line, other in zip(found, expected, strict=True):
        for name in line.keys() - {"minutes", "frames_per_second"}:
            assert line[name] == pytest.approx(other[name], rel=1e-4), (line["step"], name)


@pytest.fixture(scope="module")
def one_process(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The log of one process with the whole batch."""
    output = tmp_path_factory.mktemp("runs") / "one"
    assert run(command(latents, output, 1))
    return read_log(output)


def test_two_processes_learn_what_one_learns_with_twice_the_batch(
    latents: Path, tmp_path: Path, repository: Path, one_process: list[dict[str, float]]
) -> None:
    two = ["-m", "training.train_far", *command(latents, tmp_path / "two", 2)]
    processes = start(two, 2, repository)
    said = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    assert_same_curve(read_log(tmp_path / "two"), one_process)


def test_gradient_checkpointing_learns_the_same(
    latents: Path, tmp_path: Path, repository: Path, one_process: list[dict[str, float]]
) -> None:
    two = ["-m", "training.train_far", *command(latents, tmp_path / "two", 2, "--gradient-checkpointing")]
    processes = start(two, 2, repository)
    said = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], said
    assert_same_curve(read_log(tmp_path / "two"), one_process)


def test_gradient_checkpointing_keeps_less(latents: Path, tmp_path: Path) -> None:
    """Of a run, not of a model: the option reaches the forward of a step."""
    kept = {}
    for name, more in {"all": [], "inputs": ["--gradient-checkpointing"]}.items():
        words = command(latents, tmp_path / name, 1, "--num_layers", "4", *more)
        trainer = FARTrainer(*parse(words, (ModelOptions, FAROptions), None))
        kept[name] = kept_for_backward(trainer.objective, trainer.batches[0])
    assert kept["inputs"] < 0.5 * kept["all"]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_processes_share_out_the_clips_of_one(latents: Path, num_ranks: int) -> None:
    videos = LatentVideos(latents / "train")
    one = ClipBatches(videos, CLIPS, 6, 3)
    shares = [
        ClipBatches(videos, CLIPS // num_ranks, 6, 3, rank=rank, num_ranks=num_ranks)
        for rank in range(num_ranks)
    ]
    for index in range(4):
        whole, parts = one[index], [share[index] for share in shares]
        assert whole.sources == sum((part.sources for part in parts), ())
        for name in ("latents", "actions"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
        draws = torch.arange(CLIPS)
        assert torch.equal(torch.cat([part.own(draws) for part in parts]), draws)


def test_a_signal_to_one_process_ends_all_after_the_same_step(
    latents: Path, tmp_path: Path, repository: Path
) -> None:
    endless = command(
        latents, tmp_path / "two", 2, "--max_train_steps", "100000", "--dataloader_workers", "1"
    )
    processes = start(["-m", "training.train_far", *endless], 2, repository)
    processes[0].wait_for_line("step=2 ")
    processes[1].send_signal(signal.SIGTERM)
    finish(processes)
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2
    last = read_log(tmp_path / "two")[-1]["step"]
    assert [path.name for path in (tmp_path / "two").glob("checkpoint-*")] == [f"checkpoint-{last:07d}"]


@pytest.fixture(scope="module")
def sharded(latents: Path, tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """What two processes with FSDP2 leave, with checkpoints at steps 4 and 8."""
    output = tmp_path_factory.mktemp("runs") / "sharded"
    launch_sharded(
        command(latents, output, 2, "--save_steps", "4", "--gradient-checkpointing"), 2, repository
    )
    return output


def launch_sharded(words: list[str], num_processes: int, repository: Path) -> None:
    processes = start(["-m", "tests.training.train_far_sharded", *words], num_processes, repository)
    said = finish(processes)
    assert [process.returncode for process in processes] == [0] * num_processes, said


def test_sharded_weights_learn_the_same(
    sharded: Path, latents: Path, tmp_path: Path, one_process: list[dict[str, float]]
) -> None:
    assert_same_curve(read_log(sharded), one_process)
    files = [path.name for path in (sharded / "checkpoint-0000008/sharded").iterdir()]
    assert len(files) == 2 and not list(sharded.rglob("averaged.safetensors"))
    assert averaged_weights(sharded).keys() == set(
        FARTransformer3DModel.from_pretrained(sharded / "ema").state_dict()
    )


@pytest.mark.parametrize("num_processes", [1, 3])
def test_a_sharded_checkpoint_goes_on_in_any_number_of_processes(
    sharded: Path,
    latents: Path,
    tmp_path: Path,
    repository: Path,
    num_processes: int,
) -> None:
    shutil.copytree(sharded / "checkpoint-0000004", tmp_path / "checkpoint-0000004")
    words = command(latents, tmp_path, num_processes, "--resume_from", "latest")
    if num_processes == 1:
        assert run(words)
    else:
        launch_sharded(words, num_processes, repository)
    assert_same_curve(read_log(tmp_path), [line for line in read_log(sharded) if line["step"] > 4])
    expected = averaged_weights(sharded)
    for name, value in averaged_weights(tmp_path).items():
        assert relative_error(value, expected[name]) < 1e-3, name


def test_a_damaged_part_of_a_sharded_checkpoint_is_named(
    sharded: Path, latents: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(sharded / "checkpoint-0000004", tmp_path / "checkpoint-0000004")
    (part, *_) = (checkpoint / "sharded").iterdir()
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    with pytest.raises(ValueError, match="checkpoint-0000004 is damaged"):
        run(command(latents, tmp_path, 1, "--resume_from", "latest"))


def test_weights_are_not_shared_out_in_the_middle_of_a_run(latents: Path, tmp_path: Path) -> None:
    assert run(command(latents, tmp_path, 1, "--max_train_steps", "1"))
    again = FARTrainer(
        *parse(command(latents, tmp_path, 1, "--resume_from", "latest"), (ModelOptions, FAROptions), None)
    )
    again.run.is_sharded = True
    with pytest.raises(ValueError, match="checkpoint-0000001 was saved without FSDP; go on without it, or"):
        again.train()
