"""An optimizer goes on after pruning: the same settings over the new parameters, its state without what was removed."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.default_device import keeps_own_on_cpu
from fastscore.graph.cutting.surgery import remove_indices
from fastscore.modules import scripted
from fastscore.modules.evaluation_copy import computed_tensors
from fastscore.modules.weights.computed_weights import held_after
from fastscore.modules.wrappers import unwrapped
from fastscore.pruning.result import PruneResult
from fastscore.pruning.saved import recipes


@keeps_own_on_cpu
def rebuild_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, result: PruneResult) -> torch.optim.Optimizer:
    """A new optimizer for `result.model`, where `optimizer` would be if it had never seen what was removed.

    It is of the same class, with the same parameter groups and settings; state tensors of a parameter's shape
    (momentum, Adam's moments) lose what the parameter lost, others of one element are copied. A bias that compensation
    added joins the group of its layer's weight, without state, and a weight that was computed and is held now has none.

    Args:
        optimizer: of `model`, the one that was pruned; it is left as it is.
        model: the dense one (not pruned in place: its parameters must still be there).
        result: what fastscore.prune or fastscore.prune_iteratively returned for it.

    Returns:
        The optimizer of the smaller model.

    Raises:
        ValueError: an optimizer of other parameters, a result of another model, or state of a shape that says nothing
            about the parameter's elements.
        TypeError: a class that cannot be built from groups and defaults; what is no optimizer, or no result.
    """
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer: {type(optimizer).__name__}; give the optimizer that trained the model")
    if not isinstance(result, PruneResult):
        raise TypeError(f"result: {type(result).__name__}; give what fastscore.prune returned, not its model alone")
    if isinstance(optimizer, torch.optim.LBFGS) and optimizer.state:
        raise ValueError("optimizer: LBFGS keeps the history of all parameters in one vector; make a new one")
    model = unwrapped(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if not any(id(parameter) in names for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError("optimizer: it holds none of the model's parameters; give the model that it trained, and "
                         "prune without inplace=True, which takes its parameters away")
    successors = _successors(model, result)
    state: dict[Tensor, dict[str, Any]] = {}
    groups = []
    for group in optimizer.param_groups:
        parameters: list[Tensor] = []
        for old in group["params"]:
            for new, index in successors[names[id(old)]] if id(old) in names else [(old, None)]:
                parameters.append(new)
                if index is not None and index.numel() == 0:
                    continue  # a new bias, which has no past
                if old in optimizer.state:
                    state[new] = {key: _kept(key, value, old, new, index) for key, value in
                                  optimizer.state[old].items()}
        groups.append({**{key: copy.deepcopy(value) for key, value in group.items() if key != "params"},
                       "params": parameters})
    accepted = inspect.signature(type(optimizer)).parameters
    try:
        rebuilt = type(optimizer)(groups, **{key: value for key, value in optimizer.defaults.items()
                                             if key in accepted})
    except TypeError as error:
        raise TypeError(f"optimizer: {type(optimizer).__name__} cannot be built from its groups and defaults "
                        f"({error}); make a new one") from error
    rebuilt.state.update(state)
    return rebuilt


def _successors(model: nn.Module, result: PruneResult) -> Mapping[str, list[tuple[nn.Parameter, Tensor]]]:
    """Parameter of `model` -> the parameters of `result.model` that are made of it, and of which of its elements.

    The surgery is done once more, on a copy whose elements hold their own numbers: whatever surgery does, they tell.
    A new bias follows its layer's weight, with no elements, and so does a weight that was computed and is held now.
    """
    starts, count, numbered = {}, 1, {}  # from 1: a new bias is 0
    for name, parameter in model.named_parameters():
        starts[name] = count
        numbers = torch.arange(count, count + parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
        numbered[id(parameter)] = nn.Parameter(numbers, requires_grad=False)
        count += parameter.numel()
    parts = scripted.copies(model)
    for _, part in scripted.outermost(model):
        for parameter, old in zip(parts[id(part)].parameters(), part.parameters(), strict=True):
            parameter.data = numbered[id(old)].data
    computed = {id(tensor): tensor.detach() for tensor in computed_tensors(model)}
    shared: dict[int, Any] = {**numbered, **parts, **computed}
    numbered_model: nn.Module = copy.deepcopy(model, shared)
    recipes.add_biases(numbered_model, result.new_biases)
    remove_indices(numbered_model, result.removed_indices)
    now, made = dict(result.model.named_parameters()), dict(numbered_model.named_parameters())
    if {name: p.shape for name, p in now.items()} != {name: p.shape for name, p in made.items()}:
        raise ValueError("result: it is not what pruning the model gave, or was changed since: give the model that "
                         "went into prune(), and what came out, or make a new optimizer")
    fresh = held_after(model, (name for name, _ in result.removed_indices))
    first = torch.tensor(list(starts.values()))
    found: dict[str, list[tuple[nn.Parameter, Tensor]]] = {name: [] for name in starts}
    for name, numbers in made.items():
        elements = torch.zeros(numbers.shape, dtype=torch.int64) if name in fresh else numbers.detach().long()
        last = int(elements.max()) if elements.numel() else starts[name]
        source = list(starts)[int(torch.searchsorted(first, last, right=True)) - 1] if last else \
            fresh.get(name, name.removesuffix("bias") + "weight")
        found[source].append((now[name], elements - starts[source] if last else elements[:0]))
    return found


def _kept(key: str, value: Any, old: Tensor, new: Tensor, index: Tensor | None) -> Any:
    """An entry of the state of `old` for `new`, whose elements are those of `old` at `index` (None: the same)."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if index is None or (value.numel() == 1 and value.shape != old.shape):
        return value.clone()
    if value.shape != old.shape:
        raise ValueError(f"optimizer: its state {key!r} has shape {list(value.shape)} for a parameter of "
                         f"{list(old.shape)}, and cannot be cut with it; make a new optimizer")
    return torch.empty_like(new, dtype=value.dtype, requires_grad=False).copy_(value.flatten()[index.to(value.device)])
