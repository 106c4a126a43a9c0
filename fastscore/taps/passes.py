"""Forward passes, and which of them a backward pass went through."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastscore.batches.parts import valid_tokens
from fastscore.modules.sample_axis import Owners, SampleAxis, Untold


class Tapped(NamedTuple):
    """A tap that has run: its layer, its gate [P, R, C], and how rows belong to samples, or why that is not known."""

    layer: str
    gate: Tensor
    axis: SampleAxis | Untold | Owners


class ForwardPass:
    """One forward pass: the gates that its taps made, and the gradient that came back to its output."""

    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs  # of the model's first call
        self.batch: Any = None  # what that came from, where it is known
        self.ids: Tensor | None = None  # of its samples, once they have been asked for
        self.called = False
        self.returned = False
        self.gates: list[Tapped] = []  # a layer called twice stands here twice
        self.calls: Counter[str] = Counter()  # of each layer, up to now
        self.deferred_layers: set[str] = set()  # layers that ran without gradients: checkpointing may run them again
        self.output_gradients: dict[int, Tensor] = {}  # which output -> the gradient that came back to it
        self.weight_gradients: dict[str, Tensor] = {}
        self.probes = 0
        self.counted = False  # among the samples seen
        self.received: dict[int, Tensor] | None = None  # gate -> what came, where second-order gradients may follow
        # numbers of backward passes: the latest measured, that brought second-order gradients, that was dropped
        self.latest = self.second_order = self.dropped = -1
        self.mixed = False  # not measured, since second-order gradients came together with those of a loss

    @cached_property
    def valid(self) -> Tensor | None:
        """Its tokens that are no padding, bool [N, T]; None where all count, or nothing tells."""
        return valid_tokens(self.inputs)

    def grad_versions(self) -> list[tuple[int, int] | None]:
        """Something that differs once an ordinary backward pass has reached a gate."""
        return [None if gate.grad is None else (id(gate.grad), gate.grad._version) for _, gate, _ in self.gates]

    def forget_gradients(self) -> None:
        """What came back has been counted: what comes later counts as another backward pass, not once more."""
        self.output_gradients.clear()
        self.weight_gradients.clear()
        if self.received is not None:
            self.received.clear()
        for _, gate, _ in self.gates:
            gate.grad = None

    def set_apart(self) -> None:
        """From here on what came to the gates is moved away after every backward pass (`absorb`): second-order
        gradients would be added to it."""
        if self.received is None:
            self.received = {}
            self.absorb()

    def absorb(self) -> None:
        """Move away what an ordinary backward pass has brought to the gates, if that is set apart."""
        for _, gate, _ in self.gates if self.received is not None else []:
            if gate.grad is not None and self.received is not None:
                known, new = self.received.get(id(gate)), gate.grad.detach()
                self.received[id(gate)] = new if known is None else known + new
                gate.grad = None

    def drop(self, task: int) -> None:
        """Forget what the backward pass `task` has brought to the gates."""
        for _, gate, _ in self.gates:
            if gate.grad is not None:
                self.dropped, gate.grad = task, None

    def rows(self) -> list[Tapped]:
        """What every tap measured that an ordinary backward pass reached: [P, R, C] in place of its gate."""
        received = self.received
        found = [each.gate.grad if received is None else received.get(id(each.gate)) for each in self.gates]
        return [each._replace(gate=rows) for each, rows in zip(self.gates, found, strict=True) if rows is not None]


class _Recorded(torch.autograd.Function):
    """(gradient, leaf) -> gradient; backward: (what is sent back through the pass that brought it, nothing)."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, leaf: Tensor, notice: Callable[[], None]) -> Tensor:
        ctx.notice = notice
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        ctx.notice()
        return g, None, None


class BackwardPasses:
    """Hears the gradients that ordinary backward passes bring to the outputs of forward passes.

    A backward pass that is recorded itself (create_graph=True, for a penalty on gradients) is marked, so that one which
    comes back through it is noticed: that brings second-order gradients to activations, beside or without those of a
    loss, and autograd adds them up. What it brings to such a forward pass is dropped.
    """

    def __init__(self) -> None:
        self.finished: list[ForwardPass] = []  # whose gradients are in
        self.running: list[ForwardPass] = []  # that a backward pass which runs now has begun with
        self.second_order = -1  # the latest backward pass that brought second-order gradients; -1 for none
        self.mixed = 0  # forward passes that are not measured since theirs came together with those of a loss

    def watch_outputs(self, done: ForwardPass, outputs: Sequence[Tensor], paused: Callable[[], bool]) -> None:
        """Note what comes back to `outputs` of the pass `done`, except in backward passes while `paused()` holds."""
        for number, output in enumerate(outputs):
            if output.requires_grad:
                node, place = _origin(output)
                node.register_prehook(self._receive(done, number, place, paused))

    def recorded(self, done: ForwardPass, gradient: Tensor) -> Tensor:
        """`gradient`, of a backward pass through `done` that is recorded, with a mark: what comes back to it is
        noticed, even where it depends on nothing."""
        done.set_apart()
        mark = torch.empty(0, device="cpu", requires_grad=True)  # whatever device is the default one
        marked: Tensor = _Recorded.apply(gradient, mark, partial(self._notice, done))
        return marked

    def _notice(self, done: ForwardPass) -> None:
        task = torch._C._current_graph_task_id()
        if done.second_order != task:
            done.second_order = self.second_order = task
            torch.autograd.Variable._execution_engine.queue_callback(partial(done.drop, task))

    def receive_weight(self, done: ForwardPass, name: str, gradient: Tensor) -> None:
        """Note the gradient of a weight for the pass `done`; where the same backward pass brings second-order ones,
        what it measured is left out."""
        task = torch._C._current_graph_task_id()

        def add() -> None:
            if self.second_order != task:
                known = done.weight_gradients.get(name)
                done.weight_gradients[name] = gradient.detach() if known is None else known + gradient.detach()
                return
            for each in [each for each in self.finished if each.latest == task]:
                self.finished.remove(each)
                each.forget_gradients()
                each.mixed, self.mixed = True, self.mixed + 1

        torch.autograd.Variable._execution_engine.queue_callback(add)

    def _receive(self, done: ForwardPass, number: int, place: int,
                 paused: Callable[[], bool]) -> Callable[[tuple[Tensor | None, ...]], tuple[Tensor | None, ...] | None]:
        def receive(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
            gradient = gradients[place]
            if paused() or gradient is None:
                return None
            task, marked = torch._C._current_graph_task_id(), None
            if torch.is_grad_enabled():
                marked = self.recorded(done, gradient)
            before = done.grad_versions()
            self.running.append(done)

            def finish() -> None:
                self.running = [each for each in self.running if each is not done]
                if done.second_order == task:
                    done.drop(task)
                    if done.dropped == task and done.latest < 0 and not done.mixed:
                        done.mixed, self.mixed = True, self.mixed + 1
                    return
                if done.latest != task and done.grad_versions() == before:
                    return  # of torch.autograd.grad, which is no training step: it leaves nothing at the gates
                if not done.output_gradients:
                    self.finished.append(done)
                # several losses, each sent back on its own: the gates add up, and so does the output's gradient
                done.latest = task
                done.absorb()
                known = done.output_gradients.get(number)
                done.output_gradients[number] = gradient.detach() if known is None else known + gradient.detach()

            # called when this backward pass is over, unless an exception ends it
            torch.autograd.Variable._execution_engine.queue_callback(finish)
            return None if marked is None else (*gradients[:place], marked, *gradients[place + 1:])

        return receive


def _origin(output: Tensor) -> tuple[Any, int]:
    """The autograd node that made `output`, and as which of its results; before a mere change of dtype.

    Wrappers for mixed precision hand out a float32 copy of an output that the model's own loss was computed from.
    """
    node: Any = output.grad_fn
    place = output.output_nr
    while node.name() == "ToCopyBackward0":
        node, place = node.next_functions[0]
    return node, place


def pass_of(layer: str, current: ForwardPass | None, running: Sequence[ForwardPass]) -> ForwardPass | None:
    """The forward pass that `layer`, which runs now, belongs to; None where it runs again and has its gate already.

    current: the latest forward pass. running: those that a backward pass which runs now has begun with. Where
    checkpointing is reentrant, layers ran without gradients before, and their gates are made only now.
    Raises RuntimeError, naming the layer, where it may belong to several.
    """
    if torch._C._current_graph_task_id() == -1:  # no backward pass runs now
        return current
    owners = [each for each in running if layer in each.deferred_layers]
    if len(owners) > 1:
        raise RuntimeError(f"{layer}: it runs again for a backward pass that covers {len(owners)} forward passes, and "
                           "which of them it belongs to cannot be told: use checkpoint(..., use_reentrant=False), or a "
                           "backward pass for each forward pass")
    return owners[0] if owners else None
