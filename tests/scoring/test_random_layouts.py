"""Scores of random networks whose samples are not the rows of what layers read: against every sample run alone, in
float64.

13 networks in a normal run; FASTSCORE_NIGHTLY=1 makes it 300, and FASTSCORE_FIRST_SEED=n begins at another.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import oracles
import pytest
import torch
import whole_way
from random_layouts import MOVING, generate
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace

FIRST = int(os.environ.get("FASTSCORE_FIRST_SEED", "0"))
# 23: packed, ragged and sorted rows in one; 26: channels along several dimensions, divided by one view after another
SEEDS = range(FIRST, FIRST + 300) if os.environ.get("FASTSCORE_NIGHTLY") else [*range(FIRST, FIRST + 11), 23, 26]


@dataclass
class Pair:
    """What a model with two inputs takes, samples first."""

    x: Tensor
    others: Tensor


WRAPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dict": lambda x, others: {"x": x, "others": others}, "dataclass": Pair, "tuple": lambda *parts: parts}
PARTS: dict[str, Callable[[Any], tuple[Tensor, Tensor]]] = {
    "dict": lambda batch: (batch["x"], batch["others"]), "dataclass": lambda batch: (batch.x, batch.others),
    "tuple": lambda batch: batch}


class OfPair(nn.Module):
    """A model with two inputs, on one tensor [2, T, 4] for each sample, as `whole_way.sums` runs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, both: Tensor) -> Tensor:
        return self.model(both[:, 0], both[:, 1].transpose(0, 1))


@pytest.mark.filterwarnings("ignore:.*depends on which others")
@pytest.mark.parametrize("seed", SEEDS)
def test_random_layouts(seed: int) -> None:
    """Of one input or two, of which one has its samples second; in batches of several samples, and of one."""
    network = generate(seed)
    model, x, others = network.model, network.inputs, network.others
    v = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options: dict[str, Any] = {"gradient": "loss", "normalize": False, "progress": False}
    parts = [slice(None), slice(3)] if seed % 3 else [slice(1), slice(None), slice(3)]
    rows = [v[part] for part in parts]
    if others is None:
        batches: list[Any] = [x[part] for part in parts]
        alone, both, prefix = model, x, ""
    else:
        kind = list(WRAPS)[seed % len(WRAPS)]
        batches = [WRAPS[kind](x[part], others[part]) for part in parts]
        alone, both, prefix = OfPair(model), torch.stack([x, others], 1), "model."

        def forward(model: nn.Module, batch: Any) -> Tensor:
            first, second = PARTS[kind](batch)
            return model(first, second.transpose(0, 1))

        options["forward"] = forward
    graph, sent = trace(alone, both), iter(rows)
    names = {group.name.removeprefix(prefix): group for group in graph.groups}
    if names.keys() <= network.untold:
        with pytest.raises((ValueError, RuntimeError), match="one sample each"):
            fastscore.score(model, batches, loss=lambda output, batch: (output * next(sent)).sum(), **options)
        return
    with oracles.untouched(model):
        scores = fastscore.score(model, batches, loss=lambda output, batch: (output * next(sent)).sum(), **options)
    in_order = {name for name, reason in scores.skipped.items() if "in another layout than when" in reason
                and model.layouts[int(name.split(".")[1])] in MOVING}  # whose rows were, when they were traced
    assert set(scores) >= names.keys() - network.untold - in_order, model.layouts
    for name, group in names.items():
        if name in scores:
            s = whole_way.sums(alone, group, both, v).square()
            want = sum(s[part].sum(0) for part in parts) / sum(map(len, rows))
            torch.testing.assert_close(scores[name].double(), want, rtol=1e-6, atol=1e-12,
                                       msg=lambda text, name=name: f"{name} of {model.layouts}: {text}")
