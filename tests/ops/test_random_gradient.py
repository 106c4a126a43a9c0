"""random_gradient: the published Philox, the reference's integers, the right distributions."""

import math

import native_math
import numpy as np
import pytest
import torch
from torch import Tensor

from fastscore import ops
from fastscore.ops import reference

# Random123's known answers for philox4x32-10: counter, key, words.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]
SEEDS = (0, 1, -1, 2**63 - 1, -2**63, 0x123456789ABCDEF)
PROBES = (0, 1, 2**32 - 1)
IDS = torch.tensor([0, 1, 2, -1, 2**32 - 1, 2**32, 2**63 - 1, -2**63, 1234567890123])


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_published_vectors(counter, key, words):
    assert native_math.philox(counter, key) == words
    assert [int(x) for x in reference.philox(tuple(torch.tensor(c) for c in counter), (key[0], key[1]))] == words


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("probe", PROBES)
def test_words_are_the_reference_s(seed, probe):
    expected = reference.random_words(IDS, 203, seed, probe)
    for row, sample_id in zip(expected, IDS.tolist(), strict=True):
        assert np.array_equal(native_math.random_words(sample_id, 203, seed, probe), row.numpy())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("classes", [0, 1, 2, 3, 10, 63, 64, 65, 1000])
def test_values_are_the_reference_s(classes, probe, seed):
    """A normal within 1e-6 needs the upper 24 bits of its words right, a sign the top one."""
    for normalize in (False, True):
        signs = ops.random_gradient(IDS, classes, seed, probe, "rademacher", normalize)
        assert torch.equal(signs, reference.random_gradient(IDS, classes, seed, probe, "rademacher", normalize))
        normal = ops.random_gradient(IDS, classes, seed, probe, "normal", normalize)
        assert normal.dtype == torch.float32
        expected = reference.random_gradient(IDS, classes, seed, probe, "normal", normalize)
        error = (normal - expected).abs() / expected.abs().clamp(min=1)
        assert not error.numel() or error.max() <= 1e-6


def test_box_muller_over_every_uniform():
    words = np.arange(2**24, dtype=np.uint32) << 8
    radius, cosine, sine = native_math.box_muller(words)
    uniform = (np.arange(2**24) + 0.5) / 2**24
    exact = np.sqrt(-2 * np.log(uniform))
    assert (np.abs(radius - exact) <= 3e-7 * np.maximum(exact, 1)).all()
    assert (np.abs(radius - exact) <= 1e-5 * exact).all()  # the smallest as well
    angle = 2 * math.pi * uniform
    assert np.abs(cosine - np.cos(angle)).max() <= 1.5e-7
    assert np.abs(sine - np.sin(angle)).max() <= 1.5e-7


def test_a_value_depends_on_seed_sample_probe_and_class_alone():
    ids = torch.arange(100)
    whole = ops.random_gradient(ids, 50, seed=3, probe=2)
    assert torch.equal(whole[17:18], ops.random_gradient(ids[17:18], 50, seed=3, probe=2))
    assert torch.equal(whole[::7], ops.random_gradient(ids[::7], 50, seed=3, probe=2))  # a strided view of ids
    raw = ops.random_gradient(ids, 50, seed=3, normalize=False)
    assert torch.equal(raw[:, :21], ops.random_gradient(ids, 21, seed=3, normalize=False))
    for other in (ops.random_gradient(ids, 50, 4, 2), ops.random_gradient(ids, 50, 3, 1),
                  ops.random_gradient(ids + 100, 50, 3, 2)):
        assert (other == whole).float().mean() < 1e-3


def test_threads_change_no_bit():
    ids, before = torch.arange(300), torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outputs.append(ops.random_gradient(ids, 1001, seed=5))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outputs)


def correlation(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1])


def test_moments_of_normals():
    x = ops.random_gradient(torch.arange(2000), 1000, seed=11, normalize=False).double()
    count = x.numel()  # standard errors of the moments of N(0, 1): √(1/n), √(2/n), √(15/n), √(96/n)
    assert abs(x.mean()) < 5 * math.sqrt(1 / count)
    assert abs(x.square().mean() - 1) < 5 * math.sqrt(2 / count)
    assert abs(x.pow(3).mean()) < 5 * math.sqrt(15 / count)
    assert abs(x.pow(4).mean() - 3) < 5 * math.sqrt(96 / count)
    for shifted in (x[1:], x[:-1]), (x[:, 1:], x[:, :-1]), (x[:, 2:], x[:, :-2]):
        assert abs(correlation(*shifted)) < 5 / math.sqrt(count)
    assert abs(correlation(x, ops.random_gradient(torch.arange(2000), 1000, 11, 1, normalize=False).double())) < 0.004


def test_moments_of_signs():
    x = ops.random_gradient(torch.arange(1000), 1000, seed=12, distribution="rademacher", normalize=False)
    assert torch.equal(x.abs(), torch.ones_like(x))
    assert abs(x.mean()) < 5 / 1000


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
@pytest.mark.parametrize("classes", [1, 7, 10, 1000])
def test_normalized_length_is_one(classes, distribution):
    x = ops.random_gradient(torch.arange(64), classes, 0, 0, distribution)
    torch.testing.assert_close(x.double().norm(dim=1), torch.ones(64, dtype=torch.float64), rtol=0, atol=2e-7)
