"""From data to a smaller model and a file of it, checked at every step: what holds for channels of every kind."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from oracles import untouched
from state_attentions import Gated
from thinned import first_of_its_file
from torch import Tensor, nn

import fastscore
from fastscore.graph.groups import ChannelGroup, Member
from fastscore.graph.tracing import trace
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.inspection import channel_dim
from fastscore.modules.weights.computed_weights import computed_weight


def run(model: nn.Module, batch: Any) -> Tensor:
    """The output, or the logits, of a model."""
    output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    return output if isinstance(output, Tensor) else output.logits


def noisy(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """In float64 and evaluation mode, with no weight left at zero and none alike, as training would."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().double().eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def sums(model: nn.Module, group: ChannelGroup, batch: Any, v: Tensor) -> Tensor:
    """s [N, C], float64: the derivative of each sample's v·z by a gate on each unit at every edge of the group.

    A gate on what all rows read is one on the weights that read it; samples are run one by one. So neither taps nor
    the order of rows has a part in it.
    """
    there = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    tied = any(edge.layer not in there for edge in group.role("producer", "consumer"))
    model = evaluation_copy(model) if tied else copy.deepcopy(model)  # where products with a weight are layers
    gates: list[Tensor] = []  # that of the sample that runs
    for edge in group.role("norm"):
        _gate_statistics(model.get_submodule(edge.layer), edge, gates)
    read = [edge for edge in group.role("consumer") if tied or (edge.layer in dict(model.named_modules())
            and (computed_weight(model.get_submodule(edge.layer)) is not None or _is_tied(model, edge.layer)))]
    for edge in read:  # whose weight is another one once a parameter is gated, or is read elsewhere
        model.get_submodule(edge.layer).register_forward_pre_hook(partial(_gate_input, edge, gates))
    rows, parameters = [], dict(model.named_parameters())
    for n in range(len(v)):
        one = {key: value[n:n + 1] for key, value in batch.items()} if isinstance(batch, Mapping) else batch[n:n + 1]
        gate = torch.ones(group.channels, dtype=torch.float64, requires_grad=True)
        gates[:] = [gate]
        weights: dict[str, Tensor] = {}
        for edge in (edge for edge in group.role("consumer") if not any(edge is other for other in read)):
            name = edge.layer if edge.layer in parameters else f"{edge.layer}.weight"
            weight = weights.get(name, parameters[name].detach())
            dim = edge.dim if edge.holds else _input_dim(model, edge.layer, weight)
            groups = 1 if edge.layer in parameters else getattr(model.get_submodule(edge.layer), "groups", 1)
            whole = torch.ones(weight.shape[dim] * groups, dtype=torch.float64).index_put((edge.index,),
                                                                                          gate[edge.channel])
            if groups > 1:  # [out, in / groups, ...]: of each output the inputs of its group
                whole = whole.view(groups, -1).repeat_interleave(len(weight) // groups, 0).flatten()
                weights[name] = (weight.flatten(0, 1) * whole.view(-1, *[1] * (weight.dim() - 2))).view_as(weight)
                continue
            weights[name] = weight * whole.view(-1, *[1] * (weight.dim() - 1 - dim))
        (z,) = _tensor(torch.func.functional_call(model, weights, *(((), one) if isinstance(one, dict) else ((one,),))))
        rows.append(torch.autograd.grad((z * v[n]).sum(), gate)[0])
    s = torch.stack(rows)
    return torch.stack([s[:, group.unit == unit].sum(1) for unit in group.unit], 1)


def _is_tied(model: nn.Module, layer: str) -> bool:
    weight = model.get_submodule(layer)._parameters["weight"]
    return sum(weight is held for module in model.modules() for held in module._parameters.values()) > 1


def _gate_input(edge: Member, gates: list[Tensor], layer: nn.Module, args: tuple[Tensor]) -> Tensor:
    """What a layer is to read: its input times the gates of the edge."""
    shape = [1] * args[0].dim()
    shape[channel_dim(layer)] = -1
    width = args[0].shape[channel_dim(layer)]
    return args[0] * torch.ones(width, dtype=torch.float64).index_put((edge.index,), gates[0][edge.channel]).view(shape)


def _gate_statistics(norm: nn.Module, edge: Member, gates: list[Tensor]) -> None:
    """Have a LayerNorm, or RMSNorm, of the last dimension, or a LayerNorm with its own forward of images, or one that
    is called with a gate, count a channel as its gate says, by definition."""
    if isinstance(norm, Gated):
        norm.forward = partial(_gated, norm.forward, edge, gates)
        return
    assert isinstance(norm, (nn.LayerNorm, nn.RMSNorm))
    dim = -1 if type(norm).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward) else -3

    def forward(x: Tensor) -> Tensor:
        x = x.movedim(dim, -1)
        counted = x * torch.ones(x.shape[-1], dtype=x.dtype).index_put((edge.index,), gates[0][edge.channel])
        mean = counted.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x.new_zeros(())
        y = (x - mean) / ((counted - mean).square().mean(-1, keepdim=True) + norm.eps).sqrt()
        y = y if norm.weight is None else y * norm.weight
        return (y if getattr(norm, "bias", None) is None else y + norm.bias).movedim(-1, dim)

    norm.forward = forward


def _gated(forward: Callable[..., Tensor], edge: Member, gates: list[Tensor], x: Tensor, gate: Tensor) -> Tensor:
    counts = torch.ones(x.shape[-1], dtype=x.dtype).index_put((edge.index,), gates[0][edge.channel])
    return forward(x * counts, gate) / counts  # what it makes of a channel itself is taken out again


def _input_dim(model: nn.Module, layer: str, weight: Tensor) -> int:
    """Where inputs lie in a weight: of a Linear or Conv, of experts, of transformers' Conv1D, a transposed one."""
    if layer in dict(model.named_parameters()):
        turned = getattr(model.get_submodule(layer.rpartition(".")[0]), "is_transposed", False)  # of experts
        return weight.dim() - (2 if turned else 1)
    module = model.get_submodule(layer)
    return 0 if type(module).__name__ == "Conv1D" or getattr(module, "transposed", False) else 1


def check(build: Callable[[], nn.Module], batch: Any, groups: Sequence[str], path: Path,
          only: bool = True) -> fastscore.PruneResult:
    """Scores by brute force, budgets by counting, smaller = masked, export, a training step, save and load.

    In a normal run PyTorch exports, of a file's examples, the first, and the first with each set of modules that are
    fastscore's own.

    Args:
        build: makes the model, before it is given noise.
        batch: a tensor or arguments by name, in float64.
        groups: those that are looked at; half of each goes.
        path: a folder for files.
        only: whether there must be no other groups.

    Returns:
        What pruning half of each of `groups` gave.
    """
    model = noisy(build)
    with torch.no_grad():
        z = run(model, batch)
    v = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with untouched(model):
        graph = trace(model, batch)
        found = {group.name: group for group in graph.groups}
        assert set(groups) == set(found) if only else set(groups) <= set(found), (list(found), graph.skipped)
        scores = fastscore.score(model, [batch], gradient="loss", normalize=False, progress=False,
                                 loss=lambda output, batch: (_tensor(output) * v).sum())
        for name in groups:
            exact = sums(model, found[name], batch, v).square().mean(0)
            torch.testing.assert_close(scores[name].double(), exact, rtol=1e-5, atol=1e-9 * float(exact.max()))
        for budget in ({"macs": 0.8}, {"params": 0.8}):
            report = fastscore.prune(model, scores, batch, **budget).report
            for unit, share in budget.items():
                before, after = getattr(report, unit)
                assert after <= share * before
        ignore = [name for name in scores if name not in groups]
        options: dict[str, Any] = {"scope": "layer", "ignore": ignore, "compensate": False}
        result = fastscore.prune(model, scores, batch, channels=0.5, **options)
        assert set(result.removed) == set(groups)
        with torch.no_grad(), fastscore.mask(model, scores, 0.5, batch, **options):
            masked = run(model, batch)
    assert not torch.allclose(masked, z, rtol=1e-4)
    small = result.model
    assert result.report.params[1] == sum(parameter.numel() for parameter in small.parameters())
    with torch.no_grad():
        output = run(small, batch)
        torch.testing.assert_close(output, masked, rtol=1e-9, atol=1e-9 * float(masked.abs().max()))
        own = frozenset(kind for kind in map(type, small.modules()) if kind.__module__.startswith("fastscore."))
        if first_of_its_file(own):
            args, kwargs = ((), batch) if isinstance(batch, Mapping) else ((batch,), {})
            exported = torch.export.export(small, args, kwargs).module()(*args, **kwargs)
            torch.testing.assert_close(_tensor(exported), output)
        fastscore.save_pruned(small, path / "small.safetensors")
        loaded = fastscore.load_pruned(noisy(build, seed=1), path / "small.safetensors")
        assert torch.equal(run(loaded.eval(), batch), output)
    _learn(small, batch, z)
    return result


def scored_alike(one: nn.Module, other: nn.Module, x: Tensor) -> None:
    """Two models, of layers of the same names, have the same scores by importances of every kind."""
    for importance in ("taylor-sq", "magnitude-l2", "molchanov-group"):
        a, b = (fastscore.score(each, [x], importance=importance, progress=False) for each in (one, other))
        for name in b:
            torch.testing.assert_close(a[name], b[name])


def loads(small: nn.Module, build: Callable[[], nn.Module], x: Tensor, path: Path) -> None:
    """What is saved of a smaller model makes of another dense one the same."""
    fastscore.save_pruned(small, path / "small.safetensors")
    loaded = fastscore.load_pruned(noisy(build, seed=1), path / "small.safetensors")
    assert torch.equal(loaded(x), small(x))


def _learn(model: nn.Module, batch: Any, target: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3 / float(target.std()))
    first = (run(model, batch) - target).square().mean()
    first.backward()
    optimizer.step()
    with torch.no_grad():
        assert (run(model, batch) - target).square().mean() < first


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits
