"""Each criterion against a formula of its own, and the random gradient against what it estimates."""

import math

import oracles
import pytest
import torch
from networks import NETWORKS, Network
from torch import Tensor, nn

import fastscore
from fastscore import Scores
from fastscore.scoring.criteria import NAMES, gradient_importance

ALL = list(NETWORKS)


def scored(network: Network, model: nn.Module, x: Tensor, **options: object) -> Scores:
    return fastscore.score(model, [x], progress=False, **options)


def close(scores: Scores, exact: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert set(scores) == set(exact)
    for layer, values in exact.items():
        assert (scores[layer].double() - values).abs().max() <= tolerance * values.abs().max(), layer


def squares(output: Tensor, batch: Tensor) -> Tensor:
    return output.square().sum()


@pytest.mark.parametrize(("importance", "power", "normalize"), [
    ("taylor", 0, True), ("taylor-abs", 1, False), ("taylor-sq", 2, True), ("taylor-sq", 2, False)])
@pytest.mark.parametrize("name", ALL)
def test_sum_over_positions_first(name: str, importance: str, power: int, normalize: bool) -> None:
    network = NETWORKS[name]
    model, x = network.traced(), network.inputs(5)
    v = 2 * model(x).detach()
    if normalize:
        v = v / v.flatten(1).norm(dim=1).reshape(-1, *[1] * (v.dim() - 1))
    exact = {}
    for group, spec in network.groups.items():
        s = oracles.sums(model, spec, x, v)
        exact[group] = s.mean(0).abs() if power == 0 else s.abs().pow(power).mean(0)
    close(scored(network, model, x, importance=importance, gradient="loss", loss=squares, normalize=normalize), exact)


@pytest.mark.parametrize(("importance", "normalize"), [("taylor-abs", True), ("taylor-sq", True), ("taylor-sq", False)])
@pytest.mark.parametrize("name", ["residual", "dense", "flattening", "gated", "shared", "tokens"])
def test_element_by_element(name: str, importance: str, normalize: bool) -> None:
    network = NETWORKS[name]
    model, x = network.traced(), network.inputs(5)
    v = 2 * model(x).detach()
    if normalize:
        v = v / v.norm(dim=1, keepdim=True)
    exact = {}
    for group, spec in network.groups.items():
        total = torch.zeros(spec.channels, dtype=torch.float64)
        for products, positions in oracles.elements(model, spec, x, v):
            values = products.abs() if importance == "taylor-abs" else products.square()
            for c, places in enumerate(positions):
                total[c] += values[places].sum()
        exact[group] = oracles.tied(spec, total) / len(x)
    close(scored(network, model, x, importance=importance, gradient="loss", loss=squares, normalize=normalize,
                 reduction="element"), exact)


def filters(layer: nn.Module) -> Tensor:
    """The weights that make each output channel, [C, everything]."""
    if isinstance(layer, nn.ConvTranspose2d):
        return layer.weight.transpose(0, 1).flatten(1)  # networks.py has no grouped one
    return layer.weight.flatten(1)


def depthwise(name: str, group: str) -> tuple[str, ...]:
    return ("depthwise.0",) if (name, group) == ("mobile", "expand.0") else ()


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("name", ALL)
def test_magnitude(name: str, power: int) -> None:
    network = NETWORKS[name]
    model, x = network.traced(), network.inputs()
    exact = {group: oracles.tied(spec, sum(filters(model.get_submodule(layer)).abs().pow(power).sum(1) for layer in
                                           (*spec.producers, *depthwise(name, group)))).pow(1 / power).detach()
             for group, spec in network.groups.items()}
    close(scored(network, model, x, importance=f"magnitude-l{power}"), exact)


def test_bn_scale() -> None:
    network = NETWORKS["residual"]
    model, x = network.traced(), network.inputs()
    model.stem[1].weight.data[2] = -7.0
    norms = {"stem.0": ["stem.1", "block1.bn2"], "block1.conv1": ["block1.bn1"], "block2.conv1": ["block2.bn1"],
             "block2.conv2": ["block2.bn2", "block2.shortcut.1"]}
    close(scored(network, model, x, importance="bn-scale"),
          {group: torch.stack([model.get_submodule(norm).weight.detach().abs() for norm in names]).mean(0)
           for group, names in norms.items()})


def test_bn_scale_names_the_layers_it_says_nothing_about() -> None:
    network = NETWORKS["plain"]
    scores = scored(network, network.traced(), network.inputs(), importance="bn-scale")
    assert list(scores) == ["3"]
    with pytest.raises(KeyError, match="0 has no score: bn-scale says nothing"):
        scores["0"]
    with pytest.raises(ValueError, match="importance: bn-scale says nothing about any layer"):
        scored(network, NETWORKS["flattening"].traced(), network.inputs(), importance="bn-scale")


def test_random_is_uniform_and_depends_on_seed_and_layer_alone() -> None:
    network = NETWORKS["residual"]
    one = scored(network, network.traced(0), network.inputs(), importance="random", seed=1)
    same = scored(network, network.model(5), network.inputs(3, seed=9), importance="random", seed=1)
    other = scored(network, network.traced(0), network.inputs(), importance="random", seed=2)
    for layer in one:
        assert torch.equal(one[layer], same[layer])
        assert not torch.equal(one[layer], other[layer])
        assert one[layer].min() >= 0
        assert one[layer].max() < 1
    assert len({tuple(one[layer][:5].tolist()) for layer in one}) == len(one)


# What the random gradient estimates. u_n = ∂z_n/∂gate; expectation and variance of each term, exactly.

def moments(u: Tensor, importance: str, distribution: str, normalize: bool) -> tuple[Tensor, Tensor]:
    """(expectation, variance) [N, C] of a single sample's share, from u [N, C, K]."""
    square, k = u.square().sum(2), u.shape[2]
    if importance == "taylor-abs":  # |N(0, ‖u‖²)|
        return math.sqrt(2 / math.pi) * square.sqrt(), (1 - 2 / math.pi) * square
    if normalize:  # uniform on the sphere: (v·u)² / ‖u‖² is Beta(1/2, (K - 1)/2)
        return square / k, 2 * (k - 1) / (k * k * (k + 2)) * square.square()
    if distribution == "rademacher":
        return square, 2 * (square.square() - u.pow(4).sum(2))
    return square, 2 * square.square()


@pytest.mark.parametrize(("importance", "distribution", "normalize"), [
    ("taylor-sq", "normal", False), ("taylor-sq", "normal", True), ("taylor-sq", "rademacher", False),
    ("taylor-abs", "normal", False)])
def test_random_gradients_converge_to_the_change_of_the_output(importance: str, distribution: str, normalize: bool
                                                               ) -> None:
    """The error in units of its exact standard deviation, which falls as 1/√probes, has mean square 1."""
    network = NETWORKS["flattening"]
    model, x = network.traced(), network.inputs(6)
    changes = {group: oracles.output_changes(model, spec, x) for group, spec in network.groups.items()}
    for probes, seeds in ((2, 24), (16, 12), (256, 3)):
        squares = []
        for seed in range(seeds):
            scores = scored(network, model, x, importance=importance, normalize=normalize, probes=probes, seed=seed,
                            distribution=distribution)
            for group, u in changes.items():
                mean, variance = moments(u, importance, distribution, normalize)
                deviation = variance.sum(0).div(probes).sqrt() / len(x)
                assert torch.equal(scores[group] == 0, deviation == 0)  # a dead ReLU
                alive = deviation > 0
                squares.append(((scores[group].double() - mean.mean(0)) / deviation)[alive].square())
        error = float(torch.cat(squares).mean())
        print(f"{importance} {distribution} {probes} probes: mean square error {error:.2f} of its expectation")
        assert 0.3 < error < 2.5


def test_the_signed_score_of_a_random_gradient_is_noise_around_zero() -> None:
    network = NETWORKS["flattening"]
    model, x = network.traced(), network.inputs(6)
    few, many = (scored(network, model, x, importance="taylor", normalize=False, probes=p) for p in (4, 1024))
    assert sum(float(many[layer].sum()) for layer in many) < sum(float(few[layer].sum()) for layer in few) / 6


def test_twins_have_twin_scores() -> None:
    """Two channels with equal filters and equal readers are equally important; a channel no one reads is not at all."""
    network = NETWORKS["plain"]
    model, x = network.traced(), network.inputs()
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = model[0].weight[0], model[0].bias[0]
        model[3].weight[:, 1] = model[3].weight[:, 0]
        model[3].weight[:, 2] = 0
    for importance in ("taylor", "taylor-abs", "taylor-sq"):
        scores = scored(network, model, x, importance=importance)["0"]
        torch.testing.assert_close(scores[0], scores[1])
        assert scores[2] == 0
        assert scores[3] > 0


@pytest.mark.parametrize(("importance", "reduction", "message"), [
    ("tailor", "sum", "^importance: 'tailor' is none of taylor, "),
    ("taylor", "element", "^reduction, ablation: 'taylor' has no"),
    ("taylor-sq", "mean", "^reduction: 'mean' is neither"),
    ("magnitude-l2", "element", "^importance: 'magnitude-l2' reads weights")])
def test_what_is_not_in_the_table(importance: str, reduction: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gradient_importance(importance, reduction)
    network = NETWORKS["plain"]
    with pytest.raises(ValueError, match=message):
        scored(network, network.traced(), network.inputs(), importance=importance, reduction=reduction)


def test_every_name_runs() -> None:
    network = NETWORKS["residual"]
    model, x = network.traced(dtype=torch.float32), network.inputs().float()
    for name in NAMES:
        scores = scored(network, model, x, importance=name)
        assert set(scores) == set(network.groups)
        for layer, spec in network.groups.items():
            assert scores[layer].shape == (spec.channels,)
            assert scores[layer].dtype == torch.float32
            assert scores[layer].isfinite().all()
