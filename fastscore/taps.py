"""Taps: where activation meets gradient.

A tap stands on the input of a layer that reads channels (a consumer), or on the output of one (a BatchNorm). It hands
the tensor on through an identity whose second argument, the gate, is a leaf [P, N, C]; what autograd sends to the gate
is what is measured of activation and gradient *on that edge alone*. So a backward pass that asks for the gates computes
no weight gradient, and an ordinary backward pass leaves the sums in `gate.grad`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Measure:
    """What is measured at a tap: `compute(activation, gradient, channel_dim)` -> [P, N, C], for P `parts`."""

    parts: int
    compute: Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Place:
    """Where a tap stands: the dimension that holds the channels, of the layer's input or of its output."""

    channel_dim: int
    output: bool = False


class OwnHook:
    """A hook that can be told from the user's, and that a copy of the model shares with it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OwnHook":
        return self  # a copied model (an EMA, say) carries the hooks along; they know their own modules and stay quiet


class _Gate(torch.autograd.Function):
    """(x, gate) -> x; backward: (g, measure(x, g))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, taps: "Taps", place: Place) -> Tensor:
        ctx.save_for_backward(x)
        ctx.taps, ctx.place = taps, place
        # a Conv or Linear never writes to its input; whoever takes a BatchNorm's output may (`out += identity`)
        return x.clone() if place.output else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        measured = ctx.taps.measure.compute(x, g, ctx.place.channel_dim) if ctx.taps.measuring else None
        return g, measured, None, None


class ForwardPass:
    """One forward pass: the gates that its taps made, and the gradient that came back to its output."""

    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs
        self.ids: Tensor | None = None  # of its samples, once they have been asked for
        self.called = False
        self.gates: list[tuple[str, Tensor]] = []  # (layer, gate [P, N, C]); a layer called twice stands here twice
        self.output_gradient: Tensor | None = None
        self.weight_gradients: dict[str, Tensor] = {}
        self.probes = 0

    def marks(self) -> list[tuple[int, int] | None]:
        """Something that differs once an ordinary backward pass has reached a gate."""
        return [None if gate.grad is None else (id(gate.grad), gate.grad._version) for _, gate in self.gates]

    def sums(self) -> list[tuple[str, Tensor]]:
        """(layer, sums [P, N, C]) of every tap that an ordinary backward pass reached."""
        return [(layer, gate.grad) for layer, gate in self.gates if gate.grad is not None]


class Taps:
    """Taps on the layers that `places` names; a context manager that leaves no hook behind.

    places: layer -> where its tap stands. measure: what a gate receives. on_pass: called with each
    ForwardPass whose output an ordinary backward pass reached, once a later forward pass begins or `flush` is called;
    without it only `propagate` measures, and ordinary backward passes cost nothing. weights: parameters whose gradients
    are measured too, by name; those of an ordinary backward pass count for the latest forward pass.
    """

    def __init__(self, model: nn.Module, places: Mapping[str, Place], measure: Measure,
                 on_pass: Callable[[ForwardPass], None] | None = None,
                 weights: Mapping[str, Tensor] | None = None) -> None:
        self.model = model
        self.places = places
        self.measure = measure
        self.weights = dict(weights or {})
        self.current: ForwardPass | None = None
        self._on_pass = on_pass
        self._propagating = self._joining = False
        self._finished: list[ForwardPass] = []
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Set the hooks. Raises RuntimeError when they are set already."""
        if self._handles:
            raise RuntimeError("these taps are attached already: detach() first")
        self._handles = [self.model.register_forward_pre_hook(OwnHook(self._begin), with_kwargs=True),
                         self.model.register_forward_hook(OwnHook(self._end))]
        for layer, place in self.places.items():
            module = self.model.get_submodule(layer)
            self._handles.append(
                module.register_forward_hook(self._tap_output(module, layer, place)) if place.output
                else module.register_forward_pre_hook(self._tap_input(module, layer, place)))
        if self._on_pass is not None:
            self._handles += [weight.register_hook(self._receive_weight(name)) for name, weight in self.weights.items()]

    def detach(self) -> None:
        """Remove the hooks and hand over what is finished. Harmless when nothing is attached."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
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
        return self._propagating or self._on_pass is not None

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
    def joined(self, inputs: Any) -> Iterator[None]:
        """Whatever runs in the block is one pass, however often the model is called; `inputs` if it never is."""
        self.flush()
        self.current, self._joining = ForwardPass(inputs), True
        try:
            yield
        finally:
            self._joining = False

    def flush(self) -> None:
        """Hand over the passes whose gradients are in."""
        finished, self._finished = self._finished, []
        for done in finished:
            assert self._on_pass is not None
            self._on_pass(done)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self.model or not torch.is_grad_enabled():
            return
        if self._joining and self.current is not None:
            if not self.current.called:
                self.current.inputs, self.current.called = (args, kwargs), True
            return
        self.flush()
        self.current = ForwardPass((args, kwargs))

    def _tap_input(self, own: nn.Module, layer: str, place: Place) -> OwnHook:
        def hand_over_view(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if module is not own or self.current is None or not torch.is_grad_enabled():
                return None
            if not args:
                raise TypeError(f"{layer}: its input arrives as a keyword argument; call it by position, or ignore it")
            return self._gated(args[0], layer, place), *args[1:]

        return OwnHook(hand_over_view)

    def _tap_output(self, own: nn.Module, layer: str, place: Place) -> OwnHook:
        def hand_over_copy(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if module is not own or self.current is None or not torch.is_grad_enabled():
                return None
            return self._gated(output, layer, place)

        return OwnHook(hand_over_copy)

    def _gated(self, x: Tensor, layer: str, place: Place) -> Tensor:
        assert self.current is not None
        # never read: only what comes back to it counts
        gate = torch.empty(self.measure.parts, x.shape[0], x.shape[place.channel_dim], device=x.device,
                           dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, requires_grad=True)
        self.current.gates.append((layer, gate))
        gated: Tensor = _Gate.apply(x, gate, self, place)
        return gated

    def _receive_weight(self, name: str) -> Callable[[Tensor], None]:
        def receive(gradient: Tensor) -> None:
            if self.current is not None and not self._propagating:
                known = self.current.weight_gradients.get(name)
                self.current.weight_gradients[name] = gradient if known is None else known + gradient

        return receive

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        done = self.current
        if module is not self.model or done is None or not isinstance(output, Tensor) or not output.requires_grad:
            return

        def receive(gradient: Tensor) -> None:
            if self._propagating or self._on_pass is None:
                return
            before = done.marks()

            def finish() -> None:
                if done.marks() == before:
                    return  # of torch.autograd.grad, which is no training step: it leaves nothing at the gates
                if done.output_gradient is None:
                    self._finished.append(done)
                    done.output_gradient = gradient.detach()
                else:  # several losses, each sent back on its own: the gates add up, and so does the output's gradient
                    done.output_gradient = done.output_gradient + gradient.detach()

            # called when this backward pass is over, unless an exception ends it
            torch.autograd.Variable._execution_engine.queue_callback(finish)

        output.register_hook(receive)


def remove_copied_hooks(model: nn.Module) -> None:
    """Take off a copy of a tapped or masked model the hooks that came along with it."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(hooks.items()):
                if isinstance(hook, OwnHook):
                    del hooks[number]
                    module._forward_pre_hooks_with_kwargs.pop(number, None)
