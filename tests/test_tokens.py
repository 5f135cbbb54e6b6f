"""Token order, positions and masks."""

import pytest
import torch

from diffusers_far.attention import attention_mask
from diffusers_far.tokens import (
    patchify,
    per_stream,
    per_token,
    split_frames,
    token_coordinates,
    unpatchify,
)
from tests.tiny_models import noise


def test_values_of_frames_and_tokens() -> None:
    streams = [noise(2, 2, 4, 5), noise(2, 3, 16, 5)]
    assert per_token(torch.arange(5), streams).tolist() == [0] * 4 + [1] * 4 + [2] * 16 + [3] * 16 + [4] * 16
    values = noise(2, 5, 5)
    long, short = per_stream(values, streams)
    assert torch.equal(long, values[:, :2, None]) and torch.equal(short, values[:, 2:, None])
    assert torch.equal(per_stream(values, streams[:1])[0], values[:, :, None])


@pytest.mark.parametrize(
    ("num_frames", "window", "split"), [(5, None, (0, 5)), (3, 4, (0, 3)), (7, 4, (3, 4))]
)
def test_split_frames(num_frames: int, window: int | None, split: tuple[int, int]) -> None:
    assert split_frames(num_frames, window) == split


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patchify_and_back(patch: int) -> None:
    frames = noise(2, 3, 5, 8, 12)
    tokens = patchify(frames, patch)
    assert tokens.shape == (2, 3, 8 * 12 // patch**2, 5 * patch**2)
    assert torch.equal(unpatchify(tokens, patch, 8, 12), frames)
    # Token (frame 1, row 1, column 2), features in the order (C, p, p).
    token = tokens[0, 1, 12 // patch + 2]
    corner = frames[0, 1, :, patch : 2 * patch, 2 * patch : 3 * patch]
    assert torch.equal(token, corner.flatten())


def test_coordinates() -> None:
    fine = token_coordinates(torch.tensor([7.5]), 2, 3)
    assert fine.tolist() == [[7.5, row, column] for row in range(2) for column in range(3)]
    coarse = token_coordinates(torch.tensor([0, 3]), 2, 1, stride=4)
    assert coarse.tolist() == [[0, 0, 0], [0, 4, 0], [3, 0, 0], [3, 4, 0]]


@pytest.mark.parametrize("slope", [0.0, 0.5])
@pytest.mark.parametrize("context", [None, [0, 0, 1, 4, 4, 5]])
def test_mask(slope: float, context: list[int] | None) -> None:
    """Of earlier frames the cached version where there is one: here of frames 4 and 5, which are copies."""
    queries = [2, 3, 3, 4, 5, 5]
    cached = None if context is None else torch.tensor(context)
    mask = attention_mask(torch.tensor(queries), cached, slope, torch.float32, one_frame=False)
    keys = [(key, True) for key in context or []] + [(key, False) for key in queries]
    assert mask.shape == (1, 1, len(queries), len(keys))
    for row, query in zip(mask[0, 0].tolist(), queries, strict=True):
        for value, (key, is_cached) in zip(row, keys, strict=True):
            copied = key in (context or [])
            seen = key < query if is_cached else key == query or (key < query and not copied)
            if slope == 0:
                assert value is seen
            else:
                assert value == (-slope * (query - key) if seen else float("-inf"))


def test_mask_of_one_frame_has_one_row() -> None:
    positions, cached = torch.full((4,), 3), torch.tensor([0, 1])
    mask = attention_mask(positions, cached, 0.5, torch.float32, one_frame=True)
    assert mask.tolist() == [[[[-1.5, -1.0, 0.0, 0.0, 0.0, 0.0]]]]
