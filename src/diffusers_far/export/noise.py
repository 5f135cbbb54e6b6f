"""Noise that every language makes alike: Threefry-2x32 with 20 rounds, and Box-Muller.

A number of the noise depends on nothing but the seed, its frame and its place in the frame, so there is no
state to keep. docs/export.md has the same in words.
"""

from collections.abc import Sequence

import numpy as np

_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA
_WORD = 0xFFFFFFFF


def threefry(key: tuple[int, int], counter: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Threefry-2x32-20 of Random123.

    Args:
        key: two words of 32 bits.
        counter: two arrays of the same shape of uint32.

    Returns:
        Two arrays of uint32 of this shape.
    """
    keys = (*key, key[0] ^ key[1] ^ _PARITY)
    x, y = (np.asarray(word, np.uint32) + np.uint32(part) for word, part in zip(counter, key, strict=True))
    for turn in range(20):
        rotation = _ROTATIONS[turn % 8]
        x = x + y
        y = (y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation))
        y = y ^ x
        if turn % 4 == 3:
            group = turn // 4 + 1
            x = x + np.uint32(keys[group % 3])
            y = y + np.uint32((keys[(group + 1) % 3] + group) & _WORD)
    return x, y


def seeded_noise(seed: int, frame: int, shape: Sequence[int]) -> np.ndarray:
    """Standard normal float32 numbers of `shape`: the noise of a frame of the video of a seed.

    Args:
        seed: 0 to 2**64 - 1.
        frame: its number in the video, 0 to 2**32 - 1, given frames included.
        shape: of the latents of a frame, `[C, h, w]`.

    Raises:
        ValueError: for a seed or frame outside these.
    """
    for name, value, bits in (("seed", seed, 64), ("frame", frame, 32)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < 2**bits:
            raise ValueError(f"{name}={value!r} must be an integer, 0 to 2**{bits} - 1")
    count = int(np.prod(shape))
    blocks = np.arange((count + 1) // 2, dtype=np.uint32)
    key = (int(seed) & _WORD, int(seed) >> 32)
    x, y = threefry(key, (blocks, np.full_like(blocks, frame)))
    radius = np.sqrt(-2 * np.log((x + 0.5) / 2**32))  # in float64, as JavaScript's numbers are
    angle = 2 * np.pi * (y / 2**32)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.reshape(-1)[:count].reshape(tuple(shape)).astype(np.float32)
