"""Recurrent cells that are written by hand: units of their state are scored by brute force, cut, and otherwise kept."""

from pathlib import Path

import pytest
import torch
import whole_way
from torch import Tensor, nn

from fastscore.graph.tracing import trace

UNITS = 8
WIDTH = 8
STATES = ("attribute", "of the input", "of a layer", "as a weight", "learned", "another type")


class Cell(nn.Module):
    """A GRU, LSTM or minimal RNN by its formulas, between an embedding and a head. state: what it begins with.

    fused: whether one layer makes all gates, or one each."""

    def __init__(self, kind: str = "GRU", state: str = "attribute", fused: bool = True) -> None:
        super().__init__()
        self.kind, self.state, self.fused, self.hidden = kind, state, fused, UNITS
        self.gates = gates = {"GRU": 3, "LSTM": 4, "RNN": 1}[kind]
        self.embed = nn.Linear(5, 4)
        wide = [gates * UNITS] if fused else [UNITS] * gates
        self.made = nn.ModuleList(nn.Linear(4, width) for width in wide)
        self.again = nn.ModuleList(nn.Linear(UNITS, width) for width in wide)
        if state == "learned":
            self.first = nn.Parameter(torch.randn(UNITS))
        self.inner, self.head = nn.Linear(UNITS, 6), nn.Linear(6, 3)

    def begin(self, x: Tensor) -> Tensor:
        """[N, units]."""
        if self.state == "attribute":
            return torch.zeros(len(x), self.hidden, device=x.device, dtype=x.dtype)
        if self.state == "of the input":
            return x.new_zeros((len(x), self.hidden))
        if self.state == "another type":
            return torch.zeros(self.hidden, dtype=torch.float32).to(x).expand(len(x), -1)
        return self.first.expand(len(x), -1)

    def of_layers(self, x: Tensor) -> Tensor:
        """The same, of a width that layers have."""
        if self.state == "of a layer":
            return x.new_zeros(len(x), self.again[0].in_features)
        return torch.zeros_like(self.inner.weight[:1]).expand(len(x), -1)

    def forward(self, x: Tensor) -> Tensor:
        c = h = self.of_layers(x) if self.state in ("of a layer", "as a weight") else self.begin(x)
        for step in self.embed(x).unbind(1):
            a, b = ([y for layer in layers for y in layer(read).chunk(self.gates if self.fused else 1, 1)]
                    for layers, read in ((self.made, step), (self.again, h)))
            if self.kind == "GRU":
                r, z = (a[0] + b[0]).sigmoid(), (a[1] + b[1]).sigmoid()
                h = (1 - z) * (a[2] + r * b[2]).tanh() + z * h
            elif self.kind == "LSTM":
                i, f, g, o = (p + q for p, q in zip(a, b, strict=True))
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                h = (a[0] + b[0]).tanh()
        return self.head(self.inner(h).relu())


class Joined(nn.Module):
    """An Elman cell that reads its input and its state as one, whose state stands to be read at every step.

    asks: who makes the zeros, and whose attribute they are of."""

    def __init__(self, asks: str = "itself") -> None:
        super().__init__()
        self.asks, self.embed, self.cell = asks, nn.Linear(5, 4), Elman(4, UNITS)
        self.inner, self.head = nn.Linear(UNITS, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell.begin(len(x)).to(x) if self.asks == "itself" else x.new_zeros(len(x), self.cell.hidden)
        states = x.new_zeros(len(x), x.shape[1], self.cell.hidden) if self.asks == "written to" else None
        made = []
        for number, step in enumerate(self.embed(x).unbind(1)):
            h = self.cell(step, h)
            made.append(h)
            if states is not None:
                states[:, number] = h
        return self.head(self.inner(torch.stack(made, 1) if states is None else states).relu().mean(1))


class Written(Joined):
    """The width of the state stands in the code."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), WIDTH if self.asks == "global" else 8)
        for step in self.embed(x).unbind(1):
            h = self.cell(step, h)
        return self.head(self.inner(h).relu())


class Elman(nn.Module):
    """The cell of Joined."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden, self.i2h = hidden, nn.Linear(width + hidden, hidden)

    def begin(self, samples: int) -> Tensor:
        """[N, units] of zeros."""
        return torch.zeros(samples, self.hidden)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.i2h(torch.cat([x, h], 1)).tanh()


class ConvCell(nn.Module):
    """A ConvGRU, or ConvLSTM, whose state begins with zeros."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.hidden_dim, more = UNITS, {"kernel_size": 3, "padding": 1}
        self.kind, self.embed = kind, nn.Conv2d(3, 4, **more)
        self.gates = nn.Conv2d(4 + UNITS, UNITS * (2 if kind == "GRU" else 4), **more)
        self.candidate = nn.Conv2d(4 + UNITS, UNITS, **more) if kind == "GRU" else nn.Identity()
        self.inner, self.head = nn.Conv2d(UNITS, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), self.hidden_dim, *x.shape[3:]).to(x)
        c = h
        for step in x.unbind(1):
            step = self.embed(step).relu()
            parts = torch.split(self.gates(torch.cat([step, h], 1)), self.hidden_dim, dim=1)
            if self.kind == "GRU":
                z, r = (part.sigmoid() for part in parts)
                h = (1 - z) * h + z * self.candidate(torch.cat((step, r * h), dim=1)).tanh()
            else:
                i, f, o, g = parts
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
        return self.head(self.inner(h).relu().mean((2, 3)))


class OfInputs(nn.Module):
    """A cell that reads the model's input itself, so that no layer has a part in what it reads first.

    kind: "elman"; one whose state comes "first"; with the output before, as "feedback"; "images"; or "detached"."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.hidden, self.outputs = kind, UNITS, 3
        more = UNITS + (3 if kind == "feedback" else 0)
        self.cell = nn.Conv2d(4 + more, UNITS, 3, padding=1) if kind == "images" else nn.Linear(5 + more, UNITS)
        self.inner, self.head = nn.Linear(UNITS, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, y = x.new_zeros(len(x), self.hidden, *x.shape[3:]), x.new_zeros(len(x), self.outputs)
        for number, step in enumerate(x.unbind(1)):
            read = {"first": [h, step], "feedback": [y, step, h]}.get(self.kind, [step, h])
            h = self.cell(torch.cat(read, 1)).tanh()
            y = self.head(self.inner(h.mean((2, 3)) if self.kind == "images" else h).relu())
            h = h.detach() if self.kind == "detached" and number == 1 else h
        return y


def _inputs(*shape: int) -> Tensor:
    return torch.randn(*shape or (3, 4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("kind", "state", "fused"), [
    *(("GRU", state, number % 2 == 0) for number, state in enumerate(STATES)), ("LSTM", "attribute", False),
    ("LSTM", "of the input", True), ("RNN", "attribute", True)])
def test_units_go(kind: str, state: str, fused: bool, tmp_path: Path) -> None:
    small = whole_way.check(lambda: Cell(kind, state, fused), _inputs(), ["embed", "made.0", "inner"], tmp_path).model
    assert small.inner.in_features == small.again[0].in_features == UNITS // 2
    assert small.hidden == (UNITS if state in ("of a layer", "as a weight", "learned") else UNITS // 2)


@pytest.mark.parametrize("asks", ["itself", "child", "written to"])
def test_zeros_that_are_joined(asks: str, tmp_path: Path) -> None:
    small = whole_way.check(lambda: Joined(asks), _inputs(), ["embed", "cell.i2h", "inner"], tmp_path).model
    assert (small.cell.i2h.in_features, small.cell.i2h.out_features, small.cell.hidden) == (2 + 4, 4, 4)


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_states_of_images(kind: str, tmp_path: Path) -> None:
    groups = ["embed", "gates", "inner"]
    small = whole_way.check(lambda: ConvCell(kind), _inputs(2, 3, 3, 5, 6), groups, tmp_path).model
    assert small.hidden_dim == small.inner.in_channels == UNITS // 2


@pytest.mark.parametrize("kind", ["elman", "first", "feedback", "images"])
def test_inputs_that_no_layer_made(kind: str, tmp_path: Path) -> None:
    """The zeros that the state begins with are worth nothing, whatever lies beside them."""
    x = _inputs(2, 3, 4, 5, 6) if kind == "images" else _inputs()
    small = whole_way.check(lambda: OfInputs(kind), x, ["cell", "inner"], tmp_path).model
    assert small.hidden == small.cell.weight.shape[0] == small.inner.in_features == UNITS // 2


def test_a_state_without_gradients_beside_inputs() -> None:
    graph = trace(whole_way.noisy(lambda: OfInputs("detached")), _inputs())
    assert [group.name for group in graph.groups] == ["inner"]
    assert graph.skipped["cell"].startswith("cell is called as well on what no layer makes")


def test_widths_written_in_the_code(tmp_path: Path) -> None:
    whole_way.check(lambda: Written("written"), _inputs(), ["embed", "cell.i2h", "inner"], tmp_path)


def test_widths_that_are_global() -> None:
    graph = trace(whole_way.noisy(lambda: Written("global")), _inputs())
    assert [group.name for group in graph.groups] == ["embed", "inner"]
    assert graph.skipped["cell.i2h"].startswith("the code of Written makes zeros of 8 channels that meet them")


class OfVectors(nn.Module):
    """Layers that read a constant without samples: embeddings of positions, numbered once for all, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 4), nn.Linear(4, UNITS), nn.Linear(UNITS, 3)
        self.positions, self.gate = nn.Embedding(6, 4), nn.Linear(7, UNITS)
        self.register_buffer("held", torch.linspace(-1, 1, 7))

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, 5] -> [N, 3]."""
        x = torch.tanh(self.first(x) + self.positions(torch.arange(x.shape[1], device=x.device)))
        return self.head((self.second(x).tanh() * self.gate(self.held).sigmoid()).mean(1))


def test_constants_without_samples(tmp_path: Path) -> None:
    small = whole_way.check(OfVectors, _inputs(), ["first", "second"], tmp_path).model
    assert small.positions.embedding_dim == 2
    assert small.gate.out_features == small.second.out_features == UNITS // 2


class Sparse(nn.Module):
    """Its first layer reads a sparse tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 5] -> [N, 3]."""
        return self.head(torch.relu(self.first(x.to_sparse())))


def test_sparse_inputs_are_no_error() -> None:
    assert "sparse" in trace(Sparse(), torch.randn(2, 5)).skipped["first"]


class Shifted(nn.Linear):
    """Its own code adds a single zero."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.new_zeros(2)[0]


class Stray(nn.Module):
    """Makes zeros that are no state: a concatenation writes over them, and a layer adds one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(10, UNITS), Shifted(UNITS, UNITS), nn.Linear(UNITS, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 5] -> [N, 3]."""
        both = x.new_zeros(len(x), 10)
        torch.cat([x, x], 1, out=both)
        return self.head(self.second(self.first(both).tanh()).tanh())


def test_zeros_that_are_no_state(tmp_path: Path) -> None:
    whole_way.check(Stray, _inputs(3, 5), ["first", "second"], tmp_path)
