"""csrc/cuda/random_gradient.cuh against the reference: the same integers, the same numbers."""

import pytest
import torch
from shim import Shim

from fastscore.ops import reference

# Counter, key and words: the known answers published with Philox (Random123, philox4x32-10).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]
IDS = torch.tensor([0, 1, 2, 77, 2**31, 2**32 + 5, 2**62 + 11, -1, -(2**40), 5, 6, 7])
SEEDS = [0, 1, 2**63 - 1, -(2**63), 0x1234_5678_9ABC_DEF0]


def signed(low: int, high: int) -> int:
    """int64 with the given 32-bit halves."""
    value = high << 32 | low
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_published_words(shim: Shim, counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    ids = torch.tensor([signed(counter[2], counter[3])])
    if counter[0] == 0:
        assert shim.random_words(ids, 1, signed(*key), counter[1]).tolist() == [list(words)]
    assert shim.philox(*counter, *key) == words


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("probe", [0, 1, 2**32 - 1])
def test_the_integers_of_the_reference(shim: Shim, seed: int, probe: int) -> None:
    blocks = 32
    assert torch.equal(shim.random_words(IDS, blocks, seed, probe),
                       reference.random_words(IDS, 4 * blocks, seed, probe))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 10, 17, 100, 1000, 1001, 9000])
def test_the_numbers_of_the_reference(shim: Shim, classes: int, distribution: str, normalize: bool) -> None:
    for seed, probe in ((0, 0), (SEEDS[-1], 3)):
        got = shim.random_gradient(IDS, classes, seed, probe, distribution, normalize)
        expected = reference.random_gradient(IDS, classes, seed, probe, distribution, normalize)
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_ids_of_any_stride_and_number(shim: Shim) -> None:
    ids = torch.arange(900)
    expected = reference.random_gradient(ids[::3], 10, seed=4)
    torch.testing.assert_close(shim.random_gradient(ids[::3], 10, seed=4), expected, rtol=0, atol=1e-6)
    assert shim.random_gradient(ids[:0], 10, seed=4).shape == (0, 10)
    assert shim.random_gradient(ids, 0, seed=4).shape == (900, 0)


def test_a_gradient_does_not_depend_on_its_neighbours(shim: Shim) -> None:
    alone = torch.cat([shim.random_gradient(IDS[n:n + 1], 123, seed=9) for n in range(len(IDS))])
    assert torch.equal(alone, shim.random_gradient(IDS, 123, seed=9))
