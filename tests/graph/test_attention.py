"""Attention heads as channel groups: found, scored, masked and removed."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from attentions import (
    EMBED,
    EMBEDDING,
    HEADS,
    KINDS,
    WIDTH,
    Apart,
    Multihead,
    called,
    channels_of,
    group_of,
    inputs,
    network,
    traced,
)
from oracles import finite_difference, sums, sums_of_each_sample, untouched
from random_mixers import Heads
from thinned import thinned
from torch import Tensor

import fastscore
from fastscore import Scorer
from fastscore.graph.tracing import trace
from fastscore.pruning.budgets.costs import total_macs


@pytest.mark.parametrize("kind", list(KINDS))
def test_heads_are_found(kind: str) -> None:
    build, name, output, unit = KINDS[kind]
    model = network(build)
    with untouched(model):
        graph = trace(model, inputs())
    (group,) = graph.without(model, EMBEDDING).groups
    assert (group.name, group.channels) == (name, channels_of(kind))
    assert group.unit.tolist() == [c // unit for c in range(group.channels)]
    (edge,) = group.edges
    assert edge.layer == output
    assert torch.equal(edge.index, edge.channel)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_embedding_is_a_group_too(kind: str) -> None:
    """Where a module reads it by a weight of its own, too."""
    graph = trace(network(KINDS[kind][0]), inputs())
    stream = next(group for group in graph.groups if group.name == "embed")
    roles = {member.layer.removeprefix("attention."): member.role for member in stream.members}
    assert roles["embed"] == roles[KINDS[kind][2].removeprefix("attention.")] == "producer"
    assert (roles["norm"], roles["head"]) == ("norm", "consumer")
    queries = ("qkv", "q_proj", "query", "in_proj_weight")
    assert {role for layer, role in roles.items() if layer.endswith(queries)} == {"consumer"}


@pytest.mark.parametrize("kind", list(KINDS))
def test_scores_are_those_of_a_gate_on_each_head(kind: str) -> None:
    model, x = traced(kind), inputs()
    v = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = sums(called(model), group_of(kind), x, v)
    with untouched(model):
        scorer = Scorer(model, x, importance="taylor", gradient="random", normalize=False)
        found = sums_of_each_sample(scorer, model, x, v)[KINDS[kind][1]]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    scores = fastscore.score(model, [x], importance="taylor-sq", normalize=False, probes="exact", progress=False)
    changes = torch.stack([sums(called(model), group_of(kind), x, torch.eye(3).double()[k].expand(len(x), 3))
                           for k in range(3)])
    torch.testing.assert_close(scores[KINDS[kind][1]].double(), changes.square().sum(0).mean(0), rtol=1e-5, atol=0)
    if kind in ("shared keys", "multihead"):
        differences = finite_difference(called(model), group_of(kind), x, v)
        units = torch.tensor(group_of(kind).units)
        torch.testing.assert_close(found, differences[:, units] if differences.shape[1] < len(units) else differences,
                                   rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("kind", "units"), thinned(list(KINDS), [1, 2, 3]))
def test_without_heads_it_computes_what_it_computes_masked(kind: str, units: int) -> None:
    _, name, output, unit = KINDS[kind]
    model, x = traced(kind), inputs()
    count = channels_of(kind) // unit
    units = min(units, count - 1)  # one always stays
    scores = fastscore.score(model, [x], ignore=EMBEDDING, progress=False)
    result = fastscore.prune(model, scores, x, channels=1 - units / count, compensate=False)
    gone = result.removed[name]
    assert len(gone) == units * unit
    assert sorted(set((gone // unit).tolist())) == (gone[::unit] // unit).tolist()
    oracle = called(model)
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
    model, x = traced(kind), inputs(1)
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
    model, x = traced(kind), inputs()
    _, name, _, unit = KINDS[kind]
    labels = torch.tensor([0, 1, 2])
    norms = fastscore.score(model, [x], importance="magnitude-l2")[name]
    products = fastscore.score(model, [(x, labels)], importance="molchanov-group", gradient="loss", normalize=False,
                               progress=False)[name]
    F.cross_entropy(model(x), labels).backward()
    attention = model.get_submodule("attention")
    rows = {"fused": [("qkv", lambda r: r % (HEADS * WIDTH) // unit)],
            "fused by head": [("qkv", lambda r: r // (3 * unit))],
            **{each: [(layer, lambda r: r // unit) for layer in ("q_proj", "k_proj", "v_proj")]
               for each in ("apart", "by functions")},
            "shared keys": [("q_proj", lambda r: r // unit), *((layer, lambda r: r // WIDTH) for layer in
                                                               ("k_proj", "v_proj"))],
            "nested": [(f"self.{layer}", lambda r: r // unit) for layer in ("query", "key", "value")],
            "multihead": [("inner", lambda r: r % EMBED // unit)]}[kind]
    squares = torch.zeros(channels_of(kind) // unit, dtype=torch.float64)
    taylor = squares.clone()
    for layer, head in rows:
        for parameter in attention.get_submodule(layer).parameters(recurse=False):
            for r in range(len(parameter)):
                if parameter.dim() > 1:
                    squares[head(r)] += parameter[r].detach().square().sum()
                taylor[head(r)] += (parameter[r] * parameter.grad[r]).detach().square().sum()
    torch.testing.assert_close(norms.double(), squares.sqrt().repeat_interleave(unit), rtol=1e-6, atol=0)
    torch.testing.assert_close(products.double(), taylor.repeat_interleave(unit), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["multihead", "apart"])
def test_multiply_accumulates_of_attention_count(kind: str) -> None:
    """With the definition in plain products as the oracle: fused kernels count the same."""
    model, x = network(KINDS[kind][0]), inputs(2)
    fused = copy.deepcopy(model)
    for module in fused.modules():
        if isinstance(module, Apart):
            module.__class__ = ApartFused
    assert total_macs(fused, x) == total_macs(called(model), x)


class ApartFused(Apart):
    """The same through PyTorch's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (-1, WIDTH)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_pruned_twice_saved_and_trained_on(tmp_path: Path) -> None:
    model, x = network(Multihead), inputs()
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
    loaded = fastscore.load_pruned(network(Multihead, seed=5), tmp_path / "small.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(x), again.model(x))
        assert torch.equal(pickle.loads(pickle.dumps(again.model))(x), again.model(x))


def test_images_of_as_many_channels_as_heads_are_no_biases() -> None:
    """What one attention returns, and another reads first, says nothing of its heads."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), Heads(4, None, True), Heads(4, None, False),
                                torch.nn.Flatten(), torch.nn.Linear(4 * 9, 2)).double().eval()
    graph = trace(model, torch.randn(2, 3, 5, 5).double())
    assert {"1.qkv_proj", "2.q_proj"} <= {group.name for group in graph.groups}
    assert set(graph.skipped) == {"4"}
