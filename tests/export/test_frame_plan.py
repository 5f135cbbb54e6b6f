"""Which graph runs when: against the context that a rollout in PyTorch has."""

import pytest

from diffusers_far import ContextSchedule
from diffusers_far.export.frame_plan import FramePlan


def test_calls_of_a_base_model() -> None:
    plan = FramePlan(ring_frames=2, window_frames=0)
    calls = []
    for _ in range(4):
        calls += plan.next_frame()
        plan.add_frame()
    assert [(call.graph, call.frames, call.slot, call.ring_ages) for call in calls] == [
        ("step", (0,), -1, (-1, -1)),
        ("commit", (0,), 0, (-1, -1)),
        ("step", (1,), -1, (1, -1)),
        ("commit", (1,), 1, (2, -1)),
        ("step", (2,), -1, (2, 1)),
        ("commit", (2,), 0, (-1, 2)),  # frame 0 is out of the context: its slot is the new frame's
        ("step", (3,), -1, (1, 2)),
    ]


def test_calls_of_a_long_model() -> None:
    plan = FramePlan(ring_frames=1, window_frames=2)
    calls = []
    for _ in range(5):
        calls += plan.next_frame()
        plan.add_frame()
    assert [(call.graph, call.frames, call.slot, call.ring_ages, call.window_ages) for call in calls] == [
        ("step", (0,), -1, (-1,), (-1, -1)),
        ("commit", (-1, -1, 0), -1, (-1,), ()),
        ("step", (1,), -1, (-1,), (-1, 1)),
        ("commit", (-1, 0, 1), -1, (-1,), ()),
        ("step", (2,), -1, (-1,), (2, 1)),
        ("commit", (0, 1, 2), 0, (-1,), ()),
        ("step", (3,), -1, (3,), (2, 1)),
        ("commit", (1, 2, 3), 0, (-1,), ()),
        ("step", (4,), -1, (3,), (2, 1)),
    ]
    assert calls[5].frame_ages == (3, 2, 1)


@pytest.mark.parametrize(
    ("short", "long", "window"), [(6, None, None), (None, 5, 4), (None, 0, 4), (1, None, None)]
)
@pytest.mark.parametrize("given", [0, 3, 20])
def test_every_step_sees_the_context_of_the_schedule(
    short: int | None, long: int | None, window: int | None, given: int
) -> None:
    schedule = ContextSchedule(max_short_frames=short, max_long_frames=long)
    plan = FramePlan(long or 0, window - 1) if window else FramePlan((short or 1) - 1, 0)
    for _ in range(given):
        plan.add_frame()
    for _ in range(30):
        new = plan.num_frames
        *commits, step = plan.next_frame()
        context = schedule.context(new, window)
        ring = sorted(new - age for age in step.ring_ages if age > 0)
        seen = [new - age for age in step.window_ages if age > 0]
        assert ring == list(context.long if window else context.short)
        assert seen == list(context.short if window else ())
        assert plan.first_frame == min((*context.long, *context.short), default=new)
        if new > given:  # once it runs, a frame costs at most one commit
            assert len(commits) <= 1
        plan.add_frame()


def test_a_frame_that_is_planned_again_needs_no_commit() -> None:
    plan = FramePlan(ring_frames=3, window_frames=2)
    for _ in range(6):
        plan.add_frame()
    first = plan.next_frame()
    assert len(first) > 1 and plan.next_frame() == first[-1:]


def test_reset_forgets_everything() -> None:
    plan, fresh = FramePlan(3, 2), FramePlan(3, 2)
    for _ in range(9):
        plan.next_frame()
        plan.add_frame()
    plan.reset()
    assert plan.next_frame() == fresh.next_frame()


def test_the_frames_that_are_kept_are_those_that_a_rewind_needs() -> None:
    plan, kept = FramePlan(ring_frames=3, window_frames=2, max_rewind=4), set()
    for count in (0, 0, 3, 0, 1, 4, 0) * 20:
        count = min(count, plan.rewindable)
        plan.rewind(count)
        kept = {frame for frame in kept if frame < plan.num_frames}
        for _ in range(2):
            needed = {frame for call in plan.next_frame()[:-1] for frame in call.frames if frame >= 0}
            assert needed <= kept
            kept = {frame for frame in {*kept, plan.add_frame()} if frame >= plan.first_kept}
        assert len(kept) <= 4 + 3 + 2
    assert plan.num_frames > 100


def test_rewind_keeps_what_the_ring_has_of_earlier_frames() -> None:
    plan = FramePlan(ring_frames=3, window_frames=2)
    for _ in range(8):
        plan.next_frame()
        plan.add_frame()
    assert plan.slots == [3, 4, 2]
    plan.rewind(4)  # back to 4 frames: the ring is of frames 0 and 1, which it has no more
    assert [call.frames for call in plan.next_frame()] == [(0, 2, 3), (1, 2, 3), (4,)]
    plan.rewind(0)
    assert [call.frames for call in plan.next_frame()] == [(4,)]
    plan.rewind(1)
    assert plan.slots == [0, 1, -1] and plan.window is None
