"""Steps of random networks with mixtures of experts whose routers transformers has: a router that chooses a few of them
for each pixel, as Mixtral's and Qwen 3's do, so that whole experts can go."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from random_generating import Generating
from random_kinds import Gated
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

COUNTS = (4, 5, 6)


class Routed(Gated):
    """Each pixel goes through the most probable of some experts.

    gone: those that are never chosen, by definition.
    """

    def __init__(self, width: int, inner: int, count: int, most: int, shares: bool) -> None:
        super().__init__()
        self.gone: list[int] = []
        if shares:
            self.gate: Any = MixtralTopKRouter(transformers.MixtralConfig(
                num_local_experts=count, hidden_size=width, num_experts_per_tok=most))
        else:
            self.gate = Qwen3MoeTopKRouter(transformers.Qwen3MoeConfig(
                num_experts=count, hidden_size=width, num_experts_per_tok=most, norm_topk_prob=False))
        self.experts = MixtralExperts(transformers.MixtralConfig(
            num_local_experts=count, hidden_size=width, intermediate_size=inner, experts_implementation="batched_mm"))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=width ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        tokens = x.flatten(2).transpose(1, 2)  # [N, T, C]
        if self.gates or self.gone:
            made = self._by_definition(tokens)
        else:
            _, shares, chosen = self.gate(tokens.flatten(0, 1))
            made = self.experts(tokens.flatten(0, 1), chosen, shares).unflatten(0, tokens.shape[:2])
        return made.transpose(1, 2).unflatten(-1, x.shape[2:])

    def _by_definition(self, tokens: Tensor) -> Tensor:
        logits = F.linear(self.through("weight", tokens), self.gate.weight)
        logits = logits.index_fill(-1, torch.tensor(self.gone, dtype=torch.int64), -torch.inf)
        shares, chosen = logits.softmax(-1).topk(self.gate.top_k, -1)
        if getattr(self.gate, "norm_topk_prob", True):
            shares = shares / shares.sum(-1, keepdim=True)
        found = torch.zeros_like(tokens)
        for number in range(len(self.gate.weight)):
            gate, up = F.linear(self.through("gate_up_proj", tokens), self.experts.gate_up_proj[number]).chunk(2, -1)
            made = F.linear(self.through("down_proj", F.silu(gate) * up), self.experts.down_proj[number])
            found = found + made * (shares * (chosen == number)).sum(-1, keepdim=True)
        return found


class Experts(Generating):
    """Steps of a generator, each of which adds itself and gives its value, or None where nothing fits."""

    def experts(self) -> Mapping[Callable[[], Any], int]:
        """Step -> how often it comes, beside others."""
        return {self.routed: 12}

    def routed(self) -> int | None:
        """Beside a stream, or in its place. The inner width of all experts is one; rows of the router stay, unless
        whole experts go."""
        source = self.pick()
        if source is None:
            return None
        reads, beside, count = self.values[source].labels, self.rng.random() < 0.7, self.rng.choice(COUNTS)
        inner, chosen, out = (self.new_labels(width) for width in (self.rng.choice((2, 4)), count, len(reads)))
        layer = Routed(len(reads), len(inner), count, self.rng.choice((1, 2)), self.rng.random() < 0.5)
        return self.add("routed", (source,), out, self.values[source].size,
                        (lambda layer, x: x + layer(x)) if beside else (lambda layer, x: layer(x)), layer,
                        within=[(".gate.weight", reads, chosen), (".experts.gate_up_proj", reads, inner * 2),
                                (".experts.down_proj", inner, out)],
                        stays=chosen, ties=[(reads, out)] if beside else [])
