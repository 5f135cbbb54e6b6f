"""The rollout of the page's worker against that in Python: calls, noise and frames."""

import base64
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Page

from diffusers_far.export import ExportedRollout, FramePlan, seeded_noise
from tests.web.conftest import ASK, serving

SEED = 2**40 + 7
BLANK = "style.css"  # a place of the page's origin that starts nothing


def picture(reply: dict[str, Any]) -> np.ndarray:
    """Of a worker's frame: `[64, 64, 3]` uint8."""
    return np.frombuffer(base64.b64decode(reply["picture"]), np.uint8).reshape(64, 64, 4)[..., :3]


def calls_of(game: ExportedRollout) -> list[dict[str, Any]]:
    """That made its last frame, as the worker tells them."""
    return [call.as_json() for call in game.calls]


def largest_difference(reply: dict[str, Any], frame: np.ndarray) -> float:
    """Levels of 255."""
    return float(np.abs(picture(reply) - frame * 255).max())


def test_a_game_with_rewind_and_branch_is_that_of_python(
    page: Page, url: str, ask: Callable[..., Any], long_model: Path
) -> None:
    page.goto(url + BLANK)
    loaded = ask("load", {"folder": url + "model/", "backend": "wasm"})
    assert (loaded["backend"], loaded["threads"] > 0) == ("wasm", True)
    assert ask("begin", {"beginning": {"start": 0}, "settings": {"seed": SEED}}) == 6
    exported = ExportedRollout(long_model, SEED, num_threads=1)
    exported.append_start(0)
    other_steps = ExportedRollout(long_model, num_inference_steps=1).sampler, exported.sampler

    def play(actions: list[int | None], num_steps: int = 3) -> None:
        exported.sampler = other_steps[num_steps > 1]
        for action in actions:
            reply = ask("step", {"action": action, "numSteps": num_steps})
            frame = exported.step(action)
            assert reply["number"] == exported.num_frames - 1
            assert largest_difference(reply, frame) < 0.51  # rounding to 8 bits
            assert reply["calls"] == calls_of(exported)

    play([None, *(index * 5 % 6 for index in range(20))])
    play([1, 2], num_steps=1)
    assert ask("mark") == 29
    branch = exported.fork()
    play([3, 3, 3])
    assert ask("rewind", 5) == 27
    exported.rewind(5)
    play([4] * 4)
    assert ask("rewind", 1) == 30
    assert ask("back") == 29
    exported = branch
    play([5, 0])


def test_200_frames_are_those_of_python(
    page: Page, url: str, ask: Callable[..., Any], long_model: Path
) -> None:
    """Many times round the ring, so that errors of either would add up, and far beyond what is kept."""
    exported = ExportedRollout(long_model, SEED, num_inference_steps=1, num_threads=1, max_rewind=9)
    actions = [index * 7 % 11 % 6 for index in range(200)]
    page.goto(url + BLANK)
    ask("load", {"folder": url + "model/", "backend": "wasm"})
    ask("begin", {"beginning": None, "settings": {"seed": SEED, "maxRewind": 9}})
    play = f"""async (actions) => {{
        const ask = {ASK}, replies = [];
        for (const action of actions) replies.push(await ask(["step", {{ action, numSteps: 1 }}]));
        return replies.map((one) => (one.number % 20 === 19 ? one : {{ ...one, picture: null }}));
    }}"""
    frames, calls = [], []
    for action in actions:
        frames.append(exported.step(action))
        calls.append(calls_of(exported))
    replies = page.evaluate(play, actions)
    assert [reply["calls"] for reply in replies] == calls
    for reply in replies[19::20]:
        assert largest_difference(reply, frames[reply["number"]]) < 0.51
    assert ask("rewind", 8) == 192
    exported.rewind(8)
    assert largest_difference(ask("step", {"action": 5, "numSteps": 1}), exported.step(5)) < 0.51
    with pytest.raises(Exception, match="cannot go back 3 frames: 2 of 193 can be taken back"):
        ask("rewind", 3)
    with pytest.raises(ValueError, match="num_frames=3 must be 0 to 2: there are 193 frames"):
        exported.rewind(3)


def test_noise_is_that_of_python(page: Page, url: str, ask: Callable[..., Any]) -> None:
    page.goto(url + BLANK)
    for seed, frame, count in ((0, 0, 64), (SEED, 2**32 - 1, 63), (2**53 - 1, 5, 64)):
        found, expected = np.array(ask("noise", [seed, frame, count])), seeded_noise(seed, frame, (count,))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_pictures_classes_and_guidance(
    page: Page, url: str, ask: Callable[..., Any], long_model: Path
) -> None:
    exported = ExportedRollout(long_model, 3, class_label=2, guidance_scale=1.5, flex_rope_slope=0.4)
    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 4), dtype=np.uint8)
    page.goto(url + BLANK)
    ask("load", {"folder": url + "model/", "backend": "wasm"})
    pictures = [frame.ravel().tolist() for frame in frames]
    settings = {"seed": 3, "classLabel": 2, "guidanceScale": 1.5, "flexRopeSlope": 0.4}
    assert ask("begin", {"beginning": {"pictures": pictures}, "settings": settings}) == 2
    for frame in frames:
        exported.append(frame[..., :3])
    for action in (1, None, 3, 2, 5):
        assert (
            largest_difference(ask("step", {"action": action, "numSteps": 3}), exported.step(action)) < 0.51
        )


def run_in_node(repository: Path, code: str, given: Any) -> Any:
    """What a script of TypeScript, which has `given`, writes as JSON."""
    options = {"cwd": repository / "web", "capture_output": True, "text": True, "check": True, "timeout": 60}
    esbuild = ["node_modules/.bin/esbuild", "--bundle", "--platform=node", "--loader=ts"]
    code = f'const given = JSON.parse(require("node:fs").readFileSync(0, "utf8"));\n{code}'
    bundle = subprocess.run(esbuild, input=code, **options).stdout
    return json.loads(subprocess.run(["node", "-e", bundle], input=json.dumps(given), **options).stdout)


@pytest.mark.parametrize(
    ("kind", "sizes", "action", "null"),
    [
        ("integer", [6], 2, [-1]),
        ("groups", [3, 4], [2, 1], [-1, -1]),
        ("vector", [2], [0.5, -1], [None, None]),
    ],
)
def test_actions_of_every_kind(
    repository: Path, dist: Path, kind: str, sizes: list[int], action: Any, null: list[Any]
) -> None:
    """As graphs take them: of a frame that has one, of one that has none, and of places without a frame."""
    names = {"commit": ["latents", "actions"], "step": ["latents", "actions"]}
    graphs = {name: {"inputs": [{"name": one} for one in inputs]} for name, inputs in names.items()}
    config = {
        "latent_shape": [1],
        "ring_frames": 1,
        "window_frames": 2,
        "rope_frequencies": [1],
        "flex_rope_slope": 0,
        "actions": {"kind": kind, "sizes": sizes},
        "num_inference_steps": 1,
        "samplers": {"1": {"timesteps": [1000], "ends": [0], "weights": [[1, -1]]}},
        "graphs": graphs,
    }
    code = """
        import { ExportedRollout } from "./src/exported_rollout";
        const seen = [], run = async (graph, { latents, actions }) => {
            seen.push([graph, [...actions]]);
            return [latents];
        };
        const game = new ExportedRollout(given.config, run, { seed: 0 });
        game.step(given.action).then(() => game.step(null)).then(() => console.log(JSON.stringify(seen)));"""
    found = run_in_node(repository, code, {"config": config, "action": action})
    row = action if isinstance(action, list) else [action]
    assert found == [["step", row], ["commit", [*null, *null, *row]], ["step", null]]


def test_a_long_game_keeps_the_memory_of_a_short_one(repository: Path, dist: Path) -> None:
    """All that a game holds, counted by node: the same after 100 frames and after 200, but not before."""
    inputs = [{"name": "ring_keys", "dtype": "float32", "shape": [2]}]
    inputs += [{"name": name} for name in ("latents", "ring_ages")]
    config = {
        "latent_shape": [4],
        "ring_frames": 3,
        "window_frames": 2,
        "rope_frequencies": [1],
        "flex_rope_slope": 0,
        "actions": None,
        "num_inference_steps": 1,
        "samplers": {"1": {"timesteps": [1000], "ends": [0], "weights": [[1, -1]]}},
        "graphs": {"step": {"inputs": inputs}, "commit": {"inputs": inputs}},
    }
    code = """
        import { ExportedRollout } from "./src/exported_rollout";
        const run = async (graph, { latents }) => [latents.slice()];
        const game = new ExportedRollout(given, run, { seed: 0, maxRewind: 10 });
        function held(value) {
            if (typeof value !== "object" || value === null || value === given) return 1;
            if (ArrayBuffer.isView(value)) return value.buffer.byteLength;
            const parts = value instanceof Map ? [...value.keys(), ...value.values()] : Object.values(value);
            return parts.reduce((sum, one) => sum + held(one), 1);
        }
        (async () => {
            const found = [];
            for (let frame = 1; frame <= 200; frame++) {
                await game.step(null);
                if ([5, 100, 200].includes(frame)) found.push(held(game));
            }
            game.rewind(10);
            await game.step(null);
            let message = "";
            try { game.rewind(2); } catch (error) { message = error.message; }
            console.log(JSON.stringify([...found, message]));
        })();"""
    early, middle, late, message = run_in_node(repository, code, config)
    assert early < middle == late
    assert message == "cannot go back 2 frames: 1 of 191 can be taken back"


def test_the_plan_of_every_kind_of_context_is_that_of_python(repository: Path, dist: Path) -> None:
    """Calls over random rewinds and given frames, by node."""
    rng, cases = np.random.default_rng(0), []
    for ring, window in ((0, 0), (3, 0), (7, 0), (0, 2), (1, 2), (5, 3)):
        for _ in range(5):
            moves = [["next", "add", "rewind"][i] for i in rng.choice(3, 60, p=[0.7, 0.2, 0.1])]
            plan, steps, calls = FramePlan(ring, window, max_rewind=12), [], []
            for move in moves:
                count = 0
                if move == "next":
                    calls += [call.as_json() for call in plan.next_frame()]
                if move == "rewind":
                    count = int(rng.integers(0, plan.rewindable + 1))
                    plan.rewind(count)
                else:
                    plan.add_frame()
                steps.append([move, count, plan.rewindable])
            cases.append({"ring": ring, "window": window, "steps": steps, "calls": calls})
    code = """
        import { FramePlan } from "./src/frame_plan";
        console.log(JSON.stringify(given.map(({ ring, window, steps }) => {
            const plan = new FramePlan(ring, window, 12), calls = [];
            for (const [move, count, rewindable] of steps) {
                if (move === "next") calls.push(...plan.nextFrame());
                move === "rewind" ? plan.rewind(count) : plan.addFrame();
                if (plan.rewindable !== rewindable) throw new Error(`${plan.rewindable} !== ${rewindable}`);
            }
            return calls;
        })));"""
    found = run_in_node(repository, code, cases)
    assert found == [case["calls"] for case in cases]
    assert sum(len(calls) for calls in found) > 1000


@pytest.mark.parametrize("broken", ["missing", "short", "changed", "not_json", "version", "page"])
def test_a_broken_model_is_told(
    page: Page, ask: Callable[..., Any], dist: Path, long_model: Path, tmp_path: Path, broken: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in long_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights, config = folder / "weights.bin", folder / "rollout.json"
    data = weights.read_bytes()
    match broken:
        case "missing":
            weights.unlink()
            message = "weights.bin cannot be loaded: the server says 404"
        case "short":
            weights.write_bytes(data[:-1])
            message = r"weights.bin is broken .* \(\d+ bytes of \d+ came\)"
        case "changed":
            weights.write_bytes(bytes([data[0] ^ 1]) + data[1:])
            message = "weights.bin is broken"
        case "not_json":
            config.write_text("<html>")
            message = "rollout.json is not JSON"
        case "version":
            config.write_text(config.read_text().replace('"version": 1', '"version": 2'))
            message = "rollout.json has version 2; this page knows version 1"
        case "page":
            config.write_text("[]")
            message = "rollout.json is not of an export of diffusers-far"
    with serving(dist, folder) as url:
        page.goto(url + BLANK)
        with pytest.raises(Exception, match=message):
            ask("load", {"folder": url + "model/", "backend": "wasm"})
