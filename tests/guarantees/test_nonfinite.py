"""Numbers that networks make when things go wrong: in the ops, in the scores, and over very many samples."""

import warnings

import numpy as np
import pytest
import torch
from networks import NETWORKS
from oracles import gated
from torch import Tensor, nn

import fastscore
from fastscore import Scorer, ops
from fastscore.graph.groups import ChannelGraph, ChannelGroup, Member
from fastscore.ops import reference
from fastscore.scoring.scores import Origin
from fastscore.scoring.totals import Totals

PLAIN = NETWORKS["plain"]
UNIT = 2.0**-24  # of rounding in float32
CHAIN = 260  # terms that a kernel adds one after the other: see tests/ops/samples.py


def sums_of(a: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    return *ops.channel_sums(a, g), *ops.channel_powers(a, g)


def bounded(a: Tensor, g: Tensor) -> None:
    """Every sum is within the bound on rounding of the float64 one."""
    wide_a, wide_g = a.double(), g.double()
    exact = (*reference.channel_sums(wide_a, wide_g), *reference.channel_powers(wide_a, wide_g))
    size = (*reference.channel_sums(wide_a.abs(), wide_g.abs()), *reference.channel_powers(wide_a, wide_g))
    for got, want, largest in zip(sums_of(a, g), exact, size, strict=True):
        # below the normal range float32 rounds to a fixed step
        assert ((got.double() - want).abs() <= CHAIN * (UNIT * largest + 2.0**-149)).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_sums_of_float16_go_far_beyond_its_range(layout):
    a = torch.full((2, 5, 9, 11), 6e4, dtype=torch.float16).to(memory_format=layout)
    g = (torch.arange(a.numel()).reshape(a.shape) % 7 * 1e4).half().to(memory_format=layout)
    bounded(a, g)
    assert ops.channel_dot(a, g).max() > 1e11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_cancellation_leaves_what_is_small(dtype, layout):
    """Products of 2¹⁰ that cancel in pairs, and one of 1: bfloat16 sums would lose it."""
    a = torch.full((2, 4, 20, 20), 32.0)
    a[:, :, ::2] *= -1
    g = torch.full_like(a, 32.0)
    a[:, :, 5, 7], g[:, :, 5, 7] = 1, 1
    a[:, :, 6, 7] = 0
    a, g = (x.to(dtype).to(memory_format=layout) for x in (a, g))
    assert torch.equal(ops.channel_dot(a, g), torch.ones(2, 4))
    assert ops.channel_sums(a, g)[1].tolist() == [[1.0] * 4] * 2


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-42), (torch.bfloat16, 1e-39), (torch.float16, 1e-7),
                                              (torch.float64, 1e-310)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_denormals_count(dtype, scale, layout):
    a = (torch.arange(1, 2 * 3 * 5 * 7 + 1).reshape(2, 3, 5, 7).double() * scale).to(dtype)
    a = a.to(memory_format=layout)
    assert (a.abs() < torch.finfo(dtype).smallest_normal).any()
    ones = torch.ones_like(a)
    assert (ops.channel_sums(a, ones)[1] > 0).all()
    bounded(a, ones)


def test_denormals_may_be_flushed():
    """With torch.set_flush_denormal they may count as zero, and nothing else changes."""
    a = torch.tensor([1.0, 2.0, 6e-8, -3.0], dtype=torch.float16).expand(3, 5, 4)
    assert torch.set_flush_denormal(True)
    try:
        total = ops.channel_dot(a, torch.ones_like(a))
    finally:
        torch.set_flush_denormal(False)
    assert (total.abs() < 1e-6).all()


@pytest.mark.parametrize(("shape", "channel_dim"), [((1, 1, 10**7), 1), ((1, 10**7, 1), 2), ((2, 1, 3), 1),
                                                    ((3, 1), 1)])
def test_one_channel_of_many_positions(shape, channel_dim):
    generator = torch.Generator().manual_seed(0)
    a, g = (torch.randn(shape, generator=generator).abs() for _ in range(2))
    exact = reference.channel_dot(a.double(), g.double(), channel_dim)
    assert ((ops.channel_dot(a, g, channel_dim).double() - exact).abs() <= CHAIN * UNIT * exact).all()


@pytest.mark.parametrize("shape", [(3, 4, 0), (3, 4, 0, 5), (0, 4, 5), (3, 0, 5)])
def test_nothing_sums_to_zero(shape):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for total in sums_of(torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)):
            assert torch.equal(total, torch.zeros(shape[:2], dtype=total.dtype))


def test_a_gradient_of_length_zero_counts_and_is_reported(tmp_path):
    model, x = PLAIN.model(), PLAIN.inputs(4)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=torch.float64)
    batches = list(zip(x.split(2), weights.split(2), strict=True))
    scores = fastscore.score(model, batches, gradient="loss", progress=False,
                             loss=lambda output, batch: (output.square().sum(1) * batch[1]).sum())
    scorer = Scorer(model, x)
    with scorer:
        for part, weight in batches:
            (model(part).square().sum(1) * weight).sum().backward()
    model.zero_grad()
    group = PLAIN.groups["0"]
    gate, z = gated(model, group, x)
    v = 2 * z.detach() * weights[:, None]
    s = torch.autograd.grad(z, gate, v / v.norm(dim=1, keepdim=True).clamp(min=1e-300))[0]
    for found in (scores, scorer.scores()):
        assert (found.samples, found.passes, found.zero_gradients) == (4, 4, 2)
        torch.testing.assert_close(found["0"].double(), s.square().mean(0), rtol=1e-6, atol=0)
        assert "2 output gradients were zero throughout" in str(found)
        assert found.merge(found).zero_gradients == 4
        found.save(tmp_path / "s.safetensors")
        assert fastscore.Scores.load(tmp_path / "s.safetensors").zero_gradients == 2
    again = Scorer(model, x)
    again.load_state_dict(scorer.state_dict())
    assert again.scores().zero_gradients == 2


def test_no_gradient_of_length_zero_is_not_worth_a_word():
    scores = fastscore.score(PLAIN.model(), [PLAIN.inputs(2)], progress=False)
    assert scores.zero_gradients == 0
    assert "zero throughout" not in str(scores)


@pytest.mark.parametrize("gradient", ["random", "loss"])
def test_batches_without_samples_change_nothing(gradient):
    model, x = PLAIN.model(), PLAIN.inputs(4)
    labels = torch.arange(4)
    full = [(x[:3], labels[:3]), (x[3:], labels[3:])]
    empty = (x[:0], labels[:0])
    want = fastscore.score(model, full, gradient=gradient, progress=False)
    got = fastscore.score(model, [empty, full[0], empty, full[1], empty], gradient=gradient, progress=False)
    assert got.samples == 4
    assert all(torch.equal(got[layer], want[layer]) for layer in want)
    with pytest.raises(ValueError, match="none that holds a sample"):
        fastscore.score(model, [empty], gradient=gradient, progress=False)


def test_a_loop_with_a_batch_without_samples():
    model, x = PLAIN.model(), PLAIN.inputs(3)
    scorer = Scorer(model, x)
    with scorer:
        model(x[:0]).sum().backward()
        with pytest.raises(RuntimeError, match="no backward pass has been measured"):
            scorer.scores()
        model(x).square().sum().backward()
    assert scorer.scores().samples == 3


def test_one_sample_one_channel_one_class():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1), nn.Flatten()).double()
    nn.init.constant_(model[0].weight, 1.0)
    nn.init.zeros_(model[0].bias)
    nn.init.constant_(model[2].weight, 0.5)
    x = torch.tensor([[[[3.0]]]], dtype=torch.float64)
    scores = fastscore.score(model, [x], progress=False)
    assert scores["0"].tolist() == [2.25, 2.25]  # (0.5 · 3)², whichever sign the gradient has


def constant_network() -> nn.Sequential:
    """Channel 0 of the first layer is dead, channel 1 the same everywhere, channel 2 an ordinary one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                              nn.Flatten(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[0].bias[:2] = torch.tensor([-1.0, 1.0])
    return model


@pytest.mark.parametrize("layerwise", ["none", "l2", "mean"])
@pytest.mark.parametrize("importance", ["taylor", "taylor-abs", "taylor-sq", "molchanov-group"])
def test_dead_and_constant_channels(importance, layerwise):
    model, x = constant_network(), PLAIN.inputs(6)
    zero = fastscore.score(model, [x], importance=importance, layerwise=layerwise, progress=False)["0"]
    assert zero[0] == 0
    assert zero.isfinite().all()
    if importance == "taylor-sq":
        mean = fastscore.score(model, [x], ablation="mean", layerwise=layerwise, progress=False)["0"]
        assert zero[1] > 0
        assert (mean[:2] <= 1e-12 * mean[2]).all()  # the mean of a constant channel replaces it


def test_a_layer_whose_channels_are_all_dead():
    model = constant_network()
    nn.init.zeros_(model[0].weight)
    nn.init.constant_(model[0].bias, -1.0)
    for layerwise in ("none", "l2", "mean"):
        scores = fastscore.score(model, [PLAIN.inputs(2)], layerwise=layerwise, progress=False)
        assert torch.equal(scores["0"], torch.zeros(3))
        result = fastscore.prune(model, scores, PLAIN.inputs(1), channels=5 / 7)
        assert result.report.channels == (7, 5)
        assert len(result.removed["0"]) == 2


def test_importances_beyond_float32_are_an_error():
    model = constant_network()
    with torch.no_grad():
        model[0].weight[2] *= 1e30
    with pytest.raises(FloatingPointError, match=r"0: its importances are beyond float32.*taylor-abs"):
        fastscore.score(model, [PLAIN.inputs(2)], progress=False)
    assert fastscore.score(model, [PLAIN.inputs(2)], importance="taylor-abs", progress=False)["0"].isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
def test_models_in_16_bits(dtype, tolerance):
    """Activations near the end of float16's range; the same weights and inputs in float64 are the oracle."""
    model, x = constant_network().to(dtype), (PLAIN.inputs(8) * 8000).to(dtype)
    wide = constant_network().to(dtype).double()
    options = {"importance": "taylor-abs", "gradient": "loss", "normalize": False, "progress": False,
               "loss": lambda output, batch: output.sum()}
    got = fastscore.score(model, [x], **options)
    want = fastscore.score(wide, [x.double()], **options)
    for layer in want:
        assert ((got[layer] - want[layer]).abs() <= tolerance * want[layer].max()).all()


MANY = 10**8


def totals_of_one_channel() -> Totals:
    index = torch.arange(1)
    group = ChannelGroup("0", 1, index, (Member("0", "producer", index, index), Member("1", "consumer", index, index)))
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1))
    return Totals(model, ChannelGraph((group,), {}, {}), Origin("taylor", "sum", "random", True, 0, "normal", ""))


def whole_numbers(count: int) -> np.ndarray:
    """int64 numbers of 24 bits, as sums in float32 are, times 1 to 2¹⁵: an int64 holds the exact sum of 10⁷."""
    rng = np.random.default_rng(0)
    return rng.integers(2**23, 2**24, count) << rng.integers(0, 16, count)


def test_a_hundred_million_samples_are_added_within_the_bound():
    """Totals are float64, and n terms have an error of at most n · 2⁻⁵³ · Σ |s|: 1.2e-8 of it for 10⁸."""
    totals, batch = totals_of_one_channel(), 10**6
    terms = whole_numbers(batch)
    s = torch.zeros(3, batch, 1)
    s[0, :, 0] = torch.from_numpy(terms).float()
    for _ in range(MANY // batch):
        totals.add([("1", s)], batch)
    assert totals.samples == MANY
    exact = int(terms.sum()) * (MANY // batch)
    assert exact > 2**60  # so that float64 has to round
    error = abs(int(totals.state_dict()["totals"]["0"].sum()) - exact) / exact
    assert error <= 1e-14  # 1.9e-15: batches are added up on their own first
    assert totals.scores()["0"].item() == pytest.approx(exact / MANY, rel=2.0**-24)


def test_a_hundred_million_batches_of_one_are_added_within_the_bound():
    """The worst order: one float64 addition after another, as batches of one sample make them."""
    block = 10**7
    whole = whole_numbers(block)
    terms = np.empty(block + 1)
    terms[1:] = whole
    total = 0.0
    for _ in range(MANY // block):
        terms[0] = total
        total = float(np.add.accumulate(terms)[-1])
    exact = int(whole.sum()) * (MANY // block)
    error = abs(int(total) - exact) / exact
    assert error <= 1e-11  # 2.3e-13: rounding goes up and down


def test_adding_a_sample_at_a_time_is_one_addition_in_float64():
    """What the simulation above stands on: `Totals.add` of a batch of one adds its s to the running total once."""
    totals = totals_of_one_channel()
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    want = [0.0, 0.0]
    for n, value in enumerate(values.tolist()):
        totals.add([("1", torch.tensor([value, 0.0, 0.0]).reshape(3, 1, 1))], 1)
        want[n % 2] += value
    assert totals.state_dict()["totals"]["0"].flatten().tolist() == want


def test_nan_in_the_first_sample_leaves_no_word_about_the_next_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)).eval()
    good = torch.randn(4, 3, 6, 6)
    bad = good.clone()
    bad[0, 0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError):
        fastscore.score(model, [bad], progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastscore.score(model, [good], progress=False)
