"""Layers that are neither Conv nor Linear: scored, cut, repaired, saved."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
import whole_way
from torch import Tensor, nn

import fastscore

TOKENS = {"input_ids": torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(1))}


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=4, n_inner=12, n_positions=8, bos_token_id=1, eos_token_id=2,
        use_cache=False))


MLP, HEADS = "transformer.h.0.mlp.c_fc", "transformer.h.0.attn.c_attn"


def test_gpt2_loses_heads_and_hidden_channels(tmp_path: Path) -> None:
    small = whole_way.check(_gpt2, TOKENS, [MLP, HEADS], tmp_path).model
    block = small.transformer.h[0]
    assert (block.mlp.c_fc.nx, block.mlp.c_fc.nf, block.mlp.c_proj.nx, block.mlp.c_proj.nf) == (16, 6, 6, 16)
    assert [tuple(parameter.shape) for parameter in block.attn.c_attn.parameters()] == [(16, 24), (24,)]
    with torch.no_grad():
        cached = small(**TOKENS, use_cache=True).logits
        torch.testing.assert_close(cached, small(**TOKENS).logits)
        generated = small.float().generate(TOKENS["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (3, 9)


def _as_linears(model: nn.Module) -> nn.Module:
    """A copy with nn.Linear in the place of each Conv1D."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, transformers.pytorch_utils.Conv1D):
                linear = nn.Linear(child.nx, child.nf).double()
                linear.weight.data, linear.bias.data = child.weight.data.t().contiguous(), child.bias.data
                setattr(module, name, linear)
    return model.eval()


@pytest.mark.parametrize("importance", ["magnitude-l2", "molchanov-group", "taylor-sq"])
def test_what_a_conv1d_is_worth_is_what_a_linear_is(importance: str) -> None:
    """In score() and in a Scorer, which taps the model itself."""
    model = whole_way.noisy(_gpt2)
    linears = _as_linears(model)
    one, other = (fastscore.score(each, [TOKENS], importance=importance, progress=False) for each in (model, linears))
    found = []
    for each in (model, linears) if importance[:3] != "mag" else ():
        scorer = fastscore.Scorer(each, TOKENS, importance=importance, normalize=False)
        with scorer:
            each(**TOKENS).logits.square().mean().backward()
        found.append(scorer.scores())
    for a, b in ((one, other), *([found] if found else [])):
        for name in (MLP, HEADS):
            torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-9)


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


def test_a_conv1d_is_repaired_as_a_linear_is() -> None:
    batches = [{"input_ids": torch.randint(1, 50, (4, 8), generator=torch.Generator().manual_seed(n))}
               for n in range(6)]
    outputs = []
    for model in (whole_way.noisy(_gpt2), _as_linears(whole_way.noisy(_gpt2))):
        scores = fastscore.score(model, batches, progress=False)
        result = fastscore.prune(model, scores, TOKENS, channels=0.7, scope="layer")
        repaired = fastscore.reconstruct(model, result, batches, method="linear", ridges=(1e-3,), forward=_logits)
        outputs.append([_logits(each.model, TOKENS).detach() for each in (result, repaired)])
        assert not torch.allclose(*outputs[-1])
    for conv, linear in zip(*outputs, strict=True):
        torch.testing.assert_close(conv, linear, rtol=1e-4, atol=1e-5)
