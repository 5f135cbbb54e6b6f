"""ContextSchedule: which frames the next one sees."""

from typing import Any

import pytest

from diffusers_far import ContextSchedule


@pytest.mark.parametrize(
    ("bounds", "num_frames", "window", "long", "short"),
    [
        ({}, 0, None, (), ()),
        ({}, 5, None, (), (0, 1, 2, 3, 4)),
        ({"max_short_frames": 3}, 2, None, (), (0, 1)),
        ({"max_short_frames": 3}, 5, None, (), (3, 4)),
        ({"max_short_frames": 1}, 5, None, (), ()),
        ({"max_short_frames": 4, "num_sink_frames": 1}, 3, None, (), (0, 1, 2)),
        ({"max_short_frames": 4, "num_sink_frames": 1}, 9, None, (), (0, 6, 7, 8)),
        ({"max_short_frames": 4, "num_sink_frames": 3}, 5, None, (), (0, 1, 2, 3, 4)),
        ({"max_short_frames": 4, "num_sink_frames": 3}, 9, None, (), (0, 1, 2, 6, 7, 8)),
        ({}, 0, 4, (), ()),
        ({}, 3, 4, (), (0, 1, 2)),
        ({}, 6, 4, (0, 1, 2), (3, 4, 5)),
        ({}, 2, 1, (0, 1), ()),
        ({"max_short_frames": 2}, 6, 4, (0, 1, 2, 3, 4), (5,)),
        ({"max_short_frames": 9}, 6, 4, (0, 1, 2), (3, 4, 5)),
        ({"max_long_frames": 2}, 8, 4, (3, 4), (5, 6, 7)),
        ({"max_long_frames": 0}, 8, 4, (), (5, 6, 7)),
        ({"max_long_frames": 0, "num_sink_frames": 2}, 8, 4, (0, 1), (5, 6, 7)),
        ({"max_long_frames": 3, "num_sink_frames": 1}, 9, 4, (0, 3, 4, 5), (6, 7, 8)),
        ({"max_long_frames": 3, "max_short_frames": 2, "num_sink_frames": 1}, 9, 4, (0, 5, 6, 7), (8,)),
    ],
)
def test_context(
    bounds: dict[str, int], num_frames: int, window: int | None, long: tuple[int, ...], short: tuple[int, ...]
) -> None:
    context = ContextSchedule(**bounds).context(num_frames, window)
    assert (context.long, context.short) == (long, short)
    # No gap in time: what comes right before the newest frames are the sinks.
    kept = len(long) + len(short)
    assert context.positions == tuple(range(num_frames - kept, num_frames))


def test_the_bounds_of_training() -> None:
    base = ContextSchedule().for_model(None, 16)
    assert base == ContextSchedule(max_short_frames=16, max_long_frames=16)
    assert base.context(100) == ((), tuple(range(85, 100)), tuple(range(85, 100)))  # and the new one: 16
    long = ContextSchedule().for_model(8, 48)
    assert (long.max_short_frames, long.max_long_frames) == (None, 40)
    assert len(long.context(100, 8).positions) == 47
    assert len(ContextSchedule(num_sink_frames=4).for_model(8, 48).context(100, 8).positions) == 47
    assert len(ContextSchedule(max_short_frames=4).for_model(8, 48).context(100, 8).positions) == 47
    assert len(ContextSchedule(num_sink_frames=4).for_model(None, 16).context(100).positions) == 15
    assert len(ContextSchedule(num_sink_frames=9).for_model(8, 8).context(100, 8).long) == 9


def test_beyond_training_is_a_choice() -> None:
    schedule = ContextSchedule.unbounded(num_sink_frames=2, refresh_interval=None)
    assert schedule == ContextSchedule(None, None, 2, None)
    for window in (None, 8):
        assert len(schedule.for_model(window, 16).context(1000, window).positions) == 1000
        assert len(ContextSchedule().for_model(window, None).context(1000, window).positions) == 1000
    assert ContextSchedule(max_long_frames=64).for_model(8, 48).max_long_frames == 64


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("num_sinks", [0, 2])
def test_a_frame_once_dropped_never_comes_back(window: int | None, num_sinks: int) -> None:
    schedule = ContextSchedule(max_short_frames=3, max_long_frames=5, num_sink_frames=num_sinks)
    gone: set[int] = set()
    for num_frames in range(40):
        context = schedule.context(num_frames, window)
        seen = {*context.long, *context.short}
        assert len(seen) == len(context.long) + len(context.short) <= 7 + num_sinks
        assert not seen & gone and seen <= set(range(num_frames))
        assert num_frames == 0 or num_frames - 1 in seen  # the newest one is always seen
        gone |= set(range(num_frames)) - seen


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (
            {"max_short_frames": 0},
            "max_short_frames=0 must be an integer of at least 1 or None or 'tr",
        ),
        ({"max_short_frames": 2.0}, r"max_short_frames=2\.0 must be an integer"),
        ({"max_long_frames": -1}, "max_long_frames=-1"),
        ({"max_long_frames": "all"}, "max_long_frames='all'"),
        ({"num_sink_frames": -1}, "num_sink_frames=-1 must be an integer of at least 0$"),
        ({"num_sink_frames": None}, "num_sink_frames=None"),
        ({"refresh_interval": 0}, "refresh_interval=0 must be an integer of at least 1 or None$"),
        ({"refresh_interval": True}, "refresh_interval=True"),
    ],
)
def test_bad_bounds(bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContextSchedule(**bounds)
