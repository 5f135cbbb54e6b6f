"""Token order, positions and masks."""

import pytest
import torch

from diffusers_far.frame_layout import (
    FrameLayout,
    attention_mask,
    patchify,
    split_frames,
    token_coordinates,
    unpatchify,
)
from tests.tiny_models import noise


def test_counts() -> None:
    layout = FrameLayout(2, 3, 4, 16)
    assert (layout.num_frames, layout.num_long_tokens, layout.num_tokens) == (5, 8, 56)
    assert layout.per_token(torch.arange(5)).tolist() == [0] * 4 + [1] * 4 + [2] * 16 + [3] * 16 + [4] * 16


@pytest.mark.parametrize(
    ("num_frames", "window", "split"), [(5, None, (0, 5)), (3, 4, (0, 3)), (7, 4, (3, 4))]
)
def test_split_frames(num_frames: int, window: int | None, split: tuple[int, int]) -> None:
    assert split_frames(num_frames, window) == split


@pytest.mark.parametrize(("num_long", "num_short"), [(2, 3), (0, 3), (2, 0), (0, 0)])
def test_modulate_is_per_token(num_long: int, num_short: int) -> None:
    layout = FrameLayout(num_long, num_short, 2, 4)
    tokens, scale = noise(2, layout.num_tokens, 5), noise(2, layout.num_frames, 5, seed=1)
    index = layout.per_token(torch.arange(layout.num_frames))
    assert torch.equal(layout.modulate(torch.mul, tokens, scale), tokens * scale[:, index])


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patchify_and_back(patch: int) -> None:
    frames = noise(2, 3, 5, 8, 12)
    tokens = patchify(frames, patch)
    assert tokens.shape == (2, 3 * 8 * 12 // patch**2, 5 * patch**2)
    assert torch.equal(unpatchify(tokens, patch, 8, 12), frames)
    # Token (frame 1, row 1, column 2), features in the order (C, p, p).
    token = tokens[0, 96 // patch**2 + 12 // patch + 2]
    corner = frames[0, 1, :, patch : 2 * patch, 2 * patch : 3 * patch]
    assert torch.equal(token, corner.flatten())


def test_coordinates() -> None:
    fine = token_coordinates(torch.tensor([7.5]), 2, 3)
    assert fine.tolist() == [[7.5, row, column] for row in range(2) for column in range(3)]
    coarse = token_coordinates(torch.tensor([0, 3]), 2, 1, stride=4)
    assert coarse.tolist() == [[0, 0, 0], [0, 4, 0], [3, 0, 0], [3, 4, 0]]


@pytest.mark.parametrize("slope", [0.0, 0.5])
@pytest.mark.parametrize("context", [None, [0, 0, 4, 1]])
def test_mask(slope: float, context: list[int] | None) -> None:
    layout, positions = FrameLayout(1, 2, 1, 2), torch.tensor([2, 3, 5])
    cached = None if context is None else torch.tensor(context)
    mask = attention_mask(layout, positions, cached, slope, torch.float32)
    queries = [2, 3, 3, 5, 5]
    keys = (context or []) + queries
    assert mask.shape == (1, 1, len(queries), len(keys))
    for row, query in zip(mask[0, 0].tolist(), queries, strict=True):
        for value, key in zip(row, keys, strict=True):
            if slope == 0:
                assert value is (key <= query)
            else:
                assert value == (-slope * (query - key) if key <= query else float("-inf"))


def test_mask_of_one_frame_has_one_row() -> None:
    layout, cached = FrameLayout(0, 1, 1, 4), torch.tensor([0, 1])
    mask = attention_mask(layout, torch.tensor([3]), cached, 0.5, torch.float32)
    assert mask.tolist() == [[[[-1.5, -1.0, 0.0, 0.0, 0.0, 0.0]]]]
