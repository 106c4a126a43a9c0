"""Forward passes, and which of them a backward pass went through."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastscore.batches import valid_tokens
from fastscore.modules.sample_axis import SampleAxis, Untold


class Tapped(NamedTuple):
    """A tap that has run: its layer, its gate [P, R, C], and how rows belong to samples, or why that is not known."""

    layer: str
    gate: Tensor
    axis: SampleAxis | Untold


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
        for _, gate, _ in self.gates:
            gate.grad = None

    def rows(self) -> list[Tapped]:
        """What every tap measured that an ordinary backward pass reached: [P, R, C] in place of its gate."""
        return [tapped._replace(gate=tapped.gate.grad) for tapped in self.gates if tapped.gate.grad is not None]


class BackwardPasses:
    """Hears the gradients that ordinary backward passes bring to the outputs of forward passes."""

    def __init__(self) -> None:
        self.finished: list[ForwardPass] = []  # whose gradients are in
        self.running: list[ForwardPass] = []  # that a backward pass which runs now has begun with

    def watch_outputs(self, done: ForwardPass, outputs: Sequence[Tensor], paused: Callable[[], bool]) -> None:
        """Note what comes back to `outputs` of the pass `done`, except in backward passes while `paused()` holds."""
        for number, output in enumerate(outputs):
            if output.requires_grad:
                node, place = _origin(output)
                node.register_prehook(self._receive(done, number, place, paused))

    def _receive(self, done: ForwardPass, number: int, place: int,
                 paused: Callable[[], bool]) -> Callable[[tuple[Tensor | None, ...]], None]:
        def receive(gradients: tuple[Tensor | None, ...]) -> None:
            gradient = gradients[place]
            if paused() or gradient is None:
                return
            before = done.grad_versions()
            self.running.append(done)

            def finish() -> None:
                self.running = [each for each in self.running if each is not done]
                if done.grad_versions() == before:
                    return  # of torch.autograd.grad, which is no training step: it leaves nothing at the gates
                if not done.output_gradients:
                    self.finished.append(done)
                # several losses, each sent back on its own: the gates add up, and so does the output's gradient
                known = done.output_gradients.get(number)
                done.output_gradients[number] = gradient.detach() if known is None else known + gradient.detach()

            # called when this backward pass is over, unless an exception ends it
            torch.autograd.Variable._execution_engine.queue_callback(finish)

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
