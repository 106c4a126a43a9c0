"""Experts of transformers, two parameters gate_up_proj [E, 2I, H] and down_proj [E, H, I], as two layers; the weight
[E, H] of a router, which chooses among them, as one; and the projections that nn.MultiheadAttention holds itself.

In evaluation copies, and in a user's model as long as it is tapped or masked, each of the two is an ExpertLinear under
its own name, and rows go through it in order of tokens, whichever expert they choose: rows of one sample stay together.
Before and after surgery a user's model is what it was, with narrower parameters.
"""

import dis
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.modules.multihead_attention import PROJECTIONS, projections

_NAMES = ("gate_up_proj", "down_proj")
_ROUTER = ("weight",)
_BIAS = "in_proj_bias"
# what transformers says of a class whose code is that of _Experts
_SETTINGS = {"is_transposed": False, "has_gate": True, "has_bias": False, "has_post_expert_norm": False,
             "_is_expert_parallel": False}
# widths that the code keeps beside its parameters: (parameter, side) -> attributes
_WIDTHS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("down_proj", "inputs"): ("intermediate_dim", "intermediate_size", "ffn_dim"),
    ("gate_up_proj", "inputs"): ("hidden_dim", "hidden_size"), ("weight", "inputs"): ("hidden_dim", "hidden_size")}


class ExpertLinear(nn.Linear):
    """[rows, inputs], int64 [rows] -> [rows, outputs]: each row times the matrix of its expert, of weight
    [experts, outputs, inputs]."""

    def __init__(self, weight: nn.Parameter, owner: nn.Module, name: str) -> None:
        nn.Module.__init__(self)
        self._of = (owner, name)  # no child of it, that is
        self.weight = weight
        self.register_parameter("bias", None)
        self._measure()

    def _measure(self) -> None:
        _, self.out_features, self.in_features = self.weight.shape

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:  # type: ignore[override]
        """[rows, inputs] -> [rows, outputs]; rows of no expert are zero."""
        made: Tensor = _Product.apply(x, self.weight, expert)
        return made

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """As Torch-Pruning's functions do of a Linear: without the outputs `idxs`, in place."""
        return self._without("outputs", idxs)

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Without the inputs `idxs`, in place."""
        return self._without("inputs", idxs)

    def get_out_channels(self, layer: nn.Module) -> int:
        """How many outputs there are."""
        return self.out_features

    def get_in_channels(self, layer: nn.Module) -> int:
        """How many inputs there are."""
        return self.in_features

    def _without(self, side: Literal["inputs", "outputs"], index: Sequence[int]) -> nn.Module:
        old = self.weight
        self.weight = _cut(old, side, torch.tensor(index))
        self._measure()
        owner, name = self._of
        _set_widths(owner, name, side, old.shape[-1], self.in_features)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix[:-1]] = self.weight if keep_vars else self.weight.detach()


class RouterLinear(ExpertLinear):
    """A Linear in the place of a parameter [outputs, inputs]: F.linear(x, it) runs it."""

    def _measure(self) -> None:
        self.out_features, self.in_features = self.weight.shape

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """[..., inputs] -> [..., outputs]."""
        return F.linear(x, self.weight)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What PyTorch calls where a function is given one as a tensor."""
        if func is F.linear and len(args) == 2 and isinstance(args[1], cls) and not kwargs:
            return args[1](args[0])
        return NotImplemented


class ProjectionLinear(RouterLinear):
    """A projection of queries, keys and values in the place of a parameter of nn.MultiheadAttention, and of its bias,
    where that goes with no other projection."""

    def __init__(self, weight: nn.Parameter, owner: nn.Module, name: str) -> None:
        super().__init__(weight, owner, name)
        if name == PROJECTIONS[0]:
            self.bias = owner._parameters[_BIAS]
            owner._parameters[_BIAS] = None

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """[N, L, inputs] -> [N, L, outputs], by rows in the order [L, N], as there: to the bit."""
        return F.linear(x.transpose(0, 1), self.weight, self.bias).transpose(0, 1)

    def _without(self, side: Literal["inputs", "outputs"], index: Sequence[int]) -> nn.Module:
        bias = self.bias
        if side == "outputs" and bias is not None:
            self.bias = _cut(bias[:, None], side, torch.tensor(index))
            self.bias.data = self.bias.data[:, 0]
        return super()._without(side, index)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.bias is not None:
            owner = prefix[:-len(PROJECTIONS[0]) - 1]
            destination[f"{owner}{_BIAS}"] = self.bias if keep_vars else self.bias.detach()


class _Product(torch.autograd.Function):
    """One node of autograd, however many experts there are: whoever follows channels sees one layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, expert)
        made = [(rows, F.linear(x[rows], weight[number])) for number, rows in _rows(expert, len(weight))]
        out = x.new_zeros(len(x), weight.shape[1], dtype=made[0][1].dtype if made else x.dtype)
        for rows, part in made:
            out[rows] = part
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, expert = ctx.saved_tensors
        to_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for number, rows in _rows(expert, len(weight)):
            part = g[rows]
            if to_x is not None:
                to_x[rows] = (part @ weight[number].to(part.dtype)).to(x.dtype)
            if to_weight is not None:
                to_weight[number] = (part.t() @ x[rows].to(part.dtype)).to(weight.dtype)
        return to_x, to_weight, None


def _rows(expert: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """(an expert, the rows that choose it, int64), for each that some do."""
    for number in expert.unique().tolist():
        if number < experts:
            yield number, (expert == number).nonzero()[:, 0]


class _Renamed:
    """Loads the names that it has outside of this file."""

    def _load_from_state_dict(self: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in (*_NAMES, *_ROUTER):
            if f"{prefix}{name}" in state_dict:
                state_dict[f"{prefix}{name}.weight"] = state_dict.pop(f"{prefix}{name}")
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]


class _Experts(_Renamed):
    """The forward of such a module, of which it has all else."""

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, H], int64 [tokens, K], [tokens, K] -> [tokens, H]."""
        chosen, expert = top_k_index.shape[-1], top_k_index.reshape(-1)
        rows = hidden_states[:, None].expand(-1, chosen, -1).flatten(0, 1)
        made = self.down_proj(self._apply_gate(self.gate_up_proj(rows, expert)), expert)
        summed: Tensor = (made.unflatten(0, (-1, chosen)) * top_k_weights[..., None]).sum(1)
        return summed.to(hidden_states.dtype)


_KINDS: dict[tuple[type, type], type] = {}  # (what is changed, a class) -> the class, with that changed


def _kind(change: type, cls: type) -> type:
    if (change, cls) not in _KINDS:
        _KINDS[change, cls] = type(cls.__name__, (change, cls), {})
    return _KINDS[change, cls]


def replace_experts(model: nn.Module, called: Iterable[str] | None = None) -> Iterator["Handle"]:
    """Make the two parameters of each module of experts two layers, which compute the same, and a router's weight, or a
    projection of nn.MultiheadAttention, one.

    Args:
        model: changed in place.
        called: names of layers; only modules of which one is among them are changed. None: all.

    Yields:
        For each module, a handle that undoes it.
    """
    wanted = None if called is None else {name.rpartition(".")[0] for name in called}
    for name, module in list(model.named_modules()):
        if (wanted is None or name in wanted) and holds_experts(module):
            yield Handle(module, _NAMES, ExpertLinear, _Experts)
        elif (wanted is None or name in wanted) and routes(module):
            yield Handle(module, _ROUTER, RouterLinear, _Renamed)
        elif (wanted is None or name in wanted) and (held := projections(module)):
            yield Handle(module, held, ProjectionLinear)


def holds_experts(module: nn.Module) -> bool:
    """Whether it is such a module, as its user has it."""
    up, down = (module._parameters.get(name) for name in _NAMES)
    return up is not None and down is not None and set(module._parameters) == set(_NAMES) \
        and up.dim() == down.dim() == 3 and up.shape[1] == 2 * down.shape[2] and up.shape[2] == down.shape[1] \
        and hasattr(type(module), "_apply_gate") \
        and all(getattr(module, name, None) is value for name, value in _SETTINGS.items())


def routes(module: nn.Module) -> bool:
    """Whether it is one of transformers' own whose forward multiplies by its one parameter, and does nothing else with
    it."""
    cls = type(module)
    if cls.__module__.partition(".")[0] != "transformers" or module._modules or set(module._parameters) != set(_ROUTER):
        return False
    weight, code = module._parameters["weight"], getattr(inspect.unwrap(cls.forward), "__code__", None)
    if weight is None or weight.dim() != 2 or code is None:
        return False
    read = [instruction.argval for instruction in dis.get_instructions(code) if instruction.opname.startswith("LOAD_")]
    return read.count("weight") == 1 == read.count("linear")


def is_expert_parameter(model: nn.Module, name: str) -> bool:
    """Whether `name` is the qualified name of a parameter that replace_experts makes a layer, as a user has it."""
    owner, _, key = name.rpartition(".")
    return (key in _NAMES and holds_experts(model.get_submodule(owner))) or \
        (key in _ROUTER and routes(model.get_submodule(owner))) or \
        (key in PROJECTIONS and key in projections(model.get_submodule(owner)))


def cut(model: nn.Module, name: str, side: Literal["inputs", "outputs"], index: Tensor) -> None:
    """Take inputs or outputs `index` (int64) of all experts out of one of the two parameters, in place."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    old: nn.Parameter = getattr(module, key)
    new = _cut(old, side, index)
    module._parameters[key] = new
    _set_widths(module, key, side, old.shape[-1], new.shape[-1])


def _set_widths(module: nn.Module, key: str, side: str, old: int, new: int) -> None:
    for attribute in _WIDTHS.get((key, side), ()):
        if vars(module).get(attribute) == old:
            setattr(module, attribute, new)


def _cut(weight: Tensor, side: Literal["inputs", "outputs"], index: Tensor) -> nn.Parameter:
    dim = weight.dim() - (1 if side == "inputs" else 2)
    stays = torch.ones(weight.shape[dim], dtype=torch.bool).index_fill(0, index.cpu(), False).nonzero()[:, 0]
    return nn.Parameter(weight.detach().index_select(dim, stays.to(weight.device)), weight.requires_grad)


def held_projections(module: nn.Module) -> dict[str, Tensor | None]:
    """Names that the projections which run as layers of a module have as its parameters -> what they hold."""
    held: dict[str, Tensor | None] = {}
    for name, layer in module._modules.items():
        if isinstance(layer, ProjectionLinear):
            held[name] = layer.weight
            if name == PROJECTIONS[0]:
                held[_BIAS] = layer._parameters["bias"]
    return held


def put_projections_back(model: nn.Module) -> None:
    """Make projections parameters again, in place: of a copy of a model that is tapped."""
    for module in model.modules():
        held = held_projections(module)
        for name in held:
            module._modules.pop(name, None)
        others = {name: value for name, value in module._parameters.items() if name not in held}
        module._parameters.clear()
        module._parameters.update(held | others)  # type: ignore[arg-type]


class Handle:
    """A module whose parameters `names` are layers of a `kind` until `remove`, and its class changed."""

    def __init__(self, module: nn.Module, names: tuple[str, ...], kind: type[ExpertLinear],
                 change: type | None = None) -> None:
        self._module: nn.Module | None = module
        self._class, self._names = None if change is None else type(module), names
        self._order = list(module._parameters)
        for name in names:
            weight = module._parameters.pop(name)
            assert weight is not None
            module.add_module(name, kind(weight, module, name))
        others = {name: module._modules.pop(name) for name in list(module._modules) if name not in names}
        module._modules.update(others)  # behind them, so that parameters come in the order that they had
        if change is not None:
            module.__class__ = _kind(change, type(module))

    def remove(self) -> None:
        """Give the module back what it had."""
        module, self._module = self._module, None
        if module is None:
            return
        for name in self._names:
            layer = module._modules.pop(name)
            module._parameters[name] = layer._parameters["weight"]  # type: ignore[union-attr]
            if name == PROJECTIONS[0]:
                module._parameters[_BIAS] = layer._parameters["bias"]  # type: ignore[union-attr]
        held = {name: module._parameters.pop(name) for name in self._order}
        module._parameters.update(held)
        if self._class is not None:
            module.__class__ = self._class

    def make_permanent(self) -> None:
        """Let the module be what it is now for good."""
        self._module = None

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()
