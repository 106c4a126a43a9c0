"""MACs of the run that a trace makes anyhow on the example inputs as they are, or of one more."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fastscore.batches.calls import Forward
from fastscore.batches.parts import Batch
from fastscore.modules.macs.counting import Counting, count, counting
from fastscore.modules.weights import recurrent


class CountedRun:
    """model: an evaluation copy. example_inputs, forward: how it is called."""

    def __init__(self, model: nn.Module, example_inputs: Batch, forward: Forward) -> None:
        self._model, self._example, self._forward = model, example_inputs, forward
        self._counted: Counting | None = None

    @contextmanager
    def once(self) -> Iterator[None]:
        """A block in which the model is called on the example inputs, without gradients: that is counted, unless it has
        recurrent modules, whose steps are not all taken while a model is traced."""
        if any(map(recurrent.state_layers, self._model.modules())):
            yield
            return
        with counting(self._model) as counted:
            yield
        self._counted = counted

    def products(self, batch_dim: int) -> dict[str, Any]:
        """The `macs` and `uncounted` of a graph. batch_dim: along which the samples of the example inputs lie."""
        try:
            counted = count(self._model, self._example, self._forward, batch_dim) if self._counted is None else \
                self._counted.of(self._example, batch_dim)
        except Exception as error:  # of a model that runs otherwise: what is scored does not depend on it
            return {"uncounted": {f"everything ({type(error).__name__}: {error})": "the whole model"}}
        return {"macs": counted.weights, "uncounted": counted.uncounted}
