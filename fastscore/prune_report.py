"""What prune() did, in figures."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class GroupReport:
    """One group before and after: its channels, and the MACs (of one sample) and parameters of the layers that make
    its channels or work on each of them."""

    layer: str
    channels: tuple[int, int]
    macs: tuple[int, int]
    params: tuple[int, int]


@dataclass(frozen=True)
class PruneReport:
    """What prune() did. Pairs are (before, after); MACs are those of one sample."""

    groups: tuple[GroupReport, ...]
    channels: tuple[int, int]
    macs: tuple[int, int]
    params: tuple[int, int]
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        width = max([len("layer"), *(len(row.layer) for row in self.groups)])
        lines = [f"{'layer':<{width}} {'channels':>14} {'MACs':>25} {'parameters':>23}"]
        rows = [(row.layer, row.channels, row.macs, row.params) for row in self.groups]
        for layer, channels, macs, params in [*rows, ("model", self.channels, self.macs, self.params)]:
            lines.append(f"{layer:<{width}} {channels[0]:>6} → {channels[1]:<5} {macs[0]:>11,} → {macs[1]:<11,} "
                         f"{params[0]:>10,} → {params[1]:<10,}")
        remains = ", ".join(f"{after / max(before, 1):.1%} of the {unit}" for unit, (before, after)
                            in (("channels", self.channels), ("MACs", self.macs), ("parameters", self.params)))
        lines.append(f"remains: {remains}")
        lines += [f"{layer}: left alone: {reason}" for layer, reason in self.skipped.items()]
        return "\n".join(lines)
