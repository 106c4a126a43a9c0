"""What the steps of random networks are written with."""

import random
from collections.abc import Callable
from typing import Any

from torch import nn


class Generating:
    """A generator, as its steps see it."""

    more: bool
    with_kinds: bool
    rng: random.Random
    steps: list[Any]
    layers: dict[str, nn.Module]
    values: list[Any]
    add: Callable[..., int]
    call: Callable[..., int]
    conv: Callable[..., int | None]
    new_labels: Callable[[int], list[int]]
    pick: Callable[..., int | None]
    pair: Callable[[], tuple[int, int] | None]

    def counting(self, name: str, build: Callable[[int], nn.Module]) -> int | None:
        """A layer over each pixel's channels, which goes on counting zeros where some are gone."""
        source = self.pick()
        if source is None:
            return None
        value = self.values[source]
        return self.add(name, (source,), value.labels, value.size, lambda layer, x: layer(x),
                        build(len(value.labels)), counts=value.labels)
