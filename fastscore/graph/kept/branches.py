"""Residual branches that end in no module that runs once: which they are, and why they stay."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from fastscore.graph.autograd_nodes import Readers, sources
from fastscore.graph.following.residual_sums import Calls, addends, scales, terms


def why(modules: Mapping[str, nn.Module], calls: Calls, readers: Readers, told: Collection[tuple[Any, Any]]
        ) -> dict[str, str]:
    """Module that ends such a branch, the last with weights -> why it stays. told: (sum, what comes to it) of the
    branches that are known."""
    behind, number = _behind(readers), {node: place for place, node in enumerate(readers)}

    def made_from(node: Any, source: Any) -> bool:
        return bool(behind[node] >> number[source] & 1)

    def is_told(total: Any, made: Any) -> bool:
        """Whether one that is known comes to the sum as a part of what comes to it."""
        within = addends(made, readers)
        return (total, made) in told or (bool(within or scales(made)) and any(
            is_told(made if within else total, source) for source in sources(made)))

    noted = [(name, call) for name, module in modules.items() for call in calls[name] if call is not None
             and call.node in number and any(parameter.dim() > 1 for parameter in module.parameters())]
    found: dict[str, str] = {}
    for total in readers:
        parts = addends(total, readers)
        for made in sources(total) if len(parts) > 1 else ():
            own = [source for part in parts if made in part for source in part]
            others = [source for part in parts if made not in part for source in part]
            # of `x + one(x) + two(x)`, the stream of the second is in the first sum
            read = next((each for each in terms(others, readers) if made_from(made, each)), None)
            inside = [] if read is None or any(is_told(total, each) for each in own) else [
                (name, call) for name, call in noted if made_from(call.node, read)
                and (call.node is made or made_from(made, call.node))]
            if not inside:
                continue
            last = max((call.node for _, call in inside), key=lambda node: behind[node].bit_count())
            name = next(name for name, call in inside if call.node is last)  # the outermost that returns it
            step = made
            while step is not last and scales(step):
                step = next(source for source in sources(step) if source is last or made_from(source, last))
            if step is not last:
                reason = f"what it returns goes through {step.name().partition('Backward')[0]} in the code around it " \
                         "before it is added"
            elif len(calls[name]) > 1:
                reason = f"it runs {len(calls[name])} times"
            else:
                reason = "what it reads first is not the stream that it is added to"
            found.setdefault(name, reason)
    return found


def _behind(readers: Readers) -> dict[Any, int]:
    """Node -> a bit for each node that it is computed from, in the order of `readers`."""
    bits = {node: 1 << place for place, node in enumerate(readers)}
    behind: dict[Any, int] = {}
    for root in readers:
        work = [root]
        while work:
            node = work[-1]
            if later := [source for source in sources(node) if source not in behind]:
                work += later
                continue
            work.pop()
            behind[node] = 0
            for source in sources(node):
                behind[node] |= behind[source] | bits[source]
    return behind
