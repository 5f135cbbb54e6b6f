"""training/pretrained.py: trained models are found, changed without harm, and adapted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_far import FARTransformer3DModel, FARVideoPipeline
from diffusers_far.training.options import FAROptions, ModelOptions, StartOptions, parse
from diffusers_far.training.pretrained import Change, change_model, find_pretrained, plan_change
from diffusers_far.training.train_far import FARTrainer
from tests.hub.hub_double import Repository, serve
from tests.hub.test_hub import environment
from tests.python_process import run_python
from tests.tiny_models import (
    TOLERANCE,
    latents,
    long_transformer,
    pipeline,
    relative_error,
    transformer,
)

NAMES = ["stay", "left", "right"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Long pipeline with three actions."""
    folder = tmp_path_factory.mktemp("trained")
    pipeline(long_transformer(num_actions=3), action_names=NAMES).save_pretrained(folder)
    return folder


def plan(folder: Path, names: list[str] | None = None, rank: int | None = None, **sizes: Any) -> Change:
    options = StartOptions(pretrained=str(folder), lora_rank=rank, action_names=names)
    return plan_change(find_pretrained(str(folder)), ModelOptions(**sizes), options)


@torch.no_grad()
def velocity(model: FARTransformer3DModel, **given: Any) -> Tensor:
    levels = torch.tensor([[-1.0, -1, 900, 500, 100], [-1, 700, 30, -1, 1]])
    return model(latents(2, 5), levels, **given).sample


# ------------------------------------------------------------------------------------------------------------
# Where it is


def test_a_pipeline_a_model_and_a_repo_of_the_hub_are_found(trained: Path, tmp_path: Path) -> None:
    found = find_pretrained(str(trained))
    assert (found.pipeline, found.transformer) == (trained, trained / "transformer")
    assert found.action_names == NAMES and found.resolution == "64" and found.config["num_layers"] == 2
    alone = find_pretrained(str(trained / "transformer"))
    assert alone.pipeline is None and alone.action_names is None and alone.resolution is None
    assert alone.config == found.config

    files = {
        path.relative_to(trained).as_posix(): path.read_bytes()
        for path in trained.rglob("*")
        if path.is_file()
    }
    code = (
        "from diffusers_far.training.pretrained import find_pretrained\n"
        "print(find_pretrained('me/far').action_names, find_pretrained('me/far').load().is_long)"
    )
    with serve() as hub:
        hub.repositories["me/far"] = Repository(branches={"main": files | {"notes.bin": b"large"}})
        done = run_python(["-c", code], env=environment(hub, tmp_path), imported="torch")
    assert done.stdout.strip() == f"{NAMES} True", done.stderr
    assert not list(tmp_path.rglob("notes.bin"))


def test_what_is_no_model_is_named(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pretrained='\./gone' is neither a folder nor a repo id"):
        find_pretrained("./gone")
    with pytest.raises(ValueError, match=r"has neither model_index\.json, as a pipeline, nor config\.json"):
        find_pretrained(str(tmp_path))
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(ValueError, match="is a LoRA; it takes the pipeline that the LoRA is for"):
        find_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="is a AutoencoderDC; it takes a FARTransformer3DModel"):
        _ = find_pretrained(str(trained / "vae")).config


# ------------------------------------------------------------------------------------------------------------
# What is changed


def test_actions_are_matched_by_name(trained: Path) -> None:
    model = FARTransformer3DModel.from_pretrained(trained / "transformer")
    assert plan(trained) == plan(trained, num_actions=3) == Change({}, action_names=NAMES)
    assert plan(trained, NAMES) == plan(trained)

    change = plan(trained, ["right", "jump", "stay", "left"])
    assert change.rows == (2, None, 0, 1) and change.options == {"num_actions": 4}
    assert change.told == ("actions: kept from the model: right, stay, left; made anew: jump",)
    changed = change_model(model, change)
    assert changed.config.num_actions == 4
    before = torch.tensor([[2, 0, 1, 2, 0], [1, 1, 2, 0, -1]])
    after = torch.tensor([[0, 2, 3, 0, 2], [3, 3, 0, 2, -1]])
    assert torch.equal(velocity(changed, actions=after), velocity(model, actions=before))
    jumps = torch.full((2, 5), 1)
    assert torch.equal(velocity(changed, actions=jumps), velocity(model))  # as where no action is known

    assert plan(trained, ["stay", "left", "up"]).rows == (0, 1, None)  # as many, but others
    told = "actions: 2, all made anew; the model had 3"
    for anew in (plan(trained, num_actions=2), plan(trained, ["up", "down"])):
        assert anew.rows == () and anew.replaced == {"action_embedder"} and anew.told == (told,)
        assert anew.action_names in (None, ["up", "down"])
        assert (
            relative_error(velocity(change_model(model, anew), actions=after % 2), velocity(model))
            < TOLERANCE
        )


def test_conditions_come_and_go_without_harm(trained: Path) -> None:
    model = FARTransformer3DModel.from_pretrained(trained / "transformer")
    change = plan(trained, num_actions=0, num_classes=5)
    assert change.options == {"num_actions": None, "num_classes": 5} and change.action_names is None
    assert [line.partition(":")[0] for line in change.told] == ["actions", "classes"]
    changed = change_model(model, change)
    assert changed.action_embedder is None and changed.class_embedder.num_embeddings == 6
    assert relative_error(velocity(changed), velocity(model)) < TOLERANCE
    labels = torch.tensor([4, 1])
    assert relative_error(velocity(changed, class_labels=labels), velocity(model)) < TOLERANCE


def test_groups_and_vectors_take_the_place_of_other_actions(trained: Path, tmp_path: Path) -> None:
    model = FARTransformer3DModel.from_pretrained(trained / "transformer")
    options, found = StartOptions(pretrained=str(trained)), find_pretrained(str(trained))
    statistics = {"action_mean": [0.5, 1.0], "action_std": [2.0, 3.0]}
    vectors = plan_change(found, ModelOptions(num_actions=[0], action_dim=2), options, ("x", "y"), statistics)
    assert vectors.told == ("actions: vectors of 2 numbers, all made anew; the model had 3",)
    assert vectors.options == {"num_actions": None, "action_dim": 2} | statistics
    assert vectors.action_names == ["x", "y"]
    changed = change_model(model, vectors)
    given = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0))
    assert relative_error(velocity(changed, actions=given), velocity(model)) < TOLERANCE

    changed.save_pretrained(tmp_path)
    found, options = find_pretrained(str(tmp_path)), StartOptions(pretrained=str(tmp_path))
    assert plan_change(found, ModelOptions(action_dim=2), options, ("x", "y"), statistics) == Change({})
    groups = plan_change(found, ModelOptions(action_dim=0, num_actions=[3, 2]), options, ("keys", "mouse"))
    assert groups.told == ("actions: groups of 3, 2, all made anew; the model had vectors of 2 numbers",)
    back = change_model(changed, groups)
    assert back.config.action_mean is None and list(back.config.num_actions) == [3, 2]
    presses = torch.tensor([2, 1]).expand(2, 5, 2)
    assert relative_error(velocity(back, actions=presses), velocity(model)) < TOLERANCE


def test_a_long_model_starts_from_a_base_one(tmp_path: Path) -> None:
    model = transformer(num_actions=3, patch_size=2, num_layers=3)
    model.save_pretrained(tmp_path)
    change = plan(tmp_path, long_patch_size=4, short_window=3)
    assert change.told == ("long-term frames: new; their projections start as those of short-term frames",)
    changed = change_model(model, change)
    assert changed.is_long and changed.short_window == 3
    assert torch.equal(velocity(changed, num_long_frames=0), velocity(model))

    (short,) = changed.embed_frames(latents(2, 5), 0)  # [B, F, 4 * 4, D]
    long, _ = changed.embed_frames(latents(2, 5), 4)  # [B, 4, 2 * 2, D]
    mean = short[:, :4].unflatten(2, (2, 2, 2, 2)).mean(dim=(3, 5)).flatten(2, 3)
    assert relative_error(long, mean) < TOLERANCE
    for block in changed.transformer_blocks:
        attention = block.attn
        assert torch.equal(attention.add_k_proj.weight, attention.to_k.weight)
        assert torch.equal(attention.norm_added_q.weight, attention.norm_q.weight)
        if attention.to_add_out is not None:
            assert torch.equal(attention.to_add_out.bias, attention.to_out[0].bias)
    seen = velocity(changed)  # with two long-term frames, which say what they did at half the resolution
    assert seen.shape[1] == 3 and torch.isfinite(seen).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_layers": 5}, "num_layers=5: the pretrained model has 2, which stays"),
        ({"long_patch_size": 8}, "long_patch_size=8: the pretrained model has 4, which stays"),
        ({"short_window": 5}, "short_window=5: the pretrained model has 4, which stays"),
        ({"names": ["a", "b", "a"]}, r"action_names=\['a', 'b', 'a'\] has a name twice"),
        ({"names": ["a", "b"], "num_actions": 3}, r"action_names=\['a', 'b'\] are 2; num_actions is 3"),
        ({"rank": 4, "num_actions": 5}, r"lora_rank=4: an adapter leaves the model as it is, .* anew"),
        ({"rank": 4, "num_actions": 0}, r"lora_rank=4: an adapter .* actions: none any more"),
    ],
)
def test_what_cannot_be_changed_is_named(trained: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(trained, **given)


# ------------------------------------------------------------------------------------------------------------
# train_far


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    for split in ("train", "validation"):
        (folder / split).mkdir()
        for number in range(3):
            content = {"latents": latents(1, 9, seed=number)[0].half(), "actions": torch.arange(9) % 3}
            save_file(content, folder / split / f"{number}.safetensors")
    return folder


def trainer(latents: Path, output: Path, *more: str) -> FARTrainer:
    words = ["--latents", str(latents), "--output_dir", str(output), "--num_frames", "8", "--batch_size", "2"]
    words += ["--max_train_steps", "4", "--learning_rate", "1e-2", "--save_steps", "2", "--ema_decay", "0.5"]
    return FARTrainer(*parse([*words, "--logging_steps", "1", *more], (ModelOptions, FAROptions), None))


def test_an_adapter_is_trained_resumed_and_loaded(trained: Path, encoded: Path, tmp_path: Path) -> None:
    more = ("--pretrained", str(trained), "--lora-rank", "4", "--validation_steps", "2")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run = trainer(encoded, whole, *more)
    before = {name: weight.clone() for name, weight in run.network.state_dict().items()}
    assert run.train()
    for name, weight in run.network.state_dict().items():
        is_read = "1.attn.add_q_proj" not in name  # the last block has no use for long-term queries
        assert torch.equal(weight, before[name]) != ("lora" in name and is_read), name
    assert not (whole / "ema").exists()

    shutil.copytree(whole / "checkpoint-0000002", resumed / "checkpoint-0000002")
    assert trainer(encoded, resumed, *more, "--resume_from", "latest").train()
    one, other = (load_file(path / "lora/pytorch_lora_weights.safetensors") for path in (whole, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match="lora_rank=4 of the model, which is 8 now"):
        trainer(encoded, resumed, *more, "--lora-rank", "8", "--resume_from", "latest").train()

    pipe = FARVideoPipeline.from_pretrained(trained)
    plain = velocity(pipe.transformer)
    pipe.load_lora_weights(whole / "lora")
    with run.run.averaged_weights():
        expected = velocity(run.network)
    assert relative_error(velocity(pipe.transformer), expected) < TOLERANCE
    assert relative_error(plain, expected) > 100 * TOLERANCE
    card = (whole / "lora/README.md").read_text()
    assert f'from_pretrained("{trained}")' in card and f'load_lora_weights("{whole}/lora")' in card
    assert "LoRA of rank 4" in card and "- next frame loss: " in card and "- 4 steps of 2 clips" in card
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (whole / "lora").iterdir())


def test_all_weights_are_trained_after_a_change(trained: Path, encoded: Path, tmp_path: Path) -> None:
    names = ("--action-names", "left", "jump", "stay", "right")
    run = trainer(encoded, tmp_path / "run", "--pretrained", str(trained), *names, "--validation_steps", "0")
    assert run.action_names == list(names[1:])
    assert run.train()
    model = FARTransformer3DModel.from_pretrained(tmp_path / "run/ema")
    assert model.config.num_actions == 4 and model.is_long
    assert json.loads((tmp_path / "run/arguments.json").read_text())["pretrained"] == str(trained)


def test_combinations_that_do_not_fit_are_named(trained: Path, encoded: Path, tmp_path: Path) -> None:
    def refused(message: str, *more: str, data: Path = encoded, start: Path | None = trained) -> None:
        words = ("--pretrained", str(start)) if start else ()
        with pytest.raises(ValueError, match=message):
            trainer(data, tmp_path / "run", *words, "--validation_steps", "0", *more)

    refused("pretrained=None: lora_rank=2 takes the model to adapt", "--lora-rank", "2", start=None)
    refused("muon_learning_rate=0.1: an adapter", "--lora-rank", "2", "--muon-learning-rate", "0.1")
    refused("lora_rank=2: objective=flow_map trains whole", "--lora-rank", "2", "--objective", "flow_map")
    refused("objective=flow_map takes the model as it is", "--num-actions", "4", "--objective", "flow_map")
    refused(r"action_names=\['a'\] are 1; num_actions is None", "--action-names", "a", start=None)

    any_step = tmp_path / "any_step"
    long_transformer(use_meanflow=True).save_pretrained(any_step)
    refused("is an any-step model .* which flow matching would undo", start=any_step)

    (tmp_path / "latents/train").mkdir(parents=True)
    content = {"latents": latents(1, 9)[0].half(), "actions": torch.zeros(9, dtype=torch.long)}
    save_file(content, tmp_path / "latents/train/a.safetensors", metadata={"autoencoder_sha256": "0"})
    refused("was encoded by another autoencoder; encode with .*vae", data=tmp_path / "latents")
