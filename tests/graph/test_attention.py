"""Attention heads as channel groups: found, scored, masked and removed; and what only looks like them, left alone."""

import copy
import itertools
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import Group
from oracles import finite_difference, sums, sums_of_each_sample, untouched
from torch import Tensor, nn

import fastscore
from fastscore import Scorer
from fastscore.graph.tracing import trace
from fastscore.modules.attention import multihead_attention
from fastscore.pruning.budgets.costs import total_macs

EMBED, HEADS, WIDTH, TOKENS = 10, 4, 3, 5  # heads x width differs from the embedding
EMBEDDING = ("embed",)  # the layer that makes it: a group of its own


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """[N, H, T, D] each -> [N, T, H·D]."""
    weights = (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class Fused(nn.Module):
    """One projection for queries, keys and values, with a bias for each head; then what `layout` makes of its rows."""

    def __init__(self, layout: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(EMBED, 3 * HEADS * WIDTH), nn.Linear(HEADS * WIDTH, EMBED)
        self.num_heads, self.head_dim = HEADS, WIDTH
        self.relative_position_bias_table = nn.Parameter(torch.randn(TOKENS, HEADS))
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.layout(self.qkv(x))
        return self.proj(_attend(q, k, v, self.relative_position_bias_table.t()[:, None]))


class Apart(nn.Module):
    """A projection each, keys and values shared by `repeats` heads; no count of heads is written down."""

    def __init__(self, repeats: int = 1, tiled: bool = False) -> None:
        super().__init__()
        self.head_dim, self.repeats, self.tiled = WIDTH, repeats, tiled
        self.q_proj = nn.Linear(EMBED, HEADS * WIDTH)
        self.k_proj, self.v_proj = (nn.Linear(EMBED, HEADS // repeats * WIDTH, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(HEADS * WIDTH, EMBED, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (-1, WIDTH)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        k, v = ((y.repeat(1, self.repeats, 1, 1) if self.tiled else y.repeat_interleave(self.repeats, 1))
                for y in (k, v))
        return self.o_proj(_attend(q, k, v))


class Nested(nn.Module):
    """The projections in one child, the output in another."""

    def __init__(self) -> None:
        super().__init__()
        self.self, self.output = nn.Module(), nn.Module()
        for name in ("query", "key", "value"):
            self.self.add_module(name, nn.Linear(EMBED, HEADS * WIDTH))
        self.self.num_attention_heads, self.self.attention_head_size = HEADS, WIDTH
        self.output.dense = nn.Linear(HEADS * WIDTH, EMBED)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (self.self.num_attention_heads, WIDTH)).transpose(1, 2)
                   for layer in self.self.children())
        return self.output.dense(_attend(q, k, v))


class Multihead(nn.Module):
    """PyTorch's own module, whose heads fill the embedding."""

    def __init__(self, embed: int = EMBED, heads: int = 5) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(embed, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class Network(nn.Module):
    """An attention in a residual block, then a classifier."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(EMBED, EMBED), nn.LayerNorm(EMBED)
        self.attention, self.head = attention, nn.Linear(EMBED, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.attention(self.norm(x))).tanh().mean(1))


def _blocks(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(part.unflatten(2, (-1, WIDTH)).transpose(1, 2) for part in qkv.chunk(3, 2))


def _by_head(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.unflatten(2, (-1, 3, WIDTH)).permute(3, 0, 2, 1, 4).unbind(0)


def _network(attention: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(attention()).double().eval()


def _inputs(samples: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(samples, TOKENS, EMBED, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# name -> (attention, group, output projection, channels of a unit)
KINDS: dict[str, tuple[Callable[[], nn.Module], str, str, int]] = {
    "fused": (lambda: Fused(_blocks), "attention.qkv", "attention.proj", WIDTH),
    "fused by head": (lambda: Fused(_by_head), "attention.qkv", "attention.proj", WIDTH),
    "apart": (Apart, "attention.q_proj", "attention.o_proj", WIDTH),
    "shared keys": (lambda: Apart(2), "attention.q_proj", "attention.o_proj", 2 * WIDTH),
    "nested": (Nested, "attention.self.query", "attention.output.dense", WIDTH),
    "multihead": (Multihead, "attention.inner", "attention.inner.out_proj", 2),
}


def _channels(kind: str) -> int:
    return EMBED if kind == "multihead" else HEADS * WIDTH


def _group(kind: str) -> Group:
    _, _, output, unit = KINDS[kind]
    channels = _channels(kind)
    return Group(channels, {output: [[c] for c in range(channels)]}, units=tuple(c // unit for c in range(channels)))


def _called(model: nn.Module) -> nn.Module:
    """A copy whose output projection is called, so that an oracle's hooks see it: PyTorch's does not call it."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.__class__ = ByDefinition
    return model


class ByDefinition(nn.MultiheadAttention):
    """Vaswani et al., arXiv 1706.03762, section 3.2."""

    def forward(self, x: Tensor, key: Tensor, value: Tensor, need_weights: bool) -> tuple[Tensor, None]:
        q, k, v = (F.linear(x, w, b).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for w, b in
                   zip(self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True))
        return self.out_proj(_attend(q, k, v)), None


@pytest.mark.parametrize("kind", list(KINDS))
def test_heads_are_found(kind: str) -> None:
    build, name, output, unit = KINDS[kind]
    model = _network(build)
    with untouched(model):
        graph = trace(model, _inputs())
    (group,) = graph.without(model, EMBEDDING).groups
    assert (group.name, group.channels) == (name, _channels(kind))
    assert group.unit.tolist() == [c // unit for c in range(group.channels)]
    (edge,) = group.edges
    assert edge.layer == output
    assert torch.equal(edge.index, edge.channel)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_embedding_is_a_group_too(kind: str) -> None:
    """Where a module reads it by a weight of its own, too."""
    graph = trace(_network(KINDS[kind][0]), _inputs())
    stream = next(group for group in graph.groups if group.name == "embed")
    roles = {member.layer.removeprefix("attention."): member.role for member in stream.members}
    assert roles["embed"] == roles[KINDS[kind][2].removeprefix("attention.")] == "producer"
    assert (roles["norm"], roles["head"]) == ("norm", "consumer")
    queries = ("qkv", "q_proj", "query", "in_proj_weight")
    assert {role for layer, role in roles.items() if layer.endswith(queries)} == {"consumer"}


@pytest.mark.parametrize("kind", list(KINDS))
def test_scores_are_those_of_a_gate_on_each_head(kind: str) -> None:
    model, x = _network(KINDS[kind][0]), _inputs()
    v = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = sums(_called(model), _group(kind), x, v)
    with untouched(model):
        scorer = Scorer(model, x, importance="taylor", gradient="random", normalize=False)
        found = sums_of_each_sample(scorer, model, x, v)[KINDS[kind][1]]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    scores = fastscore.score(model, [x], importance="taylor-sq", normalize=False, probes="exact", progress=False)
    changes = torch.stack([sums(_called(model), _group(kind), x, torch.eye(3).double()[k].expand(len(x), 3))
                           for k in range(3)])
    torch.testing.assert_close(scores[KINDS[kind][1]].double(), changes.square().sum(0).mean(0), rtol=1e-5, atol=0)
    if kind in ("shared keys", "multihead"):
        differences = finite_difference(_called(model), _group(kind), x, v)
        units = torch.tensor(_group(kind).units)
        torch.testing.assert_close(found, differences[:, units] if differences.shape[1] < len(units) else differences,
                                   rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("units", [1, 2, 3])
def test_without_heads_it_computes_what_it_computes_masked(kind: str, units: int) -> None:
    build, name, output, unit = KINDS[kind]
    model, x = _network(build), _inputs()
    count = _channels(kind) // unit
    units = min(units, count - 1)  # one always stays
    scores = fastscore.score(model, [x], ignore=EMBEDDING, progress=False)
    result = fastscore.prune(model, scores, x, channels=1 - units / count, compensate=False)
    gone = result.removed[name]
    assert len(gone) == units * unit
    assert sorted(set((gone // unit).tolist())) == (gone[::unit] // unit).tolist()
    oracle = _called(model)
    oracle.get_submodule(output).register_forward_pre_hook(lambda _, args: args[0].index_fill(-1, gone, 0))
    with torch.no_grad(), untouched(model):
        expected = oracle(x)
        with fastscore.mask(model, scores, units / count, x, compensate=False):
            torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result.model(x), expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(model(x), expected)
    before, after = result.report.params
    widths = {id(p): p.numel() for p in result.model.parameters()}
    assert sum(widths.values()) == after < before
    (row,) = result.report.groups
    assert row.params[1] < row.params[0]
    assert row.macs[1] < row.macs[0]


@pytest.mark.parametrize("kind", list(KINDS))
def test_costs_are_those_of_the_smaller_model(kind: str) -> None:
    """Attention itself costs less with fewer heads, so a budget that counted its layers alone would not be met."""
    model, x = _network(KINDS[kind][0]), _inputs(1)
    scores = fastscore.score(model, [x], ignore=EMBEDDING, importance="random")
    result = fastscore.prune(model, scores, x, channels=0.5)
    for unit in ("macs", "params"):
        before, after = getattr(result.report, unit)
        again = fastscore.prune(model, scores, x, **{unit: after / before})
        assert {k: v.tolist() for k, v in again.removed.items()} == {k: v.tolist() for k, v in result.removed.items()}
        rows = result.report.groups[0]
        assert before - after >= getattr(rows, unit)[0] - getattr(rows, unit)[1] > 0


@pytest.mark.parametrize("kind", list(KINDS))
def test_weights_of_a_head_are_its_rows(kind: str) -> None:
    model, x = _network(KINDS[kind][0]), _inputs()
    _, name, _, unit = KINDS[kind]
    labels = torch.tensor([0, 1, 2])
    norms = fastscore.score(model, [x], importance="magnitude-l2")[name]
    products = fastscore.score(model, [(x, labels)], importance="molchanov-group", gradient="loss", normalize=False,
                               progress=False)[name]
    F.cross_entropy(model(x), labels).backward()
    attention = model.get_submodule("attention")
    rows = {"fused": [("qkv", lambda r: r % (HEADS * WIDTH) // unit)],
            "fused by head": [("qkv", lambda r: r // (3 * unit))],
            "apart": [(layer, lambda r: r // unit) for layer in ("q_proj", "k_proj", "v_proj")],
            "shared keys": [("q_proj", lambda r: r // unit), *((layer, lambda r: r // WIDTH) for layer in
                                                               ("k_proj", "v_proj"))],
            "nested": [(f"self.{layer}", lambda r: r // unit) for layer in ("query", "key", "value")],
            "multihead": [("inner", lambda r: r % EMBED // unit)]}[kind]
    squares = torch.zeros(_channels(kind) // unit, dtype=torch.float64)
    taylor = squares.clone()
    for layer, head in rows:
        for parameter in attention.get_submodule(layer).parameters(recurse=False):
            for r in range(len(parameter)):
                if parameter.dim() > 1:
                    squares[head(r)] += parameter[r].detach().square().sum()
                taylor[head(r)] += (parameter[r] * parameter.grad[r]).detach().square().sum()
    torch.testing.assert_close(norms.double(), squares.sqrt().repeat_interleave(unit), rtol=1e-6, atol=0)
    torch.testing.assert_close(products.double(), taylor.repeat_interleave(unit), rtol=1e-5, atol=0)


class ValuesElsewhere(Apart):
    """Whose values are read past the attention too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.v_proj(x).mean(2, keepdim=True)


class Mixing(Apart):
    """Whose heads read each other."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (-1, WIDTH)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(_attend(q, k + k.mean(1, keepdim=True), v))


class Across(Apart):
    """Whose heads lie across the rows of the projections."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (WIDTH, -1)).permute(0, 3, 1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(_attend(q, k, v))


class FixedWidth(Fused):
    """Whose code writes the width down."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.layout(self.qkv(x))
        return self.proj(_attend(q, k, v).reshape(len(x), TOKENS, HEADS * WIDTH))


class NotCalled(Apart):
    """Whose output projection is no layer that runs."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (-1, WIDTH)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        return _attend(q, k, v) @ self.o_proj.weight.t()


class NoneCalled(Apart):
    """Whose projections are no layers that run."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (F.linear(x, layer.weight, layer.bias).unflatten(2, (-1, WIDTH)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        return F.linear(_attend(q, k, v), self.o_proj.weight)


def _parametrized() -> nn.Module:
    attention = Apart()
    nn.utils.parametrizations.spectral_norm(attention.k_proj)
    return attention


def _sharing() -> nn.Module:
    attention = Apart()
    attention.k_proj.weight = attention.v_proj.weight
    return attention


LEFT_ALONE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tiled keys": (lambda: Apart(2, tiled=True), "computes something else"),
    "heads that read each other": (Mixing, "computes something else"),
    "heads across rows": (Across, "computes something else|does not run"),
    "a width in the code": (lambda: FixedWidth(_blocks), "does not run with fewer heads"),
    "one head": (lambda: Multihead(heads=1), "one head"),
    "one head of keys": (lambda: Apart(HEADS), "one for all keys"),
    "computed weights": (_parametrized, "parametrization"),
    "shared weights": (_sharing, "shares its weight"),
    "an output that is not called": (NotCalled, "does not call"),
    "no projection that is called": (NoneCalled, "does not call"),
    "values read elsewhere": (ValuesElsewhere, "something else|cannot follow"),
}


@pytest.mark.parametrize("name", list(LEFT_ALONE))
def test_heads_that_cannot_go_are_left_alone_with_a_reason(name: str) -> None:
    build, reason = LEFT_ALONE[name]
    model = _network(build)
    with untouched(model):
        graph = trace(model, _inputs())
    assert not graph.without(model, EMBEDDING).groups
    assert any(re.search(reason, why) for layer, why in graph.skipped.items() if layer.startswith("attention")), \
        dict(graph.skipped)


class HandedOn(nn.Module):
    """Two attentions, of which the second takes its bias for each head from the first; then one that takes none."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (Apart() for _ in range(3))
        self.one.num_heads = HEADS

    def forward(self, x: Tensor) -> Tensor:
        bias = x.new_ones(self.one.num_heads, 1, TOKENS) * torch.arange(TOKENS)
        q, k, v = (layer(x).unflatten(2, (-1, WIDTH)).transpose(1, 2)
                   for layer in (self.two.q_proj, self.two.k_proj, self.two.v_proj))
        return self.three(self.one(x) + self.two.o_proj(_attend(q, k, v, bias)))


def test_heads_that_others_count_on_are_left_alone() -> None:
    graph = trace(_network(HandedOn), _inputs())
    assert [group.name for group in graph.groups if "q_proj" in group.name] == ["attention.three.q_proj"]
    assert "the model does not run with fewer heads there" in graph.skipped["attention.one.q_proj"]


OPTIONS = [dict(zip(("batch_first", "bias", "add_bias_kv", "add_zero_attn", "kdim"), values, strict=True))
           for values in itertools.product((True, False), (True, False), (True, False), (True, False), (None, 6))]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_replacement_computes_what_pytorch_does(options: dict[str, object]) -> None:
    """Outputs and gradients, with every mask, to the bit in self-attention; elsewhere to rounding."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, **options).train()
    inner = options["kdim"] or 8
    query, memory = torch.randn(3, 5, 8), torch.randn(3, 4, int(inner))
    if not options["batch_first"]:
        query, memory = query.transpose(0, 1), memory.transpose(0, 1)
    itself = options["kdim"] is None
    source = 5 if itself else 4
    causal = torch.triu(torch.ones(5, source, dtype=torch.bool), 1)
    padding = torch.zeros(3, source, dtype=torch.bool).index_fill(1, torch.tensor([source - 1]), True)
    calls = [{}, {"need_weights": False}, {"average_attn_weights": False}, {"attn_mask": causal},
             {"attn_mask": causal, "need_weights": False}, {"attn_mask": torch.randn(6, 5, source)},
             {"attn_mask": causal, "key_padding_mask": padding, "need_weights": False},
             {"key_padding_mask": padding}, {"key_padding_mask": padding, "need_weights": False}]
    if itself and not options["add_bias_kv"] and not options["add_zero_attn"]:
        calls.append({"attn_mask": causal, "need_weights": False, "is_causal": True})
    inputs = (query, query, query) if itself else (query, memory, memory)
    if options["kdim"]:
        module = nn.MultiheadAttention(8, 2, vdim=int(inner), **options).train()

    def run(call: dict[str, object]) -> list[Tensor | None]:
        module.zero_grad()
        output, weights = module(*inputs, **call)
        output.square().sum().backward()
        return [output, weights, *(parameter.grad for parameter in module.parameters())]

    for call in calls:
        expected = run(call)
        (handle,) = multihead_attention.replace_attention(module)
        with handle:
            assert type(module) is multihead_attention.MultiheadAttention
            found = run(call)
        assert type(module) is nn.MultiheadAttention
        for ours, theirs in zip(found, expected, strict=True):
            if itself and ours is not None:
                assert torch.equal(ours, theirs), call
            else:
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_replacement_without_a_batch() -> None:
    module, x = nn.MultiheadAttention(8, 2).eval(), torch.randn(5, 8)
    mask = torch.tensor([False] * 4 + [True])
    for call in ({}, {"need_weights": False}, {"key_padding_mask": mask}):
        expected = module(x, x, x, **call)
        (handle,) = multihead_attention.replace_attention(module)
        with handle:
            for ours, theirs in zip(module(x, x, x, **call), expected, strict=True):
                torch.testing.assert_close(ours, theirs)


def test_a_training_loop_keeps_its_gradients_to_the_bit() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(EMBED, 2, 16, dropout=0.1, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(),
                          nn.Linear(EMBED * TOKENS, 3))
    x, labels = _inputs().float(), torch.tensor([0, 1, 2])

    def step() -> list[Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = step()
    scorer = Scorer(model, x)
    assert [name for name in scorer._totals._graph.groups if "self_attn" in name.name]
    with scorer:
        found = step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert (scorer.scores()["0.layers.0.self_attn"] > 0).all()


def test_an_encoder_without_heads_runs_with_padding_and_as_a_fused_kernel_would() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch, src_key_padding_mask=padding[:len(batch)])[:, :3]

    scores = fastscore.score(model, [x], forward=forward, progress=False)
    result = fastscore.prune(model, scores, x, channels=0.6, forward=forward)
    assert any("self_attn" in name for name in result.removed)
    with fastscore.mask(model, scores, 0.4, x, forward=forward):
        masked = forward(model, x)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            torch.testing.assert_close(forward(result.model, x), masked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["multihead", "apart"])
def test_multiply_accumulates_of_attention_count(kind: str) -> None:
    """With the definition in plain products as the oracle: fused kernels count the same."""
    model, x = _network(KINDS[kind][0]), _inputs(2)
    fused = copy.deepcopy(model)
    for module in fused.modules():
        if isinstance(module, Apart):
            module.__class__ = ApartFused
    assert total_macs(fused, x) == total_macs(_called(model), x)


class ApartFused(Apart):
    """The same through PyTorch's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (-1, WIDTH)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_pruned_twice_saved_and_trained_on(tmp_path: Path) -> None:
    model, x = _network(Multihead), _inputs()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    F.cross_entropy(model(x), torch.tensor([0, 1, 2])).backward()
    optimizer.step()
    result = fastscore.prune(model, fastscore.score(model, [x], progress=False), x, channels=0.8, ignore="embed")
    gone = result.removed["attention.inner"]
    rebuilt = fastscore.rebuild_optimizer(optimizer, model, result)
    rows = torch.tensor([r for r in range(3 * EMBED) if r % EMBED not in gone.tolist()])
    old, new = model.attention.inner.in_proj_weight, result.model.attention.inner.in_proj_weight
    assert torch.equal(new, old[rows])
    assert torch.equal(rebuilt.state[new]["momentum_buffer"], optimizer.state[old]["momentum_buffer"][rows])
    F.cross_entropy(result.model(x), torch.tensor([0, 1, 2])).backward()
    rebuilt.step()
    again = fastscore.prune(result.model, fastscore.score(result.model, [x], progress=False), x, channels=0.5)
    assert again.model.attention.inner.num_heads == 2
    fastscore.save_pruned(again, tmp_path / "small.safetensors")
    loaded = fastscore.load_pruned(_network(Multihead, seed=5), tmp_path / "small.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(x), again.model(x))
        assert torch.equal(pickle.loads(pickle.dumps(again.model))(x), again.model(x))
