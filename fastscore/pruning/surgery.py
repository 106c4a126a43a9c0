"""prune()'s surgery: biases grow, channels go, and the recipe is kept; and whether what is left still runs."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from fastscore.batches.calls import Forward
from fastscore.batches.outputs import checked_forward
from fastscore.batches.parts import Batch
from fastscore.graph.cutting.surgery import (
    RemovedIndices,
    remove_channels,
    remove_indices,
    removed_indices,
    smaller_copy,
)
from fastscore.graph.groups import ChannelGraph, ChannelGroup
from fastscore.modules import frames
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.handles import undone_on_error
from fastscore.modules.macs.counting import Count, count
from fastscore.modules.modes import evaluating
from fastscore.modules.narrower import in_place_of
from fastscore.modules.weights import held_weights
from fastscore.modules.weights.computed_weights import computed_weights, make_plain
from fastscore.modules.weights.own_layers import own_layer
from fastscore.modules.weights.transposed_linear import is_transposed
from fastscore.pruning.refusal import DoesNotRun, OtherShape, checked, does
from fastscore.pruning.saved import recipes
from fastscore.recovery.compensation import add_to_biases, mean_contributions, removed_means, removed_positions
from fastscore.scoring.scores import Scores
from fastscore.wording import said


class Surgery:
    """What is done to a model, on copies or on itself: biases grow by `added`, `weights` (of the dense shapes)
    are put in, then `removed_indices` go."""

    def __init__(self, model: nn.Module, removed_indices: RemovedIndices, added: Mapping[str, Tensor],
                 weights: Mapping[str, Tensor] | None = None) -> None:
        self._model, self.removed_indices, self._added, self._weights = model, removed_indices, added, weights or {}
        self.made_plain = tuple(computed_weights(model, (name for name, _ in removed_indices)))
        self.of_own_class = tuple(name for name in self.made_plain if own_layer(model.get_submodule(name)) is not None)
        self.new_biases = tuple(name for name in added if not held_weights.is_held(model, name)
                                and _has_no_bias(model.get_submodule(name)))
        self._recipe = recipes.extend(model, removed_indices, self.new_biases)

    @property
    def takes_means(self) -> bool:
        """Whether a bias, new or not, takes what removed channels gave on average."""
        return bool(self._added)

    def copy(self) -> nn.Module:
        """A smaller model; the model itself stays as it is."""
        return smaller_copy(self._model, self.apply)

    def apply(self, model: nn.Module) -> nn.Module:
        """Make `model` (the one given, or a copy) smaller, in place; returns it."""
        make_plain(model, self.made_plain)
        held = list(held_weights.replace(model, [*self._added, *self._weights]))
        add_to_biases(model, self._added)
        for name, value in self._weights.items():
            layer = model.get_submodule(name)
            old: Tensor = layer.weight  # type: ignore[assignment]
            value = value.t() if is_transposed(layer) else value
            # in memory as the old one lies: what a convolution makes follows it, and a view() in the model's code that
            layer.weight = in_place_of(old, torch.empty_like(old).copy_(value))
        for handle in held:
            handle.remove()
        recipes.attach(model, self._recipe)
        return remove_indices(model, self.removed_indices)


def _has_no_bias(layer: nn.Module) -> bool:
    own = own_layer(layer)
    return layer.bias is None if own is None else own.bias is None


def plan_surgery(model: nn.Module, eval_model: nn.Module, graph: ChannelGraph, scores: Scores | None,
                 example_inputs: Batch, forward: Forward, removed: Mapping[str, Tensor]) -> Surgery:
    """What takes `removed` (group -> int64 [R]) out of `model`. scores: where their means are to be compensated for.

    Raises ValueError or FloatingPointError, naming the layer, where there is no finite mean to compensate with.
    """
    added: Mapping[str, Tensor] = {}
    if scores is not None:
        means = removed_means(model, scores.means, removed_positions(graph.groups, removed), graph.groups,
                              graph.kept_biases)
        added = mean_contributions(eval_model, means, example_inputs, forward) if means else {}
    return Surgery(model, removed_indices(graph.groups, removed), added)


def replay(model: nn.Module, pruned: nn.Module, surgery: Surgery, check: Callable[[nn.Module], int]) -> nn.Module:
    """Make `model` what `pruned` is, which `surgery` made of it and a repair changed since, in place; returns it.

    Raises RuntimeError where `check` does not like the model then, which is as it was again.
    """
    try:
        with undone_on_error(model):
            surgery.apply(model)
            values = {**dict(pruned.named_parameters()), **dict(pruned.named_buffers())}
            for name, own in (*model.named_parameters(), *model.named_buffers()):
                if not torch.equal(own, values[name]):
                    own.data = values[name].data
            check(model)
    except Exception as error:  # whatever the model's code does that its copy's does not
        raise RuntimeError(f"the model, pruned in place, {does(error)}, and a copy of it does run: leave inplace= "
                           "out, and take the copy, result.model") from error
    return model


def verify(model: nn.Module, example_inputs: Batch, forward: Forward, expected: torch.Size, batch_dim: int) -> int:
    """Run the pruned model in evaluation mode, which it then leaves; its MACs for one sample.

    batch_dim: the dimension of the example inputs that counts samples.

    Raises OtherShape where it returns another shape than `expected`, DoesNotRun where it no longer fits together.
    """
    with evaluating(model):
        counted = _counted(model, example_inputs, checked_forward(forward), batch_dim)
    if counted.returned.shape != expected:
        raise OtherShape(f"{tuple(counted.returned.shape)} instead of {tuple(expected)}")
    return counted.macs


def _counted(model: nn.Module, example_inputs: Batch, forward: Forward, batch_dim: int) -> Count:
    try:
        return count(model, example_inputs, forward, batch_dim)
    except Exception as error:  # whatever a model raises that no longer fits together
        raise DoesNotRun(f"{frames.where(model, error.__traceback__)}: {said(error)}") from error


def macs_without(model: nn.Module, groups: Iterable[ChannelGroup], example_inputs: Batch,
                 forward: Forward, batch_dim: int, removed: Mapping[str, Tensor]) -> int:
    """MACs of `model`, an evaluation copy that stays as it is, without `removed` (group -> int64 [R]): a copy is cut.

    Raises RuntimeError where it does not run, with the groups to ignore.
    """
    return checked(lambda gone: _counted(remove_channels(evaluation_copy(model), groups, gone), example_inputs,
                                         forward, batch_dim).macs, removed)
