"""Linears of parameters that a module's own code multiplies by: see fastscore.modules.weights.own_products."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.modules.weights.parameter_layers import ParameterLinear


class TurnedLinear(ParameterLinear):
    """A Linear, or several, of a parameter that need not lie as a Linear's weight does; in an evaluation copy it does.

    dims: of the parameter: (copies, if there are several,) outputs, inputs.
    """

    dims: tuple[int, ...] = (0, 1)

    def __init__(self, owner: nn.Module, name: str, bias_name: str = "") -> None:
        nn.Module.__init__(self)
        self._of, self.bias_name, self.order = (owner, name), bias_name, tuple(owner._parameters)
        self._parameters.update({self.stored_as: owner._parameters.pop(name), "bias": owner._parameters.get(bias_name)})
        owner._parameters.pop(bias_name, None)
        self.measure()

    @property
    def stored_as(self) -> str:  # type: ignore[override]
        """The name of the parameter here."""
        return "weight" if "weight" in self._parameters or self.dims == tuple(sorted(self.dims)) else "turned"

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """[(copies,) outputs, inputs]."""
        held = self._parameters.get("weight")
        if held is not None:
            return held
        turned = self._parameters["turned"]
        assert turned is not None
        return turned.permute(self.dims)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self._parameters["weight"] = value
        else:
            super().__setattr__(name, value)

    @property
    def stored(self) -> tuple[Tensor, tuple[int, ...]]:
        """What is in memory, and which dimensions of the parameter its own are."""
        turned = self._parameters.get("turned")
        return (self.weight, self.dims) if turned is None else (turned, tuple(sorted(self.dims)))

    @property
    def raw(self) -> Tensor:
        """The parameter as the module's code has it."""
        tensor, dims = self.stored
        return tensor if dims == tuple(sorted(dims)) else tensor.permute(tuple(map(dims.index, sorted(dims))))

    @property
    def held(self) -> dict[str, nn.Parameter | None]:
        """What the module has in the place of this layer."""
        raw = self.raw
        bias = {self.bias_name: self._parameters["bias"]} if self.bias_name else {}
        return {self._of[1]: raw if isinstance(raw, nn.Parameter) else nn.Parameter(raw.detach(), raw.requires_grad),
                **bias}

    def at(self, dim: int) -> int:
        """The dimension of the weight that a dimension of the parameter is."""
        return self.dims.index(dim)

    def lie_as_a_linear(self) -> None:
        """Of an evaluation copy: hold the weight itself, in the memory of the parameter."""
        turned = self._parameters.pop("turned", None)
        if turned is not None:
            self._parameters = {"weight": nn.Parameter(turned.detach().permute(self.dims), turned.requires_grad),
                                **self._parameters}


class OwnLinear(TurnedLinear):
    """One of a parameter that a module's code multiplies by."""

    def __init__(self, owner: nn.Module, name: str, dims: tuple[int, ...]) -> None:
        vars(self).update(dims=dims, readers=list[int]())  # threads in which code runs that reads it, once for a call
        super().__init__(owner, name)

    def forward(self, x: Tensor, copy: int | None = None) -> Tensor:
        """[(copies,) ..., inputs] -> [(copies,) ..., outputs]; copy: which one alone."""
        weight: Tensor = self.weight
        if weight.dim() == 2 or copy is not None:
            return F.linear(x, weight if copy is None else weight[copy])
        if x.dim() == 3:
            return torch.bmm(x, weight.transpose(1, 2))
        rows = x[:, None] if x.dim() == 2 else x.flatten(1, -2)
        return torch.bmm(rows, weight.transpose(1, 2)).view(*x.shape[:-1], weight.shape[1])


class TiedLinear(OwnLinear):
    """One of a parameter that another layer holds, an embedding, say: it loses what that does."""

    def __init__(self, layer: nn.Module, key: str, dims: tuple[int, ...], also: str = "") -> None:
        nn.Module.__init__(self)
        self._of, self.bias_name, self.dims, self.also, self.readers = (layer, key), "", dims, also, list[int]()
        self._parameters["bias"] = None

    @property
    def raw(self) -> Tensor:
        """The parameter as the model's code has it."""
        layer, key = self._of
        held: Tensor = layer.raw if isinstance(layer, OwnLinear) else getattr(layer, key)
        return held

    @property
    def stored(self) -> tuple[Tensor, tuple[int, ...]]:
        """See OwnLinear."""
        layer = self._of[0]
        return layer.stored if isinstance(layer, OwnLinear) else (self.raw, tuple(range(len(self.dims))))

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """See OwnLinear."""
        return self.raw.permute(self.dims)

    @property
    def held(self) -> dict[str, nn.Parameter | None]:
        """Nothing: the other layer holds it."""
        return {}

    def measure(self) -> None:
        pass

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """How many inputs there are."""
        return int(self.weight.shape[-1])

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """How many outputs there are."""
        return int(self.weight.shape[-2])

    def lie_as_a_linear(self) -> None:
        """The other layer does."""

    def _without(self, side: Any, index: Sequence[int]) -> nn.Module:
        return self
