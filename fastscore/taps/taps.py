"""Taps: where activation meets gradient.

A tap stands on the input of a layer that reads channels (a consumer), or on the output of one (a BatchNorm). It hands
the tensor on through an identity whose second argument, the gate, is a leaf [P, N, C]; what autograd sends to the gate
is what is measured of activation and gradient *on that edge alone*. So a backward pass that asks for the gates computes
no weight gradient, and an ordinary backward pass leaves the sums in `gate.grad`. A gate has a row for each place along
the dimension of the samples; where frames or windows lie there too, their rows are added up afterwards.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastscore.batches.outputs import Outputs, output_tensors
from fastscore.modules.attention import multihead_attention
from fastscore.modules.handles import Handle
from fastscore.modules.hooks import OwnHook, input_of, with_input
from fastscore.modules.norms import gated_norms
from fastscore.modules.sample_axis import SampleAxes, SampleAxis, Untold
from fastscore.modules.weights import experts, held_weights, recurrent
from fastscore.taps import owners
from fastscore.taps.gates import ExpertGate, FusedTap, Gate, NormGate, TapPoint
from fastscore.taps.measures import Measure
from fastscore.taps.passes import BackwardPasses, ForwardPass, Tapped, pass_of
from fastscore.taps.rows import Rows
from fastscore.taps.unseen import check_in_place, never_seen


class Taps:
    """Taps on the layers that `points` names; a context manager that leaves no hook behind.

    points: layer -> where its tap stands. measure: what a gate receives. on_pass: called with these taps and each
    ForwardPass whose output an ordinary backward pass reached, once a later forward pass begins or `flush` is called;
    without it only `propagate` measures, and ordinary backward passes cost nothing. weights: parameters whose gradients
    are measured too, by name; those of an ordinary backward pass count for the latest forward pass. outputs: what the
    model returns -> the tensors whose gradients are the pass's output gradient. traceable: whether torch.compile is to
    follow the hooks, rather than compile what stands between them. sample_dims: how many dimensions of a layer's input
    tell samples apart; with 2, the second is that of tokens. axes: where the samples lie in what is tapped. apart:
    whether samples have to be told apart; without, the sums of a batch are right in all, and not for each sample, where
    that cannot be.
    """

    def __init__(self, model: nn.Module, points: Mapping[str, TapPoint], measure: Measure,
                 on_pass: "Callable[[Taps, ForwardPass], None] | None" = None,
                 weights: Mapping[str, Tensor] | None = None, outputs: Outputs = output_tensors,
                 traceable: bool = False, sample_dims: int = 1, axes: SampleAxes | None = None,
                 apart: bool = True) -> None:
        self.model, self.measure = model, measure
        self.points = dict(points)
        self.weights = dict(weights or {})
        self.current: ForwardPass | None = None
        self._preallocated: Mapping[str, Tensor] = {}
        self._published: FusedTap | None = None
        self._on_pass, self._outputs = on_pass, outputs
        self._traceable = traceable
        self.axes = SampleAxes() if axes is None else axes
        self.rows = Rows(measure, self.axes, sample_dims, apart)
        self._propagating = self._in_one_pass = False
        self._backward = BackwardPasses()
        self._unseen: dict[str, RemovableHandle] = {}  # layers whose taps have not run -> what says so
        self._handles: list[RemovableHandle | Handle] = []
        self._owners: dict[str, nn.Module] = {}  # of every tap; while a forward runs, some go by their name as tensors
        self._placed: dict[str, nn.Module] = {}  # the same, by their own names

    def attach(self) -> None:
        """Set the hooks. Raises RuntimeError when they are set already."""
        if self._handles:
            raise RuntimeError("these taps are attached already: detach() first")
        layers = [point.owner(layer) for layer, point in self.points.items()]
        self._handles = list(held_weights.replace(self.model, layers))
        self._handles += [self.model.register_forward_pre_hook(self._hook(self._begin), with_kwargs=True),
                          self.model.register_forward_hook(self._hook(self._end))]
        self._handles += multihead_attention.replace_attention(self.model, layers)
        self._owners = {layer: self.model.get_submodule(point.owner(layer)) for layer, point in self.points.items()}
        self._placed = {point.owner(layer): self._owners[layer] for layer, point in self.points.items()}
        for layer, point in self.points.items():
            module = self.model.get_submodule(point.module or layer)
            self._handles.append(
                module.register_forward_hook(self._tap_output(module, layer, point), with_kwargs=True) if point.output
                else module.register_forward_pre_hook(self._tap_input(module, layer, point), with_kwargs=True))
        if self._on_pass is not None:
            self._handles += [weight.register_hook(self._receive_weight(name)) for name, weight in self.weights.items()]
            self._unseen = {layer: weight.register_hook(never_seen(layer)) for layer, point in self.points.items()
                            if isinstance(weight := getattr(self._owners[layer], "weight", None), nn.Parameter)
                            and weight.requires_grad}

    def detach(self) -> None:
        """Remove the hooks and hand over what is finished. Harmless when nothing is attached."""
        for handle in (*self._handles, *self._unseen.values()):
            handle.remove()
        self._handles.clear()
        self._owners.clear()
        self._placed.clear()
        self._unseen.clear()
        self.flush()
        self.current = None

    def __enter__(self) -> "Taps":
        self.attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.detach()

    @property
    def measuring(self) -> bool:
        """Whether a backward pass that runs now is to be measured."""
        return self._propagating or self._on_pass is not None or bool(self._preallocated)

    @torch.no_grad()
    def handed_on(self, g: Tensor, owner: ForwardPass | None) -> Tensor:
        """`g`, as a gate of the forward pass `owner` sends it on: marked where the backward pass is recorded itself."""
        recorded = owner is not None and self._on_pass is not None and torch.is_grad_enabled()
        return self._backward.recorded(owner, g) if owner is not None and recorded else g

    @property
    def mixed(self) -> int:
        """Forward passes that are not measured, since second-order gradients came together with those of a loss."""
        return self._backward.mixed

    @property
    def second_order(self) -> bool:
        """Whether any backward pass brought second-order gradients."""
        return self._backward.second_order >= 0

    def propagate(self, output: Tensor, gradient: Tensor, last: bool = False
                  ) -> tuple[list[tuple[str, Tensor | str]], dict[str, Tensor]]:
        """Send `gradient` (of `output`'s shape, [N, ...]) back from the latest forward pass, to the gates and weights
        alone.

        Returns what `Rows.by_sample` makes of every tap that `output` depends on, and the gradients of the weights that
        it depends on. No `.grad` changes; the graph stays alive unless this is the last.
        Raises RuntimeError when the output does not come from that pass, or its graph is gone.
        """
        # a copy: activation checkpointing runs layers, and their taps, again during the backward pass
        current = self.current
        gates = list(current.gates) if current is not None else []
        if current is None or not gates or not output.requires_grad:
            raise RuntimeError("output: no tapped forward pass is behind it: run the model with gradients enabled "
                               "while the taps are attached, then pass its output")
        samples = len(output)
        if not self.rows.one_by_one or samples < 2:
            moving = self.rows.moving(gates, samples)
            reached, weights = self._sent(output, gradient, gates, last and not moving)
            if moving:
                reached = owners.followed(reached, moving, gradient, self.rows.linear, last, lambda scaled, last:
                                          self._sent(output, scaled, moving, last)[0])
            return self.rows.by_sample([*reached.values()], current, output), weights
        passes = []
        for sample in range(samples):
            alone = torch.zeros_like(gradient)
            alone[sample] = gradient[sample]
            reached, _ = self._sent(output, alone, gates, last and sample == samples - 1)
            passes.append(self.rows.of_sample([*reached.values()]))
        return self.rows.of_samples(passes), {}

    def _sent(self, output: Tensor, gradient: Tensor, gates: Sequence[Tapped], last: bool
              ) -> tuple[dict[int, Tapped], dict[str, Tensor]]:
        """What one backward pass brings to gates that it comes to, by their id, and to weights."""
        self._propagating = True
        try:
            found = torch.autograd.grad(output, [*(gate for _, gate, _ in gates), *self.weights.values()], gradient,
                                        retain_graph=not last, allow_unused=True)
        except RuntimeError as error:
            if "donated buffers" in str(error):
                raise RuntimeError("output: torch.compile has let go of what another backward pass would need: set "
                                   "torch._functorch.config.donated_buffer = False before the model first runs, or "
                                   'use gradient="loss"') from error
            if "second time" not in str(error):
                raise
            raise RuntimeError("output: its graph is gone: send gradients back before loss.backward() frees "
                               "it") from error
        finally:
            self._propagating = False
        reached = {id(tapped.gate): tapped._replace(gate=tensor) for tapped, tensor in zip(gates, found, strict=False)
                   if tensor is not None}
        if not reached:
            raise RuntimeError("output: it is not the output of the latest forward pass: send gradients back before "
                               "the model runs again")
        weights = zip(self.weights, found[len(gates):], strict=True)
        return reached, {name: tensor for name, tensor in weights if tensor is not None}

    @contextmanager
    def one_pass(self, inputs: Any) -> Iterator[None]:
        """Whatever runs in the block is one pass, however often the model is called; `inputs` if it never is."""
        self.flush()
        self.current, self._in_one_pass = ForwardPass(inputs), True
        self.current.batch = inputs
        try:
            yield
        finally:
            self._in_one_pass = False

    def flush(self) -> None:
        """Hand over the passes whose gradients are in."""
        finished, self._backward.finished = self._backward.finished, []
        for done in finished:
            assert self._on_pass is not None
            self._on_pass(self, done)
            done.forget_gradients()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self.model or not torch.is_grad_enabled():
            return
        if not self._traceable:
            check_in_place(self.model, self._placed)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError("the model runs under a transform of torch.func (grad, vmap, jvp), where taps see no "
                               "gradients of samples: call it on the whole batch and loss.backward(), or detach() the "
                               "scorer meanwhile")
        if self._in_one_pass and self.current is not None:
            if not self.current.called:
                self.current.inputs, self.current.called = (args, kwargs), True
            return
        self.flush()
        self._backward.running.clear()
        self.current = ForwardPass((args, kwargs))

    def _hook(self, function: Callable[..., Any]) -> OwnHook:
        return OwnHook(function if self._traceable else torch.compiler.disable(function))

    def _tap_input(self, own: nn.Module, layer: str, point: TapPoint) -> OwnHook:
        def hand_over_view(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if module is not own or not self._listening(layer):
                return None
            return with_input(args, kwargs, self._gated(input_of(args, kwargs), layer, point, point.expert_of(args)))

        return self._hook(hand_over_view)

    def _tap_output(self, own: nn.Module, layer: str, point: TapPoint) -> OwnHook:
        def hand_over_copy(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
                           ) -> Any:
            if module is not own or not self._listening(layer):
                return None
            if isinstance(output, tuple):
                return (self._gated(output[0], layer, point), *output[1:])
            read = gated_norms.statistics(module, args, kwargs) if point.statistics else ()
            return self._gated(output, layer, point, *read)

        return self._hook(hand_over_copy)

    def _listening(self, layer: str) -> bool:
        """Whether a layer that runs now is tapped."""
        if self.current is None:
            return False
        if not torch.is_grad_enabled() and not self.current.returned:
            self.current.deferred_layers.add(layer)
        return torch.is_grad_enabled()

    def publish(self, tap: FusedTap) -> None:
        """Hold a tap ready for the first layer that reads its tensor; the next one takes its place."""
        self._published = tap if self.rows.sample_dims == 1 else None

    def claim(self, x: Tensor) -> Tensor:
        """What a reader of `x` that no tap stands before is to read in its place: it sends back a gradient that
        nothing else holds."""
        tap = self._published
        if tap is None or tap.y is not x:
            return x
        self._published = None
        return tap.tapped

    def _gated(self, x: Tensor, layer: str, point: TapPoint, read: Tensor | None = None, factor: Tensor | None = None
               ) -> Tensor:
        """x as the gate hands it on. read: what the layer that made x has read, if that counts; or rows' experts.
        factor: what that was multiplied by when it was normalised."""
        gate, valid, owner = self._preallocated.get(layer), None, None
        if gate is None:
            owner = pass_of(layer, self.current, self._backward.running)
            known = self._axis(layer, owner)
            axis = known if isinstance(known, SampleAxis) else SampleAxis(known.moving or 0)
            if layer in self._unseen:
                self._unseen.pop(layer).remove()
            tap = self._published
            if tap is not None and tap.y is x and layer in tap.readers and point.fits(x) and axis.dim == 0:
                assert self.current is not None
                self._published = None
                self.current.gates.append(Tapped(layer, tap.gate, known))
                return tap.tapped
            valid = None if known is not axis else self._padding(x, layer, point, axis, owner)
            read_there = (x[point.window] if point.window else x).detach()
            rows = self.rows.first(read_there, point.channel_dim, axis)[0] if valid is None else valid
            gate = self.rows.gate(rows.shape[0], x.shape[point.channel_dim] + point.experts, x)
            if owner is not None:
                owner.gates.append(Tapped(layer, gate, self.rows.axis_of(x, layer, point, known, valid)))
        else:
            known = self.axes.of(layer)
            axis = known if isinstance(known, SampleAxis) else SampleAxis()
        inside = None if point.output or self.rows.sample_dims > 1 else recurrent.inside_of(self._owners[layer])
        gated: Tensor = Gate.apply(x, gate, self, point, axis, valid, owner, inside) if read is None else \
            ExpertGate.apply(x, read, gate, self, point, axis, valid, owner) if point.experts else \
            NormGate.apply(x, read.detach(), factor, gate, self.model.get_submodule(layer), self, point, axis,
                           valid, owner)
        return gated

    def _axis(self, layer: str, owner: ForwardPass | None) -> SampleAxis | Untold:
        """Where the samples lie in what a layer that runs now reads, or why that is not known."""
        if owner is None or torch._C._current_graph_task_id() != -1:
            return self.axes.rerun(layer)
        owner.calls[layer] += 1
        return self.axes.of(layer, owner.calls[layer] - 1)

    def _padding(self, x: Tensor, layer: str, point: TapPoint, axis: SampleAxis, owner: ForwardPass | None
                 ) -> Tensor | None:
        """Which tokens of x are no padding, bool [N, T]; None where it has none, or tokens are samples."""
        if owner is None or (valid := owner.valid) is None or point.channel_dim != -1 or self.rows.sample_dims > 1:
            return None
        if isinstance(self._owners[layer], experts.ExpertLinear) and len(x) % valid.numel() == 0:
            valid = valid.repeat_interleave(len(x) // valid.numel(), 1)  # a row for each expert that a token chooses
        fits = x.dim() > 1 and axis.fits(x, len(valid)) and axis.first(x.detach(), len(valid)).shape[:-1] == valid.shape
        return valid if fits else None

    @contextmanager
    def preallocated_gates(self, gates: Mapping[str, Tensor]) -> Iterator[None]:
        """Layers that run in the block take these gates: torch.compile cannot make any on its way."""
        assert self.current is not None
        self.current.gates += [Tapped(layer, gate, self.axes.of(layer)) for layer, gate in gates.items()]
        self._preallocated = gates
        try:
            yield
        finally:
            self._preallocated = {}

    def _receive_weight(self, name: str) -> Callable[[Tensor], None]:
        def receive(gradient: Tensor) -> None:
            if self.current is not None and not self._propagating:
                self._backward.receive_weight(self.current, name, gradient)

        return receive

    def _end(self, module: nn.Module, args: tuple[Any, ...], returned: Any) -> None:
        done, self._published = self.current, None
        if module is not self.model or done is None or not torch.is_grad_enabled():
            return
        done.returned = True
        if self._on_pass is not None:
            self._backward.watch_outputs(done, self._outputs(returned, type(module).__name__),
                                         lambda: self._propagating)
