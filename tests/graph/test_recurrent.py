"""Units of the state of nn.LSTM, nn.GRU, nn.RNN and their cells: scored by brute force, cut, and otherwise kept."""

import copy
import random
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
import whole_way
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastscore
from fastscore.graph.tracing import trace
from fastscore.modules.macs.counting import count
from fastscore.modules.weights import held_weights

KINDS = (nn.LSTM, nn.GRU, nn.RNN)
CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
STATES = ("none", "own", "attribute", "learned", "made")


class Sequences(nn.Module):
    """A recurrent module between layers, of a kind that a seed draws.

    state: what it begins with: nothing, zeros of its own width or of one that this module keeps, a parameter, or what
    a layer makes of the input.
    """

    def __init__(self, seed: int, state: str = "none") -> None:
        super().__init__()
        draw = random.Random(seed)
        self.time, self.layers, self.state = draw.random() < 0.5, draw.choice((1, 2)), state
        both, kind = draw.random() < 0.5, KINDS[seed % 3]
        self.units, self.read = draw.choice((4, 6)), draw.choice(("last", "all", "state", "cell", "normed"))
        self.read = "state" if self.read == "cell" and kind is not nn.LSTM else self.read
        more = {"nonlinearity": draw.choice(("tanh", "relu"))} if kind is nn.RNN else {}
        self.embed = nn.Linear(5, 4)
        self.rnn = kind(4, self.units, self.layers, batch_first=self.time, bidirectional=both,
                        bias=draw.random() < 0.8, **more)
        self.places = self.layers * (1 + both)
        self.norm = nn.LayerNorm(self.units * (1 + both))
        if state == "learned":
            self.first = nn.Parameter(torch.randn(self.places, 1, self.units))
        elif state == "made":
            self.maker = nn.Linear(5, self.units)
        self.head = nn.Linear(self.units * (1 + both), 3)

    def begin(self, x: Tensor) -> Tensor | None:
        """[places, N, units]."""
        if self.state == "none":
            return None
        if self.state == "learned":
            return self.first.expand(-1, len(x), -1).contiguous()
        if self.state == "made":
            return self.maker(x.mean(1)).tanh().expand(self.places, -1, -1).contiguous()
        units = self.units if self.state == "attribute" else self.rnn.hidden_size
        return torch.zeros(self.places, len(x), units).to(x)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        h = self.begin(x)
        given = (h, h) if isinstance(self.rnn, nn.LSTM) and h is not None else h
        y: Any = self.embed(x) if self.time else self.embed(x).transpose(0, 1)
        if lengths is not None:
            y = pack_padded_sequence(y, lengths, self.time, enforce_sorted=False)
        y, last = self.rnn(y, given)
        if lengths is not None:
            y, _ = pad_packed_sequence(y, self.time, total_length=x.shape[1])
        if self.read in ("state", "cell"):
            ends = last[self.read == "cell"] if isinstance(last, tuple) else last
            return self.head(torch.cat(list(ends[-2:]), -1) if self.rnn.bidirectional else ends[-1])
        y = y if self.time else y.transpose(0, 1)
        if self.read == "normed":
            return self.head(self.norm(y).mean(1))
        return self.head(y[:, -1] if self.read == "last" else y.sum(1))


class Loop(nn.Module):
    """A cell in a loop of the model's own."""

    def __init__(self, cell: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.embed, self.cell, self.head, self.units = nn.Linear(5, 4), cell(4, 6), nn.Linear(6, 3), 6

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros(len(x), self.units).to(x)
        state: Any = (zeros, zeros) if isinstance(self.cell, nn.LSTMCell) else zeros
        for step in self.embed(x).unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


def _inputs(samples: int = 3, steps: int = 4) -> Tensor:
    return torch.randn(samples, steps, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _check(model: nn.Module, batch: Any) -> fastscore.PruneResult:
    """Scores by brute force through PyTorch's own kernels, true MACs, smaller = masked."""
    tensors = {"x": batch} if isinstance(batch, Tensor) else batch
    with torch.no_grad():
        z = model(**tensors)
    v = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with oracles.untouched(model):
        graph = trace(model, batch)
        scores = fastscore.score(model, [batch], gradient="loss", normalize=False, progress=False,
                                 loss=lambda output, batch: (output * v).sum())
        assert set(graph.skipped) == {"head"}
        for group in graph.groups:
            exact = whole_way.sums(model, group, batch, v).square().mean(0)
            torch.testing.assert_close(scores[group.name].double(), exact, rtol=1e-5, atol=1e-9 * float(exact.max()))
        options: dict[str, Any] = {"scope": "layer", "compensate": False}
        result = fastscore.prune(model, scores, batch, channels=0.5, **options)
        with torch.no_grad(), fastscore.mask(model, scores, 0.5, batch, **options):
            masked = model(**tensors)
    assert set(result.removed) == set(scores)
    torch.testing.assert_close(result.model(**tensors), masked, rtol=1e-9, atol=1e-12)
    assert result.report.macs == (count(model, batch).macs, count(result.model, batch).macs)
    return result


@pytest.mark.parametrize("seed", range(10))
def test_a_unit_goes_from_every_layer_and_direction(seed: int) -> None:
    model = whole_way.noisy(lambda: Sequences(seed, STATES[seed % 5]), seed)
    batch = _inputs() if seed % 2 else {"x": _inputs(), "lengths": torch.tensor([3, 4, 1])}
    small = _check(model, batch).model
    before, after = model.rnn, small.rnn
    assert type(after) is type(before)
    assert (after.input_size, after.hidden_size) == (2, model.units // 2)
    assert [tuple(parameter.shape) for parameter in after.parameters()] == [
        tuple(parameter.shape) for parameter in type(before)(
            2, model.units // 2, before.num_layers, bidirectional=before.bidirectional, bias=before.bias).parameters()]


@pytest.mark.parametrize("cell", CELLS)
def test_cells(cell: type[nn.RNNCellBase]) -> None:
    small = _check(whole_way.noisy(lambda: Loop(cell)), _inputs()).model
    assert (small.cell.input_size, small.cell.hidden_size, small.units) == (2, 3, 3)


def test_the_whole_way(tmp_path: Path) -> None:
    """Budgets, export, a training step, save and load."""
    result = whole_way.check(lambda: Sequences(6), _inputs(), ["embed", "rnn.weight_ih_l0"], tmp_path)
    units = result.model.rnn.hidden_size
    assert units == 3
    with torch.no_grad():
        x, model = result.model.embed(_inputs(2, 6)), result.model.rnn  # [N, T, C]
        x = x if model.batch_first else x.transpose(0, 1)
        time = int(model.batch_first)
        first, state = model(x.narrow(time, 0, 3))
        if not model.bidirectional:
            torch.testing.assert_close(torch.cat([first, model(x.narrow(time, 3, 3), state)[0]], time), model(x)[0])


def test_batches_of_other_lengths_than_the_first() -> None:
    """How many steps there are is no part of the graph."""
    model = whole_way.noisy(lambda: Sequences(3))
    batches = [_inputs(steps=steps) for steps in (4, 7, 2)]
    every = fastscore.score(model, batches, progress=False)
    assert set(every) == {"embed", "rnn.weight_ih_l0"}
    apart = [fastscore.score(model, [batch], gradient="loss", normalize=False, progress=False,
                             loss=lambda output, batch: output.sum()) for batch in batches]
    whole = fastscore.score(model, batches, gradient="loss", normalize=False, progress=False,
                            loss=lambda output, batch: output.sum())
    want = torch.stack([each["rnn.weight_ih_l0"] for each in apart]).mean(0)
    torch.testing.assert_close(whole["rnn.weight_ih_l0"], want)


class Given(nn.Module):
    """Reads a state that it is given, or that it has kept from its last call."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.rnn, self.head, self.keeps, self.kept = nn.GRU(5, 4, batch_first=True), nn.Linear(4, 3), keeps, None

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        y, last = self.rnn(x, self.kept if self.keeps else state)
        self.kept = last.detach()
        return self.head(y[:, -1])


@pytest.mark.parametrize(("keeps", "state", "reason"), [
    (True, None, "something else comes to rnn.weight_hh_l0 each time the model runs on the same input"),
    (False, torch.ones(1, 3, 4, dtype=torch.float64), "rnn.weight_hh_l0 is called as well on what no layer makes"),
    (False, torch.zeros(1, 3, 4, dtype=torch.float64), r"does not run with fewer channels there \(rnn \(GRU\): Run"),
])
def test_states_that_come_from_outside_are_kept(keeps: bool, state: Tensor | None, reason: str) -> None:
    model = whole_way.noisy(lambda: Given(keeps))
    model.kept = None
    graph = trace(model, {"x": _inputs()} if state is None else {"x": _inputs(), "state": state})
    assert not graph.groups
    assert any(re.search(reason, why) for why in graph.skipped.values()), graph.skipped


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(5, 4, 2, batch_first=True, bidirectional=True, dropout=0.4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def test_training_with_a_scorer_is_training_without() -> None:
    """The same gradients, dropout included; parameters come back in their order, under their names."""
    torch.manual_seed(0)
    plain = Dropping().double()
    tapped = copy.deepcopy(plain)
    scorer = fastscore.Scorer(tapped, _inputs(), importance="molchanov-group", normalize=False)
    for model in (plain, tapped):
        torch.manual_seed(1)
        with scorer if model is tapped else nullcontext():
            model(_inputs()).square().sum().backward()
    for (name, one), (other, two) in zip(plain.named_parameters(), tapped.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(two.grad, one.grad)
    assert list(scorer.scores()) == ["rnn.weight_ih_l0"]
    want = sum((parameter * parameter.grad).square().unflatten(0, (4, 4)).transpose(0, 1).flatten(1).sum(1)
               for parameter in plain.rnn.parameters())
    torch.testing.assert_close(scorer.scores()["rnn.weight_ih_l0"].double(), want.detach().repeat(4), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_pytorch_does(kind: type[nn.RNNBase]) -> None:
    model = kind(5, 4, 2, bidirectional=True, dropout=0.5).double()
    x, state = _inputs(), torch.randn(4, 4, 4, dtype=torch.float64)
    given = (state, -state) if kind is nn.LSTM else state
    calls = [(x,), (x, given), (x[0],), (pack_padded_sequence(x, [1, 3, 2, 3], enforce_sorted=False), given)]
    for training in (False, True):
        for args in calls[:2 + 2 * (not training)]:  # packed, or of one sample, dropout falls elsewhere
            model.train(training)
            found = []
            for replaced in (False, True):
                handles = list(held_weights.replace(model)) if replaced else []
                torch.manual_seed(0)
                found.append(model(*args))
                for handle in handles:
                    handle.remove()
            torch.testing.assert_close(_flat(found[1]), _flat(found[0]), rtol=1e-9, atol=1e-12)


def _flat(returned: Any) -> list[Tensor]:
    if isinstance(returned, Tensor):
        return [returned]
    return [tensor for each in returned if each is not None for tensor in _flat(each)]
