"""prune()'s surgery: biases grow, channels go, and the recipe is kept; and whether what is left still runs."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.batches import Batch, Forward, checked_forward
from fastscore.graph.groups import ChannelGraph, ChannelGroup
from fastscore.graph.surgery import RemovedIndices, remove_channels, remove_indices, removed_indices
from fastscore.modules.counting import count
from fastscore.modules.evaluation_copy import computed_tensors, evaluation_copy
from fastscore.modules.hooks import remove_copied_hooks
from fastscore.modules.transposed_linear import is_transposed
from fastscore.pruning import recipes
from fastscore.pruning.refusal import OtherShape, checked
from fastscore.recovery.compensation import add_to_biases, mean_contributions, removed_means, removed_positions
from fastscore.scoring.scores import Scores


class Surgery:
    """What is done to a model, on copies or on itself: biases grow by `added`, `weights` (of the dense shapes)
    are put in, then `removed_indices` go."""

    def __init__(self, model: nn.Module, removed_indices: RemovedIndices, added: Mapping[str, Tensor],
                 weights: Mapping[str, Tensor] | None = None) -> None:
        self._model, self.removed_indices, self._added, self._weights = model, removed_indices, added, weights or {}
        self.new_biases = tuple(name for name in added if model.get_submodule(name).bias is None)
        self._recipe = recipes.extend(model, removed_indices, self.new_biases)

    def copy(self) -> nn.Module:
        """A smaller model; the model itself stays as it is."""
        # surgery makes new weights of most: those that are still the model's own afterwards are copied then
        # .data: detach() would share autograd's count of changes with the model's own, for good
        shared: dict[int, Any] = {id(parameter): nn.Parameter(parameter.data, parameter.requires_grad)
                                  for parameter in self._model.parameters() if type(parameter) is nn.Parameter}
        shared |= {id(tensor): tensor.detach().clone() for tensor in computed_tensors(self._model)}
        pruned = self.apply(copy.deepcopy(self._model, shared))
        own = {parameter.untyped_storage()._cdata for parameter in self._model.parameters()}
        for parameter in pruned.parameters():
            if parameter.untyped_storage()._cdata in own:
                parameter.data = parameter.data.clone()
        remove_copied_hooks(pruned)
        return pruned

    def apply(self, model: nn.Module) -> nn.Module:
        """Make `model` (the one given, or a copy) smaller, in place; returns it."""
        add_to_biases(model, self._added)
        for name, value in self._weights.items():
            layer = model.get_submodule(name)
            old: Tensor = layer.weight  # type: ignore[assignment]
            value = value.t().contiguous() if is_transposed(layer) else value
            layer.weight = nn.Parameter(value.to(old.device, old.dtype), old.requires_grad)
        recipes.attach(model, self._recipe)
        return remove_indices(model, self.removed_indices)


def plan_surgery(model: nn.Module, eval_model: nn.Module, graph: ChannelGraph, scores: Scores | None,
                 example_inputs: Batch, forward: Forward, removed: Mapping[str, Tensor]) -> Surgery:
    """What takes `removed` (group -> int64 [R]) out of `model`. scores: where their means are to be compensated for.

    Raises ValueError or FloatingPointError, naming the layer, where there is no finite mean to compensate with.
    """
    added: Mapping[str, Tensor] = {}
    if scores is not None:
        means = removed_means(model, scores.means, removed_positions(graph.groups, removed), graph.groups)
        added = mean_contributions(eval_model, means, example_inputs, forward) if means else {}
    return Surgery(model, removed_indices(graph.groups, removed), added)


def replay(model: nn.Module, pruned: nn.Module, surgery: Surgery) -> nn.Module:
    """Make `model` what `pruned` is, which `surgery` made of it and a repair changed since, in place; returns it."""
    surgery.apply(model)
    values = {**dict(pruned.named_parameters()), **dict(pruned.named_buffers())}
    with torch.no_grad():
        for name, own in (*model.named_parameters(), *model.named_buffers()):
            if not torch.equal(own, values[name]):
                own.copy_(values[name])
    return model


def verify(model: nn.Module, example_inputs: Batch, forward: Forward, expected: torch.Size, batch_dim: int) -> int:
    """Run the pruned model in evaluation mode, which it then leaves; its MACs for one sample.

    batch_dim: the dimension of the example inputs that counts samples.

    Raises OtherShape where it returns another shape than `expected`, and whatever a model raises that no longer fits
    together.
    """
    modes = {name: module.training for name, module in model.named_modules()}
    counted = count(model.eval(), example_inputs, checked_forward(forward), batch_dim)
    if counted.returned.shape != expected:
        raise OtherShape(f"{tuple(counted.returned.shape)} instead of {tuple(expected)}")
    for name, module in model.named_modules():
        module.training = modes[name]
    return counted.macs


def macs_without(model: nn.Module, groups: Iterable[ChannelGroup], example_inputs: Batch,
                 forward: Forward, batch_dim: int, removed: Mapping[str, Tensor]) -> int:
    """MACs of `model`, an evaluation copy that stays as it is, without `removed` (group -> int64 [R]): a copy is cut.

    Raises RuntimeError where it does not run, with the groups to ignore.
    """
    return checked(lambda gone: count(remove_channels(evaluation_copy(model), groups, gone), example_inputs,
                                      forward, batch_dim).macs, removed)
