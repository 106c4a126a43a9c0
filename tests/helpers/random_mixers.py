"""More steps of random networks: attention whose projections are layers, with shared keys, fused, or of a memory; state
spaces; response normalisation; gated widths in one convolution; the input of the network beside a value."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from random_generating import Generating
from random_kinds import Gated
from random_program import SIZE, equal_parts
from torch import Tensor, nn

HEADS, SHARED, DIMS = 4, 2, 2  # of queries; of keys and values; the width of each
NAMES, OWN_NAMES = ("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj"), ("all", "ask", "key", "val", "mix")


class Heads(Gated):
    """Pixels ask each other, or those of a memory: queries of two heads share keys and values. fused: one layer makes
    all three. own: names that nobody knows, a gate for each head, from a layer, and a key of its own; what is fused is
    cut where the width says that there is. twice: what comes out asks once more, in the same code, through layers whose
    names end in 2."""

    def __init__(self, width: int, memory: int | None, fused: bool, own: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.names = OWN_NAMES if own else NAMES
        if own:
            self.asking, self.asked, self.each = HEADS, SHARED, DIMS
        else:
            self.num_heads, self.num_key_value_heads, self.head_dim = HEADS, SHARED, DIMS
        self.times = ("", "2") if twice else ("",)
        for time in self.times:
            whole, query, key, value, out = (name + time for name in self.names)
            if own:
                self.add_module(f"gate{time}", nn.Linear(width, HEADS))
                self.register_parameter(f"sinks{time}", nn.Parameter(torch.rand(HEADS)))
            if fused:
                self.add_module(whole, nn.Linear(width, (HEADS + 2 * SHARED) * DIMS))
            else:
                self.add_module(query, nn.Linear(width, HEADS * DIMS))
                for name in (key, value):
                    self.add_module(name, nn.Linear(memory or width, SHARED * DIMS))
            self.add_module(out, nn.Linear(HEADS * DIMS, width))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """[N, C, H, W], [N, M, H', W'] -> [N, C, H, W]."""
        own, query = self.names is OWN_NAMES, x.flatten(2).transpose(1, 2)
        heads, shared, width = (self.asking, self.asked, self.each) if own else (
            self.num_heads, self.num_key_value_heads, self.head_dim)
        for time in self.times:
            whole, *apart, out = (name + time for name in self.names)
            if hasattr(self, whole):
                made = getattr(self, whole)(self.through(whole, query))
                part = made.shape[-1] // (2 + HEADS // SHARED) if own else shared * width
                made = made.split([part * HEADS // SHARED, part, part], -1)
            else:
                read = query if memory is None else memory.flatten(2).transpose(1, 2)
                made = tuple(getattr(self, name)(self.through(name, each)) for name, each in
                             zip(apart, (query, read, read), strict=True))
            q, k, v = (each.unflatten(-1, (-1, width)).transpose(1, 2) for each in made)
            k, v = (each.repeat_interleave(heads // shared, 1) for each in (k, v))
            products = q @ k.mT * DIMS ** -0.5
            if own:
                sinks = getattr(self, f"sinks{time}")[:, None, None].expand(*products.shape[:3], 1)
                products = torch.cat([products, sinks], -1)
            y = products.softmax(-1)[..., :k.shape[2]] @ v
            if own:
                gate = f"gate{time}"
                y = y * getattr(self, gate)(self.through(gate, query)).sigmoid().mT[..., None]
            query = getattr(self, out)(self.through(out, y.transpose(1, 2).flatten(2)))
        return query.transpose(1, 2).reshape(len(x), -1, *x.shape[2:])


class StateSpace(Gated):
    """Pixels one after another: filters of what came before, a selective scan, and a gate."""

    def __init__(self, width: int, inner: int, state: int) -> None:
        super().__init__()
        self.sizes = (1, state, state)
        self.in_proj, self.out_proj = nn.Linear(width, 2 * inner), nn.Linear(inner, width)
        self.filters = nn.Conv1d(inner, inner, 3, padding=2, groups=inner)
        self.x_proj, self.dt_proj = nn.Linear(inner, sum(self.sizes), bias=False), nn.Linear(1, inner)
        self.A_log, self.D = nn.Parameter(torch.rand(inner, state)), nn.Parameter(0.5 + torch.rand(inner))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        tokens = x.flatten(2).transpose(1, 2)
        y, gate = self.in_proj(self.through("in_proj", tokens)).chunk(2, -1)
        y = F.silu(self.filters(y.transpose(1, 2))[..., :tokens.shape[1]]).transpose(1, 2)
        step, into, out = self.x_proj(self.through("x_proj", y)).split(self.sizes, -1)
        step, decay = F.softplus(self.dt_proj(self.through("dt_proj", step)))[..., None], -self.A_log.exp()
        kept, given = (step * decay).exp(), step * y[..., None] * into[:, :, None]  # [N, T, inner, state]
        h, made = torch.zeros_like(given[:, 0]), []
        for at in range(tokens.shape[1]):
            h = kept[:, at] * h + given[:, at]
            made.append((h * out[:, at, None]).sum(-1))
        z = (torch.stack(made, 1) + y * self.D) * F.silu(gate)
        return self.out_proj(self.through("out_proj", z)).transpose(1, 2).reshape(len(x), -1, *x.shape[2:])


class Responses(nn.Module):
    """Global response normalisation, by its definition. gate: of each sample's channels, [N, C], where they count: None
    for all ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.eps, self.gate = 0.1, None
        self.weight, self.bias = nn.Parameter(0.5 + torch.rand(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        norms = x.norm(dim=(2, 3), keepdim=True)
        counted = norms if self.gate is None else norms * self.gate[:, :, None, None]
        y = x * norms / (counted.mean(1, keepdim=True) + self.eps)
        return x + y * self.weight[:, None, None] + self.bias[:, None, None]


class Mixers(Generating):
    """Steps of a generator, each of which adds itself and gives its value, or None where nothing fits."""

    def mixers(self) -> Mapping[Callable[[], Any], int]:
        """Step -> how often it comes, beside others."""
        return {self.heads: 4, self.state_space: 2, self.responses: 3, self.gate_up: 3, self.beside_input: 2}

    def heads(self) -> int | None:
        """Heads go with the keys and values that they share; what they are of stays as wide."""
        source = self.pick()
        if source is None:
            return None
        x, fused = self.values[source].labels, self.rng.random() < 0.4
        # of as many channels as there are heads it would look like a bias for each head
        other = self.pick(lambda value: len(value.labels) != HEADS) if not fused and self.rng.random() < 0.5 else None
        memory = x if other is None else self.values[other].labels
        own = (source + len(x)) % 2 == 0  # no draw, which would change all that comes after it
        times = ("", "2") if own and not fused and other is None else ("",)
        within, out = list[tuple[str, list[int], list[int]]](), x
        for time in times:
            shared, read = self.new_labels(SHARED), out if time else memory
            query = [label for label in shared for _ in range(HEADS // SHARED * DIMS)]
            key, whole = [label for label in shared for _ in range(DIMS)], out
            out = self.new_labels(len(x))
            name, *apart, last = (f".{each}{time}" for each in (OWN_NAMES if own else NAMES))
            within += [(name, whole, query + key * 2)] if fused else zip(apart, (whole, read, read), (query, key, key),
                                                                         strict=True)
            within += [(f".gate{time}", whole, query[::DIMS])] if own else []
            within.append((last, query, out))
        return self.add("heads", (source,) if other is None else (source, other), out, self.values[source].size,
                        lambda layer, *values: layer(*values),
                        Heads(len(x), None if other is None else len(memory), fused, own, len(times) > 1),
                        within=within)

    def state_space(self) -> int | None:
        """A channel within has two rows of in_proj; sizes of steps and states are cut where the code says."""
        source = self.pick(lambda value: value.size <= 4)
        if source is None:
            return None
        x, inner, state = self.values[source].labels, self.new_labels(self.rng.choice((3, 4))), self.rng.choice((1, 2))
        small, out = self.new_labels(1 + 2 * state), self.new_labels(len(x))
        within = [(".in_proj", x, inner * 2), (".x_proj", inner, small), (".dt_proj", small[:1], inner),
                  (".out_proj", inner, out)]
        return self.add("state space", (source,), out, self.values[source].size, lambda layer, x: layer(x),
                        StateSpace(len(x), len(inner), state), within=within, fixes=small,
                        ties=[(small[1:1 + state], small[1 + state:])])

    def responses(self) -> int | None:
        """Each channel by its norm over the mean of all norms."""
        return self.counting("responses", Responses)

    def gate_up(self) -> int | None:
        """One convolution makes what goes on, and its gate."""
        source = self.pick()
        if source is None:
            return None
        made = self.conv(source, 2 * self.rng.choice((2, 3)))
        parts = equal_parts(self.values[made].labels, 2)

        def run(x: Tensor) -> Tensor:
            gate, up = x.chunk(2, 1)
            return F.silu(gate) * up

        return self.add("gate up", (made,), parts[0], self.values[made].size, run, ties=[parts])

    def beside_input(self) -> int | None:
        """Channels that no layer made stand before a value's."""
        source = self.pick(lambda value: value.size > 1)
        if source is None:
            return None
        value = self.values[source]
        small = self.add("smaller input", (0,), self.values[0].labels, value.size,
                         lambda x: F.avg_pool2d(x, SIZE // value.size))
        self.values[small].dead = True
        return self.add("beside input", (small, source), self.values[0].labels + value.labels, value.size,
                        lambda x, y: torch.cat([x, y], 1), fresh=True)
