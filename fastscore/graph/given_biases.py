"""Biases of heads that the module around attentions makes and gives to all of them, as MPNet's encoder does: the heads
of all go together, with the columns of the embedding that the biases are looked up in."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.batches.devices import with_float64
from fastscore.graph.cutting import surgery
from fastscore.graph.groups import ChannelGroup, Member
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.hooks import input_of, with_input
from fastscore.modules.narrower import staying

_NAME = "relative_attention_bias"
_ROUNDING = 1e-3  # of a channel's length


def maker(model: nn.Module, attentions: Iterable[str], heads: int) -> str | None:
    """The embedding that biases for the heads of some attention modules may be looked up in; None without one.

    Args:
        model: that holds them.
        attentions: names of the modules.
        heads: of each.
    """
    names = list(attentions)
    for name, module in model.named_modules():
        owner, _, own = name.rpartition(".")
        if own == _NAME and isinstance(module, nn.Embedding) and module.embedding_dim == heads and \
                all(other.startswith(f"{owner}." if owner else "") and other != owner for other in names):
            return str(name)
    return None


def with_embedding(model: nn.Module, run: Callable[[nn.Module], Any], group: ChannelGroup, embedding: str
                   ) -> ChannelGroup | None:
    """The group of heads with the columns of an embedding; None where the model, with other numbers there, reads other
    heads without some.

    Args:
        model: an evaluation copy.
        run: run(model) runs it on example inputs.
        group: the heads of all attentions that are given its biases.
        embedding: its name.
    """
    each = next(group.role("heads"))
    column = Member(embedding, "producer", torch.arange(len(each.index)), each.channel)
    group = replace(group, members=(*group.members, column))
    dense = evaluation_copy(model)
    weight: Any = dense.get_submodule(embedding).weight
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.data = drawn.to(weight)
    for last in (False, True):
        gone = (group.unit % 2 == int(last)).nonzero()[:, 0]
        stays = staying(group.channels, gone)
        try:
            small = surgery.remove_channels(evaluation_copy(dense), [group], {group.name: gone})
            got, want = _read(small, run, group), _read(dense, run, group, gone)
        except Exception:  # whatever the model's code does with fewer heads
            return None
        for layer, whole in want.items():
            if layer not in got or not _close(got[layer], whole[..., stays.to(whole.device)]):
                return None
    return group


def _read(model: nn.Module, run: Callable[[nn.Module], Any], group: ChannelGroup, zero: Tensor | None = None
          ) -> dict[str, Tensor]:
    """What each layer that reads the heads reads in a run; where some are zero, if that is said."""
    seen: dict[str, Tensor] = {}

    def see(layer: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = input_of(args, kwargs)
            seen.setdefault(layer, x.detach())
            return None if zero is None else with_input(args, kwargs, x.index_fill(-1, zero.to(x.device), 0))

        return hook

    with torch.no_grad(), ExitStack() as hooks:
        for edge in group.role("consumer"):
            hooks.enter_context(model.get_submodule(edge.layer).register_forward_pre_hook(see(edge.layer),
                                                                                          with_kwargs=True))
        run(model)
    return seen


def _close(x: Tensor, expected: Tensor) -> bool:
    if x.shape != expected.shape:
        return False
    x, expected = (with_float64(each.flatten(0, -2)).double() for each in (x, expected))
    return bool(((x - expected).norm(dim=0) <= _ROUNDING * expected.norm(dim=0)).all())
