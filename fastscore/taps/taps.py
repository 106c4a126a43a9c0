"""Taps: where activation meets gradient.

A tap stands on the input of a layer that reads channels (a consumer), or on the output of one (a BatchNorm). It hands
the tensor on through an identity whose second argument, the gate, is a leaf [P, N, C]; what autograd sends to the gate
is what is measured of activation and gradient *on that edge alone*. So a backward pass that asks for the gates computes
no weight gradient, and an ordinary backward pass leaves the sums in `gate.grad`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastscore.batches import Outputs, output_tensors
from fastscore.modules import multihead_attention
from fastscore.modules.hooks import OwnHook
from fastscore.taps.gates import FusedTap, Gate, TapPoint
from fastscore.taps.measures import Measure
from fastscore.taps.passes import BackwardPasses, ForwardPass
from fastscore.taps.recompute import pass_of


class Taps:
    """Taps on the layers that `points` names; a context manager that leaves no hook behind.

    points: layer -> where its tap stands. measure: what a gate receives. on_pass: called with each
    ForwardPass whose output an ordinary backward pass reached, once a later forward pass begins or `flush` is called;
    without it only `propagate` measures, and ordinary backward passes cost nothing. weights: parameters whose gradients
    are measured too, by name; those of an ordinary backward pass count for the latest forward pass. outputs: what the
    model returns -> the tensors whose gradients are the pass's output gradient. traceable: whether torch.compile is to
    follow the hooks, rather than compile what stands between them. sample_dims: how many dimensions of a layer's input
    tell samples apart; with 2, the second is that of tokens.
    """

    def __init__(self, model: nn.Module, points: Mapping[str, TapPoint], measure: Measure,
                 on_pass: Callable[[ForwardPass], None] | None = None,
                 weights: Mapping[str, Tensor] | None = None, outputs: Outputs = output_tensors,
                 traceable: bool = False, sample_dims: int = 1) -> None:
        self.model = model
        self.points = dict(points)
        self.measure = measure
        self.weights = dict(weights or {})
        self.current: ForwardPass | None = None
        self._preallocated: Mapping[str, Tensor] = {}
        self._published: FusedTap | None = None
        self._on_pass = on_pass
        self._outputs = outputs
        self._traceable = traceable
        self._sample_dims = sample_dims
        self._propagating = self._in_one_pass = False
        self._backward = BackwardPasses()
        self._seen: set[str] = set()  # layers whose taps have run
        self._handles: list[RemovableHandle | multihead_attention.Handle] = []

    def attach(self) -> None:
        """Set the hooks. Raises RuntimeError when they are set already."""
        if self._handles:
            raise RuntimeError("these taps are attached already: detach() first")
        self._handles = [self.model.register_forward_pre_hook(self._hook(self._begin), with_kwargs=True),
                         self.model.register_forward_hook(self._hook(self._end))]
        self._handles += multihead_attention.replace_attention(self.model, self.points)
        for layer, point in self.points.items():
            module = self.model.get_submodule(point.module or layer)
            self._handles.append(
                module.register_forward_hook(self._tap_output(module, layer, point)) if point.output
                else module.register_forward_pre_hook(self._tap_input(module, layer, point)))
        if self._on_pass is not None:
            self._handles += [weight.register_hook(self._receive_weight(name)) for name, weight in self.weights.items()]
            self._handles += [weight.register_hook(self._check_seen(layer)) for layer in self.points
                              if isinstance(weight := getattr(self.model.get_submodule(layer), "weight", None),
                                            nn.Parameter) and weight.requires_grad]

    def detach(self) -> None:
        """Remove the hooks and hand over what is finished. Harmless when nothing is attached."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.flush()
        self.current = None
        self._seen.clear()

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

    def measured(self, x: Tensor, g: Tensor, channel_dim: int, valid: Tensor | None) -> Tensor:
        """[P, N, C] of activation and gradient; where `valid` (bool [N, T]) tells padding, without it."""
        if self._sample_dims > 1:
            return self.measure.compute(x.flatten(0, 1), g.flatten(0, 1), channel_dim)
        if valid is None:
            return self.measure.compute(x, g, channel_dim)
        valid = valid.to(x.device)
        measured = self.measure.compute(x.masked_fill(~valid[..., None], 0), g, channel_dim)
        if self.measure.mean is not None:
            measured[self.measure.mean] *= (valid.shape[1] / valid.sum(1).clamp(min=1))[:, None]
        return measured

    def propagate(self, output: Tensor, gradient: Tensor, last: bool = False
                  ) -> tuple[list[tuple[str, Tensor]], dict[str, Tensor]]:
        """Send `gradient` (of `output`'s shape) back from the latest forward pass, to the gates and weights alone.

        Returns (layer, sums [P, N, C]) of every tap that `output` depends on, and the gradients of the weights that it
        depends on. No `.grad` changes; the graph stays alive unless this is the last.
        Raises RuntimeError when the output does not come from that pass, or its graph is gone.
        """
        # a copy: activation checkpointing runs layers, and their taps, again during the backward pass
        gates = list(self.current.gates) if self.current is not None else []
        if not gates or not output.requires_grad:
            raise RuntimeError("output: no tapped forward pass is behind it: run the model with gradients enabled "
                               "while the taps are attached, then pass its output")
        self._propagating = True
        try:
            found = torch.autograd.grad(output, [*(gate for _, gate in gates), *self.weights.values()], gradient,
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
        reached = [(layer, tensor) for (layer, _), tensor in zip(gates, found, strict=False) if tensor is not None]
        if not reached:
            raise RuntimeError("output: it is not the output of the latest forward pass: send gradients back before "
                               "the model runs again")
        return reached, {name: tensor for name, tensor in zip(self.weights, found[len(gates):], strict=True)
                         if tensor is not None}

    @contextmanager
    def one_pass(self, inputs: Any) -> Iterator[None]:
        """Whatever runs in the block is one pass, however often the model is called; `inputs` if it never is."""
        self.flush()
        self.current, self._in_one_pass = ForwardPass(inputs), True
        try:
            yield
        finally:
            self._in_one_pass = False

    def flush(self) -> None:
        """Hand over the passes whose gradients are in."""
        finished, self._backward.finished = self._backward.finished, []
        for done in finished:
            assert self._on_pass is not None
            self._on_pass(done)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self.model or not torch.is_grad_enabled():
            return
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
        def hand_over_view(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if module is not own or not self._listening(layer):
                return None
            if not args:
                raise TypeError(f"{layer}: its input arrives as a keyword argument; call it by position, or ignore it")
            return self._gated(args[0], layer, point), *args[1:]

        return self._hook(hand_over_view)

    def _tap_output(self, own: nn.Module, layer: str, point: TapPoint) -> OwnHook:
        def hand_over_copy(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return self._gated(output, layer, point) if module is own and self._listening(layer) else None

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
        self._published = tap if self._sample_dims == 1 else None

    def claim(self, x: Tensor) -> Tensor:
        """What a reader of `x` that no tap stands before is to read in its place: it sends back a gradient that
        nothing else holds."""
        tap = self._published
        if tap is None or tap.y is not x:
            return x
        self._published = None
        return tap.tapped

    def _gated(self, x: Tensor, layer: str, point: TapPoint) -> Tensor:
        tap = self._published
        if tap is not None and tap.y is x and layer in tap.readers and point.fits(x):
            assert self.current is not None
            self._published = None
            self.current.gates.append((layer, tap.gate))
            self._seen.add(layer)
            return tap.tapped
        gate, valid = self._preallocated.get(layer), None
        if gate is None:
            gate = self.gate(self._samples(x, layer, point), x.shape[point.channel_dim], x)
            owner = pass_of(layer, self.current, self._backward.running)
            if owner is not None:
                owner.gates.append((layer, gate))
                if point.channel_dim == -1 and owner.valid is not None and x.shape[:-1] == owner.valid.shape:
                    valid = owner.valid
            self._seen.add(layer)
        gated: Tensor = Gate.apply(x, gate, self, point, valid)
        return gated

    def _samples(self, x: Tensor, layer: str, point: TapPoint) -> int:
        """How many samples a layer's input holds."""
        if self._sample_dims > 1 and (point.channel_dim != -1 or x.dim() < 3):
            raise ValueError(f"{layer}: its input {list(x.shape)} has no dimension of tokens, [N, T, C], to tell "
                             f"samples apart by (sample_dims={self._sample_dims}): leave out what makes it")
        return math.prod(x.shape[:self._sample_dims])

    def gate(self, samples: int, channels: int, like: Tensor) -> Tensor:
        """A leaf [P, N, C] for a tensor such as `like`. It is never read: only what comes back to it counts."""
        return torch.empty(self.measure.parts, samples, channels, device=like.device, requires_grad=True,
                           dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)

    @contextmanager
    def preallocated_gates(self, gates: Mapping[str, Tensor]) -> Iterator[None]:
        """Layers that run in the block take these gates: torch.compile cannot make any on its way."""
        assert self.current is not None
        self.current.gates += gates.items()
        self._preallocated = gates
        try:
            yield
        finally:
            self._preallocated = {}

    def _check_seen(self, layer: str) -> Callable[[Tensor], None]:
        def check(gradient: Tensor) -> None:
            if layer not in self._seen:
                raise RuntimeError(f"{layer}: a backward pass reached its weight, but the forward pass went past its "
                                   "tap. Attach the scorer before the forward pass, and to a model that torch.compile "
                                   "has made before that first runs (afterwards, torch.compiler.reset() makes it look "
                                   "for hooks again); and call the model itself, not its parts")

        return check

    def _receive_weight(self, name: str) -> Callable[[Tensor], None]:
        def receive(gradient: Tensor) -> None:
            if self.current is not None and not self._propagating:
                known = self.current.weight_gradients.get(name)
                self.current.weight_gradients[name] = gradient if known is None else known + gradient

        return receive

    def _end(self, module: nn.Module, args: tuple[Any, ...], returned: Any) -> None:
        done, self._published = self.current, None
        if module is not self.model or done is None or not torch.is_grad_enabled():
            return
        done.returned = True
        if self._on_pass is not None:
            self._backward.watch_outputs(done, self._outputs(returned, type(module).__name__),
                                         lambda: self._propagating)
