"""Head dimensions as channels: pairs of queries and keys, and values, of each head: found, scored, masked, removed."""

import copy
import io
from collections import Counter
from pathlib import Path

import attention_layouts
import own_attentions
import pytest
import torch
import transformers
from head_dims import SIZES, Oracle, call, check, inputs, model_of, network, run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from whole_way import noisy

import fastscore
from fastscore.graph.tracing import trace
from fastscore.integrations.transformers import forward


@given(st.sampled_from(["apart", "fused", "by head"]), st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
       st.sampled_from([2, 3, 4, 6]), st.booleans(), st.sampled_from(["", "halves", "neighbours"]))
@settings(max_examples=8, deadline=None)
@example("apart", (1, 1), 4, True, "")  # whose values go without the dimensions of queries and keys, too
def test_dimensions_of_heads(layout: str, heads: tuple[int, int], width: int, bias: bool, turned: str) -> None:
    """Any layout: scores are those of gates on queries or keys, on values or what reads them; smaller is masked."""
    count, shared = (heads[0], heads[0]) if layout == "by head" else heads
    width = {2: 4, 3: 6}.get(width, width) if turned else width
    model = network(layout, count, shared, width, bias, turned)
    weights = ("q_proj", "k_proj", "v_proj") if layout == "apart" else ("qkv_proj",) * 3
    oracle = Oracle(tuple(f"one.{layer}.weight" for layer in (*weights, "o_proj")), count, shared, width, turned,
                    layout == "by head")
    _, result = check(model, inputs(), f"one.{weights[0]}", oracle)
    assert result.model.one.head_dim < width == model.one.head_dim


@pytest.mark.parametrize("name", ["timm", "torch", "Llama", "GPT-NeoX", "Phi"])
def test_of_models_that_people_have(name: str, tmp_path: Path) -> None:
    """Fused projections of timm, those that nn.MultiheadAttention holds, and shared keys under rotary tables."""
    model, batch, group, oracle = model_of(name)
    # transformers' norms and softmax are in float32
    _, result = check(model, batch, group, oracle, 0.7, 1e-10 if name in ("timm", "torch") else 1e-5)
    small = result.model
    with torch.no_grad():
        want = run(small, batch)
        fastscore.save_pruned(result, tmp_path / "small.safetensors")
        again = fastscore.load_pruned(model, tmp_path / "small.safetensors")
        file = io.BytesIO()
        torch.save(small, file)
        file.seek(0)
        for copied in (again, copy.deepcopy(small), torch.load(file, weights_only=False)):
            assert torch.equal(run(copied, batch), want)
        if isinstance(batch, dict):
            small.generation_config.pad_token_id = 0
            made = [small.generate(batch["input_ids"], max_new_tokens=3, do_sample=False, use_cache=cached)
                    for cached in (True, False)]
            assert torch.equal(*made)
        else:
            exported = torch.export.export(small, (batch,)).module()
            torch.testing.assert_close(exported(batch), want)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run(model.train(), batch).square().mean().backward()
    optimizer.step()
    before = [parameter.clone() for parameter in small.parameters()]
    stepping = fastscore.rebuild_optimizer(optimizer, model, result)
    run(small.train(), batch).square().mean().backward()
    stepping.step()
    assert all(not torch.equal(new, old) for new, old in zip(small.parameters(), before, strict=True)
               if new.grad is not None and bool(new.grad.any()))
    # once more, of what is left
    again = fastscore.score(small.eval(), [batch], units="head_dims", forward=run, progress=False)
    twice = fastscore.prune(small, again, batch, channels=0.5, ignore=[other for other in again if other != group],
                            forward=run, progress=False)
    assert [*twice.removed] == [group]
    fastscore.save_pruned(twice, tmp_path / "twice.safetensors")
    with torch.no_grad():
        assert torch.equal(run(fastscore.load_pruned(model.eval(), tmp_path / "twice.safetensors"), batch),
                           run(twice.model, batch))


def test_what_is_kept_is_said() -> None:
    x = inputs()
    scaled = network("fused", 2, 2, 4, True, "", True)
    scores = fastscore.score(scaled, [x], units="head_dims", progress=False)
    assert "scales the products of queries and keys by the width" in scores.skipped["one.qkv_proj (head dimensions)"]
    assert len(scores["one.qkv_proj"]) == 8  # whole heads
    qwen = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)).eval()
    kept = fastscore.score(qwen, [{"input_ids": torch.arange(6)[None]}], units="head_dims", forward=forward,
                           progress=False).skipped["model.layers.0.self_attn.q_proj (head dimensions)"]
    assert kept == "Qwen3Attention normalises its queries, over all dimensions of a head"
    with pytest.raises(ValueError, match="taylor importance"):
        fastscore.score(scaled, [x], units="head_dims", importance="magnitude-l2", progress=False)


def test_values_go_alone_where_queries_and_keys_cannot() -> None:
    model, x = network("apart", 4, 2, 3, True, "", True), inputs()
    oracle = Oracle(("one.q_proj.weight", "one.k_proj.weight", "one.v_proj.weight", "one.o_proj.weight"), 4, 2, 3)
    scores = fastscore.score(model, [x], units="head_dims", probes="exact", normalize=False, progress=False)
    want = oracle.importances(model, x, (2,), False)[oracle.pairs:]
    torch.testing.assert_close(scores["one.q_proj"].double(), want, rtol=1e-5, atol=1e-6 * float(want.max()))
    result = fastscore.prune(model, scores, x, channels=0.7, ignore=["two", "embed"], compensate=False, progress=False)
    gone = result.removed["one.q_proj"]
    assert Counter((gone // 3).tolist()) == {0: 1, 1: 1}
    gates = torch.ones(len(oracle.units), dtype=torch.float64).index_fill(0, gone + oracle.pairs, 0)
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), call(model, oracle.gated(model, gates, (), True), x))
    assert result.model.one.q_proj.out_features == 12


def test_looked_for_where_they_are_scored() -> None:
    """A graph with them stands for one without; not the other way round."""
    model, x = network("apart", 2, 2, 4, True), inputs()
    plain = trace(model, x)
    assert not plain.searched
    assert not plain.head_dims
    with pytest.raises(ValueError, match=r"traced without head_dims: give trace\(model, example_inputs, units="):
        fastscore.Scorer(model, plain, units="head_dims")
    found = trace(model, x, units="head_dims")
    assert [group.name for group in found.head_dims] == ["one.q_proj", "two.q_proj"]
    assert trace(model, x) is found
    assert trace(model, x, units="blocks").searched == {"blocks", "head_dims"}
    fastscore.Scorer(model, found, units="head_dims")


class ByHead(attention_layouts.Apart):
    """Query, key and value of each head one after another, of one layer; another one is called what others call it."""

    def __init__(self) -> None:
        super().__init__()
        del self.ask, self.key, self.val
        self.into = torch.nn.Linear(attention_layouts.EMBED, 3 * attention_layouts.INNER)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.into(x).unflatten(-1, (self.h, -1)).transpose(1, 2).chunk(3, -1)
        return self.mix(attention_layouts.join(self.between(q, k, v)))


class Kept(attention_layouts.Apart):
    """It keeps the widths of a head and of all, under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.dh, self.whole, self.factor = attention_layouts.WIDTH, attention_layouts.INNER, 0.7

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], self.h, self.dh).transpose(1, 2) for layer in
                   (self.ask, self.key, self.val))
        y = (q @ k.mT * self.factor).softmax(-1) @ v
        return self.mix(y.transpose(1, 2).reshape(*x.shape[:2], self.whole))


class Shared(attention_layouts.Apart):
    """Two heads each share keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.val = (torch.nn.Linear(attention_layouts.EMBED, attention_layouts.INNER // 2) for _ in range(2))
        self.groups = attention_layouts.HEADS // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = attention_layouts.split(self.ask(x), 2 * self.groups)
        k, v = (attention_layouts.split(layer(x), self.groups).repeat_interleave(2, 1) for layer in
                (self.key, self.val))
        return self.mix(attention_layouts.join((q @ k.mT * 0.7).softmax(-1) @ v))


@pytest.mark.parametrize("attention", [
    attention_layouts.Apart, own_attentions.TableBias, own_attentions.Talking, ByHead, Kept, Shared])
def test_of_attentions_that_names_say_nothing_of(attention: type[torch.nn.Module]) -> None:
    model = noisy(lambda: own_attentions.Network(attention))
    x = torch.randn(3, attention_layouts.TOKENS, 3, generator=torch.Generator().manual_seed(1)).double()
    layers = ("into",) * 3 if attention is ByHead else ("ask", "key", "val")
    shared = attention_layouts.HEADS // (2 if attention is Shared else 1)
    oracle = Oracle(tuple(f"attn.{layer}.weight" for layer in (*layers, "mix")), attention_layouts.HEADS, shared,
                    attention_layouts.WIDTH, by_head=attention is ByHead)
    check(model, x, f"attn.{layers[0]}", oracle)
