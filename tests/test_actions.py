"""Actions of all kinds, an integer, one of each group, or a vector: in model, pipeline and rollout."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_far import FARTransformer3DModel
from diffusers_far.actions import ActionSpace
from tests.tiny_models import (
    SIZE,
    TOLERANCE,
    latents,
    long_transformer,
    max_error,
    relative_error,
    transformer,
)

GROUPS = {"num_actions": [3, 2]}
VECTOR = {"action_dim": 3, "action_mean": [0.5, 0.0, -100.0], "action_std": [0.1, 1.0, 50.0]}
KINDS = {
    "groups": (GROUPS, torch.tensor([[2, 0], [1, 1], [0, 0], [-1, 1], [2, 1]])),
    "vector": (
        VECTOR,
        torch.tensor([[0.4, 1, -50], [0.5, -1, 0], [0.6, 2, -150], [math.nan] * 3, [0, 0, 0]]),
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def run(model: FARTransformer3DModel, actions: Tensor | None) -> Tensor:
    num_frames = 5 if actions is None else actions.shape[1]
    timestep = torch.linspace(0, 1000, 2 * num_frames).reshape(2, num_frames)
    with torch.no_grad():
        return model(latents(2, num_frames), timestep, actions=actions).sample


def both(actions: Tensor) -> Tensor:
    """Two videos of these actions `[F, ...]`."""
    return actions.expand(2, *actions.shape)


# ------------------------------------------------------------------------------------------------------------
# The model


def test_one_group_is_the_published_integer() -> None:
    single, group = transformer(num_actions=4), transformer(num_actions=[4])
    assert list(single.state_dict()) == list(group.state_dict())
    assert single.action_embedder.weight.shape == group.action_embedder.weight.shape == (5, 32)
    actions = torch.tensor([[0, 3, -1, 4, 2], [1, 1, 0, 3, 2]])
    assert torch.equal(run(single, actions), run(group, actions[..., None]))


def test_groups_are_embedded_and_summed() -> None:
    model = transformer(**GROUPS)
    table = model.action_embedder.weight.detach()
    assert table.shape == (3 + 1 + 2 + 1, 32)
    actions = torch.tensor([[[2, 0], [-1, 1], [0, -1], [3, 2]]])
    expected = torch.stack(
        [table[2] + table[4], table[3] + table[5], table[0] + table[6], table[3] + table[6]]
    )
    assert torch.equal(model._embed_actions(actions, torch.zeros(1, 4, 32))[0], expected)


def test_vectors_are_normalised() -> None:
    model, raw = transformer(**VECTOR), transformer(action_dim=3)
    assert list(model.state_dict()) == list(raw.state_dict())
    actions = both(KINDS["vector"][1])
    normalised = (actions - torch.tensor(VECTOR["action_mean"])) / torch.tensor(VECTOR["action_std"])
    assert relative_error(run(model, actions), run(raw, normalised)) <= TOLERANCE
    assert max_error(run(model, actions), run(raw, actions)) > 1e-3


@kinds
def test_each_number_of_an_action_matters_from_its_frame_on(kind: str) -> None:
    config, actions = KINDS[kind]
    for model in (transformer(**config), long_transformer(**config)):
        expected = run(model, both(actions))
        first = 5 - expected.shape[1]
        for index in range(actions.shape[1]):
            changed = actions.clone()
            changed[2, index] += 1
            sample = run(model, both(changed))
            assert torch.equal(sample[:, : 2 - first], expected[:, : 2 - first])
            assert max_error(sample[:, 2 - first :], expected[:, 2 - first :]) > 1e-5


@kinds
def test_null_actions_are_the_same_in_all_forms(kind: str) -> None:
    config, actions = KINDS[kind]
    model = transformer(**config)
    expected = run(model, None)
    assert torch.equal(run(model, model.action_space.null((2, 5))), expected)
    dropped = model.action_space.drop(both(actions), torch.ones(2, 5, dtype=torch.bool))
    assert torch.equal(run(model, dropped), expected)
    assert max_error(run(model, both(actions)), expected) > 1e-3


def test_one_missing_number_makes_a_null_vector_and_nothing_is_nan() -> None:
    model, actions = transformer(**VECTOR), both(KINDS["vector"][1]).clone()
    actions[:, 1, 2] = math.nan
    sample = run(model, actions)
    actions[:, 1] = math.nan
    assert sample.isfinite().all() and torch.equal(run(model, actions), sample)


@kinds
def test_dropping_some_actions(kind: str) -> None:
    config, actions = KINDS[kind]
    space = transformer(**config).action_space
    dropped = torch.tensor([[True, False, False, False, True]] * 2)
    kept = space.drop(both(actions), dropped)
    assert kept.dtype == actions.dtype and torch.equal(kept[:, 1:3], both(actions)[:, 1:3])
    assert torch.equal(kept[:, 0].nan_to_num(7), space.null((2,)).nan_to_num(7))


@kinds
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    config, actions = KINDS[kind]
    model = long_transformer(**config)
    model.save_pretrained(tmp_path)
    loaded = FARTransformer3DModel.from_pretrained(tmp_path)
    assert torch.equal(run(loaded, both(actions)), run(model, both(actions)))
    assert loaded.action_space == model.action_space


def test_a_configuration_from_before_there_were_vectors(tmp_path: Path) -> None:
    model = transformer(num_actions=4)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for name in ("action_dim", "action_mean", "action_std"):
        del config[name]
    file.write_text(json.dumps(config))
    actions = torch.tensor([[0, 3, -1, 4, 2], [1, 1, 0, 3, 2]])
    assert torch.equal(run(FARTransformer3DModel.from_pretrained(tmp_path), actions), run(model, actions))


@kinds
def test_bf16_sees_what_float32_sees(kind: str) -> None:
    config, actions = KINDS[kind]
    model = transformer(**config)
    expected = model.modulation(torch.zeros(2, 5), actions=both(actions))
    half = model.to(torch.bfloat16).modulation(torch.zeros(2, 5), actions=both(actions))
    assert all(relative_error(found, one) < 0.03 for found, one in zip(half, expected, strict=True))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"num_actions": [3, 0]},
            r"num_actions=\[3, 0\] must be an int of at least 1, or the sizes of groups",
        ),
        ({"num_actions": []}, r"num_actions=\[\]"),
        ({"num_actions": True}, "num_actions=True"),
        ({"num_actions": 4, "action_dim": 2}, "num_actions=4 and action_dim=2: .* give one"),
        ({"action_dim": 0}, "action_dim=0 must be"),
        ({"action_dim": 2.5}, r"action_dim=2\.5 must be"),
        ({"action_dim": 2, "action_std": [1.0, 0.0]}, r"action_std=\[1\.0, 0\.0\] must be 2 numbers greater"),
        ({"action_dim": 2, "action_mean": [1.0]}, r"action_mean=\[1\.0\] must be 2 numbers"),
        ({"action_dim": 1, "action_mean": [math.nan]}, "action_mean=.nan. must be 1 numbers"),
        ({"num_actions": 2, "action_mean": [1.0]}, "action_mean=.* as action_dim=None says"),
    ],
    ids=str,
)
def test_bad_configurations(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FARTransformer3DModel(**SIZE | config)


@pytest.mark.parametrize(
    ("config", "actions", "message"),
    [
        (GROUPS, torch.zeros(2, 5, dtype=torch.long), r"actions has shape \(2, 5\); it takes \(2, 5, 2\)"),
        (
            GROUPS,
            torch.zeros(2, 5, 2),
            r"actions has dtype torch\.float32; a model of groups of 3, 2 actions",
        ),
        (VECTOR, torch.zeros(2, 5, 2), r"actions has shape \(2, 5, 2\); it takes \(2, 5, 3\)"),
        (
            VECTOR,
            torch.zeros(2, 5, 3, dtype=torch.long),
            "a model of vectors of 3 numbers actions takes floats",
        ),
    ],
    ids=str,
)
def test_bad_actions_of_a_model(config: dict[str, Any], actions: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(transformer(**config), actions)


def test_spaces() -> None:
    assert ActionSpace.of(transformer().config) is None
    spaces = [transformer(**config).action_space for config in ({"num_actions": 4}, GROUPS, VECTOR)]
    assert [space.shape for space in spaces] == [(), (2,), (3,)]
    assert [str(space) for space in spaces] == ["4", "groups of 3, 2", "vectors of 3 numbers"]
