"""Graphs are found again while the model is what it was, and only then."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastscore.batches.calls import call_model
from fastscore.graph import cache
from fastscore.graph.groups import ChannelGraph
from fastscore.modules.hooks import OwnHook

GRAPH = ChannelGraph((), {}, {})
X = torch.randn(4, 3)


class Network(nn.Module):
    """With settings of all kinds, of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("scale", torch.ones(2))
        self.depth, self.sizes, self.norm = 2, [1, 2], nn.LayerNorm(2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3] -> [N, 2]."""
        return self.norm(self.second(self.first(x))) * self.scale


def _kept() -> Network:
    model = Network()
    cache.put(model, X, call_model, GRAPH)
    assert cache.get(model, X, call_model) is GRAPH
    return model


CHANGES: dict[str, Callable[[Network], Any]] = {
    "number": lambda m: setattr(m, "depth", 3),
    "list grown": lambda m: m.sizes.append(3),
    "list": lambda m: setattr(m, "sizes", [2, 1]),
    "module": lambda m: setattr(m, "first", nn.Linear(3, 4)),
    "parameter": lambda m: setattr(m.first, "weight", nn.Parameter(torch.ones(4, 3))),
    "buffer": lambda m: m.register_buffer("scale", torch.ones(2)),
    "module added": lambda m: m.add_module("third", nn.Linear(2, 2)),
    "hook": lambda m: m.first.register_forward_hook(lambda *_: None),
    "class": lambda m: setattr(m.norm, "__class__", nn.RMSNorm),
    "forward": lambda m: setattr(m, "forward", lambda x: x),
    "eps": lambda m: setattr(m.norm, "eps", 0.1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_model_is_another(change: Callable[[Network], Any]) -> None:
    """Settings, modules, parameters, buffers, hooks, classes."""
    model = _kept()
    change(model)
    assert cache.get(model, X, call_model) is None


@pytest.mark.parametrize("same", [
    lambda m: m.train(), lambda m: m.eval(), lambda m: m.first.weight.data.add_(1), lambda m: m.requires_grad_(False),
    lambda m: m.first.register_forward_hook(OwnHook(lambda *_: None)), lambda m: None,
], ids=["train", "eval", "values", "frozen", "own hook", "nothing"])
def test_values_and_modes_change_no_graph(same: Callable[[Network], Any]) -> None:
    """Nor do hooks of this library."""
    model = _kept()
    same(model)
    assert cache.get(model, X, call_model) is GRAPH


def test_inputs_and_forward_count() -> None:
    """The number of samples does not; shapes, dtypes, keywords and the function that calls the model do."""
    model = _kept()
    assert cache.get(model, X[:1], call_model) is GRAPH
    for other in (torch.randn(4, 5, 3), X.double(), {"x": X}, (X,)):
        assert cache.get(model, other, call_model) is None
    assert cache.get(model, X, lambda model, batch: model(batch)) is None


def test_the_cache_keeps_nothing_alive() -> None:
    """Neither the model nor the function; another model at the same place is another."""
    def forward(model: nn.Module, batch: Any) -> Any:
        return model(batch)

    model = Network()
    cache.put(model, X, forward, GRAPH)
    gone = weakref.ref(forward)
    del forward
    gc.collect()
    assert gone() is None
    assert cache.get(model, X, call_model) is None
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
