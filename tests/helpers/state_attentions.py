"""Attentions whose heads write to states, as hybrid models have them between others."""

import torch
import torch.nn.functional as F
from attention_layouts import EMBED, HEADS, INNER, WIDTH
from torch import Tensor, nn


class Gated(nn.Module):
    """A normalisation of groups of channels that is called with a gate."""

    def __init__(self, width: int, groups: int = 1, before: bool = True) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(width) + 0.5), 1e-4
        self.size, self.before = width // groups, before

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        gate = x.new_ones(()) if gate is None else F.silu(gate)
        each = (x * gate if self.before else x).unflatten(-1, (-1, self.size))
        y = (each * (each.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()).flatten(-2) * self.weight
        return y if self.before else y * gate


class Dual(nn.Module):
    """A state space's dual with a normalisation that takes a gate, as Mamba 2 has it: each group of heads reads, and
    writes by, numbers of its own."""

    groups, before = 1, True

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.inner, self.sets, self.state = HEADS, INNER, self.groups, 3
        self.mixed = INNER + 2 * self.groups * self.state
        self.into, self.mix = nn.Linear(EMBED, INNER + self.mixed + HEADS), nn.Linear(INNER, EMBED)
        self.filters = nn.Conv1d(self.mixed, self.mixed, 3, padding=2, groups=self.mixed)
        self.decay, self.skip = nn.Parameter(torch.rand(HEADS)), nn.Parameter(torch.rand(HEADS))
        self.norm = Gated(INNER, self.groups, self.before)

    def forward(self, x: Tensor) -> Tensor:
        gate, mixed, step = self.into(x).split([self.inner, self.mixed, self.num_heads], -1)
        mixed = F.conv1d(mixed.mT, self.filters.weight, self.filters.bias, padding=2, groups=mixed.shape[-1])
        v, read, write = F.silu(mixed[..., :x.shape[1]].mT).split(
            [self.inner, self.sets * self.state, self.sets * self.state], -1)
        read, write = (y.view(*y.shape[:2], self.sets, self.state).repeat_interleave(self.num_heads // self.sets, 2)
                       for y in (read, write))
        v, step = v.view(*v.shape[:2], self.num_heads, -1), F.softplus(step)
        ages = (step * -self.decay).cumsum(1)
        fades = (ages[:, :, None] - ages[:, None]).exp() * x.new_ones(x.shape[1], x.shape[1]).tril()[..., None]
        y = torch.einsum("nihs,njhs,nijh,njh,njhd->nihd", read, write, fades, step, v) + v * self.skip[:, None]
        return self.mix(self.norm(y.flatten(2), gate))


class DualAfter(Dual):
    """Whose gates multiply what is normalised already."""

    before = False


class DualInGroups(Dual):
    """Two groups of heads, each normalised by itself."""

    groups = 2


_WIDE = WIDTH + 1  # queries and keys


class DeltaApart(nn.Module):
    """A delta rule with gates, as Qwen3.5 has it: queries and keys of half as many heads as values. Two numbers say how
    they are cut, behind filters that are taken from a layer that is not called; no view divides what layers make."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = HEADS // 2 * _WIDE, INNER
        mixed = 2 * self.keys + self.values
        self.into, self.gate = nn.Linear(EMBED, mixed, bias=False), nn.Linear(EMBED, INNER)
        self.steps, self.mix = nn.Linear(EMBED, HEADS), nn.Linear(INNER, EMBED)
        self.filters = nn.Conv1d(mixed, mixed, 3, groups=mixed, padding=2, bias=False)
        self.decay, self.gain = nn.Parameter(torch.rand(HEADS)), nn.Parameter(torch.rand(WIDTH) + 0.5)

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(queries, keys and values side by side, gates)."""
        return self.into(x), self.gate(x)

    def forward(self, x: Tensor) -> Tensor:
        mixed, gate = self.apart(x)
        mixed = F.conv1d(mixed.mT, self.filters.weight, padding=2, groups=mixed.shape[-1])[..., :x.shape[1]].mT
        q, k, v = F.silu(mixed).split([self.keys, self.keys, self.values], -1)
        v, step = v.unflatten(-1, (-1, WIDTH)), self.steps(x).sigmoid()
        q, k = (F.normalize(y.unflatten(-1, (-1, _WIDE)), dim=-1) for y in (q, k))
        q, k = (y.repeat_interleave(v.shape[2] // y.shape[2], 2) for y in (q, k))
        state, made = x.new_zeros(len(x), v.shape[2], _WIDE, WIDTH), []
        for t in range(x.shape[1]):
            state = state * (-step[:, t] * self.decay).exp()[..., None, None]
            changed = (v[:, t] - (state * k[:, t, :, :, None]).sum(-2)) * step[:, t, :, None]
            state = state + k[:, t, :, :, None] * changed[:, :, None]
            made.append((q[:, t, :, None] @ state).squeeze(-2))
        y = torch.stack(made, 1)
        y = y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.gain * F.silu(gate.reshape(y.shape))
        return self.mix(y.flatten(2))


class Delta(DeltaApart):
    """As Qwen3-Next has it: all but the steps from one layer, whose rows lie group by group, and two numbers more."""

    def __init__(self) -> None:
        super().__init__()
        del self.gate
        self.of_keys, self.of_values = HEADS // 2, HEADS
        self.into = nn.Linear(EMBED, 2 * self.keys + 2 * self.values, bias=False)

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor]:
        each = self.of_values // self.of_keys * WIDTH
        y = self.into(x).view(*x.shape[:2], self.of_keys, 2 * _WIDE + 2 * each)
        *parts, gate = y.split([_WIDE, _WIDE, each, each], -1)
        return torch.cat([part.reshape(*x.shape[:2], -1) for part in parts], -1), gate
