"""training/train_far.py: the objectives are learnt, and mistakes are named before the first step."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusers_far import FARTransformer3DModel
from diffusers_far.training.options import FAROptions, ModelOptions, parse
from diffusers_far.training.train_far import FARTrainer
from tests.tiny_latents import LONG, averaged_weights, read_log, run_options, write_latents


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents"))


def trainer(command: list[str]) -> FARTrainer:
    return FARTrainer(*parse(command, (ModelOptions, FAROptions), None))


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
    assert trainer(run_options(latents, tmp_path, *kind, *more)).train()
    log = read_log(tmp_path)
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    validation = [line["next_frame_loss"] for line in log if "next_frame_loss" in line]
    assert len(validation) == 2 and validation[1] < validation[0]
    assert all(("memory_right" in line) == bool(kind) for line in log if "next_frame_loss" in line)
    model = FARTransformer3DModel.from_pretrained(tmp_path / "ema")
    assert model.is_long == bool(kind) and model.config.in_channels == 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, averaged_weights(tmp_path)[name])


def test_muon_trains_the_matrices_of_the_blocks(latents: Path, tmp_path: Path) -> None:
    trainer(run_options(latents, tmp_path / "start", "--max_train_steps", "1")).train()
    start = ["--pretrained", str(tmp_path / "start" / "ema"), "--ema_decay", "0"]
    rates = ["--muon_learning_rate", "1e-2", "--learning_rate", "1e-12"]
    trainer(run_options(latents, tmp_path / "muon", *start, *rates)).train()
    before, after = averaged_weights(tmp_path / "start"), averaged_weights(tmp_path / "muon")
    assert before.keys() == after.keys()
    for name, value in after.items():
        moved = not torch.allclose(value, before[name], atol=1e-8)
        assert moved == (name.startswith("transformer_blocks.") and value.ndim == 2), name


def test_matmul_attention_gives_the_same_loss_and_gradient(latents: Path, tmp_path: Path) -> None:
    results = []
    for attention in ("sdpa", "matmul"):
        run = trainer(run_options(latents, tmp_path, *LONG, "--attention", attention))
        torch.manual_seed(1)
        for parameter in run.model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        clips = next(clips for clips in map(run.batches.__getitem__, range(9)) if clips.latents.shape[1] == 6)
        loss = run.loss(clips, 0)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in run.model.parameters())])
    for expected, found in zip(*results, strict=True):
        assert torch.allclose(expected, found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", ["flow_matching", "flow_map"])
def test_gradient_checkpointing_gives_the_same_gradient(
    latents: Path, tmp_path: Path, objective: str
) -> None:
    trainer(run_options(latents, tmp_path / "start", *LONG)).train()
    more = [*LONG, "--pretrained", str(tmp_path / "start/ema"), "--objective", objective]
    more += ["--own_context_probability", "0.9"]
    results = []
    for name, option in {"plain": [], "checkpointed": ["--gradient-checkpointing"]}.items():
        run = trainer(run_options(latents, tmp_path / name, *more, *option))
        loss = run.loss(run.batches[0], 0)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in run.network.parameters())])
    for expected, found in zip(*results, strict=True):
        assert (expected is None) == (found is None)
        if expected is not None:
            assert torch.allclose(expected, found, rtol=1e-4, atol=1e-7)


def test_a_flow_map_resumes_to_the_same_weights(latents: Path, tmp_path: Path) -> None:
    trainer(run_options(latents, tmp_path / "start", *LONG)).train()
    more = ["--pretrained", str(tmp_path / "start/ema"), "--objective", "flow_map"]
    more += [*LONG, "--own_context_probability", "0.5", "--save_steps", "3", "--validation_steps", "3"]
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    trainer(run_options(latents, unbroken, *more)).train()
    shutil.copytree(unbroken / "checkpoint-0000003", resumed / "checkpoint-0000003")
    trainer(run_options(latents, resumed, *more, "--resume_from", "latest")).train()
    expected = averaged_weights(unbroken)
    assert any(name.startswith("interval_embedder") for name in expected)
    assert all(torch.equal(value, expected[name]) for name, value in averaged_weights(resumed).items())
    validation = [line for line in read_log(unbroken) if "validation_loss" in line]
    assert len(validation) == 2 and "next_frame_loss" not in validation[0]


def test_the_arguments_are_kept(latents: Path, tmp_path: Path) -> None:
    trainer(run_options(latents, tmp_path, "--report_to", "tensorboard")).train()
    arguments = json.loads((tmp_path / "arguments.json").read_text())
    assert arguments["num_layers"] == 1 and arguments["learning_rate"] == 3e-3
    assert list((tmp_path / "far").rglob("events.*"))


def test_actions_that_the_model_ignores_are_named(
    latents: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = run_options(latents, tmp_path)
    at = command.index("--num_actions")
    with caplog.at_level(logging.WARNING):
        run = trainer([*command[:at], *command[at + 2 :]])
    assert "has actions, which this model ignores (num_actions=None)" in caplog.text
    assert run.step(0)["loss"] > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num_frames", "13"], "num_frames=13 must be from 1 .* to 12"),
        (["--axes_dims_rope", "4", "4", "4"], "axes_dims_rope"),
        (["--num_actions", "2"], r"num_actions=2: .*train/0.*safetensors has actions such as 2"),
        (["--num_classes", "5"], "num_classes=5: .* has no class labels"),
        (["--latents", "nowhere"], r"nowhere.* has no \*.safetensors"),
        (["--lr_scheduler", "zigzag"], "zigzag"),
    ],
)
def test_bad_arguments_are_named(latents: Path, tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(run_options(latents, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_held_out_latents_of_another_size_are_named(latents: Path, tmp_path: Path) -> None:
    shutil.copytree(latents / "train", tmp_path / "train")
    (tmp_path / "validation").mkdir()
    save_file({"latents": torch.zeros(12, 2, 4, 6).half()}, tmp_path / "validation/a.safetensors")
    with pytest.raises(ValueError, match=r"validation has latents of \(2, 4, 6\), .*train of \(2, 4, 4\)"):
        trainer(run_options(tmp_path, tmp_path / "run"))


def test_a_pretrained_model_that_does_not_fit_is_named(latents: Path, tmp_path: Path) -> None:
    size = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
    pretrained = ["--pretrained", str(tmp_path / "model")]
    FARTransformer3DModel(in_channels=5, num_actions=3, **size).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"pretrained='.*model' takes 5 channels; .* has 2"):
        trainer(run_options(latents, tmp_path / "run", *pretrained))
    with pytest.raises(ValueError, match="num_layers=2: the pretrained model has 1, which stays"):
        trainer(run_options(latents, tmp_path / "run", *pretrained, "--num_layers", "2"))
