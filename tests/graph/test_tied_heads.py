"""Heads whose weight is an embedding's: what they read goes with the embedding's channels, whatever stands between."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import whole_way
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace
from fastscore.integrations.transformers import forward
from fastscore.pruning.saved.checkpoint import load_state

VOCABULARY = 20
TOKENS = {"input_ids": torch.randint(0, VOCABULARY, (8, 5), generator=torch.Generator().manual_seed(0))}


class Sentences(nn.Module):
    """A recurrent model of language: its head is tied to its embedding, whose channels no sum ties to the state."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(VOCABULARY, 6), nn.LSTM(6, 6, batch_first=True)
        self.head = nn.Linear(6, VOCABULARY, bias)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(input_ids))[0])


def test_the_whole_way(tmp_path: Path) -> None:
    """Scores by brute force, budgets, smaller = masked, export, a training step, save and load."""
    small = whole_way.check(Sentences, TOKENS, ["embed"], tmp_path).model
    assert small.head.weight is small.embed.weight
    assert (small.embed.embedding_dim, small.rnn.hidden_size, small.head.in_features) == (3, 3, 3)


@pytest.mark.parametrize("bias", [True, False])
def test_repairs_leave_it_tied(bias: bool, tmp_path: Path) -> None:
    """A head of its own weight would be over the budget, and be another after it is loaded; a mean goes into a bias."""
    model = whole_way.noisy(lambda: Sentences(bias))
    scores = fastscore.score(model, [TOKENS], progress=False)
    batches = [{"input_ids": row} for row in TOKENS["input_ids"].split(2)]
    result = fastscore.prune(model, scores, TOKENS, params=0.5, calibration=batches, progress=False)
    small = result.model
    assert small.head.weight is small.embed.weight
    before, after = result.report.params
    assert sum(parameter.numel() for parameter in small.parameters()) == after <= 0.5 * before
    with torch.no_grad():
        want = small(**TOKENS)
        cut = fastscore.prune(model, scores, TOKENS, params=0.5, compensate=False).model
        repairs = {row.name: row for row in result.report.repairs}
        assert repairs["mean"].kl < repairs["none"].kl
        assert not torch.allclose(cut(**TOKENS), want)
        fastscore.save_pruned(result, tmp_path / "small.safetensors")
        assert torch.equal(fastscore.load_pruned(model, tmp_path / "small.safetensors")(**TOKENS), want)


def test_what_was_untied_after_pruning_is_loaded_so() -> None:
    model, other = whole_way.noisy(Sentences, 0), whole_way.noisy(Sentences, 1)
    model.head.weight = nn.Parameter(model.head.weight.detach() * 2)
    with torch.no_grad():
        assert torch.equal(load_state(other, model.state_dict())(**TOKENS), model(**TOKENS))


def test_a_head_behind_a_layer_that_also_shares_its_bias() -> None:
    """BertForMaskedLM reads what a layer of the head makes, and holds the bias beside the head."""
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
                             "max_position_embeddings": 8}
    model = whole_way.noisy(lambda: transformers.BertForMaskedLM(transformers.BertConfig(
        **sizes, vocab_size=VOCABULARY)))
    graph = trace(model, TOKENS, forward)
    name = "bert.embeddings.word_embeddings"
    group = next(group for group in graph.groups if group.name == name)
    made = {member.layer for member in group.role("producer")}
    assert "cls.predictions.transform.dense" in made
    with torch.no_grad():
        v = torch.randn(forward(model, TOKENS).shape, dtype=torch.float64)
    scores = fastscore.score(model, [TOKENS], gradient="loss", normalize=False, forward=forward, progress=False,
                             loss=lambda output, batch: (output * v).sum())
    exact = whole_way.sums(model, group, TOKENS, v).square().mean(0)
    torch.testing.assert_close(scores[name].double(), exact, rtol=1e-5, atol=1e-9 * float(exact.max()))
    options: dict[str, Any] = {"scope": "layer", "forward": forward}
    small = fastscore.prune(model, scores, TOKENS, channels=0.5, compensate=False, **options).model
    decoder = small.cls.predictions.decoder
    assert decoder.weight is small.bert.embeddings.word_embeddings.weight
    assert decoder.bias is small.cls.predictions.bias
    with torch.no_grad(), fastscore.mask(model, scores, 0.5, TOKENS, compensate=False, **options):
        torch.testing.assert_close(forward(small, TOKENS), forward(model, TOKENS))
    repaired = fastscore.prune(model, scores, TOKENS, channels=0.5, **options).model  # a mean has no place there
    assert repaired.cls.predictions.decoder.bias is repaired.cls.predictions.bias
