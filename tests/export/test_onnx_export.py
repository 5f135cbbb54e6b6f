"""Exported graphs in ONNX Runtime against the rollout in PyTorch, from the same noise."""

import gzip
import hashlib
import importlib.util
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import FlowMatchLCMScheduler
from PIL import Image

from diffusers_far import ContextSchedule, FARVideoPipeline
from diffusers_far.cli import main
from diffusers_far.export import ExportedRollout, export_onnx, seeded_noise
from diffusers_far.shipped import ANY_STEP_CHECKPOINT as CHECKPOINT
from diffusers_far.shipped import locate
from tests import tiny_models as tm

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SEED = 5


def base_pipeline() -> FARVideoPipeline:
    return tm.pipeline(tm.transformer(num_actions=4), num_training_frames=12)


def long_pipeline() -> FARVideoPipeline:
    model = tm.long_transformer(num_actions=[3, 4], num_classes=5)
    return tm.pipeline(model, num_training_frames=14, flex_rope_slope=0.3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(base_pipeline(), tmp_path_factory.mktemp("base") / "onnx")


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(long_pipeline(), tmp_path_factory.mktemp("long") / "onnx")


def largest_error(
    exported: ExportedRollout, pipe: FARVideoPipeline, actions: list[Any], **settings: Any
) -> float:
    """Of the latents of a game, frame by frame, as a share of their largest value."""
    rollout = pipe.rollout(batch_size=1, output_type="latent", **settings)
    errors = []
    for action in actions:
        noise = seeded_noise(SEED, exported.num_frames, exported.config["latent_shape"])
        found = torch.from_numpy(exported.step_latents(action, noise))
        given = None if action is None else torch.tensor([action])
        errors.append(
            tm.relative_error(found, rollout.step_latents(given, torch.tensor(noise)[None, None])[0, 0])
        )
    return max(errors)


def test_64_frames_of_a_base_model(base: Path) -> None:
    exported = ExportedRollout(base, SEED)
    actions = [None, *(index * 7 % 4 for index in range(63))]
    assert largest_error(exported, base_pipeline(), actions) < tm.TOLERANCE


def test_64_frames_of_a_long_model_with_groups_of_actions_classes_and_slope(long: Path) -> None:
    exported = ExportedRollout(long, SEED, class_label=2)
    actions = [[index % 3, index * 3 % 4] for index in range(64)]
    assert largest_error(exported, long_pipeline(), actions, class_labels=2) < tm.TOLERANCE


def test_settings_of_a_rollout_are_inputs(long: Path) -> None:
    settings = {
        "guidance_scale": 1.5,
        "num_inference_steps": 2,
        "flex_rope_slope": 0.7,
        "rope_interpolation": 1.3,
    }
    exported = ExportedRollout(long, SEED, class_label=4, **settings)
    actions = [[1, 2], None, *([index % 3, 3] for index in range(14))]
    assert largest_error(exported, long_pipeline(), actions, class_labels=4, **settings) < tm.TOLERANCE
    plain = ExportedRollout(long, SEED, class_label=4, **settings | {"flex_rope_slope": 0.0})
    assert largest_error(plain, long_pipeline(), actions, class_labels=4, **settings) > 10 * tm.TOLERANCE


def test_null_condition_alone(long: Path) -> None:
    exported = ExportedRollout(long, SEED, class_label=4, guidance_scale=0)
    actions = [[1, 2], [0, 1], [2, 3]]
    error = largest_error(exported, long_pipeline(), actions, class_labels=4, guidance_scale=0)
    assert error < tm.TOLERANCE


@pytest.mark.parametrize("kind", ["base", "long"])
def test_given_frames_and_pixels(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    pipe = base_pipeline() if kind == "base" else long_pipeline()
    action: Any = 1 if kind == "base" else [1, 2]
    video = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    settings = {} if kind == "base" else {"class_labels": 1}
    rollout = pipe.rollout(
        video=video, context_actions=[[action] * 20], batch_size=1, output_type="latent", **settings
    )
    exported = ExportedRollout(folder, SEED, class_label=None if kind == "base" else 1)
    for frame in video:
        exported.append(frame, action)
    for _ in range(3):
        noise = seeded_noise(SEED, exported.num_frames, exported.config["latent_shape"])
        expected = rollout.step_latents(torch.tensor([action]), torch.tensor(noise)[None, None])
        pixels = torch.from_numpy(exported.step(action)).movedim(2, 0)
        with torch.no_grad():
            decoded = pipe.decode_latents(expected[:, 0])[0]
        assert tm.relative_error(pixels, (decoded / 2 + 0.5).clamp(0, 1)) < tm.TOLERANCE


def test_a_game_is_the_same_after_reset_and_its_calls_are_json(base: Path) -> None:
    exported = ExportedRollout(base, SEED)
    first, graphs = [], []
    for _ in range(3):
        first.append(exported.step_latents(1))
        graphs += [call.graph for call in exported.calls]
    assert graphs == ["step", "commit", "step", "commit", "step"]
    last = json.loads(json.dumps([call.as_json() for call in exported.calls]))[-1]
    assert last["frames"] == [2] and last["ring_ages"][:3] == [2, 1, -1]
    exported.reset()
    assert not exported.calls
    assert all(np.array_equal(exported.step_latents(1), frame) for frame in first)


def test_all_shapes_are_fixed(long: Path) -> None:
    config = json.loads((long / "rollout.json").read_text())
    assert sorted(path.name for path in long.iterdir()) == [
        *("commit.onnx", "decode.onnx", "encode.onnx", "rollout.json", "step.onnx", "weights.bin")
    ]
    for graph in config["graphs"].values():
        for one in (*graph["inputs"], *graph["outputs"]):
            assert one["shape"] and all(size > 0 for size in one["shape"]), one


def test_packed_copies_are_the_files(tmp_path: Path) -> None:
    pipe = tm.pipeline(tm.transformer(num_actions=4, num_layers=1), num_training_frames=4)
    folder = export_onnx(pipe, tmp_path / "onnx", "float16", packed=True)
    config = json.loads((folder / "rollout.json").read_text())
    names = ["commit.onnx", "decode.onnx", "encode.onnx", "step.onnx", "weights.bin"]
    assert sorted(config["files"]) == sorted([*names, *(f"{name}.packed" for name in names)])
    for name in names:
        packed = (folder / f"{name}.packed").read_bytes()
        assert gzip.decompress(packed) == (folder / name).read_bytes()
        assert config["files"][f"{name}.packed"]["bytes"] == len(packed) < config["files"][name]["bytes"]


def test_step_and_commit_share_their_weights(base: Path) -> None:
    """What both have is in the file once, and the graphs hold next to nothing."""
    sizes, places = {}, {}
    for name in ("step", "commit"):
        tensors = onnx.load(base / f"{name}.onnx", load_external_data=False).graph.initializer
        entries = [{entry.key: entry.value for entry in tensor.external_data} for tensor in tensors]
        places[name] = {entry["offset"] for entry in entries if entry}
        sizes[name] = sum(int(entry["length"]) for entry in entries if entry)
        assert all(len(tensor.raw_data) < 1024 for tensor in tensors)
    assert len(places["step"] & places["commit"]) > len(places["commit"]) / 2
    both = (base / "weights.bin").stat().st_size
    assert max(sizes.values()) <= both < 0.7 * sum(sizes.values())


def test_files_are_named_with_size_and_hash(base: Path) -> None:
    config = json.loads((base / "rollout.json").read_text())
    assert {*config["files"], "rollout.json"} == {path.name for path in base.iterdir()}
    for name, file in config["files"].items():
        data = (base / name).read_bytes()
        assert file == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize("num_frames", [1, 3, 9])
def test_rewind_goes_on_as_the_rollout_in_pytorch_does(long: Path, num_frames: int) -> None:
    exported = ExportedRollout(long, SEED, class_label=2)
    rollout = long_pipeline().rollout(batch_size=1, output_type="latent", class_labels=2)

    def error(actions: list[list[int]]) -> float:
        errors = []
        for action in actions:
            noise = seeded_noise(SEED, exported.num_frames, exported.config["latent_shape"])
            found = torch.from_numpy(exported.step_latents(action, noise))
            expected = rollout.step_latents(torch.tensor([action]), torch.tensor(noise)[None, None])
            errors.append(tm.relative_error(found, expected[0, 0]))
        return max(errors)

    assert error([[1, 2]] * 18) < tm.TOLERANCE
    first = exported._latents[18 - num_frames]
    exported.rewind(num_frames)
    rollout.rewind(num_frames)
    assert exported.num_frames == 18 - num_frames
    assert error([[2, 0]] * 12) < tm.TOLERANCE
    assert not np.array_equal(exported._latents[18 - num_frames], first)
    count = 30 - num_frames
    with pytest.raises(ValueError, match=f"num_frames={count + 1} must be 0 to {count}"):
        exported.rewind(count + 1)


@pytest.mark.parametrize("kind", ["base", "long"])
def test_a_long_game_keeps_the_memory_of_a_short_one(kind: str, request: pytest.FixtureRequest) -> None:
    """Its frames are those of a game that forgets nothing, also after a rewind within the bound."""
    folder = request.getfixturevalue(kind)
    arguments: dict[str, Any] = {"seed": SEED, "num_inference_steps": 1, "num_threads": 1}
    bounded = ExportedRollout(folder, max_rewind=5, **arguments)
    whole = ExportedRollout(folder, max_rewind=1000, **arguments)
    action: Any = 1 if kind == "base" else [1, 2]

    def held(game: ExportedRollout) -> int:
        state = {name: value for name, value in vars(game).items() if name not in ("_sessions", "config")}
        return len(pickle.dumps(state))

    sizes = []
    for _ in range(60):
        assert np.array_equal(bounded.step_latents(action), whole.step_latents(action))
        sizes.append((held(bounded), held(whole)))
    frame_bytes = bounded._latents[59].nbytes
    assert sizes[59][0] - sizes[29][0] < frame_bytes / 10  # a few numbers take more digits
    assert sizes[59][1] - sizes[29][1] > 30 * frame_bytes
    branch = bounded.fork()
    for game in (bounded, whole):
        game.rewind(2)
        game.rewind(3)
    for _ in range(8):
        assert np.array_equal(bounded.step_latents(action), whole.step_latents(action))
    for game, count in ((bounded, 5), (branch, 5), (bounded.fork(), 5)):
        with pytest.raises(ValueError, match=f"num_frames=6 must be 0 to 5: there are {game.num_frames} fr"):
            game.rewind(6)
        assert game.plan.rewindable == count
    branch.rewind(5)
    with pytest.raises(ValueError, match="num_frames=1 must be 0 to 0"):
        branch.rewind(1)
    bounded.reset()
    assert np.array_equal(bounded.step_latents(action), whole._latents[0])


def test_given_frames_after_a_rewind_are_a_new_window(long: Path) -> None:
    """Their numbers are those of frames that the window had."""
    given = np.random.default_rng(1).normal(size=(2, 4, 8, 8)).astype(np.float32)
    games = [ExportedRollout(long, SEED) for _ in range(2)]
    for _ in range(4):
        games[0].step_latents([1, 1])
    games[0].rewind(2)
    for frame in [games[0]._latents[0], games[0]._latents[1]]:
        games[1].append_latents(frame, [1, 1])
    for game in games:
        for frame in given:
            game.append_latents(frame, [2, 2])
    found, expected = (torch.from_numpy(game.step_latents([0, 3])) for game in games)
    assert tm.relative_error(found, expected) < tm.TOLERANCE


def test_a_fork_is_another_future(base: Path) -> None:
    exported = ExportedRollout(base, SEED)
    for _ in range(3):
        exported.step_latents(1)
    branch = exported.fork()
    branch.step_latents(2)
    left, right = branch.step_latents(2), [exported.step_latents(1) for _ in range(2)][-1]
    assert not np.array_equal(left, right)
    branch.rewind(2)
    branch.step_latents(1)
    assert np.array_equal(branch.step_latents(1), right)


def test_starts_are_frames_of_the_export(tmp_path: Path) -> None:
    pipe = tm.pipeline(tm.transformer(action_dim=2, num_layers=1), num_training_frames=4)
    frames = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    actions = [[1.0, 2.0], [float("nan")] * 2, [0.5, 0.0]]
    folder = export_onnx(pipe, tmp_path / "onnx", starts=[(frames, actions), (frames[:1], None)])
    begun, given = ExportedRollout(folder), ExportedRollout(folder)
    begun.append_start(0)
    for frame, action in zip(frames, actions, strict=True):
        given.append(frame, action)
    assert begun.num_frames == 3
    for one, other in zip(begun._latents.values(), given._latents.values(), strict=True):
        assert tm.relative_error(torch.from_numpy(one), torch.from_numpy(other)) < 1e-3  # half precision
    assert begun._actions[1] is None and np.array_equal(begun._actions[0], [1.0, 2.0])
    strip = np.asarray(Image.open(folder / "start_0.jpg"), float)
    assert (
        strip.shape == (64, 3 * 64, 3)
        and np.corrcoef(strip[:, 64:128].ravel(), frames[1].ravel())[0, 1] > 0.95
    )
    begun.reset()
    begun.append_start(1)
    assert begun.num_frames == 1 and begun._actions[0] is None
    with pytest.raises(ValueError, match="index=2: this export has 2 starts"):
        begun.append_start(2)
    for start, message in (
        (
            (frames[:, :32], None),
            r"starts\[0\] has frames uint8 \[3, 32, 64, 3\]; it takes uint8 \[T, 64, 64, 3\]",
        ),
        ((frames, actions[:2]), r"starts\[0\] actions has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            export_onnx(pipe, tmp_path / "wrong", starts=[start])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"num_inference_steps": 7},
            "num_inference_steps=7: this export has samplers of 1, 2, 3, 4, 8 steps",
        ),
        ({"class_label": 1}, "class_label=1 must be None"),
        ({"flex_rope_slope": -1.0}, "flex_rope_slope=-1.0 must be 0 or more"),
        ({"max_rewind": -1}, "max_rewind=-1 must be 0 or more"),
    ],
)
def test_settings_that_do_not_fit_are_refused(base: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExportedRollout(base, **arguments)


def test_frames_and_actions_that_do_not_fit_are_refused(base: Path, long: Path, tmp_path: Path) -> None:
    exported = ExportedRollout(base)
    for action in (5, 1.5, [1, 2], "left"):
        with pytest.raises(ValueError, match=r"action=.* must be integers of -1 to"):
            exported.step_latents(action)
    with pytest.raises(ValueError, match="must be integers"):
        ExportedRollout(long).step_latents([0, 5])
    with pytest.raises(ValueError, match=r"frame has shape \(8, 8, 3\)"):
        exported.append(np.zeros((8, 8, 3), np.uint8))
    assert exported.num_frames == 0
    with pytest.raises(ValueError, match=r"has no rollout\.json"):
        ExportedRollout(tmp_path)


def test_exports_that_cannot_be_are_refused(tmp_path: Path) -> None:
    pipe, output = base_pipeline(), tmp_path / "onnx"
    with pytest.raises(ValueError, match="dtype='int3' must be one of"):
        export_onnx(pipe, output, "int3")
    with pytest.raises(ValueError, match="no sink frames"):
        export_onnx(pipe, output, context_schedule=ContextSchedule(num_sink_frames=1))
    with pytest.raises(ValueError, match="no bound: give max_short_frames"):
        export_onnx(pipe, output, context_schedule=ContextSchedule.unbounded())
    with pytest.raises(ValueError, match="num_inference_steps=0"):
        export_onnx(pipe, output, num_inference_steps=[0])
    noisy = FARVideoPipeline(
        pipe.transformer, pipe.vae, FlowMatchLCMScheduler(), sample_size=64, num_training_frames=9
    )
    with pytest.raises(ValueError, match="scheduler=FlowMatchLCMScheduler draws noise"):
        export_onnx(noisy, output)
    assert not list(tmp_path.iterdir())  # nothing half-written
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        export_onnx(pipe, output)
    assert (output / "notes.txt").read_text() == "mine"


def test_float16_of_an_any_step_model_with_vectors_as_actions(tmp_path: Path) -> None:
    config = {
        "action_dim": 2,
        "action_mean": [0.5, 1.0],
        "action_std": [2.0, 3.0],
        "use_meanflow": True,
        "num_layers": 1,
    }
    pipe = tm.pipeline(tm.transformer(**config), num_training_frames=4)
    exported = ExportedRollout(export_onnx(pipe, tmp_path / "onnx", "float16"), SEED)
    dtypes = {one["name"]: one["dtype"] for one in exported.config["graphs"]["step"]["inputs"]}
    assert dtypes["ring_keys"] == "float16" and dtypes["latents"] == "float32"
    assert tm.TOLERANCE < largest_error(exported, pipe, [[1.0, -2.0], None, [3.0, 0.5], [0.0, 9.0]]) < 0.02
    with pytest.raises(ValueError, match="must be 2 numbers"):
        exported.step_latents([1.0, 2.0, 3.0])
    for wrong in ([np.inf, 0.0], [np.nan, 0.0]):
        with pytest.raises(ValueError, match="finite, or NaN alone"):
            exported.step_latents(wrong)
    alone = exported.step_latents([np.nan, np.nan])
    exported.rewind(1)
    assert np.array_equal(alone, exported.step_latents())


def test_a_game_needs_neither_pytorch_nor_onnx() -> None:
    code = (
        "import sys; from diffusers_far.export import ExportedRollout, FramePlan, seeded_noise\n"
        "print([name for name in ('torch', 'onnx', 'onnxscript') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_the_command_names_what_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxscript" else found(name, *rest)
    )
    done = CliRunner().invoke(main, ["export", CHECKPOINT, str(tmp_path / "game")])
    assert done.exit_code == 1
    assert 'export needs onnxscript: pip install "diffusers-far[onnx]"' in done.output


def test_the_command_exports_the_shipped_model_in_int8(tmp_path: Path) -> None:
    output = tmp_path / "game"
    command = ["export", CHECKPOINT, str(output), "--dtype", "int8", "--num-inference-steps", "1"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert f"{output}: written, onnx in int8" in done.output
    pipe = FARVideoPipeline.from_pretrained(locate(CHECKPOINT))
    exported = ExportedRollout(output, SEED)
    assert list(exported.config["samplers"]) == ["1", "2"]
    latents = [torch.from_numpy(seeded_noise(1, frame, (16, 8, 8))) for frame in range(10)]
    rollout = pipe.rollout(video_latents=torch.stack(latents)[None], output_type="latent")
    for frame in latents:
        exported.append_latents(frame.numpy())
    noise = seeded_noise(SEED, 10, (16, 8, 8))
    found = torch.from_numpy(exported.step_latents(1, noise))
    expected = rollout.step_latents(torch.tensor([1]), torch.tensor(noise)[None, None])[0, 0]
    error = float((found - expected).norm() / expected.norm())
    assert tm.TOLERANCE < error < 0.05
    weights = sum(parameter.numel() for parameter in pipe.transformer.parameters())
    assert (output / "commit.onnx").stat().st_size < 1.6 * weights
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 1 and "exists already" in again.output
