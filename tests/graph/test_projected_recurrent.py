"""LSTMs that project their state (proj_size): units, and what is made of them, are channels of their own."""

from pathlib import Path
from typing import Any

import pytest
import torch
import whole_way
from test_recurrent import _check, _flat, _inputs
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastscore
from fastscore.graph.tracing import trace
from fastscore.modules.weights import held_weights

UNITS, WIDTH = 8, 3


class Projected(nn.Module):
    """It begins with nothing, zeros, a parameter, or what a layer makes; what comes out last is read, or all of it, or
    its state, or its cells."""

    def __init__(self, layers: int, both: bool, time: bool, state: str, read: str) -> None:
        super().__init__()
        self.places, self.time, self.state, self.read = layers * (1 + both), time, state, read
        self.units, self.width = UNITS, WIDTH
        self.embed = nn.Linear(5, 4)
        self.rnn = nn.LSTM(4, UNITS, layers, batch_first=time, bidirectional=both, proj_size=WIDTH)
        if state == "learned":
            self.h, self.c = (nn.Parameter(torch.randn(self.places, 1, width)) for width in (WIDTH, UNITS))
        elif state == "made":
            self.to_h, self.to_c = nn.Linear(5, WIDTH), nn.Linear(5, UNITS)
        self.head = nn.Linear(UNITS if read == "cells" else WIDTH * (1 + both), 3)

    def begin(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.state == "learned":
            return self.h.expand(-1, len(x), -1).contiguous(), self.c.expand(-1, len(x), -1).contiguous()
        if self.state == "made":
            h, c = (made(x.mean(1)).tanh().expand(self.places, -1, -1).contiguous() for made in (self.to_h, self.to_c))
            return h, c
        if self.state == "attribute":
            h, c = (torch.zeros(self.places, len(x), width).to(x) for width in (self.width, self.units))
            return h, c
        return None

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        y: Any = self.embed(x) if self.time else self.embed(x).transpose(0, 1)
        if lengths is not None:
            y = pack_padded_sequence(y, lengths, self.time, enforce_sorted=False)
        y, last = self.rnn(y, self.begin(x))
        if lengths is not None:
            y, _ = pad_packed_sequence(y, self.time, total_length=x.shape[1])
        y = y if self.time else y.transpose(0, 1)
        if self.read == "cells":
            return self.head(last[1][-1])
        return self.head(y[:, -1] if self.read == "last" else y.sum(1))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("layers", "both", "time", "state", "read"), [
    (1, False, True, "none", "last"), (2, True, False, "learned", "all"), (1, True, True, "made", "cells"),
    (2, False, True, "attribute", "all")])
def test_units_and_what_is_made_of_them(layers: int, both: bool, time: bool, state: str, read: str) -> None:
    model = whole_way.noisy(lambda: Projected(layers, both, time, state, read))
    batch = _inputs() if layers == 2 else {"x": _inputs(), "lengths": torch.tensor([3, 4, 1])}
    small = _check(model, batch).model
    assert type(small.rnn) is nn.LSTM
    assert WIDTH > small.rnn.proj_size >= 1
    assert UNITS > small.rnn.hidden_size > WIDTH  # more than PyTorch takes for no projection
    assert [tuple(parameter.shape) for parameter in small.rnn.parameters()] == [
        tuple(parameter.shape) for parameter in nn.LSTM(2, small.rnn.hidden_size, layers, bidirectional=both,
                                                        proj_size=small.rnn.proj_size).parameters()]
    with torch.no_grad():  # another length, and PyTorch's own kernels against its operations
        x = small.embed(_inputs(2, 6))
        x = x if time else x.transpose(0, 1)
        want = small.rnn(x)
        handles = list(held_weights.replace(small))
        torch.testing.assert_close(_flat(small.rnn(x)), _flat(want), rtol=1e-9, atol=1e-12)
        for handle in handles:
            handle.remove()


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_the_whole_way(tmp_path: Path) -> None:
    """Budgets, export, a training step, save and load; means go into biases of what reads the projection."""
    groups = ["embed", "rnn.weight_ih_l0", "rnn.weight_hr_l0"]
    whole_way.check(lambda: Projected(1, False, True, "none", "all"), _inputs(), groups, tmp_path)
    model, x = whole_way.noisy(lambda: Projected(2, False, True, "learned", "all")), _inputs(12)
    model.rnn.weight_hr_l0.data[1] = model.rnn.weight_hr_l0.data[2] * 2  # the second is twice the third, in all layers
    model.rnn.weight_hr_l1.data[1] = model.rnn.weight_hr_l1.data[2] * 2
    model.h.data[..., 1] = model.h.data[..., 2] * 2
    scores = fastscore.score(model, [x], progress=False)
    chosen = fastscore.Scores({"rnn.weight_hr_l0": torch.tensor([1.0, 0.0, 1.0]).double()}, scores.origin,
                              means=scores.means, coverage=scores.coverage)
    result = fastscore.prune(model, chosen, x, channels=0.7, progress=False)
    assert result.removed["rnn.weight_hr_l0"].tolist() == [1]
    repaired = fastscore.reconstruct(model, result, x.split(3), "linear", ridges=(1e-10,), progress=False)
    with torch.no_grad():
        torch.testing.assert_close(repaired.model(x), model(x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(result.model(x), model(x), rtol=1e-5, atol=1e-5)


def test_trials_leave_as_many_units_as_have_to_stay() -> None:
    """With fewer, PyTorch takes the module for one without a projection; what is made of the units goes all the same.
    """
    model = nn.Sequential(nn.Linear(5, 4), Last(nn.LSTM(4, 3, batch_first=True, proj_size=2)), nn.Linear(2, 3))
    graph = trace(model.double().eval(), _inputs())
    assert [group.name for group in graph.groups] == ["0", "1.rnn.weight_ih_l0", "1.rnn.weight_hr_l0"]
    assert set(graph.skipped) == {"2"}


class Last(nn.Module):
    def __init__(self, rnn: nn.LSTM) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]
