"""nn.MultiheadAttention and what stands in for it: the same outputs and gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from attentions import EMBED, TOKENS, inputs
from torch import Tensor, nn

import fastscore
from fastscore import Scorer
from fastscore.modules.attention import multihead_attention

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
    x, labels = inputs().float(), torch.tensor([0, 1, 2])

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


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_the_replacement_is_exported_with_any_number_of_samples_and_tokens(options: dict[str, bool],
                                                                           need_weights: bool) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)  # type: ignore[arg-type]

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.attention(x, x, x, key_padding_mask=x[..., 0] > 1, need_weights=need_weights)[0]
            return made

    torch.manual_seed(0)
    model, x = Padded().eval(), torch.rand(2, 5, 8)
    (handle,) = multihead_attention.replace_attention(model)
    handle.make_permanent()
    free = {0: torch.export.Dim("samples"), 1: torch.export.Dim("tokens", min=2)}
    program = torch.export.export(model, (x,), dynamic_shapes=(free,)).module()
    for other in (x, torch.rand(7, 9, 8)):
        torch.testing.assert_close(program(other), model(other))
