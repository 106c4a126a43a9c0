"""Random output gradients against the moments they have in closed form."""

import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastscore
from fastscore import ops
from fastscore.ops import reference
from fastscore.scoring import gradients
from fastscore.scoring.gradients import DISTRIBUTIONS, random_gradient

SAMPLES, CLASSES = 20_000, 6
DRAWN = [name for name in DISTRIBUTIONS if name != "basis"]


def probes(count: int, classes: int, distribution: str, normalize: bool = True, center: bool = False,
           samples: int = SAMPLES, seed: int = 0) -> Tensor:
    """The first `count` probes of samples 0, 1, ..., float64 [P, N, K]."""
    output, ids = torch.zeros(samples, classes, dtype=torch.float64), torch.arange(samples)
    return torch.stack([random_gradient(output, ids, seed, probe, distribution, normalize, center)
                        for probe in range(count)])


def projection(classes: int, center: bool) -> Tensor:
    """Onto what is left of the outputs, float64 [K, K]."""
    return torch.eye(classes, dtype=torch.float64) - (1 / classes if center else 0)


def direction(classes: int) -> Tensor:
    """A vector u [K] of length 1, with parts along and across (1, ..., 1)."""
    u = torch.linspace(-0.5, 1, classes, dtype=torch.float64).square()
    return u / u.norm()


def agrees(values: Tensor, expected: Tensor | float) -> None:
    """The mean over dim 0 is the expected one, to within 5 of its standard errors and float32's rounding."""
    error = (values.mean(0) - expected).abs()
    assert (error <= 5 * values.std(0) / math.sqrt(len(values)) + 1e-7).all(), error


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("distribution", DRAWN)
def test_first_and_second_moments(distribution: str, normalize: bool, center: bool) -> None:
    """E[v] = 0 and E[v vᵀ] is the projection, over its dimension where v has length 1."""
    left = CLASSES - center
    scale = 1 / left if normalize else 1.0
    if distribution == "rademacher" and normalize and center:
        scale *= 1 - 2 ** (1 - CLASSES)  # of signs all alike nothing is left
    for v in probes(left + 2, CLASSES, distribution, normalize, center):
        agrees(v, 0)
        agrees(v[:, :, None] * v[:, None, :], scale * projection(CLASSES, center))


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("distribution", DRAWN)
def test_normalised_ones_have_length_1_and_centred_ones_sum_0(distribution: str, center: bool) -> None:
    v = probes(1, 10, distribution, True, center)[0]
    signs = reference.random_gradient(torch.arange(SAMPLES), 10, 0, 0, "rademacher", False)
    lost = (signs == signs[:, :1]).all(1) if center and distribution == "rademacher" else torch.zeros(SAMPLES).bool()
    torch.testing.assert_close(v.norm(dim=1), (~lost).double(), rtol=0, atol=1e-6)
    if center:
        for normalize in (False, True):
            assert probes(3, 10, distribution, normalize, center).sum(2).abs().max() < 1e-12


# Variance of the mean over P probes of (v·u)², in the D dimensions that are left.
# For v of length 1, independent: (v·u)²/‖u‖² is Beta(1/2, (D - 1)/2), so 2 (D - 1) / (D² (D + 2) P) ‖u‖⁴.
# P < D of them orthogonal: Σ (v·u)²/‖u‖² is Beta(P/2, (D - P)/2), so (D - P)/(D - 1) of that. A full set adds no
# variance: for P beyond D only the r = P mod D of the last set do.
# With the lengths of normal draws, which are independent of the directions, E[l²] = D, E[l⁴] = D (D + 2), and
# E[(q·u)² (q'·u)²] = 1 / (D (D + 2)): 2 (D + 3 - P) / (P (D + 2)) ‖u‖⁴ instead of 2/P ‖u‖⁴.

def variance(distribution: str, normalize: bool, d: int, p: int) -> float:
    """Of a vector u of length 1."""
    if distribution == "normal":
        return 2 * (d - 1) / (d * d * (d + 2) * p) if normalize else 2 / p
    if normalize:
        r = p % d
        return 2 * r * (d - r) / (d * d * (d + 2) * p * p)
    assert p <= d
    return 2 * (d + 3 - p) / (p * (d + 2))


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("distribution", ["normal", "orthogonal"])
def test_variance_of_the_mean_over_probes(distribution: str, normalize: bool, center: bool) -> None:
    u, left = direction(CLASSES), CLASSES - center
    square = float(u @ projection(CLASSES, center) @ u)
    products = (probes(left + 3, CLASSES, distribution, normalize, center) @ u).square() / square
    for count in range(1, left + 4):
        if count > left and not normalize:
            break
        mean = products[:count].mean(0)
        expected = variance(distribution, normalize, left, count)
        agrees(mean, 1 / left if normalize else 1)
        agrees((mean - mean.mean()).square(), expected)
        if distribution == "orthogonal" and count > 1:
            assert expected < variance("normal", normalize, left, count)


def test_variance_of_signs() -> None:
    """Var (v·u)² = 2 (‖u‖⁴ - Σ u⁴) for v of signs: every square of a coordinate is known."""
    u = direction(CLASSES)
    for normalize, scale in ((False, 1), (True, CLASSES ** -2)):
        square = (probes(1, CLASSES, "rademacher", normalize)[0] @ u).square()
        agrees((square - square.mean()).square(), 2 * scale * (1 - float(u.pow(4).sum())))


@pytest.mark.parametrize("center", [False, True])
def test_the_mean_over_a_full_set_is_exact(center: bool) -> None:
    u = torch.randn(50, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = (u @ projection(12, center)).square().sum(1)
    left = 12 - center
    orthogonal = probes(2 * left, 12, "orthogonal", True, center, samples=50)
    for first in (0, left):
        products = (orthogonal[first:first + left] * u).sum(2).square()
        torch.testing.assert_close(products.mean(0), exact / left, rtol=1e-9, atol=0)
    for normalize, scale in ((True, 1 / 12), (False, 1)):
        products = (probes(12, 12, "basis", normalize, center, samples=50) * u).sum(2).square()
        torch.testing.assert_close(products.mean(0), scale * exact, rtol=1e-12, atol=0)


def gram_schmidt(samples: int, classes: int, seed: int, first: int, last: int, center: bool) -> tuple[Tensor, Tensor]:
    """(q [N, K], length [N]) of probe `last` of a set that starts at `first`, one vector at a time."""
    found = []
    for n in range(samples):
        known = [torch.full((classes,), classes ** -0.5, dtype=torch.float64)] if center else []
        for probe in range(first, last + 1):
            draw = ops.random_gradient(torch.tensor([n]), classes, seed, probe, "normal", False)[0].double()
            length = (draw - draw.mean()).norm() if center else draw.norm()
            for _ in range(2):
                for earlier in known:
                    draw = draw - (draw @ earlier) * earlier
            known.append(draw / draw.norm())
        found.append((known[-1], length))
    return torch.stack([q for q, _ in found]), torch.stack([length for _, length in found])


@given(samples=st.integers(0, 3), classes=st.integers(1, 9), probe=st.integers(0, 20), center=st.booleans(),
       seed=st.integers(-2**63, 2**63 - 1))
def test_orthogonal_is_gram_and_schmidts(samples: int, classes: int, probe: int, center: bool, seed: int) -> None:
    classes += center
    first = probe - probe % (classes - center)
    v = probes(probe + 1, classes, "orthogonal", True, center, samples, seed)
    gram = torch.einsum("ank,bnk->nab", v[first:], v[first:])
    torch.testing.assert_close(gram, torch.eye(len(v) - first, dtype=torch.float64).expand_as(gram), rtol=0, atol=1e-6)
    if samples:
        q, length = gram_schmidt(samples, classes, seed, first, probe, center)
        torch.testing.assert_close(v[probe], q, rtol=0, atol=1e-6)
        scaled = probes(probe + 1, classes, "orthogonal", False, center, samples, seed)[probe]
        torch.testing.assert_close(scaled, q * length[:, None], rtol=0, atol=1e-5)


@given(samples=st.integers(1, 8), classes=st.integers(2, 40), probe=st.integers(0, 12), center=st.booleans(),
       normalize=st.booleans(), distribution=st.sampled_from(DISTRIBUTIONS), shuffle=st.randoms())
def test_a_row_is_its_samples_own(samples: int, classes: int, probe: int, center: bool, normalize: bool,
                                  distribution: str, shuffle: random.Random) -> None:
    """Whatever the batch, its order, the shape and the dtype of the output."""
    probe = min(probe, classes - 1) if distribution == "basis" else probe
    ids = torch.arange(samples) * 7919 - 3
    whole = random_gradient(torch.zeros(samples, classes, dtype=torch.float64), ids, 5, probe, distribution, normalize,
                            center)
    order = list(range(samples))
    shuffle.shuffle(order)
    for rows in (order, order[:1]):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            output = torch.zeros(len(rows), classes, dtype=dtype)[:, None]
            part = random_gradient(output, ids[rows], 5, probe, distribution, normalize, center)
            assert (part.shape, part.dtype) == (output.shape, dtype)
            tolerance = {torch.float64: 1e-9, torch.float32: 1e-6}.get(dtype, 2e-2)
            torch.testing.assert_close(part[:, 0].double(), whole[rows], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("distribution", "normalize"), [("normal", True), ("normal", False), ("rademacher", True)])
def test_without_centring_it_is_the_ops(distribution: str, normalize: bool) -> None:
    ids = torch.arange(5)
    found = random_gradient(torch.zeros(5, 3, 4), ids, 9, 2, distribution, normalize)
    torch.testing.assert_close(found.flatten(1), reference.random_gradient(ids, 12, 9, 2, distribution, normalize),
                               rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("shape", "how", "message"), [
    ((4, 3), {"distribution": "cauchy"}, "^distribution: 'cauchy' is none of normal, rademacher, orthogonal, basis"),
    ((4, 3), {"distribution": "basis", "probe": 3}, "^probe: 3, but a basis of 3 outputs"),
    ((4, 3), {"distribution": "basis", "probe": -1}, "^probe: -1, but a basis"),
    ((4, 3), {"distribution": "orthogonal", "probe": -1}, "^probe is -3"),
    ((4,), {"center": True}, "^center: .* single value .* center=False"),
    ((4, 1), {"center": True, "distribution": "orthogonal"}, "^center: .* single value"),
    ((4, 0), {"distribution": "orthogonal"}, "holds no value"),
    ((3, 3), {}, "^output: it has 3 rows for 4 samples")])
def test_what_it_cannot_draw(shape: tuple[int, ...], how: dict[str, object], message: str) -> None:
    arguments = {"probe": 0, "distribution": "normal", "normalize": True, "center": False, **how}
    with pytest.raises(ValueError, match=message):
        random_gradient(torch.zeros(shape), torch.arange(4), 0, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("last", [nn.Softmax(1), nn.LogSoftmax(1),
                                  nn.Sequential(nn.Softmax(1), nn.Unflatten(1, (4, 1)))])
def test_cross_entropy_of_probabilities_is_that_of_their_logits(last: nn.Module) -> None:
    torch.manual_seed(0)
    body, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)).double(), torch.randn(6, 5).double()
    labels = torch.randint(4, (6,))
    how: dict[str, Any] = {"gradient": "loss", "normalize": False, "progress": False}
    want = fastscore.score(body, [(x, labels)], **how)["0"]
    labels = labels[:, None] if isinstance(last, nn.Sequential) else labels
    scores = fastscore.score(nn.Sequential(*body, last), [(x, labels)], **how)["0"]
    torch.testing.assert_close(scores, want)
    own = fastscore.score(nn.Sequential(*body, last), [(x, labels)], **how,
                          loss=lambda output, batch: F.cross_entropy(output, batch[1]))["0"]
    assert isinstance(last, nn.LogSoftmax) or not torch.allclose(own, want, rtol=0.01)  # a loss that is given stands


def test_of_a_probability_that_ends_at_zero_there_is_a_gradient_for_the_others() -> None:
    output, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]), torch.tensor([1, 1, 0])
    value, gradient = gradients.loss_and_gradient(output, (None, labels), None, False)
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("last", [nn.Sigmoid(), nn.Sequential(nn.Sigmoid(), nn.Flatten())])
def test_cross_entropy_of_what_a_sigmoid_made_is_refused(last: nn.Module) -> None:
    model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4), last), torch.randn(6, 5)
    labels = torch.randint(2, (6, 4)).float()
    with pytest.raises(ValueError, match=r"^loss: the model ends in a sigmoid.* give loss=lambda output, batch"):
        fastscore.score(model, [(x, labels)], gradient="loss", progress=False)
    assert "0" in fastscore.score(model, [(x, labels)], gradient="loss", progress=False,
                                  loss=lambda output, batch: F.binary_cross_entropy(output, batch[1]))
