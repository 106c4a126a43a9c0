"""Heads whose queries and keys are normalised together: OLMo 2's, and those of a LayerNorm in its place. Its softmax is
of float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import whole_way
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace
from fastscore.integrations.transformers import forward
from fastscore.pruning.budgets.costs import total_macs

HEADS, SHARED, WIDTH = 4, 2, 2
BATCH = {"input_ids": torch.randint(1, 20, (3, 5), generator=torch.Generator().manual_seed(1))}


def _model(kind: str = "RMSNorm") -> nn.Module:
    def build() -> nn.Module:
        model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(
            hidden_size=HEADS * WIDTH, intermediate_size=12, num_hidden_layers=2, num_attention_heads=HEADS,
            num_key_value_heads=SHARED, vocab_size=20, max_position_embeddings=16, pad_token_id=0, eos_token_id=1))
        if kind == "LayerNorm":
            for layer in model.model.layers:
                layer.self_attn.q_norm = nn.LayerNorm(HEADS * WIDTH)
                layer.self_attn.k_norm = nn.LayerNorm(SHARED * WIDTH)
        return model

    return whole_way.noisy(build)


def _gated(model: nn.Module, name: str, gate: Tensor, batch: Any) -> Tensor:
    """The output where what o_proj reads, and what the statistics of the norms count, is multiplied by the gate of its
    pair of heads, [SHARED]."""
    attention: Any = model.get_submodule(name)
    of_queries, of_keys = gate.repeat_interleave(HEADS // SHARED * WIDTH), gate.repeat_interleave(WIDTH)

    def counted(norm: Any, gates: Tensor) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            (x,), eps = args, getattr(norm, "variance_epsilon", None) or norm.eps
            mean = (x * gates).mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else 0.0
            y = (x - mean) / ((x * gates - mean).square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight
            return y + norm.bias if isinstance(norm, nn.LayerNorm) else y

        return norm.register_forward_hook(hook)

    handles = [counted(attention.q_norm, of_queries), counted(attention.k_norm, of_keys),
               attention.o_proj.register_forward_pre_hook(lambda module, args: (args[0] * of_queries,))]
    try:
        return forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_heads_go_from_the_norms_that_count_them(kind: str, tmp_path: Path) -> None:
    model = _model(kind)
    with untouched(model):
        graph = trace(model, BATCH, forward)
    names = [f"model.layers.{number}.self_attn" for number in range(2)]
    assert set(graph.skipped) == {"lm_head"}
    with torch.no_grad():
        z = forward(model, BATCH)
        one = torch.ones(SHARED, dtype=torch.float64)
        torch.testing.assert_close(_gated(model, names[0], one, BATCH), z, rtol=1e-6, atol=1e-6)
    v = torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=z.dtype)
    with untouched(model):
        scores = fastscore.score(model, [BATCH], gradient="loss", normalize=False, forward=forward, progress=False,
                                 loss=lambda output, _: (output * v).sum())
    for name in names:
        rows = []
        for tokens, direction in zip(BATCH["input_ids"].split(1), v.split(1), strict=True):
            gate = torch.ones(SHARED, dtype=torch.float64, requires_grad=True)
            output = _gated(model, name, gate, {"input_ids": tokens})
            rows.append(torch.autograd.grad((output * direction).sum(), gate)[0])
        want = torch.stack(rows).square().mean(0).repeat_interleave(HEADS // SHARED * WIDTH)
        torch.testing.assert_close(scores[f"{name}.q_proj"].double(), want, rtol=1e-5, atol=1e-6 * float(want.max()))
    heads = [f"{name}.q_proj" for name in names]
    alone = fastscore.Scores({name: scores.totals[name] for name in heads}, scores.origin, coverage=scores.coverage)
    how: dict[str, Any] = {"forward": forward, "scope": "layer", "compensate": False}
    with untouched(model):
        result = fastscore.prune(model, alone, BATCH, channels=0.5, progress=False, **how)
    small: Any = result.model
    assert set(result.removed) == set(heads)
    with torch.no_grad(), untouched(model):
        with fastscore.mask(model, alone, 0.5, BATCH, **how):
            masked = forward(model, BATCH)
        torch.testing.assert_close(forward(small, BATCH), masked, rtol=1e-5, atol=1e-5)
        gate = torch.ones(SHARED, dtype=torch.float64).index_fill(0, result.removed[heads[0]][:1] // 4, 0)
        single = fastscore.Scores({heads[0]: scores.totals[heads[0]]}, scores.origin, coverage=scores.coverage)
        less = fastscore.prune(model, single, BATCH, channels=0.5, progress=False, **how).model
        torch.testing.assert_close(forward(less, BATCH), _gated(model, names[0], gate, BATCH), rtol=1e-5, atol=1e-5)
    assert small.model.layers[0].self_attn.q_norm.weight.numel() == HEADS * WIDTH // 2
    assert result.report.macs[1] == total_macs(small, BATCH, forward)
    assert result.report.params[1] == sum(parameter.numel() for parameter in small.parameters())
    fastscore.save_pruned(result, tmp_path / "small.safetensors")
    loaded = fastscore.load_pruned(_model(kind), tmp_path / "small.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(forward(loaded, BATCH), forward(small, BATCH))
    texts = [small.generate(BATCH["input_ids"], max_new_tokens=3, do_sample=False, use_cache=cached)
             for cached in (True, False)]
    assert torch.equal(*texts)
