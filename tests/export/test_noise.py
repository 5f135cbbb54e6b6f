"""The noise that every language makes alike."""

import numpy as np
import pytest

from diffusers_far.export.noise import seeded_noise, threefry


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # the known answers of Random123
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_known_answers(
    key: tuple[int, int], counter: tuple[int, int], expected: tuple[int, int]
) -> None:
    first, second = threefry(key, (np.array([counter[0]]), np.array([counter[1]])))
    assert (int(first[0]), int(second[0])) == expected


def test_noise_is_standard_normal_and_of_the_seed_and_the_frame() -> None:
    noise = seeded_noise(7, 3, (16, 64, 64))
    assert noise.dtype == np.float32 and noise.shape == (16, 64, 64)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert abs((np.abs(noise) < 1).mean() - 0.6827) < 0.01
    assert np.array_equal(noise, seeded_noise(7, 3, (16, 64, 64)))
    for other in (seeded_noise(8, 3, (16, 64, 64)), seeded_noise(7, 4, (16, 64, 64))):
        assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.02
    assert not np.array_equal(noise, seeded_noise(7 + 2**32, 3, (16, 64, 64)))


def test_an_odd_count_is_the_start_of_an_even_one() -> None:
    assert np.array_equal(seeded_noise(1, 0, (7,)), seeded_noise(1, 0, (8,))[:7])


@pytest.mark.parametrize(("seed", "frame", "name"), [(-1, 0, "seed"), (2**64, 0, "seed"), (0, -1, "frame")])
def test_numbers_out_of_range_are_refused(seed: int, frame: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=.* must be an integer"):
        seeded_noise(seed, frame, (4,))
