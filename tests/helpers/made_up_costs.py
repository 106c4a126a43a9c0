"""Groups, scores and costs made up for the purpose: what is chosen of them can be told by hand."""

from collections.abc import Sequence

import torch

from fastscore.graph.groups import ChannelGroup
from fastscore.pruning.budgets.costs import Costs
from fastscore.pruning.budgets.selection import select
from fastscore.pruning.order.ranking import RemovalStep
from fastscore.scoring.scores import Origin, Scores

ORIGIN = Origin("taylor-sq", "sum", "random", True, 0, "normal", "made up")


class Prices:
    """The costs of independent groups: each channel of a group costs the same."""

    sums_hold = False
    tells = Costs.tells

    def __init__(self, **groups: tuple[int, float]) -> None:
        self.price = {name: price for name, (_, price) in groups.items()}
        self.totals = {"channels": sum(n for n, _ in groups.values()), "params": sum(n * p for n, p in groups.values()),
                       "macs": sum(n * p for n, p in groups.values())}
        self.dense = dict(self.totals)

    def remove(self, group: str, channels: Sequence[int], sign: int = -1) -> None:
        self.totals["channels"] += sign * len(channels)
        for unit in ("params", "macs"):
            self.totals[unit] += sign * self.price[group] * len(channels)

    def restore(self, group: str, channels: Sequence[int]) -> None:
        self.remove(group, channels, 1)


def group(name: str, channels: int, unit: Sequence[int] | None = None) -> ChannelGroup:
    return ChannelGroup(name, channels, torch.tensor(unit or range(channels)), ())


def made_up(**values: Sequence[float]) -> Scores:
    return Scores({name: torch.tensor(row, dtype=torch.float64) for name, row in values.items()}, ORIGIN)


def removed(steps: list[RemovalStep], costs: Prices, **budgets: float) -> dict[str, list[int]]:
    return {name: index.tolist() for name, index in select(steps, costs, budgets).items()}  # type: ignore[arg-type]
