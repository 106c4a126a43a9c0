"""nn.LSTM, nn.GRU, nn.RNN and their cells, whose weights run as layers: weight_ih on what a layer reads, at every step,
and weight_hh on its state.

A unit of the state is a channel: rows of all gates make it (4 of an LSTM, 3 of a GRU, 1 of an RNN), weight_hh reads it
at the next step, and whoever reads the outputs does. With proj_size they read what weight_hr makes of the units, whose
outputs are other channels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from fastscore.modules.weights.parameter_layers import HoldsLayers, Kinds, ParameterLinear, Side

_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
_FIRST = ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse")  # that read what the module is given
_SKETCHED, _EXACT, _GIVEN, _INSIDE = "_sketched", "_exact_rows", "_given_constant", "_inside"
State = tuple[Tensor, ...]  # h, and c of an LSTM: [N, H] each
Project = Callable[[Tensor], Tensor]


class GateLinear(ParameterLinear):
    """A Linear of weight_ih, or weight_hh, of a layer of such a module."""

    @property
    def name(self) -> str:
        """That of the parameter."""
        return self._of[1]

    @classmethod
    def attributes(cls, name: str, side: Side) -> tuple[str, ...]:
        """The width that the module keeps, where a parameter has it."""
        if side == "outputs":
            return ()
        return ("hidden_size",) if name.startswith("weight_hh") else ("input_size",) if name in _FIRST else ()


class ProjectedGateLinear(GateLinear):
    """The same of a module that projects its units (proj_size)."""

    @classmethod
    def attributes(cls, name: str, side: Side) -> tuple[str, ...]:
        """As of GateLinear: weight_hh reads what is projected, and weight_hr, which has no bias, the units."""
        if side == "outputs":
            return ()
        return ("proj_size",) if name.startswith("weight_hh") else ("hidden_size",) if name.startswith("weight_hr") \
            else ("input_size",) if name in _FIRST else ()


class _Zeros(torch.autograd.Function):
    """Zeros of the shape of x, from which nothing comes back: a state that a layer has made, to whoever follows
    channels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.zeros_like(g)


@contextmanager
def _flagged(model: nn.Module, flag: str) -> Iterator[None]:
    modules = [module for module in model.modules() if isinstance(module, _Recurrence)]
    for module in modules:
        vars(module)[flag] = True
    try:
        yield
    finally:
        for module in modules:
            del vars(module)[flag]


def sketched(model: nn.Module) -> AbstractContextManager[None]:
    """In the block, recurrent modules of a copy, and of its copies, take one step, and from there every other step as
    if it were the second: each channel goes where it goes, in a graph that does not grow with the steps, and what comes
    out are other numbers of the same shape."""
    return _flagged(model, _SKETCHED)


@contextmanager
def whole(model: nn.Module) -> Iterator[bool]:
    """In the block, within one of `sketched`, they take every step as it is; whether there are any."""
    modules = [module for module in model.modules() if isinstance(module, _Recurrence) and _SKETCHED in vars(module)]
    for module in modules:
        del vars(module)[_SKETCHED]
    try:
        yield bool(modules)
    finally:
        for module in modules:
            vars(module)[_SKETCHED] = True


def exact_rows(model: nn.Module) -> AbstractContextManager[None]:
    """In the block, recurrent modules of a copy multiply no padding of a packed sequence, as PyTorch's do not."""
    return _flagged(model, _EXACT)


class _Recurrence(HoldsLayers):
    """What such modules have in common."""

    def _step(self: Any, kind: str, made: Tensor, again: Tensor, state: State, project: Project | None = None) -> State:
        """The state after a step. made: [N, gates · H], of what is read; again: of the state before. project: [N, H] ->
        [N, P], of an LSTM that does."""
        if kind == "LSTM":
            i, f, g, o = (made + again).chunk(4, -1)
            c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            return h if project is None else project(h), c
        if kind == "GRU":
            (r, z, n), (r_h, z_h, n_h) = made.chunk(3, -1), again.chunk(3, -1)
            n = (n + (r + r_h).sigmoid() * n_h).tanh()
            return ((state[0] - n) * (z + z_h).sigmoid() + n,)
        return ((made + again).relu() if kind == "RNN_RELU" else (made + again).tanh(),)

    def _begin(self: Any, kind: str, given: Sequence[Tensor] | None, made: Tensor, project: Project | None = None
               ) -> State:
        """The state at first: what is given, or zeros. made: [N, gates · H]."""
        if given is None or not any(x.requires_grad or bool((x != 0).any()) for x in given):
            unit = made.chunk(_GATES[kind], -1)[0]
            zeros: Tensor = _Zeros.apply(unit)
            if project is None:
                return (zeros,) * (2 if kind == "LSTM" else 1)
            # whoever follows channels is to see who makes them; where what layers read is measured, it counts once
            first = project(unit.tanh()[None])[0] if _SKETCHED in vars(self) else unit[..., :self.proj_size]
            return _Zeros.apply(first), zeros
        if _SKETCHED in vars(self) and not all(x.requires_grad for x in given):
            vars(self)[_GIVEN] = True
        return tuple(given)


class _Layers(_Recurrence):
    """The forward of nn.LSTM, nn.GRU and nn.RNN, of which it has all else."""

    def forward(self: Any, input: Any, hx: Any = None) -> Any:
        """As theirs: outputs, and the last state of every layer and direction."""
        packed = isinstance(input, PackedSequence)
        x, lengths = pad_packed_sequence(input, self.batch_first) if packed else (input, None)
        batched, time = x.dim() == 3, int(self.batch_first)
        if not batched:
            x = x.unsqueeze(1 - time)
        states = _given(hx, batched, 1, *((self.num_layers * (1 + self.bidirectional), x.shape[1 - time], width)
                                          for width in (getattr(self, "proj_size", 0) or self.hidden_size,
                                                        self.hidden_size)))
        inside = None if lengths is None else \
            (torch.arange(x.shape[time], device=lengths.device)[:, None] < lengths).to(x.device)[..., None].unbind(0)
        last: list[State] = []
        for layer in range(self.num_layers):
            ways = []
            for suffix in ("", "_reverse")[:1 + self.bidirectional]:
                given = None if states is None else [part[len(last)] for part in states]
                outputs, state = self._run(x, f"l{layer}{suffix}", given, inside)
                ways.append(outputs)
                last.append(state)
            x = torch.cat(ways, -1) if self.bidirectional else ways[0]
            if layer < self.num_layers - 1 and self.training and self.dropout:  # drawn in the order that PyTorch has
                x = F.dropout(x.transpose(0, time).contiguous(), self.dropout).transpose(0, time)
        parts = tuple(torch.stack(part) for part in zip(*last, strict=True))
        if lengths is not None:
            x = _packed(x, lengths, input, self.batch_first)
        elif not batched:
            x, parts = x.squeeze(1 - time), tuple(part.squeeze(1) for part in parts)
        return x, parts if self.mode == "LSTM" else parts[0]

    def _run(self: Any, x: Tensor, name: str, given: Sequence[Tensor] | None, inside: Sequence[Tensor] | None
             ) -> tuple[Tensor, State]:
        """One layer in one direction. inside: for each step the samples that are as long, bool [N, 1]."""
        time, again = int(self.batch_first), getattr(self, f"weight_hh_{name}")
        every = None if inside is None else torch.stack(list(inside), time)
        exact = _EXACT in vars(self)
        made = _product(getattr(self, f"weight_ih_{name}"), x, every, exact)
        projection = self._modules.get(f"weight_hr_{name}")
        state = self._begin(self.mode, given, made.select(time, 0), projection)
        if _SKETCHED in vars(self):
            first = self._step(self.mode, made.select(time, 0), again(state[0]), state, projection)
            after = self._step(self.mode, made, again(first[0]).unsqueeze(time),
                               tuple(part.unsqueeze(time) for part in first), projection)
            outputs = after[0] if every is None else after[0] * every
            return outputs, tuple(part.select(time, -1) for part in after)
        outputs = list[Tensor]()
        steps = list(enumerate(made.unbind(time)))
        for at, each in reversed(steps) if name.endswith("_reverse") else steps:
            there = None if inside is None else inside[at]
            product = _product(again, state[0], there, exact)
            project = None if projection is None else partial(_product, projection, inside=there, exact=exact)
            after = self._step(self.mode, each, product, state, project)
            if inside is None:
                outputs.append(after[0])
            else:
                outputs.append(after[0] * inside[at])
                after = tuple(torch.where(inside[at], new, old) for new, old in zip(after, state, strict=True))
            state = after
        if name.endswith("_reverse"):
            outputs.reverse()
        return torch.stack(outputs, time), state


class _Cell(_Recurrence):
    """The forward of nn.LSTMCell, nn.GRUCell and nn.RNNCell, of which it has all else."""

    def forward(self: Any, input: Tensor, hx: Any = None) -> Any:
        """As theirs: the state after one step."""
        batched = input.dim() == 2
        kind = next(kind for cls, kind in _CELLS.items() if isinstance(self, cls))
        kind = f"RNN_{self.nonlinearity.upper()}" if kind == "RNN" else kind
        made = self.weight_ih(input if batched else input[None])
        state = self._begin(kind, _given(hx, batched, 0, (len(made), self.hidden_size)), made)
        after = self._step(kind, made, self.weight_hh(state[0]), state)
        after = after if batched else tuple(part.squeeze(0) for part in after)
        return after if kind == "LSTM" else after[0]


_MODULES: tuple[type[nn.RNNBase], ...] = (nn.LSTM, nn.GRU, nn.RNN)
_CELLS: Mapping[type[nn.RNNCellBase], str] = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU", nn.RNNCell: "RNN"}


def _given(hx: Any, batched: bool, samples: int, *shapes: tuple[int, ...]) -> list[Tensor] | None:
    """The parts of a state that is given, with a dimension of samples; None where none is. shapes: of h, and of c where
    that is another. Raises RuntimeError, as PyTorch's modules do, for one of another shape."""
    parts = None if hx is None else [part if batched else part.unsqueeze(samples)
                                     for part in (hx if isinstance(hx, (tuple, list)) else (hx,))]
    for number, part in enumerate(parts or ()):
        if tuple(part.shape) != (shape := shapes[min(number, len(shapes) - 1)]):
            raise RuntimeError(f"Expected hidden size {shape}, got {list(part.shape)}")
    return parts


def _product(layer: nn.Module, x: Tensor, inside: Tensor | None, exact: bool) -> Tensor:
    """[..., inputs] -> [..., outputs], which count where `inside`, bool [..., 1], is True. exact: nothing else is read,
    and zeros are made of it."""
    if inside is None:
        return layer(x)  # type: ignore[no-any-return]
    if not exact:
        vars(layer)[_INSIDE] = inside
        try:
            return layer(x)  # type: ignore[no-any-return]
        finally:
            del vars(layer)[_INSIDE]
    rows = layer(x[inside[..., 0]])
    return rows.new_zeros(*x.shape[:-1], rows.shape[-1]).index_put((inside[..., 0],), rows)  # type: ignore[no-any-return]


def inside_of(layer: nn.Module) -> Tensor | None:
    """Of what such a layer reads at this moment, which rows are no padding of a packed sequence: bool [..., 1]; None
    where all are none."""
    return vars(layer).get(_INSIDE)


def _packed(x: Tensor, lengths: Tensor, like: PackedSequence, batch_first: bool) -> PackedSequence:
    """Padded outputs in the order of the packed inputs."""
    x = x.transpose(0, 1) if batch_first else x
    if like.sorted_indices is not None:
        x, lengths = x[:, like.sorted_indices], lengths[like.sorted_indices.cpu()]
    inside = torch.arange(len(x), device=lengths.device)[:, None] < lengths
    return PackedSequence(x[inside.to(x.device)], like.batch_sizes, like.sorted_indices, like.unsorted_indices)


def kinds(module: nn.Module) -> Kinds | None:
    """What becomes of a module's parameters; None of all but PyTorch's own recurrent ones that `why_kept` is silent
    about."""
    if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)) or why_kept(module):
        return None
    names, biases = _names(module)
    layer = ProjectedGateLinear if getattr(module, "proj_size", 0) else GateLinear
    return Kinds(names, layer, _Cell if isinstance(module, nn.RNNCellBase) else _Layers, biases)


def why_kept(module: nn.Module) -> str:
    """Why the state of a recurrent module, as its user has it, keeps its width; empty where it does not."""
    if not any(isinstance(module, cls) and type(module).forward is cls.forward for cls in (*_MODULES, *_CELLS)):
        return "its class has a forward of its own"
    names, biases = _names(module)
    held = [module._parameters.get(name) for name in (*names, *biases.values())]
    whole = all(parameter is not None for parameter in held) and len({id(parameter) for parameter in held}) == len(held)
    if not whole:
        return "its weights are computed, or shared among its layers"
    more = next((name for name in module._parameters if name not in (*names, *biases.values())), "")
    return f"it has a parameter {more} besides, as where other code computes its weights" if more else ""


def _names(module: Any) -> tuple[tuple[str, ...], dict[str, str]]:
    """(the weights of a recurrent module, weight -> its bias)."""
    ends = [""] if isinstance(module, nn.RNNCellBase) else [
        f"_l{layer}{way}" for layer in range(module.num_layers) for way in ("", "_reverse")[:1 + module.bidirectional]]
    gates = tuple(f"weight_{side}{end}" for end in ends for side in ("ih", "hh"))
    projections = tuple(f"weight_hr{end}" for end in ends) if getattr(module, "proj_size", 0) else ()
    return gates + projections, {name: name.replace("weight", "bias", 1) for name in gates} if module.bias else {}


def reads_state(layer: nn.Module) -> bool:
    """Whether it is such a layer, of weight_hh."""
    return isinstance(layer, GateLinear) and layer.name.startswith("weight_hh")


def projects(layer: nn.Module) -> bool:
    """Whether it is such a layer, of weight_hr."""
    return isinstance(layer, ProjectedGateLinear) and layer.name.startswith("weight_hr")


def at_no_step(layer: nn.Module, x: Tensor) -> bool:
    """Whether a layer is such a one, and called as it is in a sketch alone: on what is of no single step."""
    return projects(layer) and x.dim() > 2


def least_units(layer: nn.Module) -> int:
    """How many of the channels stay that such a layer reads: PyTorch takes a module with as many units as it projects
    to for one that does not project."""
    return vars(layer.owner)["proj_size"] + 1 if isinstance(layer, ProjectedGateLinear) and projects(layer) else 1


def keep_up(model: nn.Module) -> None:
    """Have recurrent modules of a model whose parameters are others now note it, as their next call would."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module._update_flat_weights()


def was_given_constant(layer: nn.Module) -> bool:
    """Whether it reads a state that its module has been given, and that no layer made."""
    return (reads_state(layer) or projects(layer)) and _GIVEN in vars(layer.owner)


def state_layers(module: nn.Module) -> list[nn.Module]:
    """Of a module whose parameters are layers, those that read its state: one for each layer and direction."""
    return list(filter(reads_state, module._modules.values()))  # type: ignore[arg-type]


def projections(module: nn.Module) -> list[nn.Module]:
    """Of such a module, those that project it: as many, or none."""
    return list(filter(projects, module._modules.values()))  # type: ignore[arg-type]
