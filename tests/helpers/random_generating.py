"""What the steps of random networks are written with."""

import random
from collections.abc import Callable
from typing import Any

from torch import nn


class Generating:
    """A generator, as its steps see it."""

    more: bool
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
