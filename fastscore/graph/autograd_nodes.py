"""Autograd's functions, and what each is computed from."""

from collections.abc import Mapping
from typing import Any, TypeAlias

Readers: TypeAlias = Mapping[Any, list[Any]]  # autograd's function -> those that read what it makes, one for each time


# of an operation, as those of quantized layers, that says nothing of gradients: none comes back through it
_WITHOUT = "torch::autograd::WarnNotImplemented"


def sources(node: Any) -> list[Any]:
    """What a function reads that others make, or are: parameters, too; none of one that gives them no gradient."""
    return [] if node.name() == _WITHOUT else [source for source, _ in node.next_functions if source is not None]


def parameters_of(node: Any) -> list[Any]:
    """What a function reads of parameters, as they are or as a Linear's product turns its weight."""
    straight = (source.next_functions[0][0] if source.name().startswith("TBackward") else source
                for source, _ in getattr(node, "next_functions", ()) if source is not None)
    return [source.variable for source in straight if hasattr(source, "variable")]


def reach(node: Any, reached: set[Any]) -> None:
    """Add a function, if it is one, and all that it is computed from."""
    work = [] if node is None else [node]
    while work:
        node = work.pop()
        if node not in reached:
            reached.add(node)
            work += sources(node)


def readers_of(root: Any) -> Readers:
    """Of all that a function is computed from, and itself."""
    readers: dict[Any, list[Any]] = {root: []}
    work = [] if root is None else [root]
    while work:
        node = work.pop()
        for source in sources(node):
            if source not in readers:
                readers[source] = []
                work.append(source)
            readers[source].append(node)
    return readers
