"""Layers that run, and whose outputs nothing that the model returns is computed from: a head that is not asked for.

They read channels that can go, and must lose them too.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn

from fastscore.graph.groups import Member, Role
from fastscore.graph.nodes import PRODUCERS
from fastscore.modules.norms.channel_norms import norm_of


class Outputs:
    """Within the block, what each layer of a model makes (Conv, Linear, Embedding, normalisation over channels) is
    noted, in the order of calls."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = {name: module for name, module in model.named_modules()
                        if tp.ops.module2type(module) in PRODUCERS or norm_of(module) is not None}
        self._made: list[tuple[str, Tensor]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "Outputs":
        self._handles = [module.register_forward_hook(self._note(name)) for name, module in self._layers.items()]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def unread(self, returned: Iterable[Tensor]) -> Mapping[str, Tensor]:
        """Layer -> what it made, of those that `returned` does not depend on; the noted tensors are let go."""
        reached = set[Any]()
        for tensor in returned:
            _reach(tensor.grad_fn, reached)
        used = {name for name, tensor in self._made if tensor.grad_fn in reached}
        found = {name: tensor for name, tensor in self._made if name not in used and tensor.grad_fn is not None}
        self._made.clear()
        return found

    def _note(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                self._made.append((name, output))

        return hook


def without_edge(member: Member) -> Member:
    """A member of which no gradient comes: it loses channels, and nothing is measured there."""
    roles: dict[Role, Role] = {"consumer": "reader", "norm": "channelwise"}
    return replace(member, role=roles.get(member.role, member.role))


def _reach(node: Any, reached: set[Any]) -> None:
    """Add an autograd node, and all that it is computed from."""
    work = [node]
    while work:
        node = work.pop()
        if node is not None and node not in reached:
            reached.add(node)
            work += [source for source, _ in node.next_functions]
