"""Totals: what the taps measure in each pass, summed over samples, until it is asked for as Scores."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from fastscore.batches.devices import with_float64
from fastscore.batches.outputs import Outputs, output_tensors
from fastscore.graph.groups import ChannelGraph, Ignore
from fastscore.scoring import tokens
from fastscore.scoring.coverage import coverage
from fastscore.scoring.criteria import gradient_importance
from fastscore.scoring.group_sums import SideBySide, check_read, with_products
from fastscore.scoring.named_sums import NamedSums
from fastscore.scoring.pending import Pending, Share, largest
from fastscore.scoring.scores import Origin, Scores
from fastscore.scoring.shares import Shares
from fastscore.scoring.tap_points import groups_to_score, tap_points
from fastscore.scoring.weights import filter_parameters
from fastscore.taps.measures import MEAN, SUMS
from fastscore.taps.passes import ForwardPass
from fastscore.taps.taps import Taps


class Totals:
    """Running sums for every group of a graph, for one way of scoring.

    They are float64: n terms have an error of at most n · 2**-53 of the sum of their sizes, 1e-8 for 10**8 samples.

    model: the one that is measured, for its layers' types and, where the importance reads them, its weights. graph: its
    channel groups. origin: the way of scoring; its fingerprint is filled in here. ignore: layers to leave out.
    several: whether batches are known to have several samples: groups whose samples cannot be told apart are kept
    then at once. Every other sample goes to one half, so that the scores can tell how far two halves of the samples
    agree. A pass with NaN or infinity is left out, whole, and counted.
    Raises ValueError, with the reasons, when no channel is left.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, origin: Origin, ignore: Ignore = (),
                 several: bool = False) -> None:
        self.criterion = gradient_importance(origin.importance, origin.reduction, origin.ablation)
        apart = several and not self.criterion.minibatch
        if graph.samples.flat and origin.sample_dims > 1:
            raise ValueError(f"sample_dims: {origin.sample_dims}, but samples of these batches lie one after the "
                             "other: each row of the output is one: use sample_dims=1")
        if origin.sample_dims > 1:
            graph = replace(graph, samples=replace(graph.samples, followed=False))
        self.several = several  # whether a batch had several samples
        self._graph, self.origin = groups_to_score(model, graph, origin, ignore, apart)
        self.model = model
        if self.criterion.edges:
            self._graph = with_products(self._graph)
        self._shares = Shares(model, self._graph.groups, self.criterion)
        self._totals = NamedSums()  # group -> float64 [2, ..., C]; first the even samples, then the odd ones
        self._means = NamedSums()  # layer -> float64 [C_in]
        self._pending: list[Pending] = []  # passes that are not in yet
        self._collected: list[Pending] | None = None  # where they go instead
        self._reached: set[str] = set()  # layers with a tap that a backward pass has come to
        self._untold: dict[str, str] = {}  # layer -> why its samples could not be told apart, once at least
        self._counts: dict[str, int] = {"even": 0, "odd": 0, "samples": 0, "zero_gradients": 0, "left_out": 0}
        self._nonfinite: str | None = None  # where the latest pass that was left out had NaN or infinity

    def new_empty(self) -> "Totals":
        """Totals of the same groups and the same way of scoring, with nothing in them."""
        other = copy.copy(self)
        other._totals, other._means, other._pending, other._collected = NamedSums(), NamedSums(), [], None
        other._reached, other._untold, other._nonfinite = set(), {}, None
        other._counts = dict.fromkeys(self._counts, 0)
        return other

    def merge(self, other: "Totals") -> None:
        """Add what `other`, made by `new_empty`, holds."""
        self.settle()
        other.settle()
        for own, more in ((self._totals, other._totals), (self._means, other._means)):
            for name, value in more.by_name().items():
                own.add([name], [value.shape[-1]], value + 0.0)  # so that there is no -0.0
        self.several |= other.several
        self._reached |= other._reached
        self._untold |= other._untold
        self._counts = {name: count + other._counts[name] for name, count in self._counts.items()}

    @property
    def samples(self) -> int:
        """Samples seen; further probes of the same ones do not count."""
        self.settle()
        return self._counts["samples"]

    @property
    def next_half(self) -> int:
        """Which half the next sample goes to, if all that is pending counts."""
        pending = [*self._pending, *(self._collected or ())]
        return (self._counts["even"] + self._counts["odd"] + sum(int(one.even + one.odd) for one in pending)) % 2

    @property
    def left_out(self) -> int:
        """Backward passes left out for NaN or infinity."""
        self.settle()
        return self._counts["left_out"]

    @property
    def nonfinite(self) -> str | None:
        """Where the latest pass that was left out had NaN or infinity."""
        self.settle()
        return self._nonfinite

    @property
    def together(self) -> bool:
        """Whether they hold for batches as they were given alone: see fastscore.graph.trials.companions."""
        return self.several and self._graph.samples.together

    def taps(self, on_pass: Callable[[Taps, ForwardPass], None] | None = None,
             outputs: Outputs = output_tensors, traceable: bool = False) -> Taps:
        """Taps that measure what these totals need."""
        # compared with its mean, a channel has one mean wherever it is read: that of the whole tensor
        points = tap_points(self.model, self._graph.groups, windowed=not self.criterion.edges)
        names = {name for group in self._graph.groups for _, name in filter_parameters(self.model, group)}
        weights = {name: self.model.get_parameter(name) for name in sorted(names)} if self.criterion.filters else {}
        # a minibatch that counts as one needs no samples told apart, but where each is divided by a length afterwards
        apart = not self.criterion.minibatch or (on_pass is not None and self.origin.normalize)
        return Taps(self.model, points, self.criterion.measure, on_pass, weights, outputs, traceable,
                    self.origin.sample_dims, self._graph.samples, apart)

    def propagate(self, taps: Taps, output: Tensor, gradient: Tensor, last: bool = False) -> None:
        """Send `gradient`, of `output`'s shape [N, ...], back to the taps as it stands, and add what they measure.

        last: no other follows from this output, whose graph is freed on the way.
        """
        samples, valid = tokens.rows(output, self.origin.sample_dims, taps.current.valid if taps.current else None)
        sums, weight_gradients = taps.propagate(output, gradient, last)
        done = taps.current
        assert done is not None
        done.probes += 1
        zeros = None
        if self.origin.normalize:
            zero = (gradient.reshape(samples, gradient.numel() // max(samples, 1)) == 0).all(1)
            zeros = (zero if valid is None else zero[valid]).sum()
        self.add(sums, samples, fresh=not done.counted, weight_gradients=weight_gradients, valid=valid, zeros=zeros,
                 done=done)

    def probe(self, taps: Taps, output: Tensor, last: bool = False) -> None:
        """Send one more random gradient back from the latest forward pass; its samples' ids come from its inputs."""
        assert taps.current is not None
        if taps.current.ids is None:
            taps.current.ids = tokens.ids_of(taps.current, self._graph.samples, len(output))
        gradient = tokens.random_gradient(output, taps.current.ids, taps.current.probes, self.origin,
                                          taps.current.valid)
        self.propagate(taps, output, gradient / len(output) if self.criterion.minibatch else gradient, last)

    def add(self, sums: Sequence[tuple[str, Tensor | str]], samples: int, length: Tensor | None = None, *,
            fresh: bool = True, weight_gradients: Mapping[str, Tensor] | None = None, valid: Tensor | None = None,
            zeros: Tensor | None = None, done: ForwardPass | None = None) -> None:
        """Add one backward pass of N samples; NaN or infinity leave it out, once that is known (see `settle`).

        sums: (layer, [P, N, C_in]) from the taps, or (layer, the reason why its samples cannot be told apart), which
        leaves its groups without a score. length: float64 [N], of each sample's output gradient, where it is
        to be divided out. fresh: whether these samples are seen for the first time. weight_gradients: of the
        taps' weights. valid: bool [N], which of them are no padding. zeros: how many had a gradient of length 0, where
        no length tells. done: the forward pass.
        """
        self.several |= samples > 1 and self.origin.sample_dims == 1
        self._untold.update((layer, reason) for layer, reason in sums if isinstance(reason, str))
        measured = [(layer, with_float64(tensor.detach())) for layer, tensor in sums
                    if isinstance(tensor, Tensor)]
        valid = None if valid is None else with_float64(valid)
        by_layer: dict[str, list[Tensor]] = {}
        for layer, tensor in measured:
            by_layer.setdefault(layer, []).append(tensor if valid is None else tensor[:, valid])
        samples = samples if valid is None else int(valid.sum())
        halves = self._halves(1 if self.criterion.minibatch else samples)
        joint = SideBySide.of(by_layer, MEAN if self.criterion.measure is SUMS else None) if by_layer else None
        shares = list(self._shares.of(by_layer, joint, length, halves, weight_gradients or {}))
        means = [Share(joint.layers, joint.widths, joint.sums[MEAN].sum(0, dtype=torch.float64))] \
            if fresh and joint is not None and self.criterion.measure is SUMS else []
        lengths = {} if length is None else {"the output": length}
        most = largest([*lengths.values(), *(share.values for share in shares)])
        zeros = (length == 0).sum() if length is not None else most.new_zeros(()) if zeros is None else zeros

        def culprit() -> str:
            check_read(measured if self.criterion.edges else ())
            every = [*lengths.items(), *measured, *(weight_gradients or {}).items(),
                     *((share.names[0], share.values) for share in shares)]
            return next(name for name, tensor in every if not torch.isfinite(tensor).all())

        one = Pending(shares, means, torch.stack([most, zeros.to(most)]), len(halves[0]), len(halves[1]),
                      samples if fresh else 0, tuple(by_layer), culprit, done)
        if done is not None:
            done.counted = True
        if self._collected is None:
            self.settle()
            self.append([one])
        else:
            self._collected.append(one)

    @contextmanager
    def collecting(self) -> Iterator[list[Pending]]:
        """Passes that are added in the block go to the list, for `append` to bring them later."""
        self._collected = []
        try:
            yield self._collected
        finally:
            self._collected = None

    def append(self, passes: Iterable[Pending]) -> None:
        """Add passes that are computed, once they are known to be finite."""
        self._pending += [one.sent() for one in passes]

    def settle(self, count: int | None = None) -> str | None:
        """Bring in the first `count` passes (all by default) but those that are not finite: this waits for the device.

        Returns where the last that was left out had NaN or infinity, if one was.
        """
        layer = None
        for _ in range(len(self._pending) if count is None else min(count, len(self._pending))):
            layer = self._bring_in(self._pending.pop(0)) or layer
        return layer

    def _bring_in(self, one: Pending) -> str | None:
        assert one.flags is not None
        most, zeros = one.flags.read()
        if not math.isfinite(most):
            self._nonfinite = one.culprit()
            self._counts["left_out"] += 1
            if one.samples and one.done is not None:
                one.done.counted = False
            return self._nonfinite
        for sums, shares in ((self._totals, one.totals), (self._means, one.means)):
            for share in shares:
                sums.add(share.names, share.widths, share.values)
        self._reached.update(one.reached)
        for name, count in (("even", one.even), ("odd", one.odd), ("samples", one.samples),
                            ("zero_gradients", int(zeros))):
            self._counts[name] += count
        return None

    def _halves(self, count: int) -> tuple[range, range]:
        """Which of the next `count` samples (or minibatches) go to which half."""
        first = self.next_half
        return range(first, count, 2), range(1 - first, count, 2)

    def scores(self) -> Scores:
        """What has been measured; groups with an edge that no backward pass came to have no score.

        Raises FloatingPointError, naming the layer, where all passes were left out for NaN or infinity, or a total
        overflowed; RuntimeError where no group was measured.
        """
        self.settle()
        layer = self._totals.nonfinite()
        if self.left_out and not self.samples:
            layer = self.nonfinite or "every backward pass"
        if layer is not None:
            raise FloatingPointError(f"{layer}: NaN or infinity in its activations or gradients")
        missed = {group.name: self._why_missed(layer) for group in self._graph.groups
                  for layer in sorted(self._missed({edge.tap for edge in group.edges}))[:1]}
        missed |= {group.name: self._untold[edge.tap] for group in self._graph.groups for edge in group.edges
                   if edge.tap in self._untold}
        totals = {name: total.cpu() for name, total in self._totals.by_name().items() if name not in missed}
        if not totals:
            raise RuntimeError("nothing was measured whole: " + "; ".join(
                f"{name}: {reason}" for name, reason in missed.items()))
        reading = {edge.layer for group in self._graph.groups for edge in group.edges}
        means = {layer: (total / self._counts["samples"]).cpu() for layer, total in self._means.by_name().items()
                 if layer not in self._untold and layer in reading}  # queries are read as they are, or not at all
        means = {layer: mean.new_empty(0) if mean.isnan().all() else mean for layer, mean in means.items()}
        means |= {layer: torch.empty(0, dtype=torch.float64) for layer in reading & self._graph.chosen - means.keys()}
        even, odd = self._counts["even"], self._counts["odd"]
        scores = Scores({name: total.sum(0) for name, total in totals.items()}, self.origin, even + odd,
                        self.samples, self._graph.less(missed).skipped, means,
                        {name: total[0] for name, total in totals.items()}, even, self._counts["zero_gradients"])
        scores = replace(scores, coverage=coverage(self.model, self._graph, totals, scores.skipped))
        layer = next((name for name in scores if not torch.isfinite(scores[name]).all()), None)
        if layer is not None:
            raise FloatingPointError(f"{layer}: its importances are beyond float32: use "
                                     + ("" if self.origin.normalize else "normalize=True, a smaller loss scale, or ")
                                     + 'importance="taylor-abs", which squares nothing')
        return scores

    def _missed(self, taps: set[str]) -> set[str]:
        """Those of a group that no backward pass came to, though something is read there; of experts, not all need be
        chosen."""
        return taps - self._reached - (self._graph.chosen if taps & self._reached else frozenset())

    def _why_missed(self, layer: str) -> str:
        if layer in self._graph.training_only:
            return f"{layer} reads its channels, and runs in training alone: measure it there (a Scorer, in training " \
                   "mode), or take it out of the model"
        return f"no gradient came to {layer}, which reads its channels: the loss does not depend on what it makes, " \
               "or only by way of detach(), no_grad or a choice; or it runs in a checkpoint(use_reentrant=True), " \
               "which probes cannot pass"

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts, to go on from."""
        self.settle()
        return {"origin": asdict(self.origin), "counts": dict(self._counts), "totals": self._totals.by_name(),
                "means": self._means.by_name(), "reached": sorted(self._reached), "untold": dict(self._untold)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`. Raises ValueError for the state of another model or another way of scoring."""
        if state["origin"] != asdict(self.origin):
            raise ValueError(f"state: it was made as {state['origin']}, these totals are {asdict(self.origin)}")
        self._pending.clear()
        self._counts = dict(state["counts"])
        self._totals, self._means = NamedSums(state["totals"]), NamedSums(state["means"])
        self._reached, self._untold = set(state["reached"]), dict(state.get("untold", {}))

    def all_reduce(self, device: torch.device, process_group: distributed.ProcessGroup | None = None) -> None:
        """Add up over the processes of `process_group` (all by default), so that every one has the sum.

        A process that has measured nothing takes part with zeros.
        """
        self.settle()
        sums = {"totals": self._totals.by_name(), "means": self._means.by_name()}
        own = {(kind, name): value for kind, values in sums.items() for name, value in values.items()}
        parts: list[Any] = [None] * distributed.get_world_size(process_group)
        distributed.all_gather_object(parts, ({key: value.shape for key, value in own.items()}, self._reached,
                                              self._untold), group=process_group)
        known: dict[tuple[str, str], torch.Size] = {}
        for shapes, reached, untold in parts:
            known.update(shapes)
            self._reached |= reached
            self._untold |= untold
        values = [own[key].to(device) if key in own else torch.zeros(known[key], dtype=torch.float64, device=device)
                  for key in sorted(known)]
        if values:
            whole = torch.cat([value.flatten() for value in values])
            distributed.all_reduce(whole, group=process_group)
            for (kind, name), part in zip(sorted(known), whole.split([value.numel() for value in values]), strict=True):
                sums[kind][name] = part.reshape(known[kind, name]).clone()
        self._totals, self._means = NamedSums(sums["totals"]), NamedSums(sums["means"])
        counts = torch.tensor(list(self._counts.values()), device=device)
        distributed.all_reduce(counts, group=process_group)
        self._counts = dict(zip(self._counts, counts.tolist(), strict=True))
