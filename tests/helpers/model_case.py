"""A model that people use: how it is made, and a batch that it takes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fastscore.batches.calls import Forward, call_model
from fastscore.batches.parts import Batch


@dataclass(frozen=True)
class Case:
    """make: the model. image: its height and width. batch: the number of samples -> a batch, where it is no tensor of
    images. forward: how it is called, where not on the batch alone. small: in the ordinary run of the tests."""

    name: str
    make: Callable[[], nn.Module]
    image: int = 64
    forward: Forward = call_model
    small: bool = False
    batch: Callable[[int], Batch] | None = None

    @property
    def library(self) -> str:
        """That the model is from."""
        return self.name.partition(":")[0] if ":" in self.name else "torchvision"

    def inputs(self, samples: int) -> Batch:
        """A random batch."""
        return torch.randn(samples, 3, self.image, self.image) if self.batch is None else self.batch(samples)

    @property
    def input(self) -> str:
        """What a sample is, in short."""
        batch = self.inputs(1)
        tensors = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple) else (batch,)
        return ", ".join("×".join(map(str, tensor.shape[1:])) or "1" for tensor in tensors if tensor.dim())
