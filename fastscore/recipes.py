"""Recipes: what was taken out of a dense model to make a smaller one, in the dense model's own numbering.

A pruned model carries its recipe as an attribute of plain data, so that copies and pickles have it too, and pruning a
pruned model again adds to it.
"""

from collections.abc import Iterable
from typing import TypedDict

import torch
from torch import Tensor, nn

from fastscore.compensation import add_to_biases
from fastscore.surgery import Places, Side, remove_places

_ATTRIBUTE = "_fastscore_recipe"


class Recipe(TypedDict):
    """structure: of the dense model, see `structure`. removed: layer -> "inputs", "outputs" or "heads" -> positions,
    ascending. biases: layers that have a bias which they had not."""

    structure: dict[str, str]
    removed: dict[str, dict[Side, list[int]]]
    biases: list[str]


def structure(model: nn.Module) -> dict[str, str]:
    """Module -> its type, its settings where it is torch's own, and the shapes of its parameters and buffers."""
    lines = {}
    for name, module in model.named_modules():
        settings = module.extra_repr() if type(module).__module__.startswith("torch.nn") else ""
        own = {**module._parameters, **module._buffers}
        shapes = [f"{key} {list(tensor.shape)}" for key, tensor in own.items() if tensor is not None]
        lines[name] = " ".join([f"{type(module).__name__}({settings})", *shapes])
    return lines


def extended(model: nn.Module, places: Places, biased: Iterable[str]) -> Recipe:
    """The recipe of what `model` (pruned before or not) becomes without `places`, and with new biases in `biased`."""
    before = find(model) or Recipe(structure=structure(model), removed={}, biases=[])
    removed = {layer: dict(sides) for layer, sides in before["removed"].items()}
    for (layer, side), index in places.items():
        gone = removed.setdefault(layer, {}).get(side, [])
        removed[layer][side] = sorted([*gone, *_in_dense(index, gone).tolist()])
    return Recipe(structure=before["structure"], removed=removed, biases=[*before["biases"], *biased])


def find(model: nn.Module) -> Recipe | None:
    """The recipe of a pruned model; None of any other."""
    recipe: Recipe | None = getattr(model, _ATTRIBUTE, None)
    return recipe


def attach(model: nn.Module, recipe: Recipe) -> None:
    """Make it the recipe of `model`."""
    setattr(model, _ATTRIBUTE, recipe)


def follow(model: nn.Module, recipe: Recipe) -> nn.Module:
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
    remove_places(model, {(layer, side): torch.tensor(index) for layer, sides in recipe["removed"].items()
                          for side, index in sides.items()})
    attach(model, recipe)
    return model


def add_biases(model: nn.Module, layers: Iterable[str]) -> None:
    """Give `layers` of a dense model biases of zeros, in place."""
    for name in layers:
        layer = model.get_submodule(name)
        outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        assert isinstance(outputs, int)
        add_to_biases(model, {name: torch.zeros(outputs)})


def _in_dense(index: Tensor, gone: list[int]) -> Tensor:
    """Positions among those that are left -> the same positions among all, of which `gone` went before."""
    every = torch.arange(int(index.max()) + len(gone) + 1)
    return every[~torch.isin(every, torch.tensor(gone, dtype=torch.int64))][index]
