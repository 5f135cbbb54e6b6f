"""FARCache: what its verbs keep, forget and refuse, and what it costs."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from diffusers_far import FARCache
from diffusers_far.kv_cache import Slot
from tests.tiny_models import GRID, TOLERANCE, latents, long_transformer, relative_error, transformer

LAYERS, BATCH, HEADS, HEAD_DIM = 2, 3, 2, 4


def make_cache(short_tokens: int = 4, long_tokens: int = 2, block_tokens: int = 16) -> FARCache:
    return FARCache(
        LAYERS,
        BATCH,
        HEADS,
        HEAD_DIM,
        short_tokens,
        long_tokens,
        dtype=torch.float32,
        block_tokens=block_tokens,
    )


def write(cache: FARCache, long: list[int], short: list[int]) -> None:
    """What a forward over these frames does: each token's key is its frame, its value minus that."""
    sizes = [(frame, cache.long_tokens) for frame in long] + [(frame, cache.short_tokens) for frame in short]
    marks = torch.cat([torch.full((size,), float(frame)) for frame, size in sizes])
    key = marks[None, :, None, None].expand(BATCH, -1, HEADS, HEAD_DIM)
    cache.begin(len(long), len(short))
    for layer in cache.layers:
        layer.extend(key, -key)


def add(cache: FARCache, long: tuple[int, ...] = (), short: tuple[int, ...] = ()) -> None:
    write(cache, list(long), list(short))
    cache.commit(slots(long, short))


def slots(long: Iterable[int] = (), short: Iterable[int] = ()) -> list[Slot]:
    """Frames at their own places in time."""
    return [Slot(frame, True, frame) for frame in long] + [Slot(frame, False, frame) for frame in short]


def assert_holds(cache: FARCache, long: set[int], short: set[int]) -> None:
    """Bookkeeping and buffers of all layers agree, and hold these frames."""
    assert (set(cache.long_frames), set(cache.short_frames)) == (long, short)
    assert cache.num_frames == len(long) + len(short)
    assert cache.num_tokens == len(long) * cache.long_tokens + len(short) * cache.short_tokens
    positions = cache.key_positions(torch.device("cpu"))
    assert positions.shape == (cache.num_tokens,)
    for layer in cache.layers:
        assert layer.num_tokens == cache.num_tokens
        expected = positions.float()[None, :, None, None].expand(BATCH, -1, HEADS, HEAD_DIM)
        assert torch.equal(layer.keys[:, : layer.num_tokens], expected)
        assert torch.equal(layer.values[:, : layer.num_tokens], -expected)


def test_a_new_cache_is_empty() -> None:
    cache = make_cache()
    assert_holds(cache, set(), set())
    assert cache.next_position == 0
    assert {layer.keys.shape[1] for layer in cache.layers} == {cache.block_tokens}


def test_commit_keeps_both_levels() -> None:
    cache = make_cache()
    add(cache, long=(0, 1), short=(2,))
    add(cache, short=(3, 4))
    assert_holds(cache, {0, 1}, {2, 3, 4})
    assert cache.next_position == 5
    assert (
        cache.key_positions(torch.device("cpu")).tolist() == [0] * 2 + [1] * 2 + [2] * 4 + [3] * 4 + [4] * 4
    )


def test_scratch_is_not_context() -> None:
    cache = make_cache()
    add(cache, short=(0,))
    write(cache, [], [7, 8])
    assert_holds(cache, set(), {0})
    add(cache, short=(1,))  # overwrites the scratch
    assert_holds(cache, set(), {0, 1})


def test_extend_returns_context_and_new_tokens() -> None:
    cache = make_cache()
    add(cache, short=(5,))
    cache.begin(1, 0)
    new = torch.ones(BATCH, 2, HEADS, HEAD_DIM)
    keys, values = cache.layers[1].extend(new, 2 * new)
    assert keys[0, :, 0, 0].tolist() == [5, 5, 5, 5, 1, 1]
    assert values[0, :, 0, 0].tolist() == [-5, -5, -5, -5, 2, 2]


def test_levels_may_come_in_any_order() -> None:
    cache = make_cache()
    add(cache, long=(0,), short=(1, 2))
    add(cache, long=(3,), short=(4,))
    assert_holds(cache, {0, 3}, {1, 2, 4})
    cache.clear_short()
    assert_holds(cache, {0, 3}, set())


@pytest.mark.parametrize("gone", [{3}, {4}, {6}, {0}, {1}, {0, 5}, {1, 3, 6}, {0, 1, 3, 4, 5, 6}])
def test_reconcile_forgets_what_is_not_wanted(gone: set[int]) -> None:
    cache = make_cache()
    add(cache, long=(0, 1), short=(3, 4, 5, 6))
    wanted = slots({0, 1} - gone, {3, 4, 5, 6} - gone)
    assert cache.reconcile(wanted) == []
    assert_holds(cache, {0, 1} - gone, {3, 4, 5, 6} - gone)


def test_reconcile_tells_what_is_missing() -> None:
    """Also a frame that is held at another level, or at another place in time."""
    cache = make_cache()
    add(cache, long=(0, 1), short=(2, 3))
    wanted = [Slot(0, True, 4), Slot(1, True, 1), Slot(2, True, 2), Slot(3, False, 3), Slot(5, False, 5)]
    assert cache.reconcile(wanted) == [wanted[0], wanted[2], wanted[4]]
    assert_holds(cache, {1}, {3})


@pytest.mark.parametrize(
    ("held", "committed"),
    [
        (([], [4]), ([], [4, 5])),
        (([4], []), ([], [4])),
        (([], [4]), ([4], [])),
        (([4, 5], [6]), ([4], [6])),
        (([], []), ([], [4])),
        (([], [1]), ([], [1])),
    ],
)
def test_commit_takes_what_the_forward_held(
    held: tuple[list[int], list[int]], committed: tuple[list[int], list[int]]
) -> None:
    cache = make_cache()
    add(cache, long=(0,), short=(1,))
    if held != ([], []):
        write(cache, *held)
    with pytest.raises(ValueError, match=r"first frames of the last forward|in the cache already"):
        cache.commit(slots(*committed))
    assert_holds(cache, {0}, {1})


def test_commit_takes_the_first_frames_once() -> None:
    cache = make_cache()
    write(cache, [0, 1], [2, 3])
    cache.commit(slots([0, 1], [2]))
    assert_holds(cache, {0, 1}, {2})
    with pytest.raises(ValueError, match="held 0 long-term and 0 short-term"):
        cache.commit(slots([], [3]))


def test_a_copy_shares_nothing() -> None:
    cache = make_cache()
    add(cache, long=(0,), short=(1,))
    copy = cache.copy()
    add(copy, short=(2, 3))
    cache.reconcile(slots([0]))
    assert_holds(copy, {0}, {1, 2, 3})
    assert_holds(cache, {0}, set())


def test_state() -> None:
    cache = make_cache()
    add(cache, long=(0, 3), short=(1, 2))
    cache.reconcile(slots([3], [1, 2]))
    other = make_cache(block_tokens=4)
    add(other, short=(7,))
    other.load_state_dict(cache.state_dict())
    assert_holds(other, {3}, {1, 2})
    with pytest.raises(ValueError, match=r"keys \[2, 3, 10, 2, 4\] of 3 frames"):
        make_cache(short_tokens=3).load_state_dict(cache.state_dict())


@pytest.mark.parametrize("long_tokens", [2, 4, 7])
def test_many_drops_and_appends_stay_consistent(long_tokens: int) -> None:
    """Long-term frames of fewer, as many and more tokens than short-term ones."""
    cache, generator = make_cache(long_tokens=long_tokens), torch.Generator().manual_seed(0)
    kept: dict[str, set[int]] = {"long": set(), "short": set()}
    for frame in range(100):
        for level in ("long", "short"):
            if len(kept[level]) == 3:
                leaving = sorted(kept[level])[int(torch.randint(3, (), generator=generator))]
                kept[level].remove(leaving)
                cache.reconcile(slots(kept["long"], kept["short"]))
        level = ("long", "short")[int(torch.randint(2, (), generator=generator))]
        add(cache, **{level: (frame,)})
        kept[level].add(frame)
        assert_holds(cache, kept["long"], kept["short"])
    assert cache.layers[0].keys.shape[1] <= 2 * 3 * (4 + long_tokens)  # holds what is kept, not what was


def test_reset_and_clear_keep_the_buffers() -> None:
    cache = make_cache()
    add(cache, long=(0, 1), short=(2,))
    num_bytes, buffer = cache.num_bytes, cache.layers[0].keys
    cache.clear_short()
    assert_holds(cache, {0, 1}, set())
    cache.reset()
    assert_holds(cache, set(), set())
    assert cache.next_position == 0
    add(cache, long=(0,))
    assert_holds(cache, {0}, set())
    assert cache.num_bytes == num_bytes and cache.layers[0].keys is buffer


def test_buffers_grow_in_blocks_and_keep_the_context() -> None:
    cache, sizes = make_cache(block_tokens=16), []
    for frame in range(13):
        add(cache, short=(frame,))
        assert_holds(cache, set(), set(range(frame + 1)))
        sizes.append(cache.layers[0].keys.shape[1])
    assert sizes == [16] * 3 + [32] * 4 + [48] * 4 + [64] * 2  # never full
    assert cache.num_bytes == LAYERS * 2 * BATCH * 64 * HEADS * HEAD_DIM * 4


def test_a_lone_level_may_be_empty() -> None:
    cache = make_cache(long_tokens=0)
    add(cache, short=(0, 1))
    cache.reconcile([])
    assert_holds(cache, set(), set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_per_long_frame(dtype: torch.dtype) -> None:
    """What a frame of long-term memory costs: keys and values of its few tokens, in each layer."""
    model = long_transformer().to(dtype)
    cache = model.create_cache(1, GRID, GRID)
    long_tokens, short_tokens = model.tokens_per_frame(GRID, GRID)
    assert (long_tokens, short_tokens) == (4, 64)
    num_frames = cache.block_tokens // long_tokens - 1  # one more would need the next block
    video = latents(1, num_frames).to(dtype)
    with torch.no_grad():
        model(video, torch.full((1, num_frames), -1.0), cache=cache, num_long_frames=num_frames)
    cache.commit(slots(range(num_frames)))
    config = model.config
    width = config.num_attention_heads * config.attention_head_dim
    per_frame = 2 * config.num_layers * long_tokens * width * dtype.itemsize
    assert cache.num_bytes == (num_frames + 1) * per_frame


@torch.no_grad()
def next_frame(model: torch.nn.Module, video: Tensor, cache: FARCache | None) -> Tensor:
    timestep = torch.full((2, video.shape[1]), -1.0)
    timestep[:, -1] = 300.0
    if cache is None:
        return model(video, timestep).sample[:, -1:]
    return model(video[:, -1:], timestep[:, -1:], cache=cache).sample


def test_a_forward_does_not_change_the_context() -> None:
    model, video = transformer(), latents(2, 6)
    cache = model.create_cache(2, GRID, GRID)
    with torch.no_grad():
        model(video[:, :5], torch.full((2, 5), -1.0), cache=cache)
    cache.commit(slots(short=range(5)))
    before = [layer.keys[:, : layer.num_tokens].clone() for layer in cache.layers]
    first, second = (next_frame(model, video, cache) for _ in range(2))
    assert torch.equal(first, second)
    assert all(
        torch.equal(layer.keys[:, : layer.num_tokens], kept)
        for layer, kept in zip(cache.layers, before, strict=True)
    )
    assert relative_error(first, next_frame(model, video, None)) <= TOLERANCE


def test_the_order_of_frames_in_a_level_is_free() -> None:
    """Keys carry their position, so dropping may fill a hole with the last frame."""
    model, video = transformer(num_layers=1), latents(2, 6)
    results = []
    for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
        cache = model.create_cache(2, GRID, GRID)
        for frame in order:
            with torch.no_grad():
                model(
                    video[:, frame : frame + 1],
                    torch.full((2, 1), -1.0),
                    cache=cache,
                    frame_positions=torch.tensor([frame]),
                )
            cache.commit(slots(short=[frame]))
        results.append(next_frame(model, video, cache))
    assert relative_error(*results) <= TOLERANCE


def test_cached_frames_one_by_one_or_together_are_the_same() -> None:
    model, video = transformer(), latents(2, 6)
    caches = [model.create_cache(2, GRID, GRID) for _ in range(2)]
    with torch.no_grad():
        for pieces, cache in zip(([1] * 5, [2, 3]), caches, strict=True):
            start = 0
            for size in pieces:
                frames = video[:, start : start + size]
                model(frames, torch.full((2, size), -1.0), cache=cache)
                cache.commit(slots(short=range(start, start + size)))
                start += size
    results = [next_frame(model, video, cache) for cache in caches]
    assert relative_error(*results) <= TOLERANCE
    assert relative_error(results[0], next_frame(model, video, None)) <= TOLERANCE
