"""Scorer: taps on a model of your own, in a loop of your own."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, distributed, nn

from fastscore import files
from fastscore.arguments import check_callable
from fastscore.batches.calls import Forward, call_model
from fastscore.batches.devices import with_float64
from fastscore.batches.outputs import Output, check_same_rows, checked_forward, concat_outputs, output_selector
from fastscore.batches.parts import Batch, first_tensor
from fastscore.default_device import keeps_own_on_cpu
from fastscore.graph.groups import ChannelGraph, Ignore
from fastscore.graph.samples.sample_axes import ALONE
from fastscore.graph.scored_units import Units, named
from fastscore.graph.tracing import trace
from fastscore.graph.trials import draws
from fastscore.graph.trials.companions import TOGETHER
from fastscore.modules.inspection import device_of
from fastscore.modules.wrappers import unwrapped
from fastscore.scoring import tokens
from fastscore.scoring.gradients import classes_of
from fastscore.scoring.options import Gradient, check_loop
from fastscore.scoring.scores import Origin, Scores
from fastscore.scoring.totals import Totals
from fastscore.taps.passes import ForwardPass
from fastscore.taps.taps import Taps
from fastscore.wording import counted

FORM = "fastscore-scorer-1"
_MIXED = ("{passes} left out: the backward pass of the loss also went back through gradients (create_graph=True), and "
          "autograd adds those of second order to those of the loss. Send the loss back on its own, "
          "loss.backward(retain_graph=True), and the penalty after it; or make the Scorer with gradient=\"random\" and "
          "call scorer.probe(output) before the backward pass")
_AT_ONCE = ("samples of a batch lie one after the other, and a loss sends the gradients of all back at once: score(), "
            "or a Scorer with gradient=\"random\" and scorer.probe(output), sends each back by itself; with the loss's")


class Scorer:
    """Drop-in scores from a loop of your own; a context manager that leaves the model as it found it.

    With gradient="loss" it reads the backward passes of the loop, whose own gradients stay bit for bit what they were
    (to rounding through nn.LSTM, GRU, RNN and nn.MultiheadAttention, in whose place layers run that can be tapped).
    With gradient="random" it reads `probe(output)` alone, and the loop's backward passes are not measured.

    In a loop that differentiates gradients (create_graph=True: gradient penalties, inner loops) the scores are those of
    first-order backward passes; a pass in which a loss and gradients of second order come together is left out, with a
    warning that names the way out.

    A backward pass that brings NaN or infinity, such as one that a GradScaler will skip, is left out and counted in
    `left_out`. A group with an edge that no backward pass came to (frozen under no_grad, or a branch without a loss)
    has no score, and `scores.skipped` says so.

    Args:
        model: Any module (of DistributedDataParallel, the one inside). Its hooks are set while the scorer is attached:
            `with scorer:`, or attach() and detach().
        example_inputs: A batch the model can run on, to trace its channel groups with (on a copy), or the ChannelGraph
            itself, where it is known.
        importance: "taylor", "taylor-abs", "taylor-sq", "molchanov-bn", "molchanov-group".
        gradient: "loss" or "random".
        normalize: Divide each sample's score by the length of its output gradient (by the square of it where the score
            is quadratic): what scaling the gradient to length 1 would give, since backward passes are linear. This also
            cancels the 1/N of a mean loss and a loss scale. In training mode BatchNorm mixes the samples of a batch:
            the division is then approximate, and by no less than the root mean square of the batch's lengths.
            "molchanov-group" reads the weight gradients of a whole batch, which cannot be divided: it takes
            normalize=False with gradient="loss".
        units, reduction, ablation, layerwise, center: See fastscore.score.
        seed, distribution: Of the random gradients.
        sample_dims: 2 where each token of an output [N, T, ...] is a sample: see fastscore.score.
        output: output(what the model returns) -> the floating-point tensor [N, ...] whose gradient is the output
            gradient, or several, taken as one long output. It can be left out where the model returns a tensor, or a
            dict, tuple or object with one such tensor beside integers and scalars. A tensor that another one is
            computed from, such as a hidden state beside the logits, must not be among them.
        forward: forward(model, batch) calls the model on example_inputs.
        ignore: Layer names (with `*`), types or modules to leave out.

    Raises:
        ValueError: No channel can be scored, or options contradict each other.
        TypeError: The output is not found.

    Source: arXiv 2310.20203 (importances, random gradient, normalisation).
    """

    @keeps_own_on_cpu
    def __init__(self, model: nn.Module, example_inputs: Batch | ChannelGraph, *, importance: str = "taylor-sq",
                 gradient: Gradient = "loss", normalize: bool = True, units: Units = "groups", reduction: str = "sum",
                 ablation: str = "zero", layerwise: str = "none", seed: int = 0, distribution: str = "normal",
                 center: bool = False, sample_dims: int = 1, output: Output | None = None,
                 forward: Forward = call_model, ignore: Ignore = ()) -> None:
        origin = Origin(importance, reduction, gradient, normalize, seed, distribution, "", named(units), ablation,
                        layerwise, center, sample_dims)
        check_loop(origin)
        if output is not None:
            check_callable("output", output, "output(what the model returns)")
        model = unwrapped(model)
        self._outputs = output_selector(output)
        graph = example_inputs if isinstance(example_inputs, ChannelGraph) else \
            trace(model, example_inputs, checked_forward(forward, self._outputs), units=origin.units)
        if gradient == "loss":
            graph = replace(graph, samples=graph.samples.all_at_once(_AT_ONCE + ALONE))
        self._output_dim = graph.samples.output
        first = None if isinstance(example_inputs, ChannelGraph) else first_tensor(example_inputs)
        several = first is not None and first.shape[:1].numel() > 1 and not graph.samples.one
        self._totals = Totals(model, graph, origin, ignore, several=several)
        self._told = self._totals.together
        drawn = "" if model.training else draws.said(model, graph.drawing)
        for warning in filter(None, (TOGETHER.format(type(model).__name__) if self._told else "", drawn)):
            warnings.warn(warning, stacklevel=3)
        on_pass = partial(_read, self._totals, self._output_dim) if gradient == "loss" else None
        self._taps = self._totals.taps(on_pass, self._outputs)

    @keeps_own_on_cpu
    def attach(self) -> "Scorer":
        """Set the taps.

        Returns:
            The scorer itself.

        Raises:
            RuntimeError: They are set already.
        """
        self._taps.attach()
        return self

    def detach(self) -> None:
        """Remove the taps; what they have measured stays."""
        self._taps.detach()

    def __enter__(self) -> "Scorer":
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.detach()

    @property
    def left_out(self) -> int:
        """Backward passes that were left out, because they brought NaN or infinity."""
        return self._totals.left_out

    @keeps_own_on_cpu
    def probe(self, output: Any) -> None:
        """Send one more random gradient back from the latest forward pass, to the taps alone: no `.grad` changes.

        Call it before loss.backward(), as often as you like: each call draws a new gradient.

        Args:
            output: What the model returned, or a tensor of it, [N, ...].

        Raises:
            RuntimeError: The output is of another pass, or its graph is gone.
        """
        origin, current = self._totals.origin, self._taps.current
        if origin.gradient != "random":
            raise RuntimeError('probe: this scorer reads the loop\'s own gradients; make it with gradient="random"')
        if current is None:
            raise RuntimeError("probe: no forward pass has been seen; attach the scorer before the model runs")
        tensor = concat_outputs(self._outputs(output, type(self._taps.model).__name__))
        self._totals.settle()
        self._totals.probe(self._taps, tensor.movedim(self._output_dim, 0))

    @keeps_own_on_cpu
    def propagate(self, output: Tensor, gradient: Tensor) -> None:
        """Send a gradient back to the taps as it stands, and add what they measure.

        Args:
            output: Of the latest forward pass, [N, ...].
            gradient: Of the same shape.
        """
        dim = self._output_dim
        self._totals.settle()
        self._totals.propagate(self._taps, output.movedim(dim, 0), gradient.movedim(dim, 0))

    @keeps_own_on_cpu
    def scores(self) -> Scores:
        """What has been measured up to now; a warning tells of passes that were left out, and of samples that meet.

        Returns:
            Scores: layer -> float32 [C].

        Raises:
            RuntimeError: Nothing was measured.
            FloatingPointError: All that was is NaN or infinite; the message names the layer.
        """
        self._taps.flush()
        mixed = self._taps.mixed
        if self._taps.second_order and not self._totals.samples and not self.left_out:
            raise RuntimeError(_MIXED.format(passes="every forward pass is"))
        if not self._totals.samples and not self.left_out:
            raise RuntimeError("no backward pass has been measured: inside `with scorer:`, run the model and call "
                               "loss.backward(), with a loss of its output and not under torch.no_grad() (or "
                               "scorer.probe(output) with gradient='random'); torch.autograd.grad is not seen. "
                               "Hooks set on a model that torch.compile has already run are not seen: attach the "
                               "scorer first")
        scores = self._totals.scores()
        if self._totals.together and not self._told:
            self._told = True
            warnings.warn(TOGETHER.format(type(self._taps.model).__name__), stacklevel=3)
        if mixed:
            warnings.warn(_MIXED.format(passes=counted(mixed, "forward pass is", "forward passes are")), stacklevel=3)
        if self.left_out:
            where = f", the last at {self._totals.nonfinite}" if self._totals.nonfinite else ""
            passes = counted(self.left_out, "backward pass", "backward passes")
            warnings.warn(f"{passes} brought NaN or infinity; left out, with the samples{where}", stacklevel=3)
        return scores

    @keeps_own_on_cpu
    def state_dict(self) -> dict[str, Any]:
        """Totals and counts, to go on from later: see load_state_dict."""
        self._taps.flush()
        return self._totals.state_dict()

    @keeps_own_on_cpu
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: It is the state of another model or another way of scoring.
        """
        self._totals.load_state_dict(state)

    def save(self, path: str | PathLike[str]) -> None:
        """Write state_dict() to a safetensors file, whole or not at all."""
        files.write_state(path, FORM, self.state_dict())

    def load(self, path: str | PathLike[str]) -> None:
        """Go on from what `save` wrote.

        Raises:
            ValueError: The file is foreign, truncated or altered, or of another model or way of scoring; nothing has
                changed then.
        """
        self.load_state_dict(files.read_state(path, FORM, "scorer state", "start over",
                                              device_of(self._taps.model)))

    @keeps_own_on_cpu
    def all_reduce(self, process_group: distributed.ProcessGroup | None = None) -> None:
        """Add up totals and counts over processes, so that every one of them has the sum.

        Args:
            process_group: Which processes; all by default.
        """
        self._taps.flush()
        self._totals.all_reduce(device_of(self._taps.model), process_group)


@keeps_own_on_cpu
def _read(totals: Totals, output_dim: int, taps: Taps, done: ForwardPass) -> None:
    """Add what an ordinary backward pass left at the gates. output_dim: where the samples lie in the output."""
    gradients = [gradient.movedim(output_dim, 0) for gradient in done.output_gradients.values()]
    parts = [part.reshape(len(part), classes_of(part)) for part in gradients]
    samples, valid = tokens.rows(gradients[0], totals.origin.sample_dims, done.valid)
    length = None
    if totals.origin.normalize:
        check_same_rows(parts)
        lengths = [torch.linalg.vector_norm(with_float64(part), dim=1, dtype=torch.float64) for part in parts]
        length = torch.linalg.vector_norm(torch.stack(lengths), dim=0)
        if _mixes_samples(taps.model):
            length = _no_shorter_than_usual(length, valid)
    sums = taps.rows.by_sample(done.rows(), done, gradients[0])
    totals.settle()
    totals.add(sums, samples, length, weight_gradients=done.weight_gradients, valid=valid)


def _mixes_samples(model: nn.Module) -> bool:
    """Whether a BatchNorm normalises by the statistics of the batch: then the gradient of one sample's output comes to
    the activations of all."""
    return any(module.training for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))


def _no_shorter_than_usual(length: Tensor, valid: Tensor | None) -> Tensor:
    """Lengths [N], but of no sample less than their root mean square; zero stays zero.

    What comes to a sample from the gradients of others does not shrink with its own: divided by the length of one that
    the loss is done with (1e-8 of the others', say), it would outweigh all else.
    """
    counted = torch.ones_like(length) if valid is None else valid.to(length.dtype)
    usual = ((length.square() * counted).sum() / counted.sum()).sqrt()
    return torch.where(length == 0, length, torch.maximum(length, usual))
