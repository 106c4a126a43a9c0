"""What the scores ought to be, by brute force in float64, and what a model ought to look like afterwards.

Nothing here calls the code under test, but for `sums_of_each_sample`, which reads it.
"""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from networks import Group, Network
from torch import Tensor, nn

from fastscore import Scorer


def gated(model: nn.Module, group: Group, x: Tensor) -> tuple[Tensor, Tensor]:
    """(gate [N, C], output): `model(x)` with a gate of ones multiplied onto the group's channels at each consumer."""
    gate = torch.ones(len(x), group.channels, dtype=torch.float64, requires_grad=True)

    def multiply(positions: list[list[int]], channel_dim: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (a,) = args
            of_position = {p: c for c, places in enumerate(positions) for p in places}
            factors = [gate[:, of_position[p]] if p in of_position else torch.ones(len(a), dtype=torch.float64)
                       for p in range(a.shape[channel_dim])]
            shape = [len(a), *[1] * (a.dim() - 1)]
            shape[channel_dim] = -1
            return (a * torch.stack(factors, 1).reshape(shape),)

        return hook

    handles = []
    for layer, positions in group.edges.items():
        module = model.get_submodule(layer)
        dim = -1 if isinstance(module, nn.Linear) else 1
        handles.append(module.register_forward_pre_hook(multiply([list(p) for p in positions], dim)))
    try:
        return gate, model(x)
    finally:
        for handle in handles:
            handle.remove()


def tied(group: Group, s: Tensor) -> Tensor:
    """[..., C]: every channel gets the sum of its unit."""
    if group.units is None:
        return s
    units = torch.tensor(group.units)
    return torch.stack([s[..., units == unit].sum(-1) for unit in group.units], -1)


def sums(model: nn.Module, group: Group, x: Tensor, v: Tensor) -> Tensor:
    """s [N, C]: the directional derivative of v·z with respect to the gate."""
    gate, z = gated(model, group, x)
    return tied(group, torch.autograd.grad(z, gate, v)[0])


def output_changes(model: nn.Module, group: Group, x: Tensor) -> Tensor:
    """u = ∂z/∂gate: [N, C, K], by one backward pass for each output."""
    gate, z = gated(model, group, x)
    z = z.flatten(1)
    rows = [torch.autograd.grad(z[:, k].sum(), gate, retain_graph=True)[0] for k in range(z.shape[1])]
    return torch.stack([tied(group, row) for row in rows], 2)


def finite_difference(model: nn.Module, group: Group, x: Tensor, v: Tensor, step: float = 1e-6) -> Tensor:
    """s [N, C] by central differences; independent of autograd."""
    columns = []
    for unit in group.units or range(group.channels):
        values = []
        for sign in (1, -1):
            scaled = copy.deepcopy(model)
            for layer, positions in group.edges.items():
                members = [c for c in range(group.channels) if (group.units or range(group.channels))[c] == unit]
                index = torch.tensor([p for c in members for p in positions[c]], dtype=torch.int64)
                module = scaled.get_submodule(layer)
                dim = -1 if isinstance(module, nn.Linear) else 1

                def scale(m: nn.Module, args: tuple[Tensor, ...], index: Tensor = index, dim: int = dim,
                          factor: float = 1 + sign * step) -> tuple[Tensor, ...]:
                    a = args[0].clone().movedim(dim, 0)
                    a[index] = a[index] * factor
                    return (a.movedim(0, dim),)

                module.register_forward_pre_hook(scale)
            with torch.no_grad():
                values.append((scaled(x) * v).flatten(1).sum(1))
        columns.append((values[0] - values[1]) / (2 * step))
    return torch.stack(columns, 1)


def elements(model: nn.Module, group: Group, x: Tensor, v: Tensor) -> list[tuple[Tensor, list[list[int]]]]:
    """[(a·g with channels first [C_in, N, ...], positions)] for each consumer edge of the group and each call of it."""
    seen: list[tuple[Tensor, str]] = []

    def record(layer: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            alias = args[0].clone()  # of this consumer alone
            if not alias.requires_grad:
                alias.requires_grad_()
            alias.retain_grad()
            seen.append((alias, layer))
            return (alias,)

        return hook

    handles = [model.get_submodule(layer).register_forward_pre_hook(record(layer)) for layer in group.edges]
    try:
        (model(x) * v).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    return [((a.detach() * a.grad).movedim(-1 if isinstance(model.get_submodule(layer), nn.Linear) else 1, 0),
             [list(p) for p in group.edges[layer]]) for a, layer in seen]


def sums_of_each_sample(scorer: Scorer, model: nn.Module, x: Tensor, v: Tensor) -> dict[str, Tensor]:
    """The scorer's own s [N, C] for each group, by sending back one sample's gradient at a time.

    The scorer must be of importance "taylor", whose totals are Σ s.
    """
    empty = scorer.state_dict()
    rows: list[dict[str, Tensor]] = []
    with scorer:
        output = model(x)
        for n in range(len(x)):
            alone = torch.zeros_like(v)
            alone[n] = v[n]
            scorer.load_state_dict(empty)
            scorer.propagate(output, alone)
            rows.append(scorer.state_dict()["totals"])
    return {group: torch.stack([row[group].sum(0) for row in rows]) for group in rows[0]}


def masked(network: Network, model: nn.Module, removed: dict[str, list[int]], x: Tensor) -> Tensor:
    """The output with the removed channels (group -> channels) read as zero by every consumer."""
    handles = []
    for name, channels in removed.items():
        for layer, positions in network.groups[name].edges.items():
            module = model.get_submodule(layer)
            dim = -1 if isinstance(module, nn.Linear) else 1
            index = torch.tensor([p for c in channels for p in positions[c]], dtype=torch.int64)

            def zero(m: nn.Module, args: tuple[Tensor, ...], index: Tensor = index, dim: int = dim) -> Any:
                keep = torch.ones(args[0].shape[dim], dtype=args[0].dtype).index_fill(0, index, 0)
                return (args[0] * (keep if dim == -1 else keep.reshape(-1, *[1] * (args[0].dim() - 2))),)

            handles.append(module.register_forward_pre_hook(zero))
    try:
        with torch.no_grad():
            return model(x)
    finally:
        for handle in handles:
            handle.remove()


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
          "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_state_dict_pre_hooks",
          "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_forward_hooks_always_called")


def _bits(x: Tensor) -> Tensor:
    """A copy whose bits can be compared, NaN and all."""
    return x.detach().clone().contiguous().reshape(-1).view(torch.uint8)


def _snapshot(model: nn.Module) -> dict[str, Any]:
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    return {
        "parameter objects": {name: id(p) for name, p in parameters.items()},
        "parameter values": {name: _bits(p) for name, p in parameters.items()},
        "parameter strides": {name: p.stride() for name, p in parameters.items()},
        "parameter versions": {name: p._version for name, p in parameters.items()},
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "gradient objects": {name: id(p.grad) for name, p in parameters.items() if p.grad is not None},
        "gradient values": {name: _bits(p.grad) for name, p in parameters.items() if p.grad is not None},
        "parameter hooks": {name: len(p._backward_hooks or ()) for name, p in parameters.items()},
        "buffer objects": {name: id(b) for name, b in buffers.items()},
        "buffer values": {name: _bits(b) for name, b in buffers.items()},
        "modes": {name: m.training for name, m in model.named_modules()},
        "hooks": {(name, kind): list(getattr(m, kind)) for name, m in model.named_modules() for kind in _HOOKS},
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
        "grad mode": torch.is_grad_enabled(),
        "torch RNG": torch.get_rng_state(),
        "numpy RNG": np.random.get_state()[1].tolist(),
        "python RNG": random.getstate(),
    }


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor):
        return torch.equal(before, after)
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(_same(value, after[key]) for key, value in before.items())
    return bool(before == after)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever happens in the block, the model and the random-number states are bit for bit the same after it."""
    before = _snapshot(model)
    try:
        yield
    finally:
        after = _snapshot(model)
        changed = [what for what in before if not _same(before[what], after[what])]
        assert not changed, f"changed: {changed}"


def params(model: nn.Module) -> int:
    """How many numbers its parameters hold."""
    return sum(parameter.numel() for parameter in model.parameters())
