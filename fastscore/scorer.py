"""Scorer: taps on a model, and running totals of what they measure."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from fastscore import batches, gradients
from fastscore.groups import ChannelGraph, ChannelGroup, Ignore
from fastscore.importance import gradient_importance
from fastscore.scores import Origin, Scores
from fastscore.taps import ForwardPass, Taps
from fastscore.tracing import trace

Gradient = Literal["loss", "random"]


class Scorer:
    """Drop-in scores from a loop of your own; a context manager that leaves the model as it found it.

    With gradient="loss" it reads the backward passes of the loop, whose own gradients stay bit for bit what they were;
    with gradient="random" it reads `probe(output)` alone, and the loop's backward passes are not measured.

    model: any module; its hooks are set while the scorer is attached (`with scorer:`, or attach() and detach()).
    example_inputs: a batch the model can run on, to trace its channel groups with (on a copy), or the ChannelGraph
    itself, where it is known.
    importance: "taylor", "taylor-abs", "taylor-sq". reduction: "sum" over a channel's positions before the absolute
    value or square, or "element". normalize: divide each sample's score by the length of its output gradient (by the
    square of it where the score is quadratic): what scaling the gradient to length 1 would give, since backward passes
    are linear. This also cancels the 1/N of a mean loss and a loss scale. In training mode BatchNorm mixes the samples
    of a batch, and the division is approximate.
    seed, distribution: of the random gradients. ignore: layer names (with `*`), types or modules to leave out.

    Raises ValueError where no channel can be scored, TypeError where the model returns no tensor.
    Source: arXiv 2310.20203 (importances, random gradient, normalisation).
    """

    def __init__(self, model: nn.Module, example_inputs: batches.Batch | ChannelGraph, *, importance: str = "taylor-sq",
                 gradient: Gradient = "loss", normalize: bool = True, reduction: str = "sum", seed: int = 0,
                 distribution: str = "normal", forward: batches.Forward = batches.forward,
                 ignore: Ignore = ()) -> None:
        if gradient not in ("loss", "random"):
            raise ValueError(f"gradient: {gradient!r} is neither 'loss' nor 'random'")
        self._row = gradient_importance(importance, reduction)
        graph = example_inputs if isinstance(example_inputs, ChannelGraph) \
            else trace(model, example_inputs, forward)
        self._origin = Origin(importance, reduction, gradient, normalize, seed, distribution, graph.fingerprint)
        self._graph = scorable(model, graph, ignore)
        self._joints = [_Joint(group) for group in self._graph.groups]
        self._totals: list[Tensor | None] = [None] * len(self._joints)
        self._passes = self._samples = 0
        channel_dims = {edge.layer: -1 if isinstance(model.get_submodule(edge.layer), nn.Linear) else 1
                        for group in self._graph.groups for edge in group.role("consumer")}
        self._taps = Taps(model, channel_dims, self._row.measure, self._read if gradient == "loss" else None)

    def attach(self) -> None:
        """Set the taps. Raises RuntimeError when they are set already."""
        self._taps.attach()

    def detach(self) -> None:
        """Remove the taps; what they have measured stays."""
        self._taps.detach()

    def __enter__(self) -> "Scorer":
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def joined(self, inputs: Any) -> AbstractContextManager[None]:
        """A block whose calls of the model count as one forward pass, when its output needs more than one."""
        return self._taps.joined(inputs)

    def probe(self, output: Tensor) -> None:
        """Send one more random gradient back from the latest forward pass, to the taps alone: no `.grad` changes.

        output: what the model returned, [N, ...]. Call it before loss.backward(), as often as you like: each call
        draws a new gradient. Raises RuntimeError for an output of another pass, or one whose graph is gone.
        """
        origin, current = self._origin, self._taps.current
        if origin.gradient != "random":
            raise RuntimeError('probe: this scorer reads the loop\'s own gradients; make it with gradient="random"')
        if current is None:
            raise RuntimeError("probe: no forward pass has been seen; attach the scorer before the model runs")
        ids = gradients.sample_ids(gradients.first_input(current.inputs))
        gradient = gradients.random_gradient(output, ids, origin.seed, current.probes, origin.distribution,
                                             origin.normalize)
        self.propagate(output, gradient)

    def propagate(self, output: Tensor, gradient: Tensor) -> None:
        """Send `gradient`, of `output`'s shape [N, ...], back to the taps as it stands, and add what they measure."""
        sums = self._taps.propagate(output, gradient)
        assert self._taps.current is not None
        self._add(sums, output.shape[0], None)
        self._samples += output.shape[0] if self._taps.current.probes == 0 else 0
        self._taps.current.probes += 1

    def scores(self) -> Scores:
        """What has been measured up to now.

        Raises RuntimeError when nothing was, FloatingPointError (naming the layer) for NaN or infinite totals.
        """
        self._taps.flush()
        if not self._passes:
            raise RuntimeError("no backward pass has been measured: inside `with scorer:`, run the model and call "
                               "loss.backward() (or scorer.probe(output) with gradient='random', which a model that "
                               "returns no tensor needs). Hooks set on a model that torch.compile has already run are "
                               "not seen: attach the scorer first")
        layer = self.nonfinite_layer()
        if layer is not None:
            raise FloatingPointError(f"{layer}: NaN or infinity in its activations or gradients")
        totals = {group.name: torch.zeros(group.channels, dtype=torch.float64) if total is None else total.cpu()
                  for group, total in zip(self._graph.groups, self._totals, strict=True)}
        return Scores(totals, self._origin, self._passes, self._samples, self._graph.skipped)

    def nonfinite_layer(self) -> str | None:
        """The first layer whose total is NaN or infinite; None when all are finite."""
        measured = [(group, total) for group, total in zip(self._graph.groups, self._totals, strict=True)
                    if total is not None]
        if not measured:
            return None
        finite = torch.stack([torch.isfinite(total).all() for _, total in measured])  # one look at the device
        return None if finite.all() else measured[int(finite.int().argmin())][0].name

    def state_dict(self) -> dict[str, Any]:
        """Totals and counts, to go on from later: see load_state_dict."""
        self._taps.flush()
        totals = {group.name: total for group, total in zip(self._graph.groups, self._totals, strict=True)
                  if total is not None}
        return {"origin": asdict(self._origin), "passes": self._passes, "samples": self._samples, "totals": totals}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`. Raises ValueError for the state of another model or another way of scoring."""
        if state["origin"] != asdict(self._origin):
            raise ValueError(f"state: it was made as {state['origin']}, this scorer is {asdict(self._origin)}")
        self._passes, self._samples = state["passes"], state["samples"]
        self._totals = [state["totals"].get(group.name) for group in self._graph.groups]

    def all_reduce(self, group: distributed.ProcessGroup | None = None) -> None:
        """Add up totals and counts over the processes of `group` (all by default), so that every one has the sum."""
        self._taps.flush()
        device = batches.device_of(self._taps.model)
        for i, joint in enumerate(self._joints):
            total = self._totals[i]
            self._totals[i] = total = torch.zeros(joint.channels, dtype=torch.float64, device=device) \
                if total is None else total.clone()
            distributed.all_reduce(total, group=group)
        counts = torch.tensor([self._passes, self._samples], device=device)
        distributed.all_reduce(counts, group=group)
        self._passes, self._samples = counts.tolist()

    def _read(self, done: ForwardPass) -> None:
        """Add what an ordinary backward pass left at the gates."""
        gradient = done.output_gradient
        assert gradient is not None
        length = None
        if self._origin.normalize:
            length = torch.linalg.vector_norm(gradient.reshape(len(gradient), -1), dim=1, dtype=torch.float64)
        self._add(done.sums(), len(gradient), length)
        self._samples += len(gradient)

    def _add(self, sums: list[tuple[str, Tensor]], samples: int, length: Tensor | None) -> None:
        """sums: (layer, [N, C]). length: float64 [N], of each output gradient, where it is divided out."""
        by_layer: dict[str, list[Tensor]] = {}
        for layer, tensor in sums:
            if len(tensor) != samples:
                raise ValueError(f"{layer}: its input has {len(tensor)} rows where the output has {samples} samples; "
                                 "leave it out with ignore=")
            by_layer.setdefault(layer, []).append(tensor.detach())
        scale = None
        if length is not None:
            scale = torch.where(length > 0, length, torch.inf).pow(-self._row.degree)[:, None]
        for i, joint in enumerate(self._joints):
            s = joint(by_layer)  # [N, C]
            if s is not None:
                s = self._row.per_sample(s if scale is None else s * scale)
                total = s.sum(0, dtype=torch.float64)
                known = self._totals[i]
                self._totals[i] = total if known is None else known + total
        self._passes += samples


class _Joint:
    """Adds up a group's edges: layer -> sums [N, C_in] becomes s [N, C], tied channels as one."""

    def __init__(self, group: ChannelGroup) -> None:
        self.channels = group.channels
        self.unit = group.unit
        self.tied = int(group.unit.max()) + 1 < group.channels
        everything = torch.arange(group.channels)
        self.edges = [(edge.layer, None if torch.equal(edge.index, everything) and torch.equal(edge.channel, everything)
                       else (edge.index, edge.channel)) for edge in group.role("consumer")]

    def __call__(self, by_layer: Mapping[str, list[Tensor]]) -> Tensor | None:
        s: Tensor | None = None
        for layer, places in self.edges:
            for sums in by_layer.get(layer, ()):
                if places is None:
                    part = sums[:, :self.channels]
                else:
                    index, channel = (place.to(sums.device) for place in places)
                    part = sums.new_zeros(len(sums), self.channels).index_add_(1, channel, sums[:, index])
                s = part if s is None else s + part
        if s is None or not self.tied:
            return s
        unit = self.unit.to(s.device)
        return torch.zeros_like(s).index_add_(1, unit, s)[:, unit]


def scorable(model: nn.Module, graph: ChannelGraph, ignore: Ignore) -> ChannelGraph:
    """`graph` without what is ignored. Raises ValueError, with the reasons, when nothing is left."""
    graph = graph.without(model, ignore)
    if not graph.groups:
        reasons = "".join(f"\n  {layer}: {reason}" for layer, reason in graph.skipped.items())
        raise ValueError(f"{type(model).__name__} has no channel that can be scored"
                         f"{reasons or ': it has no Conv or Linear'}")
    return graph
