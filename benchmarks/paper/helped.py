"""A criterion that is not fastscore's, with labels and without: Torch-Pruning's Taylor importance."""

import copy

import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace


def torch_pruning_taylor(model: nn.Module, images: Tensor, labels: Tensor | None, batch: int, seed: int = 0
                         ) -> dict[str, Tensor]:
    """GroupTaylorImportance of every channel group of `model`, whose own gradients and mode stay as they are.

    images: [N, C, H, W]. labels: int64 [N], for gradients of the cross entropy; None for random ones (of `seed`),
    sent back by fastscore.random_backward. batch: how many samples are sent through at once; gradients are summed over
    all of them. Returns name -> float32 [channels], for the groups that fastscore.graph.tracing.trace finds, in its
    order of channels; Torch-Pruning scales each group to mean 1.
    """
    groups = trace(model, images[:1]).groups
    copied = copy.deepcopy(model).eval().requires_grad_()
    copied.zero_grad()
    graph = tp.DependencyGraph().build_dependency(copied, images[:1])
    for start in range(0, len(images), batch):
        output = copied(images[start:start + batch])
        if labels is None:
            fastscore.random_backward(output, images[start:start + batch], seed=seed)
        else:
            F.cross_entropy(output, labels[start:start + batch], reduction="sum").backward()
    importance = tp.importance.GroupTaylorImportance()
    found: dict[str, Tensor] = {}
    for group in groups:
        layer = copied.get_submodule(group.name)
        members = graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels,
                                          list(range(group.channels)))
        if members[0].dep.target.module is not layer:
            raise ValueError(f"{group.name}: Torch-Pruning counts the channels of its group from another layer, "
                             f"{members[0].dep.target.name}")
        found[group.name] = importance(members)
    return found
