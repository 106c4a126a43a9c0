"""Attentions, their channels written out one by one; scores, masks and surgery of them against gates on weights."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
import transformers
from oracles import untouched
from torch import Tensor, nn
from torch.func import functional_call

import fastscore
from fastscore.integrations.transformers import forward
from fastscore.pruning.budgets.costs import total_macs

EMBED, TOKENS, SAMPLES = 6, 4, 3
Places = Mapping[str, list[tuple[int, int]]]  # weight -> (row, or column, and the channel there)


class Attend(nn.Module):
    """Heads of one width, which share keys and values; their products are scaled by a number that it keeps, but for
    `scaled`, by the width that it finds. turned: what its tables turn together, "halves" or "neighbours"."""

    def __init__(self, layout: str, heads: int, shared: int, width: int, bias: bool, turned: str = "",
                 scaled: bool = False) -> None:
        super().__init__()
        self.turned, self.scaled = turned, scaled
        self.layout, self.num_heads, self.num_key_value_heads, self.head_dim = layout, heads, shared, width
        self.scaling = width ** -0.5
        if layout == "apart":
            self.q_proj = nn.Linear(EMBED, heads * width, bias)
            self.k_proj, self.v_proj = (nn.Linear(EMBED, shared * width, bias) for _ in range(2))
        else:
            self.qkv_proj = nn.Linear(EMBED, (heads + 2 * shared) * width, bias)
        self.o_proj = nn.Linear(heads * width, EMBED, bias)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if self.layout == "apart":
            counts = (self.num_heads, self.num_key_value_heads, self.num_key_value_heads)
            q, k, v = (layer(x).unflatten(2, (count, -1)) for layer, count in
                       zip((self.q_proj, self.k_proj, self.v_proj), counts, strict=True))
        elif self.layout == "by head":
            q, k, v = self.qkv_proj(x).unflatten(2, (-1, 3, self.head_dim)).unbind(3)
        else:
            heads = self.qkv_proj(x).unflatten(2, (-1, self.head_dim))
            q, k, v = heads.split([self.num_heads, *[self.num_key_value_heads] * 2], 2)
        if tables is not None:
            cos, sin = (table[:, :, None] for table in tables)
            q, k = (y * cos + self._across(y) * sin for y in (q, k))
        repeats = q.shape[2] // k.shape[2]
        k, v = (y.repeat_interleave(repeats, 2) for y in (k, v))
        scaling = q.shape[-1] ** -0.5 if self.scaled else self.scaling
        weights = (torch.einsum("nthd,nshd->nhts", q, k) * scaling).softmax(-1)
        return self.o_proj(torch.einsum("nhts,nshd->nthd", weights, v).flatten(2))

    def _across(self, y: Tensor) -> Tensor:
        if self.turned == "halves":
            return torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], -1)
        return torch.stack([-y[..., 1::2], y[..., ::2]], -1).flatten(-2)


class Network(nn.Module):
    """Two attentions in residual blocks, turned or not, and a classifier."""

    def __init__(self, *attention: Any) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(EMBED, EMBED), nn.Linear(EMBED, 3)
        self.one, self.two = Attend(*attention), Attend(*attention)

    def forward(self, x: Tensor) -> Tensor:
        x, tables = self.embed(x), None
        if self.one.turned:
            half = round(self.one.scaling ** -2) // 2  # of the dense width
            angles = torch.arange(x.shape[1]).outer(0.5 ** torch.arange(half)).to(x)
            angles = angles.repeat(1, 2) if self.one.turned == "halves" else angles.repeat_interleave(2, 1)
            tables = angles.cos()[None], angles.sin()[None]
        x = x + self.one(x, tables)
        return self.head((x + self.two(x, tables)).tanh().mean(1))


def network(*attention: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Network(*attention).double().eval()
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def inputs() -> Tensor:
    return torch.randn(SAMPLES, TOKENS, EMBED, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@dataclass
class Oracle:
    """Where an attention has its channels, written out one by one. weights: of queries, keys, values and of what reads
    the heads; one for all three where they lie in one."""

    weights: tuple[str, str, str, str]
    heads: int
    shared: int
    width: int
    turned: str = ""
    by_head: bool = False
    part: int = 0  # of the width, where not all is turned

    @property
    def pairs(self) -> int:
        return self.width * (1 if self.turned else self.shared)

    @property
    def units(self) -> Tensor:
        """[C]: turned dimensions go in pairs."""
        pairs = torch.arange(self.pairs)
        if self.turned:
            part = self.part or self.width
            pairs = torch.cat([pairs[:part] % (part // 2) if self.turned == "halves" else pairs[:part] // 2,
                               pairs[part:] // 2])
        return torch.cat([pairs, int(pairs.max()) + 1 + torch.arange(self.shared * self.width)])

    def places(self, *parts: int) -> Places:
        """Those of queries (0), keys (1), values (2), or what reads heads (3)."""
        found: dict[str, list[tuple[int, int]]] = {}
        same = self.weights[0] == self.weights[1]
        for part in parts:
            for head in range(self.heads if part in (0, 3) else self.shared):
                kv = head // (self.heads // self.shared) if part in (0, 3) else head
                for dim in range(self.width):
                    channel = self.pairs + kv * self.width + dim if part > 1 else \
                        dim if self.turned else kv * self.width + dim
                    before = 0 if part in (0, 3) or not same else self.heads + (part - 1) * self.shared
                    place = 3 * head + part if self.by_head and part < 3 else before + head
                    found.setdefault(self.weights[part], []).append((place * self.width + dim, channel))
        return found

    def gated(self, model: nn.Module, gates: Tensor, rows: tuple[int, ...], columns: bool) -> dict[str, Tensor]:
        """The model's parameters, with rows, and their biases, times the gate of their channel [C]; and columns."""
        values = dict(model.named_parameters())
        for of, dim in ((self.places(*rows), 0), (self.places(3) if columns else {}, 1)):
            for weight, places in of.items():
                index, channel = torch.tensor(places).T
                factors = torch.ones(values[weight].shape[dim], dtype=gates.dtype).index_copy(0, index, gates[channel])
                bias = weight.removesuffix("weight") + "bias"
                values[weight] = values[weight] * (factors if dim else factors[:, None])
                if dim == 0 and bias in values:
                    values[bias] = values[bias] * factors
        return values

    def importances(self, model: nn.Module, batch: Any, rows: tuple[int, ...], columns: bool) -> Tensor:
        """Mean over samples of Σ s² over outputs [C], by autograd through gates, one sample after another."""
        units, total = self.units, 0.0
        for sample in _samples(batch):
            gates = torch.ones(int(units.max()) + 1, dtype=torch.float64, requires_grad=True)
            z = call(model, self.gated(model, gates[units], rows, columns), sample)
            total = total + sum(torch.autograd.grad(each, gates, retain_graph=True)[0].square() for each in z.flatten())
        return total[units] / len(_samples(batch))  # type: ignore[index]


def run(model: nn.Module, batch: Any) -> Tensor:
    return forward(model, batch) if isinstance(batch, dict) else model(batch)


def call(model: nn.Module, values: Mapping[str, Tensor], batch: Any) -> Tensor:
    return functional_call(model, dict(values), (), batch).logits if isinstance(batch, dict) else \
        functional_call(model, dict(values), (batch,))


def _samples(batch: Any) -> list[Any]:
    if isinstance(batch, dict):
        return [{"input_ids": x} for x in batch["input_ids"].split(1)]
    return list(batch.split(1))


def check(model: nn.Module, batch: Any, name: str, oracle: Oracle, share: float = 0.5, tolerance: float = 1e-10
           ) -> tuple[fastscore.Scores, fastscore.PruneResult]:
    """Scores, mask and surgery of one attention against gates on its rows and columns."""
    with untouched(model):
        scores = fastscore.score(model, [batch], units="head_dims", probes="exact", normalize=False, forward=run,
                                 progress=False)
    for rows, columns in (((0, 2), False), ((1,), True)):
        want = oracle.importances(model, batch, rows, columns)
        torch.testing.assert_close(scores[name].double(), want, rtol=1e-5, atol=1e-6 * float(want.max()))
    others = [other for other in scores if other != name]
    with untouched(model):
        result = fastscore.prune(model, scores, batch, channels=share, ignore=others, compensate=False, forward=run,
                                 progress=False)
    gone = result.removed[name]
    lost = Counter((gone // oracle.width).tolist())
    assert len(lost) == (oracle.pairs + oracle.shared * oracle.width) // oracle.width
    assert len(set(lost.values())) == 1
    with torch.no_grad(), untouched(model):
        gates = torch.ones(len(oracle.units), dtype=torch.float64).index_fill(0, gone, 0)
        want = call(model, oracle.gated(model, gates, (0,), True), batch)
        assert not torch.allclose(want, run(model, batch))
        torch.testing.assert_close(run(result.model, batch), want, rtol=tolerance, atol=tolerance)
        with fastscore.mask(model, scores, 1 - share, batch, ignore=others, compensate=False, forward=run) as masked:
            assert masked[name].tolist() == gone.tolist()
            torch.testing.assert_close(run(model, batch), want, rtol=tolerance, atol=tolerance)
    assert sum(parameter.numel() for parameter in result.model.parameters()) == result.report.params[1] \
        < result.report.params[0]
    assert total_macs(result.model, batch, run) == result.report.macs[1] < result.report.macs[0]
    return scores, result


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 6,
         "max_position_embeddings": 16}


def model_of(name: str) -> tuple[nn.Module, Any, str, Oracle]:
    """(model in float64, batch, group, where it has its channels)"""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "timm":
            model = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2,
                                                  num_classes=3, mlp_ratio=2)
            where = "blocks.0.attn"
            found = f"{where}.qkv", Oracle((f"{where}.qkv.weight",) * 3 + (f"{where}.proj.weight",), 2, 2, 8)
            batch: Any = torch.randn(2, 3, 16, 16).double()
        elif name == "torch":
            layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
            model = nn.Sequential(nn.Linear(6, 16), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(64, 3))
            where = "1.layers.1.self_attn"
            found = where, Oracle((f"{where}.in_proj_weight",) * 3 + (f"{where}.out_proj.weight",), 2, 2, 8)
            batch = torch.randn(2, 4, 6).double()
        elif name == "GPT-NeoX":
            model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
                **SIZES | {"hidden_size": 32}, rope_parameters={"rope_type": "default", "rope_theta": 100.0,
                                                                "partial_rotary_factor": 0.5}))
            where = "gpt_neox.layers.1.attention"
            found = f"{where}.query_key_value", Oracle((f"{where}.query_key_value.weight",) * 3 +
                                                       (f"{where}.dense.weight",), 4, 4, 8, "halves", True, 4)
            batch = {"input_ids": torch.randint(0, 6, (2, 4))}
        elif name == "Phi":
            model = transformers.PhiForCausalLM(transformers.PhiConfig(
                **SIZES, num_key_value_heads=2, head_dim=6, rope_parameters={
                    "rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.7}))
            where = "model.layers.1.self_attn"
            found = f"{where}.q_proj", Oracle((*(f"{where}.{part}_proj.weight" for part in "qkv"),
                                               f"{where}.dense.weight"), 4, 2, 6, "halves", part=4)
            batch = {"input_ids": torch.randint(0, 6, (2, 4))}
        else:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=6,
                                                                           attention_bias=True))
            where = "model.layers.1.self_attn"
            found = f"{where}.q_proj", Oracle(tuple(f"{where}.{part}_proj.weight" for part in "qkvo"), 4, 2, 6,
                                              "halves")
            batch = {"input_ids": torch.randint(0, 6, (2, 4))}
        model = model.double().eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model, batch, *found
