"""The criteria of whole minibatches, gates at BatchNorms, ablation to the mean, exact probes and stopping early."""

from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from networks import NETWORKS, Group, Network
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore import fingerprints
from fastscore.graph.groups import norm_gates
from fastscore.graph.tracing import trace
from fastscore.scoring import gradients

NORMALIZED = ["residual", "inplace", "dense", "mobile", "grouped"]  # networks with BatchNorm2d


def squares(output: Tensor, batch: Tensor) -> Tensor:
    return output.square().sum()


def sent(output: Tensor, x: Tensor, gradient: str, normalize: bool, samples: int) -> Tensor:
    """The output gradient of a minibatch, as the molchanov criteria see it."""
    if gradient == "loss":
        v = 2 * output.detach()
        if not normalize:
            return v
        return v / v.flatten(1).norm(dim=1).reshape(-1, *[1] * (v.dim() - 1)) / samples
    return gradients.random_gradient(output, fingerprints.sample_ids(x), 0, 0, "normal", normalize) / samples


def close(found: Any, exact: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert set(found) == set(exact)
    for layer, values in exact.items():
        assert values.abs().max() > 0, layer
        assert (found[layer].double() - values).abs().max() <= tolerance * values.abs().max(), layer


def at_norms(model: nn.Module, x: Tensor, v: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """BatchNorm -> Σ_p a·g at its output [N, C]."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            outputs[name] = output.clone()  # what follows may write to it
            outputs[name].retain_grad()
            return outputs[name].clone()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()
               if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    output = model(x)
    output.backward(v(output))
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {name: (a.detach() * a.grad).flatten(2).sum(2) for name, a in outputs.items()}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("gradient", ["loss", "random"])
@pytest.mark.parametrize("importance", ["taylor", "taylor-abs", "taylor-sq", "molchanov-bn"])
@pytest.mark.parametrize("name", NORMALIZED)
def test_gates_at_norms(name: str, importance: str, gradient: str, normalize: bool) -> None:
    network = NETWORKS[name]
    model, batches = network.traced(), [network.inputs(4, seed=1), network.inputs(3, seed=2)]
    minibatch = importance == "molchanov-bn"
    parts = [at_norms(model, x, lambda z, x=x: sent(z, x, gradient, normalize, len(x) if minibatch else 1))
             for x in batches]
    exact = {}
    for norm in parts[0]:
        s = torch.cat([part[norm] for part in parts])
        exact[norm] = {"taylor": s.mean(0).abs(), "taylor-abs": s.abs().mean(0), "taylor-sq": s.square().mean(0),
                       "molchanov-bn": torch.stack([part[norm].sum(0).square() for part in parts]).mean(0)}[importance]
    with untouched(model):
        found = fastscore.score(model, batches, importance=importance, gradient=gradient, normalize=normalize,
                                units="norms", loss=squares, progress=False)
    close(found, exact, 1e-5)
    assert found.origin.units == "norms"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMALIZED)
def test_molchanov_bn_is_scale_and_shift_times_their_gradients(name: str, training: bool) -> None:
    """γ·∂γ + β·∂β = Σ a·g at the output, in training mode too: the criterion as its paper writes it."""
    network = NETWORKS[name]
    model, x = network.traced().train(training), network.inputs(6)
    scorer = fastscore.Scorer(model, x, importance="molchanov-bn", units="norms", normalize=False)
    with scorer:
        model(x).square().mean().backward()
    close(scorer.scores(), {norm: (layer.weight * layer.weight.grad + layer.bias * layer.bias.grad).detach().square()
                            for norm, layer in model.named_modules()
                            if isinstance(layer, nn.modules.batchnorm._BatchNorm)}, 1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("gradient", ["loss", "random"])
@pytest.mark.parametrize("name", ["residual", "dense", "mobile", "plain", "unet"])
def test_molchanov_group(name: str, gradient: str, normalize: bool) -> None:
    network = NETWORKS[name]
    model, batches = network.traced(), [network.inputs(4, seed=1), network.inputs(3, seed=2)]
    graph = trace(model, batches[0])
    exact = {group: torch.zeros(spec.channels, dtype=torch.float64) for group, spec in network.groups.items()}
    for x in batches:
        output = model(x)
        output.backward(sent(output, x, gradient, normalize, len(x)))
        for group in graph.groups:
            for member in group.members:
                layer = model.get_submodule(member.layer)
                if member.role == "consumer" or not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
                    continue
                products = (layer.weight * layer.weight.grad).detach()
                if getattr(layer, "transposed", False):
                    products = products.transpose(0, 1)
                rows = products.flatten(1).square().sum(1)
                if layer.bias is not None:
                    rows = rows + (layer.bias * layer.bias.grad).detach().square()
                for position, channel in zip(member.index.tolist(), member.channel.tolist(), strict=True):
                    exact[group.name][channel] += rows[position] / len(batches)
        model.zero_grad(set_to_none=True)
    exact = {group: oracles.tied(network.groups[group], values) for group, values in exact.items()}
    with untouched(model):
        found = fastscore.score(model, batches, importance="molchanov-group", gradient=gradient, normalize=normalize,
                                loss=squares, progress=False)
    close(found, exact, 1e-5)


def test_molchanov_group_in_a_loop_reads_the_loops_own_gradients() -> None:
    network = NETWORKS["residual"]
    model, x = network.traced(), network.inputs(6)
    with pytest.raises(ValueError, match=r"^normalize: 'molchanov-group' reads the weight gradients"):
        fastscore.Scorer(model, x, importance="molchanov-group")
    scorer = fastscore.Scorer(model, x, importance="molchanov-group", normalize=False)
    with scorer:
        model(x).square().sum().backward()
    whole = fastscore.score(model, [x], importance="molchanov-group", normalize=False, gradient="loss", loss=squares,
                            progress=False)
    close(scorer.scores(), {layer: whole[layer].double() for layer in whole}, 1e-6)
    assert all(not parameter._backward_hooks for parameter in model.parameters())


def to_the_mean(model: nn.Module, spec: Group, x: Tensor, v: Tensor) -> Tensor:
    """[N, C]: the derivative of v·z as each consumer's channels go from what they are to their mean."""
    gate = torch.zeros(len(x), spec.channels, dtype=torch.float64, requires_grad=True)
    handles = []
    for layer, positions in spec.edges.items():
        module = model.get_submodule(layer)
        dim = -1 if isinstance(module, nn.Linear) else 1

        def hook(module: nn.Module, args: tuple[Tensor, ...], positions: Any = positions, dim: int = dim) -> Any:
            a = args[0].movedim(dim, -1)
            mean = a.detach().flatten(0, -2).mean(0)
            step = torch.zeros(len(a), a.shape[-1], dtype=a.dtype)
            for c, places in enumerate(positions):
                step[:, list(places)] = step[:, list(places)] + gate[:, c, None]
            step = step.reshape(len(a), *[1] * (a.dim() - 2), a.shape[-1])
            return ((a + step * (mean - a)).movedim(-1, dim),)

        handles.append(module.register_forward_pre_hook(hook))
    try:
        (moved,) = torch.autograd.grad(model(x), gate, v)
    finally:
        for handle in handles:
            handle.remove()
    return oracles.tied(spec, moved)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", ["plain", "residual", "dense", "mobile", "grouped", "flattening", "unet", "tokens"])
def test_ablation_to_the_mean_is_replacing_the_channel_by_its_mean_at_first_order(name: str, normalize: bool) -> None:
    network = NETWORKS[name]
    model, x = network.traced(), network.inputs(6)
    v = 2 * model(x).detach()
    if normalize:
        v = v / v.flatten(1).norm(dim=1).reshape(-1, *[1] * (v.dim() - 1))
    exact = {group: to_the_mean(model, spec, x, v).square().mean(0) for group, spec in network.groups.items()}
    found = fastscore.score(model, x.split([2, 3, 1]), ablation="mean", gradient="loss", normalize=normalize,
                            loss=squares, progress=False)
    close(found, exact, 1e-5)


def test_ablation_to_the_mean_of_gates_at_norms() -> None:
    """A BatchNorm's output at a constant: nothing is lost, while ablation to zero says something is."""
    network = NETWORKS["residual"]
    model, x = network.model(), network.inputs(6)
    model.get_submodule("block1.bn1").weight.data[2] = 0
    model.get_submodule("block1.bn1").bias.data[2] = 1
    how = {"units": "norms", "progress": False}
    assert fastscore.score(model, [x], ablation="mean", **how)["block1.bn1"][2] < 1e-12
    assert fastscore.score(model, [x], **how)["block1.bn1"][2] > 1e-6


def test_means_are_those_of_the_consumers_inputs() -> None:
    network = NETWORKS["mobile"]
    model, x = network.traced(), network.inputs(7)
    found = fastscore.score(model, x.split(3), progress=False).means
    for spec in network.groups.values():
        for layer in spec.edges:
            seen: list[Tensor] = []
            handle = model.get_submodule(layer).register_forward_pre_hook(
                lambda m, args, seen=seen: seen.append(args[0]))
            with torch.no_grad():
                model(x)
            handle.remove()
            torch.testing.assert_close(found[layer], seen[0].transpose(0, 1).flatten(1).mean(1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", ["residual", "mobile", "unet"])
def test_exact_probes_give_what_random_ones_approach(name: str, normalize: bool) -> None:
    network = NETWORKS[name]
    model, x = network.traced(), network.inputs(3)
    exact = {}
    for group, spec in network.groups.items():
        u = oracles.output_changes(model, spec, x)
        exact[group] = u.square().sum(2).mean(0) / (u.shape[2] if normalize else 1)
    close(fastscore.score(model, [x], probes="exact", normalize=normalize, progress=False), exact, 1e-5)


def test_centred_exact_probes_do_not_see_what_all_classes_share() -> None:
    network = NETWORKS["residual"]
    model, x = network.traced(), network.inputs(3)
    exact = {}
    for group, spec in network.groups.items():
        u = oracles.output_changes(model, spec, x)
        exact[group] = (u - u.mean(2, keepdim=True)).square().mean(2).mean(0)
    close(fastscore.score(model, [x], probes="exact", center=True, progress=False), exact, 1e-5)


@pytest.mark.parametrize(("layerwise", "power"), [("l2", 2), ("mean", 1)])
def test_layerwise(layerwise: str, power: int) -> None:
    network = NETWORKS["residual"]
    model, x = network.traced(), network.inputs(3)
    for importance in ("taylor-sq", "magnitude-l2"):
        plain = fastscore.score(model, [x], importance=importance, progress=False)
        found = fastscore.score(model, [x], importance=importance, layerwise=layerwise, progress=False)
        for layer in plain:
            values = plain[layer].double()
            divisor = values.norm() if power == 2 else values.mean()
            torch.testing.assert_close(found[layer].double(), values / divisor, rtol=1e-5, atol=0)


def test_overlap_is_that_of_the_scores_of_each_half() -> None:
    network = NETWORKS["residual"]
    model, x = network.traced(), network.inputs(9)
    how = {"gradient": "loss", "loss": squares, "progress": False}
    halves = [fastscore.score(model, [x[start::2]], **how) for start in (0, 1)]
    for fraction in (0.2, 0.5):
        pruned = []
        for half in halves:
            ranking = half.ranking()
            pruned.append({(layer, channel) for layer, channel, _ in ranking[:round(fraction * len(ranking))]})
        whole = fastscore.score(model, x.split([4, 1, 3, 1]), **how)
        assert whole.overlap(fraction) == len(pruned[0] & pruned[1]) / len(pruned[0])
    merged = halves[0].merge(halves[1])
    assert 0 <= merged.overlap() <= 1
    with pytest.raises(ValueError, match=r"^overlap: it takes two samples"):
        fastscore.score(model, [x[:1]], **how).overlap()
    with pytest.raises(ValueError, match=r"^fraction: 1"):
        merged.overlap(1)


def test_auto_stops_when_the_halves_agree() -> None:
    network = NETWORKS["residual"]
    model = network.traced()
    batches = [network.inputs(8, seed=seed) for seed in range(200)]
    seen = []
    found = fastscore.score(model, (seen.append(x) or x for x in batches), samples="auto", probes="exact",
                            progress=False)
    assert found.overlap(0.3) >= 0.95
    assert 32 <= found.samples == 8 * len(seen) < 1600
    before = fastscore.score(model, batches[:len(seen) - 1], probes="exact", progress=False)
    assert before.samples < 32 or before.overlap(0.3) < 0.95, "it would have stopped earlier"
    for agreement in ((0.5, 0.6), (0.3, 1.0)):
        other = fastscore.score(model, batches, samples="auto", agreement=agreement, progress=False)
        assert other.overlap(agreement[0]) >= agreement[1] or other.samples == 1600


@pytest.mark.parametrize(("options", "message"), [
    ({"units": "layers"}, "^units: 'layers'"), ({"ablation": "median"}, "^ablation: 'median'"),
    ({"ablation": "mean", "importance": "taylor-abs"}, "^reduction, ablation: 'taylor-abs' has no"),
    ({"layerwise": "max"}, "^layerwise: 'max'"), ({"probes": "all"}, "^probes: 'all'"),
    ({"samples": "some"}, "^samples: 'some'"), ({"agreement": (0, 1)}, "^agreement: "),
    ({"distribution": "basis"}, "^distribution: \"basis\" takes one probe"),
    ({"probes": "exact", "importance": "taylor-abs"}, "^probes: \"exact\" is the mean square"),
    ({"probes": "exact", "gradient": "loss"}, "^probes: exact, but a loss has one gradient")])
def test_arguments(options: dict[str, Any], message: str) -> None:
    network: Network = NETWORKS["residual"]
    model = network.traced()
    with untouched(model), pytest.raises(ValueError, match=message):
        fastscore.score(model, [network.inputs(2)], progress=False, **options)


def test_a_model_without_batchnorm_has_no_norm_gates() -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), torch.ones(3, 4)
    with untouched(model), pytest.raises(ValueError, match="it has no BatchNorm"):
        fastscore.score(model, [x], units="norms", progress=False)


def test_norm_gates_know_their_convolutions() -> None:
    network = NETWORKS["mobile"]
    model = network.traced()
    gates = norm_gates(model, trace(model, network.inputs(1)))
    producers = {group.name: [member.layer for member in group.role("producer")] for group in gates.groups}
    assert producers == {f"{name}.1": [f"{name}.0"] for name in ("stem", "expand", "depthwise", "project", "last")}
    assert [group.channels for group in gates.groups] == [4, 9, 9, 4, 8]
