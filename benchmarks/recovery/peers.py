"""Torch-Pruning's way: its criteria, pruned step by step until a budget holds, as its own benchmarks do."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

STEPS = 200  # of half a percent of the channels each
CRITERIA: dict[str, Callable[[], Any]] = {
    "magnitude": tp.importance.GroupMagnitudeImportance,  # its "group norm": of all that goes with a channel
    "taylor": tp.importance.GroupTaylorImportance,
    "bn-scale": tp.importance.BNScaleImportance,
    "filter-norm": lambda: tp.importance.GroupMagnitudeImportance(1, "first", None),  # of the layer that makes it, L1
}


def macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of one sample, as fastscore counts them."""
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
                 lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v)}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=attention) as counter:
        model(x[:1])
    return int(counter.get_total_flops()) // 2


def pseudo_label_gradients(model: nn.Module, images: Tensor, batch: int) -> None:
    """Leave in each .grad the gradient of the cross-entropy against the classes that the model itself names."""
    for x in images.split(batch):
        output = model(x)
        (F.cross_entropy(output, output.argmax(1), reduction="sum") / len(images)).backward()


def smaller(model: nn.Module, criterion: str, scope: str, images: Tensor, batch: int, budgets: Sequence[float],
            ignored: Sequence[nn.Module] = ()) -> Iterator[tuple[float, nn.Module]]:
    """(budget, network) for each of `budgets`, descending shares of the MACs; "taylor" reads `images`.

    ignored: layers of `model` whose outputs stay, besides the classifier. A budget that is not reached is left out.
    """
    names = {name for name, module in model.named_modules() if any(module is layer for layer in ignored)}
    model = copy.deepcopy(model).eval()
    if criterion == "taylor":
        pseudo_label_gradients(model, images, batch)
    left_alone = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1:]
    left_alone += [module for name, module in model.named_modules() if name in names]
    attention = [module for module in model.modules() if hasattr(module, "qkv")]
    pruner = tp.pruner.BasePruner(model, images[:1], CRITERIA[criterion](), global_pruning=scope == "global",
                                  pruning_ratio=1.0, iterative_steps=STEPS, ignored_layers=left_alone,
                                  num_heads={module.qkv: module.num_heads for module in attention},
                                  in_channel_groups={}, out_channel_groups={})
    dense, left = macs(model, images), list(budgets)
    for _ in range(STEPS):
        pruner.step()
        for module in attention:  # as Torch-Pruning's own examples do for timm's attention
            module.num_heads = pruner.num_heads[module.qkv]
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
            module.attn_dim = module.head_dim * module.num_heads
        share = macs(model, images) / dense
        while left and share <= left[0]:
            found = copy.deepcopy(model)
            found.zero_grad(set_to_none=True)
            yield left.pop(0), found.eval()
        if not left:
            return
