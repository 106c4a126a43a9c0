"""Compensation: exact where it can be, the best constant where it cannot."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import NETWORKS, Network
from oracles import untouched
from thinned import thinned
from torch import Tensor, nn

import fastscore
from fastscore.batches.calls import call_model
from fastscore.graph.groups import ChannelGroup, Member
from fastscore.recovery.compensation import constant_sum, mean_contributions, removed_positions

QUICK = settings(max_examples=30, deadline=None)
RESIDUAL = NETWORKS["residual"]
# A constant channel need not give a constant: a transposed convolution with stride repeats a pattern; a layer called
# twice has one bias for two constants.
INCONSTANT = {"unet": {"down"}, "shared": {"left"}, "recurrent": {"stem"}}


def dim_of(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


def rows(value: Tensor, layer: nn.Module, x: Tensor) -> Tensor:
    """[C] along the channels of x."""
    return value if dim_of(layer) == -1 else value.reshape(-1, *[1] * (x.dim() - 2))


def brute_force_means(model: nn.Module, network: Network, x: Tensor) -> dict[str, Tensor]:
    """Consumer -> [C_in], over samples, the positions that it reads and calls."""
    seen: dict[str, list[Tensor]] = {}

    def record(layer: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            (x,) = args
            if getattr(module, "kernel_size", None) == (1, 1):
                x = x[:, :, ::module.stride[0], ::module.stride[1]]
            seen.setdefault(layer, []).append(x.movedim(dim_of(module), 0).flatten(1).mean(1))
        return hook

    layers = {layer for group in network.groups.values() for layer in group.edges}
    handles = [model.get_submodule(layer).register_forward_pre_hook(record(layer)) for layer in layers]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return {layer: torch.stack(means).mean(0) for layer, means in seen.items()}


def rewired(network: Network, model: nn.Module, removed: Mapping[str, Tensor], x: Tensor,
            consume: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Tensor:
    """The output when every consumer computes consume(layer, input with zeros where channels are removed, means there
    and zeros elsewhere), its own forward being what the function calls."""
    means = brute_force_means(model, network, x)
    model = copy.deepcopy(model)
    for name in {layer for group in removed for layer in network.groups[group].edges}:
        places = [p for group, channels in removed.items() for c in channels.tolist()
                  for p in network.groups[group].edges.get(name, [[]] * (c + 1))[c]]
        gone = torch.zeros(len(means[name]), dtype=torch.bool)
        gone[places] = True
        layer = model.get_submodule(name)

        def consumed(x: Tensor, layer: nn.Module = layer, gone: Tensor = gone, mean: Tensor = means[name]) -> Tensor:
            return consume(layer, torch.where(rows(gone, layer, x), 0, x), rows(torch.where(gone, mean, 0), layer, x))

        layer.forward = consumed  # type: ignore[method-assign]
    with torch.no_grad():
        return model(x)


def replaced_by_mean(layer: nn.Module, x: Tensor, mean: Tensor) -> Tensor:
    return type(layer).forward(layer, x + mean)


def best_constant(layer: nn.Module, x: Tensor, mean: Tensor) -> Tensor:
    """What the means add at each place, averaged over places: by linearity it does not depend on x."""
    y, filled = type(layer).forward(layer, x), type(layer).forward(layer, x + mean)
    return y + rows((filled - y).movedim(dim_of(layer), 0).flatten(1).mean(1), layer, y)


def lowest(model: nn.Module, network: Network, x: Tensor,
           gone: Mapping[str, list[int]]) -> tuple[fastscore.Scores, float]:
    """Scores by which `gone` goes first, and its share of all channels, less half a channel."""
    scores = fastscore.score(model, [x], importance="magnitude-l2", progress=False)
    totals = {group: torch.tensor([float(c not in gone.get(group, ())) for c in range(len(total))])
              for group, total in scores.totals.items()}
    share = (sum(map(len, gone.values())) - 0.5) / sum(map(len, totals.values()))
    return replace(scores, totals=totals, means=brute_force_means(model, network, x)), share


def first_units(network: Network, name: str) -> dict[str, list[int]]:
    """The first channel of each group, with whatever goes along, but of INCONSTANT ones."""
    return {group: [c for c in range(data.channels) if (data.units or range(data.channels))[c] == 0]
            for group, data in network.groups.items() if group not in INCONSTANT.get(name, ())}


def constant(model: nn.Module, network: Network, gone: Mapping[str, list[int]]) -> nn.Module:
    """The model with `gone` made of biases and shifts alone, in place; all of these are positive."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.zeros_(module.running_mean)  # type: ignore[arg-type]
                nn.init.constant_(module.bias, 0.5)
        for group, channels in gone.items():
            for producer in network.groups[group].producers:
                layer = model.get_submodule(producer)
                weight = layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
                weight[channels] = 0
                layer.bias = nn.Parameter(weight.new_full((len(weight),), 0.5))
    return model


def padded(model: nn.Module, mode: str) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = mode
    return model


# Against oracles

@pytest.mark.parametrize("name", list(NETWORKS))
@settings(QUICK, max_examples=3)
@given(seed=st.integers(0, 100), fraction=st.floats(0.1, 0.63))
def test_mask_and_surgery_and_the_oracle_agree(name: str, seed: int, fraction: float) -> None:
    network = NETWORKS[name]
    model, x = network.model(seed), network.inputs(5)
    scores = fastscore.score(model, [x], progress=False)
    with untouched(model):
        with torch.no_grad(), fastscore.mask(model, scores, fraction, x, compensate=True) as removed:
            masked = model(x)
        result = fastscore.prune(model, scores, x, channels=1 - fraction, compensate=True)
    assert {group: index.tolist() for group, index in removed.items()} == \
        {group: index.tolist() for group, index in result.removed.items()}
    exact = rewired(network, model, removed, x, best_constant)
    torch.testing.assert_close(masked, exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.model(x), exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "mode"), thinned(list(NETWORKS), ["replicate", "circular"]))
def test_where_nothing_is_padded_with_zeros_it_is_the_mean_in_place_of_the_channel(name: str, mode: str) -> None:
    network = NETWORKS[name]
    model, x = padded(network.model(), mode), network.inputs(5)
    ignore = {"down"} if name == "unet" else ()
    scores = fastscore.score(model, [x], progress=False)
    result = fastscore.prune(model, scores, x, channels=0.6, compensate=True, ignore=ignore)
    exact = rewired(network, model, result.removed, x, replaced_by_mean)
    torch.testing.assert_close(result.model(x), exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in NETWORKS if first_units(NETWORKS[name], name)])
def test_constant_channels_are_not_missed(name: str) -> None:
    network = NETWORKS[name]
    gone = first_units(network, name)
    model, x = padded(constant(network.model(), network, gone), "replicate"), network.inputs(5)
    scores, share = lowest(model, network, x, gone)
    result, plain = (fastscore.prune(model, scores, x, channels=1 - share, compensate=compensate)
                     for compensate in (True, False))
    assert {group: index.tolist() for group, index in result.removed.items()} == gone
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-10, atol=1e-12)
    assert (plain.model(x) - model(x)).abs().max() > 1e-4


@pytest.mark.parametrize(("name", "group"), [(name, group) for name, network in NETWORKS.items()
                                             for group in first_units(network, name)])
def test_zero_padding_is_made_up_for_on_average(name: str, group: str) -> None:
    network = NETWORKS[name]
    gone = {group: first_units(network, name)[group]}
    model, x = constant(network.model(), network, gone), network.inputs(5)
    scores, share = lowest(model, network, x, gone)
    calls: list[tuple[nn.Module, Tensor]] = []

    def outputs() -> Tensor:
        """[N, C_out] of the first consumer that runs, averaged over positions."""
        calls.clear()
        handles = [model.get_submodule(layer).register_forward_hook(
            lambda module, args, output: calls.append((module, output))) for layer in network.groups[group].edges]
        with torch.no_grad():
            model(x)
        for handle in handles:
            handle.remove()
        layer, output = calls[0]
        return output.movedim(dim_of(layer), 1).flatten(2).mean(2) if output.dim() > 2 else output

    dense = outputs()
    with fastscore.mask(model, scores, share, x, compensate=True) as removed:
        masked = outputs()
    assert {group: index.tolist() for group, index in removed.items()} == gone
    torch.testing.assert_close(masked, dense, rtol=1e-12, atol=1e-12)
    with fastscore.mask(model, scores, share, x, compensate=False):
        assert (outputs() - dense).abs().max() > 1e-4


def circular(inputs: int, outputs: int, size: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding="same", padding_mode="circular", **options)


@pytest.mark.parametrize("share", [0.8, 0.5, 0.35])
@pytest.mark.parametrize("build", [
    lambda: nn.Sequential(circular(3, 8, 3), nn.BatchNorm2d(8), circular(8, 12, 5, groups=4, bias=False),
                          circular(12, 12, 3, groups=12), circular(12, 7, 3, dilation=2, bias=False), circular(7, 6, 1),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 7), nn.Linear(7, 5)),
    lambda: nn.Sequential(nn.Conv2d(3, 7, 3, stride=2), nn.BatchNorm2d(7), nn.AvgPool2d(2), nn.Flatten(),
                          nn.Linear(28, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 7), nn.Linear(7, 5))])
def test_a_linear_network_keeps_its_mean_output_over_the_data_set(build: Callable[[], nn.Module], share: float) -> None:
    """Where each position of a channel reaches the output alike, or has a mean of its own as the input of a Linear."""
    torch.manual_seed(0)
    model, x = build().double().eval(), torch.randn(24, 3, 10, 10, dtype=torch.float64) + 1
    with torch.no_grad():
        nn.init.uniform_(model[1].bias)
        scores = fastscore.score(model, x.split(5), progress=False)
        dense = model(x).mean(0)
        results = [fastscore.prune(model, scores, x[:2], channels=share, compensate=compensate)
                   for compensate in (True, False)]
        compensated, plain = (result.model(x).mean(0) for result in results)
    torch.testing.assert_close(compensated, dense, rtol=1e-11, atol=1e-12)
    assert (plain - dense).abs().max() > 1e-3


def test_scores_of_weights_compensate_with_the_means_that_others_lend() -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(5)
    measured = fastscore.score(model, [x], progress=False)
    weights = fastscore.score(model, [x], importance="magnitude-l2", progress=False)
    result = fastscore.prune(model, replace(weights, means=measured.means), x, channels=0.6, compensate=True)
    assert result.removed.keys() <= set(weights)
    torch.testing.assert_close(result.model(x), rewired(RESIDUAL, model, result.removed, x, best_constant),
                               rtol=1e-10, atol=1e-12)


# What a layer makes of the means

@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A convolution of any kind, and an input."""
    dims, groups, transposed = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3])), draw(st.booleans())
    kernel, stride, padding = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 2))
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": draw(st.integers(1, 2)),
                               "groups": groups, "bias": draw(st.booleans())}
    if transposed:
        options["output_padding"] = draw(st.integers(0, stride - 1))
    else:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "replicate", "circular"]))
    make = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    size = [draw(st.integers(5, 8)) for _ in range(dims)]
    return make(2 * groups, 3 * groups, kernel, **options), torch.randn(2, 2 * groups, *size)


@settings(QUICK, max_examples=120)
@given(convolutions(), st.integers(0, 2**31))
def test_any_convolution(case: tuple[nn.Module, Tensor], seed: int) -> None:
    """The average over positions of what the means add to the output; the layer is linear."""
    layer, x = case
    torch.manual_seed(seed)
    mean = torch.randn(x.shape[1], dtype=torch.float64)
    with torch.no_grad():
        try:
            layer(x)
        except RuntimeError:  # a padding wider than its mode can fill, or an output of no positions
            assume(False)
        (found,) = mean_contributions(nn.Sequential(layer), {"0": mean}, x, call_model).values()
        exact, x = copy.deepcopy(layer).double(), x.double()
        expected = (exact(x + rows(mean, layer, x)) - exact(x)).movedim(1, 0).flatten(1).mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("padding", [(2, 0), "same", "valid"])
def test_each_dimension_has_its_own_kernel(padding: Any) -> None:
    stride = 1 if padding == "same" else (2, 3)
    layer = nn.Conv2d(4, 6, (3, 2), stride, padding, dilation=(2, 1), groups=2).double()
    x, mean = torch.randn(2, 4, 9, 11, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    (found,) = mean_contributions(nn.Sequential(layer), {"0": mean}, x, call_model).values()
    expected = (layer(x + mean[:, None, None]) - layer(x)).detach().mean((0, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert (constant_sum(layer, mean, x.shape[1:]) is None) == isinstance(padding, str)


@pytest.mark.parametrize("shape", [(4, 6), (2, 5, 6), (2, 3, 5, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer(shape: tuple[int, ...], bias: bool) -> None:
    layer, mean = nn.Linear(6, 3, bias=bias), torch.randn(6, dtype=torch.float64)
    (found,) = mean_contributions(nn.Sequential(layer), {"0": mean}, torch.randn(shape), call_model).values()
    torch.testing.assert_close(found, layer.weight.detach().double() @ mean, rtol=1e-12, atol=1e-12)


def test_a_layer_called_on_two_sizes_is_compensated_for_the_average_of_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 2, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=(12, 12)).sum((2, 3)) + self.up(x[..., :3, :3]).sum((2, 3))

    model, mean = Twice(), torch.randn(4, dtype=torch.float64)
    found = mean_contributions(model, {"up": mean}, torch.randn(2, 4, 5, 5), call_model)["up"]
    with torch.no_grad():
        exact = model.up.double()
        exact.bias = None
        one = exact(mean.reshape(1, 4, 1, 1).expand(1, 4, 5, 5), output_size=(12, 12)).mean((0, 2, 3))
        other = exact(mean.reshape(1, 4, 1, 1).expand(1, 4, 3, 3)).mean((0, 2, 3))
    torch.testing.assert_close(found, (one + other) / 2, rtol=1e-12, atol=1e-12)


def test_layers_that_lose_nothing_have_no_place() -> None:
    every = torch.arange(4)
    members = (Member("a", "producer", every, every), Member("norm", "channelwise", every, every),
               Member("b", "consumer", every + 2, every), Member("c", "consumer", every[:2], every[2:]))
    group = ChannelGroup("a", 4, every, members)
    positions = removed_positions((group, replace(group, name="kept")), {"a": torch.tensor([0, 1])})
    assert {layer: index.tolist() for layer, index in positions.items()} == {"b": [2, 3]}
