"""training/train_far.py: the objective is learnt, runs resume exactly, and mistakes are named."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_far.flow_matching import CLEAN_TIMESTEP
from diffusers_far.transformer_far import FARTransformer3DModel
from training.data.latents import ClipBatches, LatentVideos
from training.train_far import Trainer, parse_arguments

SIZE = ["--num_layers", "1", "--num_attention_heads", "2", "--attention_head_dim", "16"]
SIZE += ["--axes_dims_rope", "4", "6", "6", "--num_actions", "3"]
LONG = ["--long_patch_size", "2", "--short_window", "3"]


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of 12 frames whose action shifts one pattern: 4 to train on, 2 held out."""
    folder = tmp_path_factory.mktemp("latents")
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(2, 4, 4, generator=generator)
    for split, number in (("train", 4), ("validation", 2)):
        (folder / split).mkdir()
        for index in range(number):
            actions = torch.randint(3, (12,), generator=generator)
            shifts = (actions - 1).cumsum(0).tolist()
            frames = torch.stack([pattern.roll(shift, dims=-1) for shift in shifts])
            save_file(
                {"latents": frames.half(), "actions": actions}, folder / split / f"{index:05d}.safetensors"
            )
    return folder


def options(latents: Path, output: Path, *more: str) -> list[str]:
    run = ["--latents", str(latents), "--output_dir", str(output), "--num_frames", "6", "--batch_size", "2"]
    return [*SIZE, *run, "--max_train_steps", "6", "--learning_rate", "3e-3", "--logging_steps", "1", *more]


def run(command: list[str]) -> list[dict[str, float]]:
    """Train in this process; the lines of the log."""
    trainer = Trainer(*parse_arguments(command))
    trainer.train()
    return read_log(trainer.output_dir)


def read_log(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "ema" / "diffusion_pytorch_model.safetensors")


# ----------------------------------------------------------------------------------------------------
# Batches


def test_a_batch_depends_on_its_index_only(latents: Path) -> None:
    videos = LatentVideos(latents / "train")
    first, second = (ClipBatches(videos, 2, 6, short_window=3, seed=5) for _ in range(2))
    second[0]
    for name, value in vars(first[7]).items():
        other = getattr(second[7], name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert not torch.equal(first[7].noise, first[8].noise)


def test_lengths_of_long_clips_vary_and_agree_between_processes(latents: Path) -> None:
    videos = LatentVideos(latents / "train")
    ranks = [ClipBatches(videos, 2, 6, short_window=3, rank=rank) for rank in range(2)]
    lengths = [[batches[index].latents.shape[1] for index in range(30)] for batches in ranks]
    assert lengths[0] == lengths[1]
    assert set(lengths[0]) == {3, 4, 5, 6}
    assert not torch.equal(ranks[0][0].noise, ranks[1][0].noise)


def test_what_the_model_is_given(latents: Path) -> None:
    batches = ClipBatches(LatentVideos(latents / "train"), 16, 6, 3, clean_context_probability=0.5)
    batch = next(batch for batch in map(batches.__getitem__, range(9)) if batch.latents.shape[1] == 6)
    hidden_states, timestep = batch.model_input()
    assert (
        torch.equal(hidden_states[:, :3], batch.latents[:, :3]) and (timestep[:, :3] == CLEAN_TIMESTEP).all()
    )
    assert torch.equal(hidden_states[:, 3:][batch.clean], batch.latents[:, 3:][batch.clean])
    assert torch.equal(timestep[:, 3:] == CLEAN_TIMESTEP, batch.clean)
    expected = batch.sigmas[..., None, None, None]
    expected = expected * batch.noise + (1 - expected) * batch.latents[:, 3:]
    assert torch.equal(hidden_states[:, 3:][~batch.clean], expected[~batch.clean])


def test_own_frames_stand_in_for_clean_ones(latents: Path) -> None:
    """With the true velocity, the model's estimate is the frame itself; with another, it is not."""
    batches = ClipBatches(LatentVideos(latents / "train"), 16, 6, 3, clean_context_probability=0.5)
    batch = next(batch for batch in map(batches.__getitem__, range(9)) if batch.latents.shape[1] == 6)
    noisy = batch.all_noisy()
    hidden_states, timestep = noisy.model_input()
    assert (timestep[:, 3:] != CLEAN_TIMESTEP).all()
    window = hidden_states[:, 3:]
    exact = batch.with_estimates(window, batch.noise - batch.window_latents).model_input()
    assert (exact[0] - batch.model_input()[0]).abs().max() <= 1e-5
    wrong, timestep = batch.with_estimates(window, torch.zeros_like(window)).model_input()
    assert torch.equal(wrong[:, 3:][batch.clean], window[batch.clean])
    assert torch.equal(wrong[:, 3:][~batch.clean], batch.model_input()[0][:, 3:][~batch.clean])
    assert torch.equal(timestep, batch.model_input()[1])


def test_share_of_batches_with_own_frames(latents: Path) -> None:
    batches = ClipBatches(LatentVideos(latents / "train"), 1, 6, own_context_probability=0.4)
    share = sum(batches[index].own_context for index in range(400)) / 400
    assert share == pytest.approx(0.4, abs=0.07)


def test_share_of_dropped_actions(latents: Path) -> None:
    batches = ClipBatches(LatentVideos(latents / "train"), 64, 12, condition_dropout=0.25)
    actions = torch.cat([batches[index].actions for index in range(4)])
    assert (actions == -1).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_log_uniform_lengths_are_mostly_short(latents: Path) -> None:
    batches = ClipBatches(LatentVideos(latents / "train"), 1, 12, 2, length_distribution="log_uniform")
    lengths = torch.tensor([batches[index].latents.shape[1] for index in range(400)])
    assert lengths.min() == 2 and lengths.max() == 12
    assert (lengths < 5).float().mean().item() == pytest.approx(math.log(5 / 2) / math.log(13 / 2), abs=0.08)


def test_noisy_windows(latents: Path) -> None:
    """They have no clean frame and one noise level, and there is nothing of the model's own to put in."""
    settings = {"clean_context_probability": 0.5, "own_context_probability": 0.5}
    batches = ClipBatches(LatentVideos(latents / "train"), 4, 6, 3, **settings, noisy_window_probability=0.3)
    drawn = [batches[index] for index in range(300)]
    noisy = [batch for batch in drawn if (batch.sigmas == batch.sigmas[:, :1]).all()]
    assert not any(batch.clean.any() for batch in noisy)
    assert len(noisy) / len(drawn) == pytest.approx(0.3, abs=0.07)
    assert not any(batch.own_context for batch in noisy)


def test_clips_of_revisits(tmp_path: Path) -> None:
    """The window shows a view that the clip has before its window."""
    revisits = torch.zeros(2, 40, dtype=torch.int64)
    revisits[0, 30], revisits[1, 12], revisits[1, 39] = 20, 9, 25
    frames = torch.arange(40.0).expand(2, 40)  # a frame is its number
    for video in range(2):
        content = {"latents": frames[video, :, None, None, None].half(), "revisits": revisits[video]}
        save_file(content, tmp_path / f"{video}.safetensors")
    batches = ClipBatches(LatentVideos(tmp_path), 8, 32, 4, revisit_probability=1.0)
    pairs = {(10, 30), (3, 12), (14, 39)}  # frames of the same view
    shown = set()
    for index in range(60):
        clips = batches[index].latents[:, :, 0, 0, 0].long()
        if clips.shape[1] in (*range(13, 17), *range(24, 33)):  # other lengths fit none of the three
            for first, last in zip(clips[:, 0].tolist(), clips[:, -1].tolist(), strict=True):
                before, window = range(first, last - 3), range(last - 3, last + 1)
                fitting = {pair for pair in pairs if pair[0] in before and pair[1] in window}
                assert fitting
                shown |= fitting
    assert shown == pairs
    with pytest.raises(ValueError, match=r"revisit_probability=0\.5"):
        ClipBatches(LatentVideos(tmp_path), 8, 32, revisit_probability=0.5)


# ----------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("kind", [[], LONG], ids=["base", "long"])
def test_the_loss_falls_and_the_weights_load(latents: Path, tmp_path: Path, kind: list[str]) -> None:
    more = [
        "--max_train_steps",
        "150",
        "--logging_steps",
        "10",
        "--batch_size",
        "8",
        "--validation_steps",
        "75",
    ]
    log = run(options(latents, tmp_path, *kind, *more))
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    validation = [line["next_frame_loss"] for line in log if "next_frame_loss" in line]
    assert len(validation) == 2 and validation[1] < validation[0]
    model = FARTransformer3DModel.from_pretrained(tmp_path / "ema")
    assert model.is_long == bool(kind) and model.config.in_channels == 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights(tmp_path)[name])


@pytest.mark.parametrize("kind", [[], LONG], ids=["base", "long"])
def test_a_killed_run_resumes_to_the_same_weights(latents: Path, tmp_path: Path, kind: list[str]) -> None:
    more = [*kind, "--max_train_steps", "30", "--save_steps", "2", "--gradient_accumulation_steps", "2"]
    more += ["--own_context_probability", "0.5", *(["--muon_learning_rate", "1e-2"] if kind else [])]
    run(options(latents, tmp_path / "unbroken", *more))

    command = options(latents, tmp_path / "broken", *more)
    script = Path(__file__).parents[2] / "training" / "train_far.py"
    process = subprocess.Popen([sys.executable, str(script), *command], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "broken").glob("checkpoint-0*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert read_log(tmp_path / "broken")[-1]["step"] < 30

    run([*command, "--resume_from", "latest"])
    expected = weights(tmp_path / "unbroken")
    for name, value in weights(tmp_path / "broken").items():
        assert torch.equal(value, expected[name]), name


def test_muon_trains_the_matrices_of_the_blocks(latents: Path, tmp_path: Path) -> None:
    run(options(latents, tmp_path / "start", "--max_train_steps", "1"))
    start = ["--pretrained", str(tmp_path / "start" / "ema"), "--ema_decay", "0"]
    run(options(latents, tmp_path, *start, "--muon_learning_rate", "1e-2", "--learning_rate", "1e-12"))
    before, after = weights(tmp_path / "start"), weights(tmp_path)
    assert before.keys() == after.keys()
    for name, value in after.items():
        moved = not torch.allclose(value, before[name], atol=1e-8)
        assert moved == (name.startswith("transformer_blocks.") and value.ndim == 2), name


def test_sigterm_saves_and_ends(latents: Path, tmp_path: Path) -> None:
    trainer = Trainer(*parse_arguments(options(latents, tmp_path, "--max_train_steps", "10000")))
    step, before = trainer.train_step, signal.getsignal(signal.SIGTERM)

    def interrupted(batches):
        if trainer.clock.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(batches)

    trainer.train_step = interrupted
    try:
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-0000004"]
    assert (tmp_path / "ema" / "config.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run(latents: Path, tmp_path: Path) -> None:
    trainer = Trainer(*parse_arguments(options(latents, tmp_path, "--save_steps", "2")))
    loss = trainer.loss
    trainer.loss = lambda batch: loss(batch) * (math.nan if trainer.clock.step == 3 else 1)
    with pytest.raises(FloatingPointError, match=r"step 3: loss is nan.*checkpoint-0000002"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-0000002"]
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


def test_the_learning_rate_follows_the_clock(latents: Path, tmp_path: Path) -> None:
    schedule = ["--max_minutes", "10", "--max_train_steps", "1000", "--lr_scheduler", "cosine"]
    clock = Trainer(*parse_arguments(options(latents, tmp_path, *schedule, "--warmup_ratio", "0.1"))).clock
    rates = []
    for clock.seconds in (0, 30, 60, 330, 600):
        rates.append(clock.learning_rate_share)
    assert rates == pytest.approx([0.005, 0.5, 1.0, 0.5, 0.0], abs=1e-3)


def test_a_rate_that_is_constant_until_the_last_part(latents: Path, tmp_path: Path) -> None:
    schedule = ["--max_minutes", "10", "--max_train_steps", "100000", "--lr_scheduler", "warmup_stable_decay"]
    schedule += ["--warmup_ratio", "0.1", "--decay_ratio", "0.4"]
    clock = Trainer(*parse_arguments(options(latents, tmp_path, *schedule))).clock
    rates = []
    for clock.seconds in (30, 60, 200, 360, 480, 600):
        rates.append(clock.learning_rate_share)
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.5, 0.0], abs=1e-3)
    assert clock.over


def test_matmul_attention_gives_the_same_loss_and_gradient(latents: Path, tmp_path: Path) -> None:
    results = []
    for attention in ("sdpa", "matmul"):
        trainer = Trainer(*parse_arguments(options(latents, tmp_path, *LONG, "--attention", attention)))
        torch.manual_seed(1)
        for parameter in trainer.model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        batch = next(
            batch for batch in map(trainer.batches.__getitem__, range(9)) if batch.latents.shape[1] == 6
        )
        loss = trainer.loss(batch)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in trainer.model.parameters())])
    for expected, found in zip(*results, strict=True):
        assert torch.allclose(expected, found, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------------------
# Arguments


def test_the_command_line_wins_over_the_recipe(latents: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "latents: here\noutput_dir: there\nmax_train_steps: 5\nnum_layers: 2\nlearning_rate: 0.01\n"
    )
    model_args, args = parse_arguments([str(recipe), "--num_layers", "3", "--output_dir", "elsewhere"])
    assert (model_args.num_layers, args.learning_rate) == (3, 0.01)
    assert (args.latents, args.output_dir) == ("here", "elsewhere")


def test_the_shipped_recipe_is_valid(repository: Path) -> None:
    parse_arguments([str(repository / "training/recipes/far_doom_maze.yaml")])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch_size", "0"], "batch_size=0 must be greater than 0"),
        (["--condition_dropout", "1.5"], r"condition_dropout=1.5 must be in \[0, 1\)"),
        (["--mixed_precision", "int8"], "mixed_precision='int8' must be one of no, bf16, fp16"),
        (["--num_frames", "13"], "num_frames=13 must be from 1 .* to 12"),
        ([*LONG, "--num_frames", "2"], "num_frames=2 must be from 3"),
        (["--axes_dims_rope", "4", "4", "4"], "axes_dims_rope"),
        (["--num_classes", "5"], "num_classes=5: .* has no class labels"),
        (["--latents", "nowhere"], r"nowhere.* has no \*.safetensors"),
        (["--resume_from", "nowhere"], "resume_from='nowhere' is not a folder"),
        (["--lr_scheduler", "zigzag"], "zigzag"),
    ],
)
def test_bad_arguments_are_named(latents: Path, tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(*parse_arguments(options(latents, tmp_path, *more))).train()


def test_a_pretrained_model_of_other_latents_is_named(latents: Path, tmp_path: Path) -> None:
    FARTransformer3DModel(
        in_channels=5, num_layers=1, num_attention_heads=1, attention_head_dim=16, axes_dims_rope=(4, 6, 6)
    ).save_pretrained(tmp_path / "model")
    command = options(latents, tmp_path / "run", "--pretrained", str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"pretrained='.*model' takes 5 channels; .* has 2"):
        Trainer(*parse_arguments(command))


def test_unknown_options_of_a_recipe_are_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("learning_rat: 0.1\n")
    with pytest.raises(ValueError, match="learning_rat"):
        parse_arguments([str(tmp_path / "recipe.yaml")])
