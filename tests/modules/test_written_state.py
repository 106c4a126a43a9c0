"""What a model's own code writes to itself in a block is undone, whatever it is kept in; what is written on purpose is
not."""

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastscore.modules import written_state
from fastscore.modules.inspection import submodule


class Keeps(nn.Module):
    """Something of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.pair, self.recent = 0, (torch.zeros(2), [torch.zeros(3)]), deque([1, 2], maxlen=2)
        self.ordered, self.more, self.counted = OrderedDict(a=1), defaultdict(list, b=[1]), Counter("cc")
        one = torch.zeros(1)
        self.wide, self.made_of = one.expand(4), one
        self.register_buffer("running_mean", torch.zeros(2))
        self.register_buffer("aside", torch.zeros(2), persistent=False)
        self.register_buffer("nans", torch.full((2,), torch.nan))
        with torch.inference_mode():
            self.inferred = torch.zeros(2)

    @property
    def table(self) -> Tensor:
        return vars(self).setdefault("table", torch.arange(3))


def _read_table(module: Any) -> None:
    assert len(module.table) == 3


def _write_twice(module: Any) -> None:
    module.recent.append(3)
    module.recent.append(4)


def _infer(module: Any) -> None:
    with torch.inference_mode():
        module.running_mean.add_(1)
        module.inferred.add_(1)


WRITES: dict[str, Callable[[Any], object]] = {
    "a number": lambda module: setattr(module, "count", 1),
    "of a tuple": lambda module: module.pair[0].add_(1),
    "of a list in a tuple": lambda module: module.pair[1].append(module.pair[1][0].add_(1)),
    "a deque": _write_twice,
    "an ordered dict": lambda module: module.ordered.update(b=2),
    "a default": lambda module: module.more["c"].append(2),
    "a list in a dict": lambda module: module.more["b"].append(2),
    "a counter": lambda module: module.counted.update("cd"),
    "what others show": lambda module: module.made_of.add_(1),
    "statistics that are no BatchNorm's": lambda module: module.running_mean.add_(1),
    "uncounted": lambda module: module.running_mean.data.copy_(torch.ones(2)),
    "in inference mode": _infer,
    "another size": lambda module: module.running_mean.resize_(5).fill_(1),
    "another buffer": lambda module: module.register_buffer("aside", torch.ones(3)),
    "nan": lambda module: module.nans.zero_(),
    "behind a property": _read_table,
    "an attribute less": lambda module: delattr(module, "count")}


def _state(module: Any) -> Any:
    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return [repr(each) for each in value.tolist()]
        if isinstance(value, dict):
            return type(value).__name__, {key: plain(each) for key, each in value.items()}
        return (type(value).__name__, list(map(plain, value))) if isinstance(value, (tuple, list, deque)) else value

    return {name: plain(value) for name, value in vars(module).items() if name != "_non_persistent_buffers_set"}, \
        list(module.state_dict())


@pytest.mark.parametrize("kind", WRITES)
def test_what_is_written_is_undone(kind: str) -> None:
    model = nn.Sequential(Keeps())
    module, before = model[0], _state(model[0])
    with written_state.undone(model):
        WRITES[kind](module)
        assert _state(module) != before
    assert _state(module) == before
    assert module.recent.maxlen == 2
    assert module.wide.data_ptr() == module.made_of.data_ptr()


def test_statistics_and_what_shows_them_or_a_parameter_stay_as_they_are_written() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    model.seen, model.rows = model[0].running_mean, model[1].weight.data[:1]
    with written_state.undone(model), torch.no_grad():
        model[0].running_mean.fill_(3)
        model[1].weight.fill_(4)
    assert model.seen.tolist() == [3, 3]
    assert model.rows.tolist() == [[4, 4]]


class Makes(nn.Module):
    """A layer and a parameter, when it first runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain, self.calls = None, None, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.layer is None:
            self.layer, self.gain = nn.Linear(x.shape[1], 2), nn.Parameter(torch.ones(2))
        return self.layer(x) * self.gain


def test_what_a_first_run_makes_stays() -> None:
    model, x = nn.Sequential(nn.LazyLinear(3), Makes()), torch.randn(2, 4)
    with written_state.undone(model):
        y = model(x)
    assert torch.equal(model(x), y)
    assert model[0].in_features == 4
    assert not hasattr(model[0], "_initialize_hook")
    assert model[1].calls == 1  # of this run alone


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2))
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(x.sum(0))
        self.calls = self.calls + 1
        return self.inner(x)


def test_of_parts_that_torch_jit_made() -> None:
    model = nn.Sequential(torch.jit.script(Part()))
    assert submodule(model, "0.inner.0") is model.get_submodule("0.inner.0")
    with written_state.undone(model):
        model(torch.ones(3, 2))
        assert model[0].seen.tolist() == [3, 3]
    assert model[0].seen.tolist() == [0, 0]
    assert float(model[0].calls) == 0
