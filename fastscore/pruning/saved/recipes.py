"""Recipes: what was taken out of a dense model to make a smaller one, in the dense model's own numbering.

A pruned model carries its recipe as an attribute of plain data, so that copies and pickles have it too, and pruning a
pruned model again adds to it.
"""

from collections.abc import Hashable, Iterable, Mapping
from typing import TypedDict, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastscore.fingerprints import settings_of
from fastscore.graph.cutting.surgery import RemovedIndices, Side, remove_indices
from fastscore.modules.attention.multihead_attention import SequenceFirstLinear
from fastscore.modules.attention.windowed_attention import LinearWithoutKeyBias
from fastscore.modules.weights.computed_weights import make_plain
from fastscore.modules.weights.parameter_layers import ParameterLayer
from fastscore.recovery.compensation import add_to_biases

K = TypeVar("K", bound=Hashable)
_ATTRIBUTE = "_fastscore_recipe"
# The projections of some attentions have another type while the model is tapped: see multihead_attention.
_SAME: Mapping[type, type] = {NonDynamicallyQuantizableLinear: nn.Linear, SequenceFirstLinear: nn.Linear,
                              LinearWithoutKeyBias: nn.Linear}


class Recipe(TypedDict):
    """What pruning took out of a dense model of this `structure`.

    removed: layer -> "inputs", "outputs" or "heads" -> positions, ascending. biases: layers that have a bias which they
    had not.
    """

    structure: dict[str, str]
    removed: dict[str, dict[Side, list[int]]]
    biases: list[str]


def structure(model: nn.Module) -> dict[str, str]:
    """Module -> its type, its settings where it is torch's own, and the shapes of its parameters and buffers."""
    lines = {}
    for name, module in model.named_modules():
        # copies of what was traced are of another kind than itself
        own_kind: type = torch.jit.ScriptModule if isinstance(module, torch.jit.ScriptModule) else type(module)
        kind = _SAME.get(own_kind, own_kind)
        settings = settings_of(module) if kind.__module__.startswith("torch.nn") else ""
        if isinstance(module, ParameterLayer):  # as long as the model is tapped
            continue
        layers = [layer for layer in module.children() if isinstance(layer, ParameterLayer)]
        own: dict[str, Tensor | None] = {name: None for layer in layers for name in layer.order}
        own |= {**module._parameters, **module._buffers}
        for layer in layers:
            own |= layer.held
        shapes = [f"{key} {list(tensor.shape)}" for key, tensor in own.items() if tensor is not None]
        lines[name] = " ".join([f"{kind.__name__}({settings})", *shapes])
    return lines


def extend(model: nn.Module, indices: RemovedIndices, new_biases: Iterable[str]) -> Recipe:
    """The recipe of what `model` (pruned before or not) becomes without `indices`, and with `new_biases`."""
    before = get(model)
    if before is None:
        return new_recipe(model, indices, new_biases)
    return {**new_recipe(model, compose(indices_of(before), indices), [*before["biases"], *new_biases]),
            "structure": before["structure"]}


def new_recipe(model: nn.Module, indices: RemovedIndices, new_biases: Iterable[str]) -> Recipe:
    """The recipe of what `model`, taken for a dense one, becomes."""
    removed: dict[str, dict[Side, list[int]]] = {}
    for (layer, side), index in indices.items():
        removed.setdefault(layer, {})[side] = index.tolist()
    return Recipe(structure=structure(model), removed=removed, biases=list(new_biases))


def indices_of(recipe: Recipe) -> RemovedIndices:
    """What the recipe removes, as surgery takes it."""
    return {(layer, side): torch.tensor(index) for layer, sides in recipe["removed"].items()
            for side, index in sides.items()}


def compose(first: Mapping[K, Tensor], then: Mapping[K, Tensor]) -> dict[K, Tensor]:
    """Positions that are gone once those of `first` went, and of what was left those of `then`; int64, ascending."""
    every = dict(first)
    for key, index in then.items():
        gone = first.get(key, index[:0])
        numbers = torch.arange(int(index.max()) + len(gone) + 1)
        every[key] = torch.cat([gone, numbers[~torch.isin(numbers, gone)][index]]).sort().values
    return every


def get(model: nn.Module) -> Recipe | None:
    """The recipe of a pruned model; None of any other."""
    recipe: Recipe | None = getattr(model, _ATTRIBUTE, None)
    return recipe


def attach(model: nn.Module, recipe: Recipe) -> None:
    """Make it the recipe of `model`."""
    setattr(model, _ATTRIBUTE, recipe)


def apply(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Make of a dense model what the recipe says, in place; returns it. New biases are zero.

    Raises ValueError, before anything is changed, where `model` is not built as the dense model was.
    """
    here, there = structure(model), recipe["structure"]
    for layer in {**there, **here}:
        if here.get(layer) != there.get(layer):
            raise ValueError(f"it was pruned from another model: {layer or 'the model itself'} was "
                             f"{there.get(layer, 'not there')} and is {here.get(layer, 'not there')}; build the dense "
                             "model as it was before it was pruned")
    add_biases(model, recipe["biases"])
    remove_indices(model, indices_of(recipe))
    attach(model, recipe)
    return model


def add_biases(model: nn.Module, layers: Iterable[str]) -> None:
    """Give `layers` of a dense model biases of zeros, in place."""
    make_plain(model, layers := list(layers))
    add_to_biases(model, no_biases(model, layers))


def no_biases(model: nn.Module, layers: Iterable[str]) -> dict[str, Tensor]:
    """Layer of a dense model -> a bias of zeros, float32 [C_out]."""
    found = {}
    for name in layers:
        layer = model.get_submodule(name)
        outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        assert isinstance(outputs, int)
        found[name] = torch.zeros(outputs)
    return found
