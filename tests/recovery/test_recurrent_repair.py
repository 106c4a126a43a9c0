"""What recurrent layers are given back: means in bias_ih and bias_hh, linear reconstructions in their weights."""

import os
from dataclasses import replace
from typing import Any

import oracles
import pytest
import torch
import whole_way
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastscore

KINDS = (nn.GRU, nn.LSTMCell, *((nn.LSTM, nn.RNN, nn.GRUCell, nn.RNNCell) if "FASTSCORE_NIGHTLY" in os.environ else ()))


class Sequence(nn.Module):
    """A recurrent module, or a cell in a loop, between two layers; it begins with a parameter."""

    def __init__(self, kind: type[nn.Module], bias: bool = True) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 6), nn.Linear(8, 3)
        self.cell = issubclass(kind, nn.RNNCellBase)
        self.rnn: Any = kind(6, 8, bias=bias) if self.cell else kind(6, 8, 2, bias=bias, batch_first=True)
        self.first = nn.Parameter(torch.randn(1 if self.cell else 2, 1, 8))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        y, h = self.embed(x), self.first.expand(-1, len(x), -1).contiguous()
        if self.cell:
            state = (h[0], h[0]) if isinstance(self.rnn, nn.LSTMCell) else h[0]
            for step in y.unbind(1):
                state = self.rnn(step, state)
            return self.head(state[0] if isinstance(state, tuple) else state)
        if lengths is not None:
            y = pack_padded_sequence(y, lengths, batch_first=True, enforce_sorted=False)
        y, _ = self.rnn(y, (h, h) if isinstance(self.rnn, nn.LSTM) else h)
        return self.head((y if lengths is None else pad_packed_sequence(y, batch_first=True)[0]).sum(1))


def _model(kind: type[nn.Module], bias: bool = True) -> Any:
    return whole_way.noisy(lambda: Sequence(kind, bias))


def _inputs(samples: int = 12) -> Tensor:
    return torch.randn(samples, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _pruned(model: Any, batch: Any, group: str, gone: int, **options: Any) -> fastscore.PruneResult:
    """Without one channel of a group."""
    scores = fastscore.score(model, [batch], progress=False)
    values = torch.ones(len(scores[group]), dtype=torch.float64)
    units = 8 if group != "embed" else 6
    values[gone::units] = 1e-9
    chosen = replace(scores, totals={group: values})
    with oracles.untouched(model):
        result = fastscore.prune(model, chosen, batch, channels=1 - 1 / units, progress=False, **options)
    assert set((result.removed[group] % units).tolist()) == {gone}
    return result


def _constant(model: Any, unit: int) -> None:
    """Make a unit of the state the same at every step."""
    rnn = model.rnn
    gates = {"LSTM": "ifgo", "GRU": "rzn", "RNN": "h"}[type(rnn).__name__.removesuffix("Cell")]
    for name, parameter in rnn.named_parameters():
        rows = parameter.data.unflatten(0, (len(gates), 8))
        rows[:, unit] = 0 if name.startswith("weight") else rows[:, unit]
        if "f" in gates and name.startswith("bias"):
            rows[gates.index("f"), unit] = -1e3  # nothing is carried over
    with torch.no_grad():
        for layer in range(len(model.first)):
            x = torch.zeros(1, 6 if model.cell or layer == 0 else 8).double()
            if model.cell:
                state = model.first[0]
                made = rnn(x, (state, state) if "f" in gates else state)
                model.first[0, 0, unit] = (made[0] if "f" in gates else made)[0, unit]
                continue
            own = {name: value for name, value in rnn.named_parameters() if name.endswith(f"l{layer}")}
            b_i, b_h = own[f"bias_ih_l{layer}"], own[f"bias_hh_l{layer}"]
            i, h = (b.unflatten(0, (len(gates), 8))[:, unit] for b in (b_i, b_h))
            if gates == "h":
                value = (i + h)[0].tanh()
            elif gates == "rzn":
                value = (i[2] + (i[0] + h[0]).sigmoid() * h[2]).tanh()
            else:
                a = i + h
                value = a[3].sigmoid() * (a[0].sigmoid() * a[2].tanh()).tanh()
            model.first[layer, 0, unit] = value


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_channel_leaves_nothing_behind(kind: type[nn.Module]) -> None:
    """Of what the module reads, and of its state: the mean that biases take in is all that it gave."""
    model, x = _model(kind), _inputs()
    model.embed.weight.data[2] = 0
    for _ in range(200 if model.cell else 1):  # of cells the state is its own successor
        _constant(model, 3)
    with torch.no_grad():
        want = model(x)
    for group, gone in (("embed", 2), ("rnn.weight_ih" + ("" if model.cell else "_l0"), 3)):
        small = _pruned(model, x, group, gone).model
        torch.testing.assert_close(small(x), want, rtol=1e-6, atol=1e-6)
        alone = _pruned(model, x, group, gone, compensate=False).model
        assert not torch.allclose(alone(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_others_say_leaves_nothing_behind(kind: type[nn.Module]) -> None:
    """A channel that is an affine function of others, and a unit that is another's double: weights take them over."""
    model, x = _model(kind), _inputs()
    mixing = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mixing[2] = 0
    model.embed.weight.data[2] = mixing @ model.embed.weight.data
    for name, parameter in model.rnn.named_parameters():
        rows = parameter.data.unflatten(0, (-1, 8))
        rows[:, 3] = rows[:, 5]
        if name == "weight_ih_l1" or name.startswith("weight_hh"):
            parameter.data[:, 3] *= 1.7  # whatever reads it
    model.first.data[..., 3] = model.first.data[..., 5]
    with torch.no_grad():
        want = model(x)
    for group, gone in (("embed", 2), ("rnn.weight_ih" + ("" if model.cell else "_l0"), 3)):
        result = _pruned(model, x, group, gone)
        repaired = fastscore.reconstruct(model, result, x.split(3), "linear", ridges=(1e-10,), progress=False)
        torch.testing.assert_close(repaired.model(x), want, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(result.model(x), want, rtol=1e-5, atol=1e-5)


class Bare(nn.Module):
    """Weights that read units without a bias: with a projection, weight_hr; with bias=False, weight_hh."""

    def __init__(self, projected: bool) -> None:
        super().__init__()
        self.rnn: Any = nn.LSTM(5, 8, proj_size=4, batch_first=True) if projected else \
            nn.GRU(5, 8, bias=False, batch_first=True)
        self.head = nn.Linear(4 if projected else 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].sum(1))


@pytest.mark.parametrize("projected", [True, False])
def test_what_others_say_goes_into_weights_without_a_bias(projected: bool) -> None:
    """A unit's double goes: the weights alone take it over, and no bias appears; a note says who takes no mean."""
    model, x = whole_way.noisy(lambda: Bare(projected)), _inputs()
    for name, parameter in model.rnn.named_parameters():
        if not name.startswith("weight_hr"):
            rows = parameter.data.unflatten(0, (-1, 8))
            rows[:, 3] = rows[:, 5]
    with torch.no_grad():
        want = model(x)
    result = _pruned(model, x, "rnn.weight_ih_l0", 3)
    reads = f"rnn.weight_h{'r' if projected else 'h'}_l0"
    assert result.report.notes["means"].startswith(f"{reads} has no bias: no mean")
    assert result.report.compensation.endswith(
        "read as zero (no bias can take what they gave on average)" if projected else
        "in biases, but for what the note on means names")  # the head has one
    assert not torch.allclose(result.model(x), want, rtol=1e-5, atol=1e-5)
    repaired = fastscore.reconstruct(model, result, x.split(3), "linear", ridges=(1e-10,), progress=False)
    torch.testing.assert_close(repaired.model(x), want, rtol=1e-5, atol=1e-5)
    assert {name for name, _ in repaired.model.named_parameters()} == {name for name, _ in model.named_parameters()}
    meant = fastscore.reconstruct(model, result, x.split(3), "mean", progress=False).model.get_parameter(reads)
    assert torch.equal(meant, result.model.get_parameter(reads))


@pytest.mark.parametrize("kind", [nn.LSTM])
def test_means_of_the_state(kind: type[nn.RNNBase]) -> None:
    """bias_hh takes in what weight_hh makes of the mean of what it read, bias_ih_l1 likewise; the mask does as much."""
    model, x = _model(kind), _inputs()
    result = _pruned(model, x, "rnn.weight_ih_l0", 3)
    read: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        y, states = model.embed(x), model.first.expand(-1, len(x), -1).contiguous()
        outputs = []
        for layer in range(2):
            one = kind(y.shape[-1], 8, batch_first=True).double()
            one.load_state_dict({name.replace("l1", "l0"): value for name, value in model.rnn.state_dict().items()
                                 if name.endswith(f"l{layer}")})
            state: Any = states[layer:layer + 1]
            state = (state, state) if kind is nn.LSTM else state
            made = []
            for step in y.unbind(1):
                read[layer].append((state[0] if kind is nn.LSTM else state)[0])
                made.append(one(step[:, None], state)[0])
                state = one(step[:, None], state)[1]
            y = torch.cat(made, 1)
            outputs.append(y)
    stays = [row for row in range(len(model.rnn.bias_ih_l0)) if row % 8 != 3]
    for layer in range(2):
        weight, bias = model.rnn.get_parameter(f"weight_hh_l{layer}"), model.rnn.get_parameter(f"bias_hh_l{layer}")
        want = (bias + weight[:, 3] * torch.stack(read[layer])[..., 3].mean())[stays]
        torch.testing.assert_close(result.model.rnn.get_parameter(f"bias_hh_l{layer}"), want, rtol=1e-6, atol=1e-8)
    want = (model.rnn.bias_ih_l1 + model.rnn.weight_ih_l1[:, 3] * outputs[0][..., 3].mean())[stays]
    torch.testing.assert_close(result.model.rnn.bias_ih_l1, want, rtol=1e-6, atol=1e-8)
    assert torch.equal(result.model.rnn.bias_ih_l0, model.rnn.bias_ih_l0[stays])
    scores = fastscore.score(model, [x], progress=False)
    result = fastscore.prune(model, scores, x, channels=0.6, progress=False)
    with torch.no_grad(), fastscore.mask(model, scores, 0.4, x) as masked:
        assert {name: index.tolist() for name, index in masked.items()} == \
            {name: index.tolist() for name, index in result.removed.items()}
        torch.testing.assert_close(model(x), result.model(x), rtol=1e-9, atol=1e-10)


def test_padding_is_not_read() -> None:
    """Moments are those of the steps that there are; a module without biases keeps what it has."""
    model = _model(nn.LSTM)
    batch = {"x": _inputs(), "lengths": torch.tensor([4, 1, 2, 3] * 3)}
    batch["x"][:, 1:] += 100 * (torch.arange(1, 4)[:, None] >= batch["lengths"][:, None, None])  # in padding alone
    batches = [{name: value[at:at + 4] for name, value in batch.items()} for at in (0, 4, 8)]
    result = _pruned(model, batch, "embed", 2, compensate=False)
    repaired = fastscore.reconstruct(model, result, batches, "mean", progress=False).model
    inside = torch.arange(4) < batch["lengths"][:, None]
    with torch.no_grad():
        mean = model.embed(batch["x"])[inside].mean(0)
    torch.testing.assert_close(repaired.rnn.bias_ih_l0, model.rnn.bias_ih_l0 + model.rnn.weight_ih_l0[:, 2] * mean[2],
                               rtol=1e-6, atol=1e-8)
    bare = _model(nn.LSTM, bias=False)
    small = _pruned(bare, _inputs(), "embed", 2).model
    assert torch.equal(small.rnn.weight_hh_l0, bare.rnn.weight_hh_l0)
    assert {name.partition("_l")[0] for name, _ in small.rnn.named_parameters()} == {"weight_ih", "weight_hh"}


class Reads(Sequence):
    """Its code reads a bias of the recurrent module itself."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return super().forward(x, lengths) + self.rnn.bias_ih_l0.square().mean()


def test_a_bias_that_other_code_reads_takes_nothing() -> None:
    model, x = whole_way.noisy(lambda: Reads(nn.LSTM)), _inputs()
    result = _pruned(model, x, "embed", 2)
    assert torch.equal(result.model.rnn.bias_ih_l0, model.rnn.bias_ih_l0)
    assert "rnn.weight_ih_l0 has a bias that other code reads as well" in result.report.notes["biases"]
    repaired = fastscore.reconstruct(model, result, x.split(3), "linear", progress=False)
    assert torch.equal(repaired.model.rnn.bias_ih_l0, model.rnn.bias_ih_l0)
