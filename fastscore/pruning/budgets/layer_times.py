"""How long each layer of a model takes, measured."""

import statistics
import time
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from fastscore.batches.calls import Forward
from fastscore.batches.parts import Batch
from fastscore.modules.hooks import put_on
from fastscore.modules.inspection import device_of

_ROUNDS = 9


def layer_seconds(model: nn.Module, names: Iterable[str], example_inputs: Batch, forward: Forward) -> dict[str, float]:
    """Layer -> the median of the seconds it takes in one call of the model, without those of other layers inside it."""
    modules = dict(model.named_modules())  # a parameter alone takes no time that could be told
    device, alone = device_of(model), [name for name in names if name not in modules]
    names = [name for name in names if name in modules]
    rounds: dict[str, list[float]] = {name: [] for name in names}

    def clock(sign: int, name: str, *args: object) -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        rounds[name][-1] += sign * time.perf_counter()

    with torch.no_grad(), put_on(put(partial(clock, sign, name)) for name in names for sign, put in (
            (-1, modules[name].register_forward_pre_hook), (1, modules[name].register_forward_hook))):
        for _ in range(1 + _ROUNDS):  # the first one warms up
            for row in rounds.values():
                row.append(0.0)
            forward(model, example_inputs)
    whole = {name: statistics.median(row[1:]) for name, row in rounds.items()}
    inside = {name: sum(whole[other] for other in names if other.startswith(f"{name}.")) for name in names}
    return dict.fromkeys(alone, 1e-9) | {name: max(whole[name] - inside[name], 1e-9) for name in names}
