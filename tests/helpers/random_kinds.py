"""Steps of random networks beside convolutions: recurrent modules and cells, experts, option-A shortcuts, GLU, pixels
that are shuffled, masks of one channel, and PyTorch's own norms of tokens."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from random_generating import Generating
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

EXPERTS = 3
GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}


class Gated(nn.Module):
    """A module of layers that are run by definition where gates stand before them.

    gates: the last part of a layer's name -> of each sample, what it reads (or counts) is multiplied by, [N, inputs]:
    empty for all ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gates: dict[str, Tensor] = {}

    def through(self, name: str, x: Tensor) -> Tensor:
        """What the layer of that name reads of x [N, ..., inputs]."""
        gate = self.gates.get(name)
        return x if gate is None else x * gate.view(len(x), *[1] * (x.dim() - 2), -1)


class Rows(Gated):
    """A recurrent module that reads an image from left to right, its rows averaged; each pixel is given what its column
    made."""

    def __init__(self, kind: type[nn.RNNBase], width: int, units: int, layers: int, both: bool, first: bool,
                 projected: int = 0) -> None:
        super().__init__()
        more = {"proj_size": projected} if projected else {}
        self.rnn = kind(width, units, layers, bidirectional=both, batch_first=first, **more)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, D, H, W]."""
        y = x.mean(2).transpose(1, 2)
        if self.gates:
            y = self._by_definition(y)
        elif self.rnn.batch_first:
            y = self.rnn(y)[0]
        else:
            y = self.rnn(y.transpose(0, 1))[0].transpose(0, 1)
        return y.transpose(1, 2)[:, :, None].expand(-1, -1, x.shape[2], -1)

    def _by_definition(self, y: Tensor) -> Tensor:
        rnn = self.rnn
        for layer in range(rnn.num_layers):
            made = []
            for way in ("", "_reverse")[:1 + rnn.bidirectional]:
                steps = list(y.unbind(1))
                outputs = self._run(steps[::-1] if way else steps, f"l{layer}{way}")
                made.append(torch.stack(outputs[::-1] if way else outputs, 1))
            y = torch.cat(made, -1)
        return y

    def _run(self, steps: list[Tensor], end: str) -> list[Tensor]:
        rnn, outputs = self.rnn, []
        c = steps[0].new_zeros(len(steps[0]), rnn.hidden_size)
        h = c[:, :rnn.proj_size or rnn.hidden_size]
        for x in steps:
            a, b = (F.linear(self.through(f"weight_{side}_{end}", read), getattr(rnn, f"weight_{side}_{end}"),
                             getattr(rnn, f"bias_{side}_{end}")) for side, read in (("ih", x), ("hh", h)))
            if isinstance(rnn, nn.LSTM):
                i, f, g, o = (a + b).chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                if rnn.proj_size:
                    h = F.linear(self.through(f"weight_hr_{end}", h), getattr(rnn, f"weight_hr_{end}"))
            elif isinstance(rnn, nn.GRU):
                (r, z, n), (s, w, m) = a.chunk(3, -1), b.chunk(3, -1)
                update = (z + w).sigmoid()
                h = (1 - update) * (n + (r + s).sigmoid() * m).tanh() + update * h
            else:
                h = (a + b).tanh()
            outputs.append(h)
        return outputs

    def within(self, reads: list[int], units: list[int], state: list[int]
               ) -> list[tuple[str, list[int] | None, list[int]]]:
        """The layers in it: name, what each reads and makes. state: what the units are projected to, or they."""
        found: list[tuple[str, list[int] | None, list[int]]] = []
        made = units * GATES[type(self.rnn)]  # type: ignore[index]
        ways = ("", "_reverse")[:1 + self.rnn.bidirectional]
        for layer in range(self.rnn.num_layers):
            for way in ways:
                found += [(f".rnn.weight_ih_l{layer}{way}", state * len(ways) if layer else reads, made),
                          (f".rnn.weight_hh_l{layer}{way}", state, made)]
                if self.rnn.proj_size:
                    found.append((f".rnn.weight_hr_l{layer}{way}", units, state))
        return found


class Cell(Gated):
    """The same by a cell that is written by hand, one way: one layer makes all gates of what it reads, another of its
    state."""

    def __init__(self, kind: type[nn.RNNBase], width: int, units: int) -> None:
        super().__init__()
        self.kind = kind  # not how many gates there are, which looks like a width where there are as many units
        self.made, self.again = (nn.Linear(inputs, GATES[kind] * units) for inputs in (width, units))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, D, H, W]."""
        c = h = x.new_zeros(len(x), self.again.in_features)
        states = []
        for step in x.mean(2).unbind(2):
            a, b = self.made(self.through("made", step)), self.again(self.through("again", h))
            if self.kind is nn.LSTM:
                i, f, g, o = (a + b).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            elif self.kind is nn.GRU:
                (r, z, n), (s, w, m) = a.chunk(3, 1), b.chunk(3, 1)
                update = (z + w).sigmoid()
                h = (1 - update) * (n + (r + s).sigmoid() * m).tanh() + update * h
            else:
                h = (a + b).tanh()
            states.append(h)
        return torch.stack(states, 2)[:, :, None].expand(-1, -1, x.shape[2], -1)


class Mixture(Gated):
    """A residual branch: each pixel goes through the two most probable of three experts, as transformers holds
    them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, EXPERTS)
        self.experts = MixtralExperts(transformers.MixtralConfig(
            num_local_experts=EXPERTS, hidden_size=width, intermediate_size=inner, experts_implementation="batched_mm"))
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=width ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        tokens = x.flatten(2).transpose(1, 2)  # [N, T, C]
        shares, chosen = self.router(self.through("router", tokens)).softmax(-1).topk(2, -1)
        made = self._by_definition(tokens, shares, chosen) if self.gates else self.experts(
            tokens.flatten(0, 1), chosen.flatten(0, 1), shares.flatten(0, 1)).view(tokens.shape)
        return x + made.transpose(1, 2).reshape(x.shape)

    def _by_definition(self, tokens: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        found = torch.zeros_like(tokens)
        for number in range(EXPERTS):
            gate, up = F.linear(self.through("gate_up_proj", tokens), self.experts.gate_up_proj[number]).chunk(2, -1)
            made = F.linear(self.through("down_proj", F.silu(gate) * up), self.experts.down_proj[number])
            found = found + made * (shares * (chosen == number)).sum(-1, keepdim=True)
        return found


class Multiplied(Gated):
    """A residual branch: each pixel is multiplied by parameters that no layer holds."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.weighed = inner % 2 == 0
        self.down, self.up = (nn.Parameter(torch.randn(width, inner) * width ** -0.5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        made = torch.tanh(self.through("down", x.flatten(2).transpose(1, 2)) @ self.down)
        made = self.through("up", made)
        if self.weighed:  # by what no layer made, at once
            weights = torch.linspace(0.5, 1, made.shape[1], dtype=x.dtype)
            return x + torch.einsum("nti,t,oi->not", made, weights, self.up).view(x.shape)
        return x + torch.einsum("nti,oi->not", made, self.up).view(x.shape)


class TokenNorm(Gated):
    """nn.LayerNorm or nn.RMSNorm of pixels."""

    def __init__(self, centered: bool, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=0.1) if centered else nn.RMSNorm(width, eps=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        tokens, norm = x.flatten(2).transpose(1, 2), self.norm
        if not self.gates:
            return norm(tokens).transpose(1, 2).reshape(x.shape)
        counted, centered = self.through("norm", tokens), isinstance(norm, nn.LayerNorm)
        mean = counted.mean(-1, keepdim=True) if centered else 0.0
        y = (tokens - mean) / ((counted - mean).square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
        return (y + norm.bias if centered else y).transpose(1, 2).reshape(x.shape)


class Kinds(Generating):
    """Steps of a generator, each of which adds itself and gives its value, or None where nothing fits."""

    def kinds(self) -> Mapping[Callable[[], Any], int]:
        """Step -> how often it comes, beside others."""
        return {self.recurrent: 4, self.mixture: 3, self.shortcut: 3, self.half_gated: 3, self.shuffled: 2,
                self.masked: 3, self.token_norm: 3}

    def recurrent(self) -> int | None:
        """Units of the state of all layers and directions go together, of PyTorch's module or of a cell written by
        hand."""
        source = self.pick()
        if source is None:
            return None
        reads, units = self.values[source].labels, self.new_labels(self.rng.choice((3, 4)))
        kind = self.rng.choice(list(GATES))
        state = self.new_labels(2) if kind is nn.LSTM and self.rng.random() < 0.5 else units
        layer = Rows(kind, len(reads), len(units), self.rng.choice((1, 1, 2)), self.rng.random() < 0.4,
                     self.rng.random() < 0.5, len(state) if state is not units else 0)
        if state is units and (source + len(reads)) % 2:  # no draw, which would change all that comes after it
            made = units * GATES[kind]
            return self.add("own cell", (source,), units, self.values[source].size, lambda layer, x: layer(x),
                            Cell(kind, len(reads), len(units)),
                            within=[(".made", reads, made), (".again", units, made)])
        return self.add("recurrent", (source,), state * (1 + layer.rnn.bidirectional), self.values[source].size,
                        lambda layer, x: layer(x), layer, within=layer.within(reads, units, state))

    def mixture(self) -> int | None:
        """The inner width of all experts is one; what the router makes stays, for its softmax. Or there is one alone,
        of parameters that no layer holds."""
        source = self.pick()
        if source is None:
            return None
        reads = self.values[source].labels
        if (source + len(reads)) % 2:  # no draw, which would change all that comes after it
            inner, out = self.new_labels(3), self.new_labels(len(reads))
            return self.add("multiplied", (source,), out, self.values[source].size, lambda layer, x: layer(x),
                            Multiplied(len(reads), len(inner)), ties=[(reads, out)],
                            within=[(".down", reads, inner), (".up", inner, out)])
        inner, chosen, out = (self.new_labels(width) for width in (self.rng.choice((2, 4)), EXPERTS, len(reads)))
        within = [(".router", reads, chosen), (".experts.gate_up_proj", reads, inner * 2),
                  (".experts.down_proj", inner, out)]
        return self.add("mixture", (source,), out, self.values[source].size, lambda layer, x: layer(x),
                        Mixture(len(reads), len(inner)), within=within, stays=chosen, ties=[(reads, out)])

    def shortcut(self) -> int | None:
        """Of every second place, zeros beside the channels: those of a convolution that they are added to stay."""
        source = self.pick(lambda value: value.size >= 4)
        if source is None:
            return None
        labels, size = self.values[source].labels, self.values[source].size
        small = self.add("strided", (source,), labels, size // 2, lambda x: x[:, :, ::2, ::2])
        more = self.rng.choice((1, 2))
        branch = self.conv(small, len(labels) + 2 * more)
        made = self.values[branch].labels
        return self.add("option A", (branch, small), made, size // 2,
                        lambda x, y: x + F.pad(y, (0, 0, 0, 0, more, more)), fresh=True,
                        ties=[(made[more:-more], labels)], stays=made[:more] + made[-more:])

    def half_gated(self) -> int | None:
        """GLU: one half gates the other."""
        source = self.pick(lambda value: len(value.labels) % 2 == 0)
        if source is None:
            return None
        labels, size = self.values[source].labels, self.values[source].size
        half = len(labels) // 2
        if self.rng.random() < 0.5:
            return self.add("glu", (source,), labels[:half], size, lambda x: F.glu(x, 1),
                            ties=[(labels[:half], labels[half:])])
        return self.add("GLU", (source,), labels[:half], size, lambda layer, x: layer(x), nn.GLU(1),
                        ties=[(labels[:half], labels[half:])])

    def shuffled(self) -> int | None:
        """Four channels to pixels, or pixels to channels."""
        source = self.pick(lambda value: value.size <= 4 and len(value.labels) % 4 == 0)
        if source is not None:
            labels = self.values[source].labels
            return self.add("shuffled", (source,), labels[::4], 2 * self.values[source].size,
                            lambda x: F.pixel_shuffle(x, 2), ties=[tuple(labels[place::4] for place in range(4))])
        source = self.pick(lambda value: value.size >= 4 and len(value.labels) <= 4)
        if source is None:
            return None
        labels = [label for label in self.values[source].labels for _ in range(4)]
        return self.add("unshuffled", (source,), labels, self.values[source].size // 2,
                        lambda x: F.pixel_unshuffle(x, 2))

    def masked(self) -> int | None:
        """A mask of one channel, which a convolution makes."""
        source = self.pick()
        if source is None:
            return None
        mask = self.conv(source, 1)
        self.values[mask].dead = True
        value = self.values[source]
        return self.add("masked", (source, mask), value.labels, value.size, lambda x, y: x * torch.sigmoid(y))

    def token_norm(self) -> int | None:
        """PyTorch's own norms of the last dimension, which count zeros where channels are gone."""
        source = self.pick()
        if source is None:
            return None
        labels = self.values[source].labels
        return self.add("token norm", (source,), labels, self.values[source].size, lambda layer, x: layer(x),
                        TokenNorm(self.rng.random() < 0.6, len(labels)), counts_within=(".norm", labels))
