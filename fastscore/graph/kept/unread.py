"""Layers that run, and whose outputs nothing that the model returns is computed from: a head that is not asked for.

They read channels that can go, and must lose them too.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastscore.graph.autograd_nodes import reach
from fastscore.graph.following.nodes import PRODUCERS
from fastscore.graph.groups import Member, Role
from fastscore.graph.layer_types import type_of
from fastscore.modules.norms.channel_norms import norm_of


class Outputs:
    """Within the block, what each layer of a model makes (Conv, Linear, Embedding, normalisation over channels) is
    noted, in the order of calls."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = {name: module for name, module in model.named_modules()
                        if type_of(module) in PRODUCERS or norm_of(module) is not None}
        self._made: list[tuple[str, Tensor, Any]] = []  # layer, output, and the autograd function that made it
        self._handles: list[Any] = []

    def __enter__(self) -> "Outputs":
        self._handles = [module.register_forward_hook(partial(self._note, name))
                         for name, module in self._layers.items()]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def unread(self, returned: Iterable[Tensor]) -> tuple[set[str], set[tuple[str, int]], list[Tensor]]:
        """(layers that `returned` does not depend on; calls of others, (layer, number), of which the same holds; what
        those layers made and nobody wrote to); the noted tensors are let go."""
        reached = set[Any]()
        for tensor in returned:
            reach(tensor.grad_fn, reached)
        used, number, idle = set[str](), Counter[str](), set[tuple[str, int]]()
        for name, tensor, node in self._made:
            if not reached.isdisjoint((node, tensor.grad_fn)):
                used.add(name)
            elif node is not None:
                idle.add((name, number[name]))
            number[name] += 1
        found = [(name, tensor, node) for name, tensor, node in self._made if name not in used and node is not None]
        self._made.clear()
        left = [tensor for _, tensor, node in found if tensor.grad_fn is node]
        return {name for name, _, _ in found}, {call for call in idle if call[0] in used}, left

    def _note(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and not output.is_nested:
            self._made.append((name, output, output.grad_fn))


def without_edge(member: Member) -> Member:
    """A member of which no gradient comes: it loses channels, and nothing is measured there."""
    roles: dict[Role, Role] = {"consumer": "reader", "norm": "channelwise"}
    return replace(member, role=roles.get(member.role, member.role))
