"""random_gradient in Triton: the reference's integers to the bit, its normals to float32 rounding.

Of each distribution every other width, and seeds and probes in pairs; FASTSCORE_NIGHTLY=1 takes all.
"""

import math

import pytest
import torch
import triton
import triton.language as tl
import triton_traffic
from guards import output, untouched
from thinned import NIGHTLY, thinned
from torch import Tensor

from fastscore.ops import reference
from fastscore.ops.triton import random_gradient as kernels
from fastscore.ops.triton.launch import RandomLaunch, plan_random_gradient

CPU = torch.device("cpu")
IDS = torch.tensor([0, 1, 2, 77, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40 + 3, 2**63 - 1, -1, -(2**63)])
SEEDS = (0, 1, -1, 2**31, 2**32 - 1, 2**50 + 12345, 2**63 - 1, -(2**63))
PROBES = (0, 1, 2**31, 2**32 - 1)


@triton.jit(do_not_specialize=["seed", "probe"])
def words_kernel(ids, out, first, seed: tl.int64, probe: tl.int64, QUADS: tl.constexpr):
    """ids [N] -> the random words, int64 out [N, 4 QUADS]"""
    n = tl.program_id(0)
    w0, w1, w2, w3 = kernels.random_words(ids + n, first.to(tl.int64) + tl.arange(0, QUADS), seed, probe)
    k = tl.arange(0, 4 * QUADS)
    tl.store(out + n * 4 * QUADS + k, kernels.interleave(w0, w1, w2, w3).to(tl.int64))


@triton.jit
def normals_kernel(words, radius, cosine, sine, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    word = tl.load(words + i).to(tl.uint32)
    tl.store(radius + i, kernels.box_muller_radius(word))
    c, s = kernels.box_muller_angle(word)
    tl.store(cosine + i, c)
    tl.store(sine + i, s)


def test_words_are_those_of_the_reference():
    for seed, probe in thinned(SEEDS, PROBES):
        out = torch.full((len(IDS), 16), -1)
        words_kernel[(len(IDS),)](IDS, out, 0, seed, probe, QUADS=4)
        assert torch.equal(out, reference.random_words(IDS, 16, seed, probe))


@pytest.mark.parametrize(("counter", "key", "words"), [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])
def test_published_vectors(counter, key, words):
    """Random123's known answers for philox4x32-10."""
    def signed(low: int, high: int) -> int:
        return (high << 32 | low) - (high >> 31 << 64)

    out = torch.empty(1, 4, dtype=torch.int64)
    words_kernel[(1,)](torch.tensor([signed(*counter[2:])]), out, counter[0], signed(*key), counter[1], QUADS=1)
    assert out[0].tolist() == list(words)


def test_normals_of_every_kind_of_word():
    """Both ends, every power of two, both sides of each switch between formulas, and words at random."""
    edges = [word + step << 8 for power in range(24) for word in (2**power, 2**24 - 2**power) for step in (-1, 0, 1)]
    switches = [int(2**24 * x) + step << 8 for x in (math.sqrt(0.5), 1 / 8, 3 / 8, 5 / 8, 7 / 8) for step in (-1, 0, 1)]
    special = [word for word in (0, 2**32 - 1, *edges, *switches) if 0 <= word < 2**32]
    rest = torch.randint(2**32, (2048 - len(special),), generator=torch.Generator().manual_seed(0))
    words = torch.cat([torch.tensor(special), rest])
    radius, cosine, sine = torch.full((3, 2048), torch.nan)
    normals_kernel[(1,)](words, radius, cosine, sine, BLOCK=2048)

    uniform = ((words >> 8).double() + 0.5) / 2**24
    want = (-2 * uniform.log()).sqrt()
    assert ((radius - want).abs() <= 3e-7 * want).all()
    for got, exact in ((cosine, (2 * math.pi * uniform).cos()), (sine, (2 * math.pi * uniform).sin())):
        assert ((got - exact).abs() <= 2e-7 * exact.abs().clamp(min=2e-7)).all()


def generate(sample_ids: Tensor, classes: int, seed: int, probe: int, normal: bool, normalize: bool) -> Tensor:
    out, buffer = output(len(sample_ids) * classes, torch.float32)
    plan = plan_random_gradient(len(sample_ids), classes)
    launch = kernels.launch(plan, CPU, sample_ids.stride(0), normal, normalize)
    launch((sample_ids, out.view(len(sample_ids), classes)), (seed, probe))
    assert untouched(buffer)
    return out.view(len(sample_ids), classes)


# One class to two programs' worth, full and ragged; then so many programs that their lengths take two loads.
WIDTHS = sorted({4 * 2**power + step for power in range(11) for step in (-3, -1, 0, 1) if step < 1 or power == 10})


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "as drawn"])
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_every_kind_of_launch(distribution, normalize, poisoned_memory):
    first, step = (0, 1) if NIGHTLY else (int(normalize), 2)
    for i, classes in list(enumerate(WIDTHS))[first::step]:
        seed, probe, ids = SEEDS[i % len(SEEDS)], PROBES[i % len(PROBES)], IDS[i % 10:i % 10 + 2]
        got = generate(ids, classes, seed, probe, distribution == "normal", normalize)
        want = reference.random_gradient(ids, classes, seed, probe, distribution, normalize)
        torch.testing.assert_close(got, want, rtol=0 if distribution == "rademacher" else 1e-6, atol=0)
    assert {plan_random_gradient(1, classes).quads for classes in WIDTHS} == {2**power for power in range(11)}


if NIGHTLY:  # 260 programs take ten seconds; those of normalize_gradient, which are shorter, are tried each time
    def test_a_gradient_of_more_programs_than_one_load_of_lengths():
        """Programs of eight classes stand for those of 4096."""
        plan, out = RandomLaunch(samples=1, classes=1037, quads=2, splits=130), torch.empty(1, 1037)
        kernels.launch(plan, CPU, 1, True, True)((IDS[:1], out), (3, 0))
        torch.testing.assert_close(out, reference.random_gradient(IDS[:1], 1037, 3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("classes", [1, 1000, 4096, 9001])
def test_bytes_of_the_model(classes, loads):
    generate(IDS[:3], classes, 0, 0, True, True)
    plan = plan_random_gradient(3, classes)
    moved = triton_traffic.random_gradient(plan, partials=plan.splits > 1)
    written = 4 * plan.grid[0] if plan.splits > 1 else 0
    assert loads.bytes == moved.inputs + moved.partials - written
    assert moved.outputs == 3 * classes * 4


def test_strided_ids():
    ids = torch.arange(10)[::3]
    torch.testing.assert_close(kernels.random_gradient(ids, 8, 1), reference.random_gradient(ids, 8, 1), rtol=1e-6,
                               atol=0)


@pytest.mark.parametrize(("samples", "classes"), [(0, 5), (3, 0)])
def test_empty(samples, classes):
    assert kernels.random_gradient(torch.arange(samples), classes, 0).shape == (samples, classes)
