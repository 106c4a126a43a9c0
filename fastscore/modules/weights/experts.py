"""Experts of transformers, two parameters gate_up_proj [E, 2I, H] and down_proj [E, H, I], or both turned, [E, H, 2I]
and [E, I, H], with biases or without, as two layers; and the weight [E, H] of a router, which chooses among them, as
one.

Rows go through an ExpertLinear in order of tokens, whichever expert they choose: rows of one sample stay together.
"""

import dis
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.modules.weights.own_linear import TurnedLinear
from fastscore.modules.weights.parameter_layers import HoldsLayers, Kinds, ParameterLinear

NAMES = ("gate_up_proj", "down_proj")
ROUTER = ("weight",)
# what transformers says of a class whose code is that of _Experts
_SETTINGS = {"has_gate": True, "has_post_expert_norm": False, "_is_expert_parallel": False}
_TURNED, _BIASES = "is_transposed", "has_bias"
# widths that the code keeps beside its parameters: (parameter, side) -> attributes
WIDTHS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("down_proj", "inputs"): ("intermediate_dim", "intermediate_size", "ffn_dim"),
    ("gate_up_proj", "inputs"): ("hidden_dim", "hidden_size"), ("weight", "inputs"): ("hidden_dim", "hidden_size")}


class ExpertLinear(TurnedLinear):
    """[rows, inputs], int64 [rows] -> [rows, outputs]: each row times the matrix of its expert, of weight
    [experts, outputs, inputs], and its bias, of [experts, outputs]."""

    widths = WIDTHS
    dims = (0, 1, 2)

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:  # type: ignore[override]
        """[rows, inputs] -> [rows, outputs]; rows of no expert are zero."""
        made: Tensor = _Product.apply(x, self.weight, self._parameters["bias"], expert)
        return made


class TurnedExpertLinear(ExpertLinear):
    """One of a parameter [experts, inputs, outputs]."""

    dims = (0, 2, 1)


class RouterLinear(ParameterLinear):
    """A Linear in the place of a parameter [outputs, inputs]: F.linear(x, it) runs it."""

    widths = WIDTHS

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs], computed as x is: code that casts both may have cast the weight."""
        return F.linear(x, self.weight.to(x.dtype))

    def type(self, dtype: Any = None) -> Any:
        """As a parameter's: it stays what it is, where a module's would change for good."""
        return self.weight.type() if dtype is None else self

    def float(self) -> "RouterLinear":
        """Likewise."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> "RouterLinear":
        """Likewise."""
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What PyTorch calls where a function is given one as a tensor."""
        if func is F.linear and len(args) == 2 and isinstance(args[1], cls) and not kwargs:
            return args[1](args[0])
        return super().__torch_function__(func, types, args, kwargs)


class _Product(torch.autograd.Function):
    """One node of autograd, however many experts there are: whoever follows channels sees one layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, expert: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, expert)
        ctx.of_bias = None if bias is None else (bias.shape, bias.dtype)
        made = [(rows, F.linear(x[rows], weight[number], None if bias is None else bias[number]))
                for number, rows in _rows(expert, len(weight))]
        out = x.new_zeros(len(x), weight.shape[1], dtype=made[0][1].dtype if made else x.dtype)
        for rows, part in made:
            out[rows] = part
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, expert = ctx.saved_tensors
        to_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        to_bias = g.new_zeros(ctx.of_bias[0], dtype=ctx.of_bias[1]) if ctx.needs_input_grad[2] else None
        for number, rows in _rows(expert, len(weight)):
            part = g[rows]
            if to_bias is not None:
                to_bias[number] = part.sum(0)
            if to_x is not None:
                to_x[rows] = (part @ weight[number].to(part.dtype)).to(x.dtype)
            if to_weight is not None:
                to_weight[number] = (part.t() @ x[rows].to(part.dtype)).to(weight.dtype)
        return to_x, to_weight, to_bias, None


def _rows(expert: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """(an expert, the rows that choose it, int64), for each that some do."""
    for number in expert.unique().tolist():
        if number < experts:
            yield number, (expert == number).nonzero()[:, 0]


class _Experts(HoldsLayers):
    """The forward of such a module, of which it has all else."""

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, H], int64 [tokens, K], [tokens, K] -> [tokens, H]."""
        chosen, expert = top_k_index.shape[-1], top_k_index.reshape(-1)
        rows = hidden_states[:, None].expand(-1, chosen, -1).flatten(0, 1)
        made = self.down_proj(self._apply_gate(self.gate_up_proj(rows, expert)), expert)
        summed: Tensor = (made.unflatten(0, (-1, chosen)) * top_k_weights[..., None]).sum(1)
        return summed.to(hidden_states.dtype)


def kinds(module: nn.Module) -> Kinds | None:
    """What becomes of a module's parameters; None of one that has no experts, and is no router."""
    if holds_experts(module):
        layer = TurnedExpertLinear if lie_turned(module) else ExpertLinear
        biases = {name: bias for name in NAMES if (bias := bias_of(module, name))}
        return Kinds(NAMES, layer, _Experts, biases)
    return Kinds(ROUTER, RouterLinear, HoldsLayers) if routes(module) else None


def holds_experts(module: nn.Module) -> bool:
    """Whether it is such a module, as its user has it."""
    up, down = (module._parameters.get(name) for name in NAMES)
    biases = {f"{name}_bias" for name in NAMES} if getattr(module, _BIASES, False) else set[str]()
    if up is None or down is None or set(module._parameters) != {*NAMES, *biases} or not up.dim() == down.dim() == 3:
        return False
    if lie_turned(module):
        up, down = up.transpose(1, 2), down.transpose(1, 2)  # type: ignore[assignment]
    return up.shape[1] == 2 * down.shape[2] and up.shape[2] == down.shape[1] \
        and hasattr(type(module), "_apply_gate") \
        and all(getattr(module, name, None) is value for name, value in _SETTINGS.items())


def lie_turned(module: nn.Module) -> bool:
    """Whether the parameters of experts are [experts, inputs, outputs]."""
    return getattr(module, _TURNED, False) is True


def bias_of(module: nn.Module, name: str) -> str:
    """The name of the bias that goes with a parameter of experts; "" where there is none."""
    bias = f"{name}_bias"
    return bias if name in NAMES and module._parameters.get(bias) is not None else ""


def routes(module: nn.Module) -> bool:
    """Whether it is one of transformers' own whose forward multiplies by its one parameter, and does nothing else with
    it."""
    cls = type(module)
    if cls.__module__.partition(".")[0] != "transformers" or module._modules or set(module._parameters) != set(ROUTER):
        return False
    weight, code = module._parameters["weight"], getattr(inspect.unwrap(cls.forward), "__code__", None)
    if weight is None or weight.dim() != 2 or code is None:
        return False
    read = [instruction.argval for instruction in dis.get_instructions(code) if instruction.opname.startswith("LOAD_")]
    return read.count("weight") == 1 == read.count("linear")
