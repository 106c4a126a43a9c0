"""Layers that activation checkpointing runs again in the middle of a backward pass."""

from collections.abc import Sequence

import torch

from fastscore.taps.passes import ForwardPass


def pass_of(layer: str, current: ForwardPass | None, running: Sequence[ForwardPass]) -> ForwardPass | None:
    """The forward pass that `layer`, which runs now, belongs to; None where it runs again and has its gate already.

    current: the latest forward pass. running: those that a backward pass which runs now has begun with. Where
    checkpointing is reentrant, layers ran without gradients before, and their gates are made only now.
    Raises RuntimeError, naming the layer, where it may belong to several.
    """
    if torch._C._current_graph_task_id() == -1:  # no backward pass runs now
        return current
    owners = [each for each in running if layer in each.deferred_layers]
    if len(owners) > 1:
        raise RuntimeError(f"{layer}: it runs again for a backward pass that covers {len(owners)} forward passes, and "
                           "which of them it belongs to cannot be told: use checkpoint(..., use_reentrant=False), or a "
                           "backward pass for each forward pass")
    return owners[0] if owners else None
