"""Attention as models of images and of text have it, as steps of random networks: in windows with a table of biases,
with rotary tables, with heads that read each other."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from random_generating import Generating
from random_kinds import Gated
from torch import Tensor, nn

HEADS, SIDE = 3, 2  # of each attention; pixels of a window, each way
FUSED, APART, OWN = ("qkv", "proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), ("ask", "key", "val", "mix")


class Asking(Gated):
    """Pixels ask each other. names: of what makes queries, keys and values, of one layer or of three, and of what reads
    all heads."""

    def __init__(self, width: int, names: tuple[str, ...], dims: int) -> None:
        super().__init__()
        self.names, own = names, names is OWN
        if own:
            self.asking, self.each = HEADS, dims
        else:
            self.num_heads, self.head_dim = HEADS, dims
        for name in names[:-1]:
            self.add_module(name, nn.Linear(width, (3 if names is FUSED else 1) * HEADS * dims))
        self.add_module(names[-1], nn.Linear(HEADS * dims, width))

    def through(self, name: str, x: Tensor) -> Tensor:
        """What the layer of that name reads of x, whose rows may be parts of a sample, one after another."""
        gate = self.gates.get(name)
        if gate is not None:
            gate = gate.repeat_interleave(len(x) // len(gate), 0)
        return x if gate is None else x * gate.view(len(x), *[1] * (x.dim() - 2), -1)

    def attend(self, x: Tensor) -> Tensor:
        """[N, T, C] -> the same."""
        heads, dims = (self.asking, self.each) if self.names is OWN else (self.num_heads, self.head_dim)
        *asking, last = self.names
        made = [getattr(self, name)(self.through(name, x)) for name in asking]
        if self.names is FUSED:
            q, k, v = made[0].reshape(*x.shape[:2], 3, heads, dims).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (each.view(*x.shape[:2], heads, dims).transpose(1, 2) for each in made)
        y = self.weigh(q, k) @ v
        return getattr(self, last)(self.through(last, y.transpose(1, 2).reshape(*x.shape[:2], heads * dims)))

    def weigh(self, q: Tensor, k: Tensor) -> Tensor:
        """[N, heads, T, dims], twice -> [N, heads, T, T]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        return self.attend(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(len(x), -1, *x.shape[2:])

    def within(self, reads: list[int], heads: list[int], made: list[int], out: list[int]
               ) -> list[tuple[str, list[int], list[int]]]:
        """The layers in it: name, what each reads and makes. heads: of each a label. made: what layers between heads
        make, if there are any."""
        each = [label for label in heads for _ in range(self.get_submodule(self.names[-1]).in_features // HEADS)]
        asking = [(f".{name}", reads, each * (3 if self.names is FUSED else 1)) for name in self.names[:-1]]
        return [*asking, (f".{self.names[-1]}", each, out)]


class Windowed(Asking):
    """In windows, which lie in the batch, with a number for each head and pair of places."""

    def __init__(self, width: int, names: tuple[str, ...], dims: int) -> None:
        super().__init__(width, names, dims)
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * SIDE - 1) ** 2, HEADS))
        at = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
        apart = at[:, None] - at + SIDE - 1
        self.register_buffer("relative_position_index", apart[..., 0] * (2 * SIDE - 1) + apart[..., 1])

    def weigh(self, q: Tensor, k: Tensor) -> Tensor:
        """[N, heads, T, dims], twice -> [N, heads, T, T]."""
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        return (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        n, c, h, w = x.shape
        rows = x.view(n, c, h // SIDE, SIDE, w // SIDE, SIDE).permute(0, 2, 4, 3, 5, 1).reshape(-1, SIDE * SIDE, c)
        made = self.attend(rows).view(n, h // SIDE, w // SIDE, SIDE, SIDE, -1)
        return made.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, h, w)


class Turned(Asking):
    """Queries and keys are turned by their places."""

    def weigh(self, q: Tensor, k: Tensor) -> Tensor:
        """[N, heads, T, dims], twice -> [N, heads, T, T]."""
        half = q.shape[-1] // 2
        angles = torch.arange(q.shape[2], dtype=q.dtype)[:, None] / 3.0 ** torch.arange(half, dtype=q.dtype)
        cos, sin = (each.repeat(1, 2) for each in (angles.cos(), angles.sin()))
        q, k = (each * cos + torch.cat([-each[..., half:], each[..., :half]], -1) * sin for each in (q, k))
        return (q @ k.mT * (2 * half) ** -0.5).softmax(-1)


class Talking(Asking):
    """Its heads read each other before and behind a softmax."""

    def __init__(self, width: int, names: tuple[str, ...], dims: int) -> None:
        super().__init__(width, names, dims)
        self.before, self.behind = nn.Linear(HEADS, HEADS + 1), nn.Linear(HEADS + 1, HEADS)

    def weigh(self, q: Tensor, k: Tensor) -> Tensor:
        """[N, heads, T, dims], twice -> [N, heads, T, T]."""
        scores = (q @ k.mT * q.shape[-1] ** -0.5).permute(0, 2, 3, 1)
        weights = self.before(self.through("before", scores)).softmax(-2)
        return self.behind(self.through("behind", weights)).permute(0, 3, 1, 2)

    def within(self, reads: list[int], heads: list[int], made: list[int], out: list[int]
               ) -> list[tuple[str, list[int], list[int]]]:
        """See Asking."""
        return [*super().within(reads, heads, made, out), (".before", heads, made), (".behind", made, heads)]


class Attentions(Generating):
    """Steps of a generator, each of which adds itself and gives its value, or None where nothing fits."""

    def attentions(self) -> Mapping[Callable[[], Any], int]:
        """Step -> how often it comes, beside others."""
        return {self.windowed: 4, self.turned: 4, self.talking: 4}

    def windowed(self) -> int | None:
        """Heads go with their column of the table."""
        return self._asking(Windowed, self.pick(lambda value: value.size >= 2 * SIDE))

    def turned(self) -> int | None:
        """Heads go; what is turned stays as wide."""
        return self._asking(Turned, self.pick(), 4)

    def talking(self) -> int | None:
        """Heads go with what they are read by, and what makes them of what they read; what lies between goes, too."""
        return self._asking(Talking, self.pick())

    def _asking(self, kind: type[Asking], source: int | None, dims: int = 2) -> int | None:
        if source is None:
            return None
        reads = self.values[source].labels
        heads, made, out = (self.new_labels(count) for count in (HEADS, HEADS + 1, len(reads)))
        layer = kind(len(reads), self.rng.choice((FUSED, APART, OWN)), dims)
        return self.add(kind.__name__.lower(), (source,), out, self.values[source].size, lambda layer, x: layer(x),
                        layer, within=layer.within(reads, heads, made, out))
