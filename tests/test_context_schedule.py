"""ContextSchedule: which frames the next one sees."""

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
        ({"max_short_frames": 4, "num_sink_frames": 1}, 9, None, (), (0, 7, 8)),
        ({"max_short_frames": 4, "num_sink_frames": 3}, 9, None, (), (0, 1, 2)),
        ({}, 0, 4, (), ()),
        ({}, 3, 4, (), (0, 1, 2)),
        ({}, 6, 4, (0, 1, 2), (3, 4, 5)),
        ({}, 2, 1, (0, 1), ()),
        ({"max_short_frames": 2}, 6, 4, (0, 1, 2, 3, 4), (5,)),
        ({"max_short_frames": 9}, 6, 4, (0, 1, 2), (3, 4, 5)),
        ({"max_long_frames": 2}, 8, 4, (3, 4), (5, 6, 7)),
        ({"max_long_frames": 0}, 8, 4, (), (5, 6, 7)),
        ({"max_long_frames": 0, "num_sink_frames": 2}, 8, 4, (), (5, 6, 7)),
        ({"max_long_frames": 3, "num_sink_frames": 1}, 9, 4, (0, 4, 5), (6, 7, 8)),
        ({"max_long_frames": 3, "max_short_frames": 2, "num_sink_frames": 1}, 9, 4, (0, 6, 7), (8,)),
    ],
)
def test_context(
    bounds: dict[str, int], num_frames: int, window: int | None, long: tuple[int, ...], short: tuple[int, ...]
) -> None:
    assert ContextSchedule(**bounds).context(num_frames, window) == (long, short)


@pytest.mark.parametrize("window", [None, 4])
def test_a_frame_once_dropped_never_comes_back(window: int | None) -> None:
    schedule = ContextSchedule(max_short_frames=3, max_long_frames=5, num_sink_frames=2)
    gone: set[int] = set()
    for num_frames in range(40):
        context = schedule.context(num_frames, window)
        seen = {*context.long, *context.short}
        assert len(seen) == len(context.long) + len(context.short) <= 7
        assert not seen & gone and seen <= set(range(num_frames))
        gone |= set(range(num_frames)) - seen


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"max_short_frames": 0}, "max_short_frames=0"),
        ({"max_long_frames": -1}, "max_long_frames=-1"),
        ({"num_sink_frames": -1}, "num_sink_frames=-1"),
        ({"refresh_interval": 0}, "refresh_interval=0"),
        ({"max_short_frames": 2, "num_sink_frames": 2}, "num_sink_frames=2.*max_short_frames=2"),
        ({"max_long_frames": 3, "num_sink_frames": 4}, "num_sink_frames=4.*max_long_frames=3"),
    ],
)
def test_bad_bounds(bounds: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContextSchedule(**bounds)
