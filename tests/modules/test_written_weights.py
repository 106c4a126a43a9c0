"""Models whose forward pass writes to weights, their own or those of their parts: a user's stay as they are."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace
from fastscore.modules.evaluation_copy import evaluation_copy


class Writing(nn.Module):
    """Writes to the weight of a part by the way of that name, as transformers' RWKV does before its first pass."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(8, 3)
        self.scale, self.way, self.done = nn.Parameter(torch.rand(10)), way, False

    def once(self) -> None:
        if not self.done:
            self.second.weight.data.div_(2)
            self.done = True

    def every(self) -> None:
        for parameter in self.second.parameters():
            parameter.data.clamp_(-0.2, 0.2)

    def own(self) -> None:
        with torch.no_grad():
            self.scale.clamp_(0, 0.5)

    def elsewhere(self) -> None:
        _clip(self)

    def forward(self, x: Tensor) -> Tensor:
        {"once": self.once, "every": self.every, "own": self.own, "elsewhere": self.elsewhere}[self.way]()
        return self.head(torch.relu(self.second(torch.relu(self.first(x)) * self.scale)))


def _clip(model: Writing) -> None:
    model.second.weight.data.clamp_(-0.2, 0.2)


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
CALLS: dict[str, Callable[[nn.Module], object]] = {
    "trace": lambda model: trace(model, X),
    "score": lambda model: fastscore.score(model, [X], progress=False),
    "scorer": lambda model: fastscore.Scorer(model, X),
    "prune": lambda model: fastscore.prune(
        model, fastscore.score(model, [X], importance="magnitude-l2", progress=False), X, channels=0.8)}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("way", ["once", "every", "own", "elsewhere"])
def test_a_users_weights_stay(way: str, call: str) -> None:
    model = Writing(way).eval()
    with untouched(model):
        CALLS[call](model)
    assert not model.done


class Scaling(nn.Module):
    """Looks rows up in a table of its own, by a function, which scales them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.head = nn.Parameter(torch.randn(9, 6)), nn.Linear(6, 10), nn.Linear(10, 3)

    def rows(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.table, max_norm=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(self.rows(x)))).mean(1)


class ScalingByPlace(Scaling):
    def rows(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.table, None, 0.5)


class ScalingBags(Scaling):
    def rows(self, x: Tensor) -> Tensor:
        return F.embedding_bag(x.reshape(-1, 1), self.table, None, 0.5).unflatten(0, x.shape)


class ScalingByList(Scaling):
    def rows(self, x: Tensor) -> Tensor:
        settings = None, 0.5
        return F.embedding(x, self.table, *settings)


ROWS: dict[str, Callable[..., Tensor]] = {
    "kept": lambda x, table: F.embedding(x, table, None, 0.5),
    "bags": lambda x, table: F.embedding_bag(x.reshape(-1, 1), table, None, 0.5).unflatten(0, x.shape),
    "clamped": lambda x, table: F.embedding(x, table.detach().clamp_(-0.2, 0.2))}


class ScalingByFunctions(Scaling):
    """Code that does not say which of the functions that it holds it calls."""

    names: tuple[str, ...] = ("kept", "bags")

    def rows(self, x: Tensor) -> Tensor:
        return sum(ROWS[name](x, self.table) for name in self.names)


class Clamping(ScalingByFunctions):
    names = "clamped",


@pytest.mark.parametrize("kind", [Scaling, ScalingByPlace, ScalingBags, ScalingByList, ScalingByFunctions, Clamping])
def test_rows_that_a_function_scales_stay(kind: type[Scaling]) -> None:
    model, x = kind().eval(), torch.randint(9, (4, 5))
    with untouched(model):
        scores = fastscore.score(model, [x], progress=False)
        fastscore.prune(model, scores, x, channels=0.8, calibration=[x, x], repair="linear")


class TiedScaling(nn.Module):
    """A head reads the rows that an embedding scales in place."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up, self.down = nn.Embedding(9, 6, max_norm=0.5), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x)
        return F.linear(h + self.down(torch.relu(self.up(h))), self.words.weight)


def test_a_head_that_reads_rows_as_they_are_scaled_has_a_way_out() -> None:
    model, x = TiedScaling().double().eval(), torch.randint(9, (4, 5))
    with untouched(model), pytest.raises(ValueError, match="words scales rows of its weight in place") as raised:
        fastscore.score(model, [x], progress=False)
    calls, sets = str(raised.value).split("scale all rows once, ")[1].split(", and set ")
    with torch.no_grad():
        exec(f"{calls}\n{sets}", {"model": model, "torch": torch})
        assert model.words.weight.norm(dim=1).max() < 0.5 + 1e-6
    with untouched(model):
        assert "up" in fastscore.score(model, [x], progress=False)


class TiedByFunction(TiedScaling):
    def __init__(self) -> None:
        super().__init__()
        self.words.max_norm = None

    def forward(self, x: Tensor) -> Tensor:
        h = F.embedding(x, self.words.weight, None, 0.5)
        return F.linear(h + self.down(torch.relu(self.up(h))), self.words.weight)


def test_a_weight_that_a_function_writes_to_is_named() -> None:
    model, x = TiedByFunction().double().eval(), torch.randint(9, (4, 5))
    with untouched(model), pytest.raises(ValueError, match=r"its code writes to words\.weight whenever it runs"):
        fastscore.score(model, [x], progress=False)


def test_weights_that_no_code_names_are_shared() -> None:
    model = Writing("once")
    copied = evaluation_copy(nn.Sequential(model, nn.Linear(3, 3)))
    assert copied[0].second.weight.data_ptr() != model.second.weight.data_ptr()
    plain = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    assert evaluation_copy(plain)[0].weight.data_ptr() == plain[0].weight.data_ptr()
