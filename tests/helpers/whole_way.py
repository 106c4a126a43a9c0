"""From data to a smaller model and a file of it, checked at every step: what holds for channels of every kind."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.graph.groups import ChannelGroup
from fastscore.graph.tracing import trace


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

    Each sample is run alone, so that whatever mixes rows is of no concern.
    """
    rows = []
    for n in range(len(v)):
        one = {key: value[n:n + 1] for key, value in batch.items()} if isinstance(batch, Mapping) else batch[n:n + 1]
        gate = torch.ones(group.channels, dtype=torch.float64, requires_grad=True)
        handles = [model.get_submodule(edge.layer).register_forward_pre_hook(
            _multiply(edge.index, gate[edge.channel])) for edge in group.edges]
        try:
            (z,) = run(model, one)
            rows.append(torch.autograd.grad((z * v[n]).sum(), gate)[0])
        finally:
            for handle in handles:
                handle.remove()
    s = torch.stack(rows)
    return torch.stack([s[:, group.unit == unit].sum(1) for unit in group.unit], 1)


def _multiply(index: Tensor, factors: Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (x,) = args
        dim = 1 if isinstance(module, nn.modules.conv._ConvNd) else x.dim() - 1
        whole = torch.ones(x.shape[dim], dtype=torch.float64).index_put((index,), factors)
        return (x * whole.view(-1, *[1] * (x.dim() - 1 - dim)),)

    return hook


def check(build: Callable[[], nn.Module], batch: Any, groups: Sequence[str], path: Path,
          only: bool = True) -> fastscore.PruneResult:
    """Scores by brute force, budgets by counting, smaller = masked, export, a training step, save and load.

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
        for budget in ({"macs": 0.8}, {"params": 0.8}) if only else ():
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
        args, kwargs = ((), batch) if isinstance(batch, Mapping) else ((batch,), {})
        exported = torch.export.export(small, args, kwargs).module()(*args, **kwargs)
        torch.testing.assert_close(_tensor(exported), output)
        fastscore.save_pruned(small, path / "small.safetensors")
        loaded = fastscore.load_pruned(noisy(build, seed=1), path / "small.safetensors")
        assert torch.equal(run(loaded.eval(), batch), output)
    _learn(small, batch, z)
    return result


def _learn(model: nn.Module, batch: Any, target: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3 / float(target.std()))
    first = (run(model, batch) - target).square().mean()
    first.backward()
    optimizer.step()
    with torch.no_grad():
        assert (run(model, batch) - target).square().mean() < first


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits
