"""Rollout: the cache changes nothing but the time, memory stays constant, and the steps are the sampler."""

import gc
import itertools
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_far import ContextSchedule, FARTransformer3DModel, Rollout
from tests.tiny_models import (
    GRID,
    TOLERANCE,
    latents,
    long_transformer,
    max_error,
    noise,
    relative_error,
    transformer,
)

BATCH, STEPS = 2, 3


def make_rollout(model: FARTransformer3DModel, num_context: int = 3, **settings: Any) -> Rollout:
    """A rollout of two videos that returns latents; conditions are set as far as the model takes them."""
    conditions: dict[str, Any] = {}
    if model.config.num_classes:
        conditions["class_labels"] = torch.tensor([1, 3])
    if model.config.num_actions:
        conditions["context_actions"] = action_table(num_context)
    settings = {"num_inference_steps": STEPS} | conditions | settings
    as_it_is = [lambda frames: frames] * 2
    return Rollout(
        model, FlowMatchEulerDiscreteScheduler(), *as_it_is, latents(BATCH, num_context), **settings
    )


def action_table(num_frames: int) -> Tensor:
    """Actions `[B, F]`, null ones among them."""
    return (torch.arange(num_frames) * 3 + torch.arange(BATCH)[:, None]) % 5 - 1


def continue_rollout(rollout: Rollout, num_new: int) -> Tensor:
    """New latents `[B, num_new, C, h, w]`, from the same noise each time."""
    made = []
    for index in range(num_new):
        frame = rollout.num_frames
        action = action_table(frame + 1)[:, -1] if rollout.transformer.config.num_actions else None
        made.append(rollout.step_latents(action, noise(*latents(BATCH, 1).shape, seed=100 + index)))
    return torch.cat(made, dim=1)


def roll(model: FARTransformer3DModel, num_context: int = 3, num_new: int = 5, **settings: Any) -> Tensor:
    return continue_rollout(make_rollout(model, num_context, **settings), num_new)


MODELS = {
    "base": lambda: transformer(),
    "base-classes": lambda: transformer(num_classes=5),
    "base-actions": lambda: transformer(num_actions=4),
    "long": lambda: long_transformer(),
    "long-classes": lambda: long_transformer(num_classes=5),
    "long-actions": lambda: long_transformer(num_actions=4),
    "long-both": lambda: long_transformer(num_classes=5, num_actions=4),
    "base-patch-2": lambda: transformer(patch_size=2, num_actions=4),
    "long-patch-2": lambda: long_transformer(patch_size=2, num_actions=4),
    "long-window-1": lambda: long_transformer(short_window=1, num_actions=4),
}
CONDITIONAL = [name for name in MODELS if name not in ("base", "long")]
SETTINGS = [
    {},
    {"flex_rope_slope": 0.4},
    {"rope_interpolation": 2.5},
    {"flex_rope_slope": 0.4, "rope_interpolation": 2.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "slope", "interpolation", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_the_cache_changes_nothing(name: str, settings: dict[str, Any]) -> None:
    model = MODELS[name]()
    cached, uncached = (roll(model, **settings, use_cache=use_cache) for use_cache in (True, False))
    assert relative_error(cached, uncached) <= TOLERANCE


@pytest.mark.parametrize("guidance_scale", [0, 0.5, 2.0])
@pytest.mark.parametrize("name", CONDITIONAL)
def test_the_cache_changes_nothing_with_guidance(name: str, guidance_scale: float) -> None:
    model = MODELS[name]()
    cached, uncached = (
        roll(model, guidance_scale=guidance_scale, use_cache=use_cache) for use_cache in (True, False)
    )
    assert relative_error(cached, uncached) <= TOLERANCE
    assert max_error(cached, roll(model)) > 1e-3  # guidance does something


@pytest.mark.parametrize(
    ("name", "num_context"),
    [("base-actions", 0), ("long-actions", 0), ("long-actions", 75), ("base-patch-2", 70)],
)
def test_the_cache_changes_nothing_for_any_length_of_context(name: str, num_context: int) -> None:
    """None, and more than a chunk of long-term frames (64) or of short-term ones (32)."""
    model = MODELS[name]()
    cached, uncached = (
        roll(model, num_context, num_new=2, use_cache=use_cache, flex_rope_slope=0.01)
        for use_cache in (True, False)
    )
    assert relative_error(cached, uncached) <= TOLERANCE


@torch.no_grad()
def naive_rollout(
    model: FARTransformer3DModel, num_context: int, num_new: int, guidance_scale: float
) -> Tensor:
    """The sampler written down once more, from the paper: no cache, no classes of ours."""
    video = latents(BATCH, num_context)
    labels = torch.tensor([1, 3]) if model.config.num_classes else None
    for index in range(num_new):
        num_frames = num_context + index + 1
        actions = action_table(num_frames) if model.config.num_actions else None
        frame = noise(*video[:, :1].shape, seed=100 + index)
        sigmas = [*torch.linspace(1000, 1, STEPS).div(1000).tolist(), 0.0]
        for sigma, next_sigma in itertools.pairwise(sigmas):
            timestep = torch.full((BATCH, num_frames), -1.0)
            timestep[:, -1] = 1000 * sigma
            frames = torch.cat([video, frame], dim=1)
            velocity = model(frames, timestep, class_labels=labels, actions=actions).sample[:, -1:]
            null = model(frames, timestep).sample[:, -1:]
            velocity = null + guidance_scale * (velocity - null)
            frame = frame + (next_sigma - sigma) * velocity
        video = torch.cat([video, frame], dim=1)
    return video[:, num_context:]


@pytest.mark.parametrize("guidance_scale", [0, 1, 2])
@pytest.mark.parametrize("name", ["base-classes", "long-actions", "long-classes"])
def test_a_rollout_is_the_sampler_of_the_paper(name: str, guidance_scale: int) -> None:
    model = MODELS[name]()
    expected = naive_rollout(model, 3, 4, guidance_scale)
    assert relative_error(roll(model, 3, 4, guidance_scale=guidance_scale), expected) <= TOLERANCE


@pytest.mark.parametrize("num_steps", [1, 3])
@torch.no_grad()
def test_a_flow_map_is_told_where_each_step_ends(num_steps: int) -> None:
    model = long_transformer(num_actions=5, use_meanflow=True)
    video = latents(BATCH, 6)
    frame = noise(*video[:, :1].shape, seed=100)
    for index in range(num_steps):
        start, end = 1 - index / num_steps, 1 - (index + 1) / num_steps
        timestep, timestep_r = (torch.full((BATCH, 7), -1.0) for _ in range(2))
        timestep[:, -1], timestep_r[:, -1] = 1000 * start, 1000 * end
        frames, actions = torch.cat([video, frame], dim=1), action_table(7)
        velocity = model(frames, timestep, actions=actions, timestep_r=timestep_r).sample[:, -1:]
        frame = frame - (start - end) * velocity
    for use_cache in (True, False):
        made = roll(model, 6, 1, num_inference_steps=num_steps, use_cache=use_cache)
        assert relative_error(made, frame) <= TOLERANCE


def step_with_corrupt_slot(rollout: Rollout, level: str, part: str, slot: int) -> Tensor:
    """A new frame, from its second denoising step on with a context frame that is not what it was."""
    cache = rollout.cache

    def corrupt(index: int, timestep: Tensor, frame: Tensor) -> Tensor:
        size = cache.long_tokens if level == "long" else cache.short_tokens
        start = slot * size + (0 if level == "long" else len(cache.long_frames) * cache.long_tokens)
        getattr(cache.layers[0], part)[:, start : start + size] += float(index == 0)
        return frame

    return rollout.step_latents(noise=noise(*latents(BATCH, 1).shape, seed=100), callback=corrupt)


@pytest.mark.parametrize("level", ["long", "short"])
@pytest.mark.parametrize("part", ["keys", "values"])
def test_a_corrupt_cache_changes_the_result(level: str, part: str) -> None:
    """Each cached frame is used: otherwise the tests above would prove nothing."""
    model = long_transformer()
    healthy = make_rollout(model, num_context=6)
    expected = continue_rollout(healthy, 1)
    frames = healthy.cache.long_frames if level == "long" else healthy.cache.short_frames
    assert len(frames) == 3
    for slot in range(len(frames)):
        rollout = make_rollout(model, num_context=6)
        assert max_error(step_with_corrupt_slot(rollout, level, part, slot), expected) > 1e-4


SCHEDULES = {
    "window": ("base-actions", ContextSchedule(max_short_frames=3)),
    "window-of-one": ("base-actions", ContextSchedule(max_short_frames=1)),
    "window-and-sinks": ("base-actions", ContextSchedule(max_short_frames=4, num_sink_frames=2)),
    "long-memory": ("long-actions", ContextSchedule(max_long_frames=2)),
    "long-memory-and-sinks": ("long-actions", ContextSchedule(max_long_frames=3, num_sink_frames=1)),
    "no-long-memory": ("long-actions", ContextSchedule(max_long_frames=0)),
    "narrow-window": ("long-actions", ContextSchedule(max_short_frames=2)),
    "never-refreshed": ("long-actions", ContextSchedule(max_long_frames=2, refresh_interval=None)),
    "seldom-refreshed": (
        "long-actions",
        ContextSchedule(max_long_frames=3, num_sink_frames=1, refresh_interval=3),
    ),
    "everything": (
        "long-both",
        ContextSchedule(max_short_frames=3, max_long_frames=2, num_sink_frames=1),
    ),
}


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=["plain", "slope"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_dropped_frames_leave_no_trace_in_one_layer(name: str, settings: dict[str, Any]) -> None:
    """In a model of one layer a frame's keys do not depend on what it saw, so dropping is exact."""
    model_name, schedule = SCHEDULES[name]
    options = {"num_classes": 5} if model_name == "long-both" else {}
    make = transformer if model_name.startswith("base") else long_transformer
    model = make(num_layers=1, num_actions=4, **options)
    settings = settings | {"context_schedule": schedule}
    cached, uncached = (
        roll(model, 5, 6, **settings, guidance_scale=2, use_cache=use_cache) for use_cache in (True, False)
    )
    assert relative_error(cached, uncached) <= TOLERANCE
    assert max_error(cached, roll(model, 5, 6, **SETTINGS[0], guidance_scale=2)) > 1e-4


@pytest.mark.parametrize(
    ("interval", "computed"),
    [(1, [5, 5, 5, 5, 5]), (2, [5, 3, 5, 3, 5]), (None, [3, 3, 3, 3, 3])],
)
def test_a_window_that_is_not_refreshed_saves_its_frames(
    interval: int | None, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new frame's first step computes itself, what became long-term, and the window or its newest frame."""
    model = long_transformer(num_actions=4)  # a window of 4 frames
    exact = make_rollout(model, 4)
    rollout = make_rollout(model, 4, context_schedule=ContextSchedule(refresh_interval=interval))
    assert relative_error(continue_rollout(rollout, 1), continue_rollout(exact, 1)) <= TOLERANCE
    counts: list[int] = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *args, **kwargs: counts.append(args[0].shape[1]) or forward(*args, **kwargs)
    )
    made = continue_rollout(rollout, 5)
    assert counts[::STEPS] == computed
    change = max_error(made, continue_rollout(exact, 5))
    assert change == 0 if interval == 1 else 1e-5 < change < 1


def test_a_bound_that_is_not_reached_changes_nothing() -> None:
    model = long_transformer(num_actions=4)
    schedule = ContextSchedule(max_short_frames=10, max_long_frames=50, num_sink_frames=3)
    assert torch.equal(roll(model, context_schedule=schedule), roll(model))


def test_a_schedule_without_long_memory_ignores_old_frames() -> None:
    """Any layers: a Long model's window is encoded anew, so only the window matters."""
    model = long_transformer(num_actions=4)
    rollouts = [
        make_rollout(model, 6, context_schedule=ContextSchedule(max_long_frames=bound)) for bound in (0, None)
    ]
    results = []
    for rollout in rollouts:
        before = continue_rollout(rollout, 1)
        rollout._start[0][:, :3] += 1.0  # frames 0 to 2 are long-term for frame 6
        rollout.reset()
        results.append(max_error(continue_rollout(rollout, 1), before))
    assert results[0] == 0
    assert results[1] > 1e-4


@pytest.mark.parametrize("seed", range(12))
def test_random_schedules(seed: int) -> None:
    """In one layer, cached and recomputed agree for every schedule."""
    draw = random.Random(seed)
    schedule = ContextSchedule(
        max_short_frames=draw.choice([None, 1, 2, 3, 5]),
        max_long_frames=draw.choice([None, 0, 1, 3, 6]),
        num_sink_frames=draw.choice([0, 0, 1, 3]),
    )
    make = draw.choice([transformer, long_transformer])
    model = make(num_layers=1, num_actions=4)
    settings = {"flex_rope_slope": draw.choice([0.0, 0.3]), "context_schedule": schedule}
    context = draw.choice([0, 3, 9])
    cached, uncached = (roll(model, context, 6, **settings, use_cache=flag) for flag in (True, False))
    assert relative_error(cached, uncached) <= TOLERANCE


@pytest.mark.parametrize("max_short_frames", [None, 2])
def test_a_window_alone_is_exact(max_short_frames: int | None) -> None:
    schedule = ContextSchedule(max_short_frames, max_long_frames=0)
    model = long_transformer(num_actions=4)
    cached, uncached = (
        roll(model, 6, 6, context_schedule=schedule, use_cache=use_cache) for use_cache in (True, False)
    )
    assert relative_error(cached, uncached) <= TOLERANCE


def test_sinks_stay_right_before_the_newest_frames() -> None:
    """The same frames in the same places give the same next frame, however long ago the sinks were."""
    model = transformer(num_layers=1)
    schedule = ContextSchedule(max_short_frames=3, num_sink_frames=1)
    video = latents(BATCH, 9)
    results = []
    for frames in ([0, 7, 8], [0, 3, 4, 5, 6, 7, 8]):
        rollout = make_rollout(model, 0, context_schedule=schedule)
        rollout.append(video_latents=video[:, frames])
        results.append(continue_rollout(rollout, 1))
    assert relative_error(*results) <= TOLERANCE


# ----------------------------------------------------------------------------------------------------
# Verbs


def test_append_is_as_if_the_frames_had_been_given() -> None:
    model = long_transformer(num_actions=4)
    video, actions = latents(BATCH, 9), action_table(9)
    rollout = Rollout(
        model,
        FlowMatchEulerDiscreteScheduler(),
        *[lambda frames: frames] * 2,
        video[:, :2],
        actions[:, :2],
        num_inference_steps=STEPS,
    )
    rollout.step_latents(actions[:, 2], noise(BATCH, 1, 4, GRID, GRID))
    rollout.rewind(1)
    rollout.append(video[:, 2:6], actions[:, 2:6])
    rollout.append(video_latents=video[:, 6:], actions=actions[:, 6:])
    assert rollout.num_frames == 9
    assert relative_error(continue_rollout(rollout, 2), roll(model, 9, 2)) <= TOLERANCE


def test_append_refuses_what_does_not_fit() -> None:
    rollout = make_rollout(transformer(num_actions=4))
    for arguments, message in (
        ({}, "video or video_latents"),
        ({"video": latents(2, 1), "video_latents": latents(2, 1)}, "video or video_latents"),
        ({"video_latents": latents(1, 2)}, r"video_latents has latents of shape \(1, 2"),
        ({"video": latents(2, 2)[..., :4]}, "video has latents of shape"),
        ({"video_latents": latents(2, 2), "actions": [1, 2, 3]}, "actions has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            rollout.append(**arguments)
    assert rollout.num_frames == 3


@pytest.mark.parametrize("num_rewound", [1, 3, 6, 9])
@pytest.mark.parametrize("name", ["base-actions", "long-actions"])
def test_after_rewinding_it_is_as_if_the_frames_had_never_been(name: str, num_rewound: int) -> None:
    """Also into the frames that were given, and over the edge of the window."""
    model = MODELS[name]()
    rollout = make_rollout(model, 6)
    made = continue_rollout(rollout, 4)
    rollout.rewind(num_rewound)
    assert rollout.num_frames == 10 - num_rewound
    start = torch.cat([latents(BATCH, 6), made], dim=1)[:, : 10 - num_rewound]
    fresh = make_rollout(model, 0)
    fresh.append(video_latents=start, actions=action_table(10 - num_rewound))
    assert relative_error(continue_rollout(rollout, 3), continue_rollout(fresh, 3)) <= TOLERANCE


def test_rewinding_too_far() -> None:
    rollout = make_rollout(transformer(), 3, max_rewind_frames=2)
    continue_rollout(rollout, 3)
    with pytest.raises(ValueError, match="num_frames=3 must be 0 to 2"):
        rollout.rewind(3)
    rollout.rewind(2)
    assert (rollout.num_frames, rollout.num_rewindable_frames) == (4, 0)


@pytest.mark.parametrize("name", ["base-actions", "long-actions"])
def test_attention_of_a_model_that_looks_everywhere_alike(name: str) -> None:
    model = MODELS[name]()
    for block in model.transformer_blocks:  # queries of zero: every token has the same share
        torch.nn.init.zeros_(block.attn.to_q.weight)
        torch.nn.init.zeros_(block.attn.to_q.bias)
    rollout = make_rollout(model, 6)
    continue_rollout(rollout, 1)
    long, short = model.tokens_per_frame(GRID, GRID)
    tokens = {slot.frame: long if slot.is_long else short for slot in rollout.cache.slots}
    shares = rollout.frame_attention()
    total = sum(tokens.values()) + short  # and the frame itself
    assert shares == pytest.approx({frame: count / total for frame, count in tokens.items()}, rel=1e-4)
    assert sorted(shares) == list(range(6))


def test_attention_under_a_slope_is_on_what_is_near() -> None:
    rollout = make_rollout(long_transformer(num_actions=4), 8, flex_rope_slope=5.0)
    continue_rollout(rollout, 2)
    shares = rollout.frame_attention()
    frames = sorted(shares)
    assert frames[-1] == rollout.num_frames - 2 and sum(shares.values()) < 1
    assert all(shares[one] >= shares[other] for one, other in itertools.pairwise(reversed(frames)))
    assert shares[frames[-1]] > 100 * shares[frames[0]]


def test_looking_changes_nothing() -> None:
    model = long_transformer(num_actions=4)
    expected = roll(model, 6, 4)
    rollout = make_rollout(model, 6)
    made = []
    for index in range(4):
        assert rollout.frame_attention() == {} if index == 0 else rollout.frame_attention()
        frame = rollout.num_frames
        made.append(
            rollout.step_latents(
                action_table(frame + 1)[:, -1], noise(*latents(BATCH, 1).shape, seed=100 + index)
            )
        )
    assert relative_error(torch.cat(made, dim=1), expected) <= TOLERANCE
    rollout.rewind(2)
    assert rollout.frame_attention() == {} or max(rollout.frame_attention()) < rollout.num_frames - 1
    assert make_rollout(model, 6, use_cache=False).frame_attention() == {}


@pytest.mark.parametrize("use_cache", [True, False])
def test_branches_of_a_fork_share_nothing_that_changes(use_cache: bool) -> None:
    model = long_transformer(num_actions=4)
    settings = {"use_cache": use_cache, "context_schedule": ContextSchedule(max_long_frames=2)}
    expected = roll(model, 6, 5, **settings)
    rollout = make_rollout(model, 6, **settings)
    continue_rollout(rollout, 2)
    branch = rollout.fork()
    branch.rewind(3)
    branch.append(video_latents=latents(BATCH, 4, seed=9))
    branch.guidance_scale = 3.0
    continue_rollout(branch, 2)
    rollout.rewind(2)
    assert relative_error(continue_rollout(rollout, 5), expected) <= TOLERANCE


def test_forks_draw_the_same_noise_on_their_own() -> None:
    rollout = make_rollout(transformer(), generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)])
    branch = rollout.fork()
    assert torch.equal(rollout.step(), branch.step())


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_state_goes_on_exactly(use_cache: bool, tmp_path: Path) -> None:
    """Through a file, after frames were dropped that cached ones remember."""
    model = long_transformer(num_classes=5, num_actions=4)
    settings = {
        "use_cache": use_cache,
        "context_schedule": ContextSchedule(max_long_frames=2, num_sink_frames=1, refresh_interval=3),
        "guidance_scale": 2.0,
    }
    rollout = make_rollout(model, 6, **settings, generator=torch.Generator().manual_seed(1))
    continue_rollout(rollout, 4)
    save_file(rollout.state_dict(), tmp_path / "game")
    other = make_rollout(model, 2, **settings, generator=torch.Generator())
    other.load_state_dict(load_file(tmp_path / "game"))
    for _ in range(4):
        assert torch.equal(other.step(1), rollout.step(1))
    other.rewind(6)
    rollout.rewind(6)
    assert relative_error(other.step(2), rollout.step(2)) <= TOLERANCE
    other.reset()
    assert other.num_frames == 6


def test_a_state_of_another_rollout() -> None:
    state = make_rollout(transformer()).state_dict()
    for other, message in (
        (make_rollout(transformer(), use_cache=False), "use_cache: True; this one has False"),
        (make_rollout(transformer(), generator=torch.Generator()), "generators: 0; this one has 1"),
        (make_rollout(transformer(num_layers=1)), "state has keys"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_inference_steps": 2},
        {"guidance_scale": 2.0},
        {"flex_rope_slope": 0.3},
        {"context_schedule": ContextSchedule(max_long_frames=1)},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_changed_settings_are_as_if_they_had_always_been(settings: dict[str, Any]) -> None:
    model = long_transformer(num_actions=4)
    rollout = make_rollout(model, 6)
    made = continue_rollout(rollout, 2)
    rollout.change(**settings)
    fresh = make_rollout(model, 0, **settings)
    fresh.append(video_latents=torch.cat([latents(BATCH, 6), made], dim=1), actions=action_table(8))
    assert relative_error(continue_rollout(rollout, 3), continue_rollout(fresh, 3)) <= TOLERANCE


def test_a_change_that_does_not_fit_changes_nothing() -> None:
    model = long_transformer(num_actions=4)
    rollout = make_rollout(model, 6)
    for settings, message in (
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"guidance_scale": 3, "flex_rope_slope": -1}, "flex_rope_slope=-1"),
        ({"generator": None}, "generator"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            rollout.change(**settings)
    assert relative_error(continue_rollout(rollout, 2), roll(model, 6, 2)) <= TOLERANCE


def test_memory_that_is_switched_on_again_has_what_is_kept() -> None:
    schedules = [ContextSchedule(max_long_frames=bound) for bound in (0, 20)]
    rollout = make_rollout(long_transformer(), 12, max_rewind_frames=5, context_schedule=schedules[0])
    assert rollout.context.long == ()
    rollout.change(context_schedule=schedules[1])
    assert rollout.context.long == (4, 5, 6, 7, 8)  # a window of 4 before the frame to which one can go back
    assert torch.isfinite(continue_rollout(rollout, 2)).all()


def test_begun_under_inference_mode() -> None:
    expected = roll(long_transformer(num_actions=4), 6, 4)
    with torch.inference_mode():
        rollout = make_rollout(long_transformer(num_actions=4), 6)
        first = continue_rollout(rollout, 1)
    made = []
    for index in range(1, 4):
        action = action_table(rollout.num_frames + 1)[:, -1]
        made.append(rollout.step_latents(action, noise(BATCH, 1, 4, GRID, GRID, seed=100 + index)))
    assert relative_error(torch.cat([first, *made], dim=1), expected) <= TOLERANCE


def test_a_frame_that_is_not_finite_is_not_kept() -> None:
    rollout = make_rollout(transformer(), 3)
    with pytest.raises(FloatingPointError, match="frame 3 came out"):
        rollout.step_latents(callback=lambda index, timestep, frame: frame * float("nan"))
    assert rollout.num_frames == 3
    assert relative_error(continue_rollout(rollout, 1), roll(transformer(), 3, 1)) <= TOLERANCE


# ----------------------------------------------------------------------------------------------------
# Memory


def count_tensors() -> tuple[int, int]:
    """Live tensors and their bytes."""
    gc.collect()
    alive = [thing for thing in gc.get_objects() if type(thing) is Tensor]
    return len(alive), sum(tensor.nbytes for tensor in alive)


@pytest.mark.parametrize(
    ("long", "num_frames", "schedule"),
    [
        (True, 2000, ContextSchedule(max_long_frames=6, num_sink_frames=1)),
        (False, 400, ContextSchedule(max_short_frames=4, num_sink_frames=1)),
    ],
    ids=["long", "base"],
)
def test_a_bounded_rollout_runs_in_constant_memory(
    long: bool, num_frames: int, schedule: ContextSchedule
) -> None:
    size = {"num_layers": 1, "num_attention_heads": 1, "patch_size": 4, "num_actions": 4}
    model = transformer(**size, **({"long_patch_size": 8, "short_window": 3} if long else {}))
    rollout = make_rollout(model, 1, num_inference_steps=1, context_schedule=schedule)
    state = []
    for frame in range(num_frames + 1):
        if frame == num_frames * 3 // 4:
            tracemalloc.start()
        if frame in (num_frames // 4, num_frames):
            state.append((rollout.cache.num_bytes, len(rollout._latents), len(rollout._actions)))
            state[-1] += count_tensors()
        if frame == num_frames * 3 // 4 + 70:  # what `rewind` may need has been replaced once
            traced = tracemalloc.get_traced_memory()[0]
        rollout.step(frame % 4)
    grown = tracemalloc.get_traced_memory()[0] - traced
    tracemalloc.stop()
    assert state[0] == state[1]
    assert grown < 20_000, f"{grown} bytes"  # one object kept per frame would be more
    assert rollout.num_frames == num_frames + 2
    assert torch.isfinite(rollout.step(0)).all()


def test_a_rollout_keeps_latents_of_its_context_and_for_rewinding() -> None:
    schedule = ContextSchedule(max_long_frames=2, num_sink_frames=1)
    rollout = make_rollout(
        long_transformer(num_actions=4), 10, context_schedule=schedule, max_rewind_frames=2
    )
    continue_rollout(rollout, 3)
    assert rollout.context.long == (0, 8, 9) and rollout.context.short == (10, 11, 12)
    # After two frames less, the context would be 0, 6, 7 and 8, 9, 10.
    assert sorted(rollout._latents) == [0, 6, 7, 8, 9, 10, 11, 12]
    assert rollout.num_rewindable_frames == 2


def test_reset_goes_back_to_the_context() -> None:
    rollout = make_rollout(long_transformer(num_actions=4), 3)
    first = continue_rollout(rollout, 5)
    assert rollout.num_frames == 8
    rollout.reset()
    assert rollout.num_frames == 3
    assert torch.equal(continue_rollout(rollout, 5), first)


def test_reset_does_not_rewind_the_generator() -> None:
    rollout = make_rollout(transformer(), generator=torch.Generator().manual_seed(0))
    first = rollout.step()
    rollout.reset()
    assert max_error(rollout.step(), first) > 0.1


def test_rollouts_do_not_disturb_each_other() -> None:
    model = long_transformer(num_actions=4)
    together = [make_rollout(model, 3, guidance_scale=scale) for scale in (1, 2)]
    made: list[list[Tensor]] = [[], []]
    for index in range(4):
        for rollout, frames in zip(together, made, strict=True):
            action = action_table(rollout.num_frames + 1)[:, -1]
            frames.append(rollout.step_latents(action, noise(BATCH, 1, 4, GRID, GRID, seed=100 + index)))
    for scale, frames in zip((1, 2), made, strict=True):
        assert torch.equal(torch.cat(frames, dim=1), roll(model, 3, 4, guidance_scale=scale))


def test_the_callers_scheduler_and_context_stay_as_they_are() -> None:
    scheduler, context = FlowMatchEulerDiscreteScheduler(), latents(BATCH, 3)
    before = scheduler.timesteps.clone()
    as_it_is = [lambda frames: frames] * 2
    rollout = Rollout(transformer(), scheduler, *as_it_is, context, num_inference_steps=2)
    rollout.step()
    assert torch.equal(scheduler.timesteps, before)
    assert torch.equal(context, latents(BATCH, 3))


@pytest.mark.parametrize("training", [True, False])
def test_sampling_does_not_depend_on_training_mode(training: bool) -> None:
    model = long_transformer(num_actions=4)
    assert torch.equal(roll(model.train(training)), roll(model.eval()))
    assert not roll(model).requires_grad


def test_the_callback_sees_and_changes_each_step() -> None:
    rollout = make_rollout(transformer(), num_inference_steps=4)
    seen = []

    def callback(index: int, timestep: Tensor, frame: Tensor) -> Tensor:
        seen.append((index, float(timestep), tuple(frame.shape)))
        return torch.zeros_like(frame) if index == 3 else frame

    frame = rollout.step_latents(callback=callback)
    assert [step[0] for step in seen] == [0, 1, 2, 3]
    assert [step[1] for step in seen] == pytest.approx([1000.0, 667.0, 334.0, 1.0])
    assert {step[2] for step in seen} == {(BATCH, 1, 4, GRID, GRID)}
    assert torch.equal(frame, torch.zeros_like(frame))


def test_an_exception_in_a_step_leaves_the_rollout_as_it_was() -> None:
    model = long_transformer(num_actions=4)
    rollout = make_rollout(model, 6)

    def fail(index: int, timestep: Tensor, frame: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rollout.step_latents(callback=fail)
    assert rollout.num_frames == 6
    assert relative_error(continue_rollout(rollout, 3), roll(model, 6, 3)) <= TOLERANCE


@pytest.mark.parametrize("action", [None, -1, 4, [-1, 4], torch.tensor([-1, -1])])
def test_null_actions_are_the_same(action: Any) -> None:
    steps = [
        make_rollout(transformer(num_actions=4), generator=torch.Generator().manual_seed(0)).step(form)
        for form in (action, None)
    ]
    assert torch.equal(*steps)


def test_forms_of_an_action() -> None:
    frames = [
        make_rollout(transformer(num_actions=4), generator=torch.Generator().manual_seed(0)).step(form)
        for form in (2, [2, 2], torch.tensor(2), torch.tensor([2, 2]))
    ]
    assert all(torch.equal(frame, frames[0]) for frame in frames)
    other = make_rollout(transformer(num_actions=4), generator=torch.Generator().manual_seed(0)).step([2, 3])
    assert torch.equal(other[0], frames[0][0]) and max_error(other[1], frames[0][1]) > 1e-4


@pytest.mark.parametrize("action", [5, -2, 1.0, [1], [1, 2, 3], [[1, 2]], "left", [], True, [None, 1]])
def test_bad_actions(action: Any) -> None:
    rollout = make_rollout(transformer(num_actions=4))
    with pytest.raises(ValueError, match=r"^action"):
        rollout.step(action)
    assert rollout.num_frames == 3


def test_an_action_for_a_model_without_actions() -> None:
    with pytest.raises(ValueError, match="action is given"):
        make_rollout(transformer()).step(1)
