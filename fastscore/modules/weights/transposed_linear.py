"""transformers' Conv1D, as in GPT-2: a Linear whose weight is [inputs, outputs].

In evaluation copies it is a Linear, whose weight is a transposed view of the same memory; in a user's model it stays
what it is, before and after surgery.
"""

from collections.abc import Sequence

from torch import nn

from fastscore.modules.narrower import without

_NAME = "transformers.pytorch_utils.Conv1D"


def is_transposed(module: nn.Module) -> bool:
    """Whether it is one; of transformers nothing is imported."""
    return f"{type(module).__module__}.{type(module).__qualname__}" == _NAME


def is_linear(module: nn.Module) -> bool:
    """Whether it is one, or a nn.Linear."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def widths(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of one."""
    inputs, outputs = module._parameters["weight"].shape  # type: ignore[union-attr]
    return inputs, outputs


def become_linear(module: nn.Module) -> None:
    """Make one a nn.Linear that computes the same, in place; its parameters share their memory with the old ones."""
    weight = module._parameters["weight"]
    assert weight is not None
    inputs, outputs = widths(module)
    module.__class__ = nn.Linear
    module.in_features, module.out_features = inputs, outputs  # type: ignore[assignment]
    module._parameters["weight"] = nn.Parameter(weight.detach().t(), weight.requires_grad)


class Surgeon:
    """Takes channels out of one, as Torch-Pruning's functions do out of a Linear."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Without the outputs `idxs`, in place."""
        for name, dim in (("weight", 1), ("bias", 0)):
            _cut(layer, name, dim, idxs)
        layer.nf = widths(layer)[1]  # type: ignore[assignment]
        return layer

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Without the inputs `idxs`, in place."""
        _cut(layer, "weight", 0, idxs)
        layer.nx = widths(layer)[0]  # type: ignore[assignment]
        return layer


def _cut(layer: nn.Module, name: str, dim: int, index: Sequence[int]) -> None:
    old = layer._parameters[name]
    if old is not None:
        layer._parameters[name] = without(old, dim, index)
