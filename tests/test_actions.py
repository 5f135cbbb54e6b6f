"""Actions of all kinds, an integer, one of each group, or a vector: in model, pipeline and rollout."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_far import FARTransformer3DModel, FARVideoPipeline, Rollout
from diffusers_far.actions import ActionSpace
from diffusers_far.convert_published import convert_back
from diffusers_far.inputs import describe_actions, parse_actions
from tests.tiny_models import (
    SIZE,
    TOLERANCE,
    generator,
    latents,
    long_transformer,
    max_error,
    pipeline,
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


@pytest.mark.parametrize("name", ["action_dim", "action_mean", "action_std"])
def test_a_configuration_of_vectors_that_has_lost_an_option(name: str, tmp_path: Path) -> None:
    transformer(**VECTOR).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(
        json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != name})
    )
    with pytest.raises(
        ValueError, match=r"action_mean=.* as action_dim=None|has lost options: action_(mean|std)"
    ):
        FARTransformer3DModel.from_pretrained(tmp_path)


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


# ------------------------------------------------------------------------------------------------------------
# The pipeline and its rollouts

NAMES = {
    "groups": [{"keyboard": ["none", "walk", "jump"]}, {"mouse": ["none", "left"]}],
    "vector": ["x", "y", "z"],
}


def pipe_of(kind: str, **config: Any) -> FARVideoPipeline:
    return pipeline(long_transformer(**KINDS[kind][0], **config), action_names=NAMES[kind])


def call(pipe: FARVideoPipeline, **arguments: Any) -> Tensor:
    arguments = {"num_frames": 5, "generator": generator(), "output_type": "latent"} | arguments
    return pipe(**arguments).frames


@kinds
def test_forms_of_actions_in_a_call(kind: str) -> None:
    pipe, actions = pipe_of(kind), KINDS[kind][1]
    expected = call(pipe, actions=actions)
    assert expected.shape[0] == 1
    for form in (
        actions.numpy(),
        actions.tolist(),
        actions[None],
        actions.double() if kind == "vector" else actions.int(),
    ):
        assert torch.equal(call(pipe, actions=form), expected)
    videos = call(pipe, actions=both(actions))
    assert videos.shape[0] == 2  # as the actions are of two
    assert torch.equal(call(pipe, actions=actions, batch_size=2), videos)
    other = actions.clone()
    other[4] = 1
    assert torch.equal(call(pipe, actions=other)[:, :4], expected[:, :4])
    assert max_error(call(pipe, actions=other)[:, 4], expected[:, 4]) > 1e-5
    assert torch.equal(call(pipe, actions=pipe.transformer.action_space.null((5,))), call(pipe))


@kinds
def test_guidance_mixes_actions_and_their_null(kind: str) -> None:
    pipe, actions = pipe_of(kind), KINDS[kind][1]
    assert torch.equal(call(pipe, actions=actions, guidance_scale=0), call(pipe))
    guided = call(pipe, actions=actions, guidance_scale=2)
    assert guided.isfinite().all() and max_error(guided, call(pipe, actions=actions)) > 1e-5
    assert relative_error(call(pipe, guidance_scale=2), call(pipe)) <= TOLERANCE


@kinds
def test_a_call_a_stream_and_a_rollout_are_the_same(kind: str) -> None:
    pipe, actions = pipe_of(kind), KINDS[kind][1]
    context = latents(1, 2)
    expected = call(pipe, video_latents=context, actions=actions)[:, 2:]
    shared = {"video_latents": context, "context_actions": actions[:2], "output_type": "latent"}
    streamed = pipe.stream(actions=iter(actions[2:].tolist()), generator=generator(), **shared)
    assert torch.equal(torch.stack(list(streamed), dim=1), expected)
    rollout = pipe.rollout(generator=generator(), **shared)
    frames = [rollout.step(action) for action in (actions[2], actions[3].numpy(), actions[None, 4])]
    assert torch.equal(torch.stack(frames, dim=1), expected)


@pytest.mark.parametrize("use_cache", [True, False])
@kinds
def test_a_rollout_appends_rewinds_and_forks(kind: str, use_cache: bool) -> None:
    pipe, actions = pipe_of(kind), KINDS[kind][1]

    def begin(num_context: int) -> Rollout:
        return pipe.rollout(
            video_latents=latents(1, 6)[:, :num_context],
            context_actions=actions[:num_context],
            generator=generator(),
            use_cache=use_cache,
            output_type="latent",
        )

    expected = begin(3).step(actions[4])
    rollout = begin(2)
    rollout.append(video_latents=latents(1, 6)[:, 2:3], actions=actions[2:3])
    state = rollout.state_dict()
    branch = rollout.fork()
    assert relative_error(rollout.step(actions[4]), expected) <= TOLERANCE
    assert relative_error(branch.step(actions[4]), expected) <= TOLERANCE
    assert branch.num_frames == rollout.num_frames == 4
    rollout.rewind(2)
    rollout.append(video_latents=latents(1, 6)[:, 2:3], actions=actions[2:3])
    rollout.generator = generator()
    assert relative_error(rollout.step(actions[4]), expected) <= TOLERANCE
    other = begin(2)
    other.append(video_latents=latents(1, 6)[:, 2:3])  # without its action: another video
    assert max_error(other.step(actions[4]), expected) > 1e-5
    other.load_state_dict(state)
    assert torch.equal(
        other._action_table(list(other._actions.values())).nan_to_num(7), both(actions[:3])[:1].nan_to_num(7)
    )
    assert relative_error(other.step(actions[4]), expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (
            "groups",
            {"actions": [1] * 5},
            r"actions has shape \(5,\); it takes \[1, 5, 2\], or \[5, 2\] for all",
        ),
        (
            "groups",
            {"actions": [[0.5, 1]] * 5},
            "actions has dtype torch.float64; it takes integers: the model has",
        ),
        (
            "groups",
            {"actions": [[3, 0], [4, 0], [0, 0], [0, 0], [0, 0]]},
            "actions has values from 0 to 4 in group 0",
        ),
        (
            "groups",
            {"actions": [[0, -2]] * 5},
            "actions has values from -2 to -2 in group 1; it takes 0 to 1",
        ),
        (
            "vector",
            {"actions": [[1.0, 2.0]] * 5},
            r"actions has shape \(5, 2\); it takes \[1, 5, 3\].* vectors of 3",
        ),
        ("vector", {"actions": [0, 1, 2, 3, 4]}, r"actions has shape \(5,\)"),
        (
            "vector",
            {"actions": [[math.nan, 0, 0]] * 5},
            "actions has vectors with infinite values, or with NaN",
        ),
        ("vector", {"actions": [[math.inf, 0, 0]] * 5}, "actions has vectors with infinite values"),
        ("vector", {"actions": [["a", "b", "c"]] * 5}, "actions=.* cannot be read as numbers"),
        ("vector", {"actions": [[0, 0, 0]] * 4}, r"actions has shape \(4, 3\)"),
    ],
    ids=str,
)
def test_bad_actions_of_a_call(kind: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(pipe_of(kind), **arguments)


@pytest.mark.parametrize(
    ("kind", "action"),
    [
        ("groups", 1),
        ("groups", [1, 1, 1]),
        ("groups", [9, 0]),
        ("vector", 1.0),
        ("vector", [[0, 0]]),
        ("vector", "x"),
    ],
    ids=str,
)
def test_bad_actions_of_a_step(kind: str, action: Any) -> None:
    rollout = pipe_of(kind).rollout()
    with pytest.raises(ValueError, match=r"^action"):
        rollout.step(action)


@pytest.mark.parametrize(
    "names", [*NAMES.items(), ("groups", ["keyboard", "mouse"]), ("vector", ["a", "b", "c"])]
)
def test_names_are_kept_with_the_pipeline(
    names: tuple[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind, kept = names
    pipe = pipeline(transformer(**KINDS[kind][0]), action_names=kept)
    pipe.save_pretrained(tmp_path)
    loaded = FARVideoPipeline.from_pretrained(tmp_path)
    assert loaded.config.action_names == kept and "Expected types" not in caplog.text
    assert torch.equal(call(loaded, actions=KINDS[kind][1]), call(pipe, actions=KINDS[kind][1]))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("vector", ["x", "y"]),
        ("vector", [{"x": []}, "y", "z"]),
        ("groups", ["keyboard"]),
        ("groups", [{"keyboard": ["none", "walk"]}, "mouse"]),
        ("groups", [{"a": ["1", "2", "3"], "b": []}, "mouse"]),
    ],
    ids=str,
)
def test_bad_names(kind: str, names: Any) -> None:
    with pytest.raises(ValueError, match=r"action_names=.* must be [23] names"):
        pipeline(transformer(**KINDS[kind][0]), action_names=names)


@pytest.mark.parametrize(
    ("kind", "script", "expected"),
    [
        ("groups", "walk+left*2 mouse=1 keyboard=jump+mouse=none", [[1, 1], [1, 1], [0, 1], [2, 0], [2, 0]]),
        ("groups", "0=2+1=left", [[2, 1]] * 5),
        ("vector", "x=0.25+z=-7*3 y=1e-3", [[0.25, 0, -7]] * 3 + [[0.5, 1e-3, -100]] * 2),
        ("vector", "1=2", [[0.5, 2, -100]] * 5),
    ],
)
def test_texts_of_actions(kind: str, script: str, expected: list[Any]) -> None:
    space = transformer(**KINDS[kind][0]).action_space
    assert parse_actions(script, NAMES[kind], space, 5) == expected


@pytest.mark.parametrize(
    ("kind", "script"),
    [
        *[
            ("groups", text)
            for text in ("none", "fly", "mouse=walk", "keyboard=3", "walk+", "2", "walk*x", "=1")
        ],
        *[("vector", text) for text in ("x", "x=", "w=1", "x=nan", "x=1e999", "3=1", "x=1+y", "0.5")],
    ],
)
def test_bad_texts_of_actions(kind: str, script: str) -> None:
    space = transformer(**KINDS[kind][0]).action_space
    takes = {
        "groups": r"keyboard=none\|walk\|jump, mouse=none\|left",
        "vector": r"x=NUMBER\+y=NUMBER\+z=NUMBER",
    }
    with pytest.raises(ValueError, match=f"is not an action: it takes {takes[kind]}"):
        parse_actions(script, NAMES[kind], space, 5)


def test_texts_of_groups_and_vectors_without_names() -> None:
    assert parse_actions("0=1+1=2", None, ActionSpace((2, 3)), 1) == [[1, 2]]
    assert parse_actions("1=0.5", None, ActionSpace(action_dim=2), 1) == [[0.0, 0.5]]
    assert describe_actions(["keyboard", "mouse"], ActionSpace((2, 3))) == "keyboard=0 to 1, mouse=0 to 2"


@kinds
def test_what_published_files_cannot_hold_is_not_converted_back(kind: str, tmp_path: Path) -> None:
    pipeline(transformer(**KINDS[kind][0])).save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match=r"published models have one integer per frame"):
        convert_back(tmp_path / "pipeline", tmp_path / "far.pth")
    assert not (tmp_path / "far.pth").exists()
