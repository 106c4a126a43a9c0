"""A batch through the prepared copy and back, and into totals, without a wait for the device in between."""

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from fastscore.batches.calls import Forward
from fastscore.batches.not_finite import in_batch, naming
from fastscore.batches.parts import Batch, first_input
from fastscore.fastpath.graphs import Graphs
from fastscore.fastpath.prepare import Prepared
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.refused_batches import naming_argument
from fastscore.scoring import gradients, tokens
from fastscore.scoring.options import Probes
from fastscore.scoring.pending import Flags, Pending, largest
from fastscore.scoring.totals import Totals


@dataclass(frozen=True)
class Measured:
    """What one batch gives, on the device. numbers: [the largest magnitude of the output, that of the loss or 0]."""

    samples: int
    numbers: Tensor
    passes: list[Pending]

    def copied(self) -> "Measured":
        """The same in memory of its own."""
        return replace(self, numbers=self.numbers.clone(), passes=[one.copied() for one in self.passes])


@dataclass(frozen=True)
class _Launched:
    """A batch whose work is on its way. number: of the batch among all. flags: its numbers. passes: how many it brought
    to the totals. replayed: by a graph, which leaves no tensor to look at."""

    totals: Totals
    batch: Batch
    number: int
    flags: Flags
    passes: int
    replayed: bool


class BatchPasses:
    """Adds what the taps measure of batches to totals; a batch's numbers are looked at once the next is on its way.

    model: the user's, to tell where NaN comes from. prepared: what runs in its place. graphs: what runs the work of a
    batch. at_once: look at each batch's numbers before the next.
    """

    def __init__(self, model: nn.Module, forward: Forward, loss: gradients.Loss | None, probes: Probes,
                 prepared: Prepared, graphs: Graphs[Measured], at_once: bool) -> None:
        self._model, self._forward, self._loss, self._probes = model, forward, loss, probes
        self._prepared, self._graphs, self._at_once = prepared, graphs, at_once
        self._last: _Launched | None = None

    def measure(self, totals: Totals, batch: Batch, number: int = 0) -> int:
        """Add what the taps measure of a batch, `number` among all, to `totals`; the number of its samples.

        Raises ValueError for a batch that the model cannot take; FloatingPointError, naming the layer, for NaN or
        infinity, ValueError for a loss that is not finite: of this batch where it is looked at at once, else of the one
        before. Nothing of either is added then.
        """
        state: Hashable = totals.next_half
        try:
            measured, replayed = self._graphs.run(lambda each: self._measure(totals, each), batch, Measured.copied,
                                                  state)
        except Exception:
            self._refuse(batch)
            raise
        totals.append(measured.passes)
        previous, self._last = self._last, _Launched(totals, batch, number, Flags(measured.numbers),
                                                     len(measured.passes), replayed)
        self._check(previous)
        if self._at_once:
            self.finish()
        return measured.samples

    def finish(self) -> None:
        """Look at the numbers of the last batch; raises as `measure` does."""
        last, self._last = self._last, None
        self._check(last)

    def _measure(self, totals: Totals, batch: Batch) -> Measured:
        taps = self._prepared.taps
        with taps.one_pass(batch):
            output = self._prepared.run(batch).movedim(taps.axes.output, 0)
        assert taps.current is not None
        valid = taps.current.valid
        if self._prepared.compiled and valid is not None:
            raise ValueError("compile: the batch has padding, which compiled taps do not know of; use compile=False")
        most = largest([output])
        loss = torch.zeros_like(most)
        with totals.collecting() as passes:
            if totals.origin.gradient == "loss":
                value, sent = tokens.loss_and_gradient(output, batch, _of_returned(self._loss, taps.axes.output),
                                                       totals.origin, valid)
                loss = value.abs().to(most)
                sent = sent / len(sent) if totals.criterion.minibatch and totals.origin.normalize else sent
                totals.propagate(taps, output, sent, last=True)
            else:
                count = self._probes if isinstance(self._probes, int) else gradients.classes_of(output)
                for probe in range(count):
                    totals.probe(taps, output, last=probe == count - 1)
        return Measured(len(output), torch.stack([most, loss]), passes)

    def _refuse(self, batch: Batch) -> None:
        """Raise ValueError where the model's own code cannot take a batch: its layers are named, and not those that
        stand in for them."""
        model, said = evaluation_copy(self._model), "batches: the model cannot take its batches"
        with torch.no_grad(), naming_argument(said, model, self._forward, batch):
            self._forward(model, batch)

    def _check(self, launched: _Launched | None) -> None:
        if launched is None:
            return
        output, loss = launched.flags.read()
        if not math.isfinite(output) and (culprit := self._first_nonfinite(launched)) is not None:
            raise culprit
        if not math.isfinite(loss):
            raise ValueError(f"loss: it is {loss}; check the labels, and the model's output for NaN")
        if (layer := launched.totals.settle(launched.passes)) is not None:
            raise self._first_nonfinite(launched) or FloatingPointError(
                f"{self._layer(launched) or layer}: NaN or infinity in the gradient that reaches its channels")

    def _layer(self, launched: _Launched) -> str | None:
        """Where a pass that was replayed had NaN or infinity: found by running it again."""
        if not launched.replayed:
            return None
        again = launched.totals.new_empty()
        again.append(self._measure(again, launched.batch).passes)
        return again.settle()

    def _first_nonfinite(self, launched: _Launched) -> FloatingPointError | None:
        """Names the samples, or the first layer, in the order they run, that turns finite input into NaN or infinity;
        None if none does."""
        batch = launched.batch
        tensor, model, found = first_input(batch), evaluation_copy(self._model), list[str]()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bare, where = "batches: NaN or infinity in the input", in_batch(batch, launched.number)
            return naming(bare, where) if where else FloatingPointError(bare)

        def look(name: str, module: nn.Module, args: tuple[object, ...], output: object) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                weights = any(not torch.isfinite(parameter).all() for parameter in module.parameters())
                found.append(f"{name}: NaN or infinity in its {'weights' if weights else 'output'}")

        for name, module in model.named_modules():
            if not any(module.children()):
                module.register_forward_hook(partial(look, name))
        with torch.no_grad():
            self._forward(model, batch)
        return FloatingPointError(found[0]) if found else None


def _of_returned(loss: gradients.Loss | None, dim: int) -> gradients.Loss | None:
    """A loss of the output with its samples first, from one of the output as the model returns it."""
    return loss if dim == 0 else lambda output, batch: (loss or gradients.cross_entropy)(output.movedim(0, dim), batch)
