"""Sequences: padding that does not count, and tokens as samples, against gates in float64."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import fastscore
from fastscore import Scorer, fingerprints
from fastscore.integrations.transformers import forward
from fastscore.scoring import gradients

TEXT = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 20,
        "max_position_embeddings": 16}
KINDS = {
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=2)),
    "BERT": lambda: transformers.BertForTokenClassification(transformers.BertConfig(**TEXT, num_labels=3)),
}
EDGES = {"Llama": {"model.layers.0.self_attn.q_proj": ("model.layers.0.self_attn.o_proj", 8),
                   "model.layers.1.mlp.gate_proj": ("model.layers.1.mlp.down_proj", 1)},
         "BERT": {"bert.encoder.layer.1.attention.self.query": ("bert.encoder.layer.1.attention.output.dense", 4),
                  "bert.encoder.layer.0.intermediate.dense": ("bert.encoder.layer.0.output.dense", 1)}}


def _model(kind: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = KINDS[kind]().double().eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def _batch(lengths: tuple[int, ...] = (6, 4, 3), padded: int = 6, padding: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(1, 20, (len(lengths), 16), generator=torch.Generator().manual_seed(1))[:, :padded]
    mask = torch.arange(padded) < torch.tensor(lengths)[:, None]
    return {"input_ids": torch.where(mask, ids, padding), "attention_mask": mask.long()}


def _brute(model: nn.Module, batch: dict[str, Tensor], layer: str, unit: int, v: Tensor) -> Tensor:
    """[N, T, C]: derivatives of v·z by a gate on each channel at each token of a layer's input, summed over units."""
    gates: list[Tensor] = []

    def gate(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        gates.append(torch.ones_like(args[0], requires_grad=True))
        return (args[0] * gates[0],)

    handle = model.get_submodule(layer).register_forward_pre_hook(gate)
    output = forward(model, batch)
    handle.remove()
    (s,) = torch.autograd.grad(output, gates, v)
    return s.unflatten(2, (-1, unit)).sum(3).repeat_interleave(unit, 2)


def _directions(output: Tensor, batch: dict[str, Tensor], dims: int, seed: int) -> Tensor:
    """Random gradients, drawn as documented, of length 1 for each sample, none at padding."""
    mask = batch["attention_mask"].bool()
    ids = fingerprints.sample_ids(batch["input_ids"] * mask)
    if dims == 1:
        v = gradients.random_gradient(output, ids, seed, 0, "normal", False) * mask[..., None]
        return v / v.flatten(1).norm(dim=1)[:, None, None]
    v = [gradients.random_gradient(output[n, t][None], fingerprints.token_ids(ids[n:n + 1], t + 1)[-1:], seed, 0,
                                   "normal", True)[0] for n in range(len(output)) for t in range(output.shape[1])]
    return torch.stack(v).reshape(output.shape) * mask[..., None]


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("kind", list(KINDS))
def test_scores_are_those_of_gates_without_padding(kind: str, dims: int) -> None:
    model, batch = _model(kind), _batch()
    scores = fastscore.score(model, [batch], forward=forward, sample_dims=dims, seed=3, progress=False)
    mask = batch["attention_mask"].bool()
    assert scores.samples == (13 if dims == 2 else 3)
    v = _directions(forward(model, batch), batch, dims, 3)
    for group, (layer, unit) in EDGES[kind].items():
        s = _brute(model, batch, layer, unit, v)
        expected = (s[mask] if dims == 2 else s.sum(1)).square().mean(0)
        torch.testing.assert_close(scores[group].double(), expected, rtol=1e-5, atol=1e-12)
        a: list[Tensor] = []
        handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args, a=a: a.append(args[0]))
        forward(model, batch)
        handle.remove()
        each = torch.stack([row[real].mean(0) for row, real in zip(a[0], mask, strict=True)])
        torch.testing.assert_close(scores.means[layer], (a[0][mask] if dims == 2 else each).mean(0).detach(),
                                   rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("gradient", ["random", "loss"])
def test_padding_changes_nothing(dims: int, gradient: Any) -> None:
    model = _model("BERT")

    def loss(output: Tensor, batch: Any) -> Tensor:
        return output.square()[batch["attention_mask"].bool()].sum()

    options: dict[str, Any] = {"forward": forward, "sample_dims": dims, "gradient": gradient, "loss": loss,
                               "progress": False}
    together = fastscore.score(model, [_batch()], **options)
    wider = fastscore.score(model, [_batch(padded=9, padding=7)], **options)
    apart = fastscore.score(model, [{name: value[n:n + 1, :length] for name, value in _batch().items()}
                                    for n, length in enumerate((6, 4, 3))], **options)
    for group in together:
        torch.testing.assert_close(wider[group], together[group], rtol=1e-5, atol=0)
        torch.testing.assert_close(apart[group], together[group], rtol=1e-5, atol=0)
    for layer, mean in together.means.items():
        torch.testing.assert_close(wider.means[layer], mean, rtol=1e-9, atol=1e-12)


def test_padding_does_not_count_in_one_output_for_an_example() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.BertConfig(**TEXT, num_labels=3)
        model = transformers.BertForSequenceClassification(config).double().eval()
    together = fastscore.score(model, [_batch(padded=9, padding=7)], forward=forward, progress=False)
    apart = fastscore.score(model, [{name: value[n:n + 1, :length] for name, value in _batch().items()}
                                    for n, length in enumerate((6, 4, 3))], forward=forward, progress=False)
    for group in apart:
        torch.testing.assert_close(together[group], apart[group], rtol=1e-5, atol=0)
    for layer, mean in apart.means.items():
        torch.testing.assert_close(together.means[layer], mean, rtol=1e-9, atol=1e-12)


def test_tokens_in_expectation_are_the_length_of_what_changes() -> None:
    """The mean square over random gradients is the squared length of all outputs' change, here K times their mean."""
    model, batch = _model("BERT"), _batch((4, 4), 4)
    scores = fastscore.score(model, [batch], forward=forward, sample_dims=2, normalize=False, probes=800,
                             progress=False)
    output = forward(model, batch)
    layer, unit = EDGES["BERT"]["bert.encoder.layer.0.intermediate.dense"]
    basis = torch.eye(output[0].numel(), dtype=output.dtype).reshape(-1, 1, *output.shape[1:]).expand(-1, 2, -1, -1)
    exact = sum(_brute(model, batch, layer, unit, v).square() for v in basis).flatten(0, 1).mean(0)
    found = scores["bert.encoder.layer.0.intermediate.dense"].double()
    torch.testing.assert_close(found, exact, rtol=0.15, atol=0)


def test_a_scorer_measures_tokens_in_a_loop() -> None:
    model, batch = _model("Llama"), _batch()
    mask = batch["attention_mask"].bool()
    for dims in (1, 2):
        options: dict[str, Any] = {"forward": forward, "sample_dims": dims, "output": lambda returned: returned.logits}
        scorer = Scorer(model, batch, gradient="random", seed=3, **options)
        with scorer:
            scorer.probe(model(**batch, use_cache=False))
        expected = fastscore.score(model, [batch], forward=forward, sample_dims=dims, seed=3, progress=False)
        for group in expected:
            torch.testing.assert_close(scorer.scores()[group], expected[group], rtol=1e-5, atol=0)
    scorer = Scorer(model, batch, normalize=False, **options)
    with scorer:
        output = model(**batch, use_cache=False).logits
        F.mse_loss(output[mask], torch.zeros_like(output[mask]), reduction="sum").backward()
    assert scorer.scores().samples == 13
    for group, (layer, unit) in EDGES["Llama"].items():
        s = _brute(model, batch, layer, unit, 2 * output.detach() * mask[..., None])
        torch.testing.assert_close(scorer.scores()[group].double(), s[mask].square().mean(0), rtol=1e-5, atol=0)
    model.zero_grad()


def test_forward_finds_logits_and_hidden_states_and_says_what_it_does_not_find() -> None:
    batch = {**_batch(), "labels": torch.zeros(3, 6, dtype=torch.long)}
    assert torch.equal(forward(_model("BERT"), batch), _model("BERT")(**_batch()).logits)
    inner = _model("BERT").bert
    assert torch.equal(forward(inner, _batch()), inner(**_batch()).last_hidden_state)

    class Other(nn.Module):
        def forward(self, **batch: Tensor) -> dict[str, Tensor]:
            return {}

    with pytest.raises(TypeError, match="neither logits nor last_hidden_state"):
        forward(Other(), _batch())


def test_the_mask_may_come_first() -> None:
    model, batch = _model("BERT"), _batch()
    swapped = {name: batch[name] for name in ("attention_mask", "input_ids")}
    scores = [fastscore.score(model, [each], forward=forward, progress=False) for each in (batch, swapped)]
    assert all(torch.equal(scores[0][group], scores[1][group]) for group in scores[0])


PLAIN = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
BAD: dict[str, tuple[Any, str]] = {
    "three": ({"sample_dims": 3}, "sample_dims: 3; it is 1"),
    "exact": ({"sample_dims": 2, "probes": "exact"}, "all tokens at once"),
    "compiled": ({"sample_dims": 2, "compile": True}, "compile=False"),
    "no tokens": ({"sample_dims": 2}, "has no dimension of tokens"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_what_cannot_be_told_apart_by_token_is_refused(name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        fastscore.score(PLAIN, [torch.randn(5, 4)], progress=False, **options)


def test_further_refusals() -> None:
    model, batch = _model("BERT"), _batch()
    for options in ({"distribution": "orthogonal"}, {"center": True}, {"probes": "exact"}):
        with pytest.raises(ValueError, match="padding of a batch among its directions"):
            fastscore.score(model, [batch], forward=forward, progress=False, **options)
    with pytest.raises(ValueError, match=re.escape("cannot be divided")):
        Scorer(model, batch, forward=forward, sample_dims=2)
    first = fastscore.score(model, [batch], forward=forward, progress=False)
    with pytest.raises(ValueError, match="sample_dims 1 and 2"):
        first.merge(fastscore.score(model, [batch], forward=forward, sample_dims=2, progress=False))


def test_a_stack_on_tokens_of_images() -> None:
    """Without any mask every token counts, and nothing is particular to text."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double(), torch.randn(2, 5, 4).double()
    by_token = fastscore.score(model, [x], sample_dims=2, normalize=False, importance="taylor-abs", progress=False)
    assert by_token.samples == 10
    ids = fingerprints.token_ids(fingerprints.sample_ids(x), 5)
    v = gradients.random_gradient(torch.empty(10, 3).double(), ids, 0, 0, "normal", False)
    hidden = torch.relu(model[0](x)).flatten(0, 1)
    expected = (hidden * (v @ model[2].weight)).abs().mean(0)
    torch.testing.assert_close(by_token["0"].double(), expected.detach(), rtol=1e-6, atol=0)


class RowsTwice(nn.Module):
    """Its second layer reads every token twice, as experts do to whom two ways lead."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.first(x).relu().flatten(0, 1).repeat_interleave(2, 0)
        found: Tensor = self.last(self.second(rows).relu().unflatten(0, (-1, 2)).sum(1).unflatten(0, x.shape[:2]))
        return found


def test_rows_that_are_no_tokens_are_kept_and_the_way_out_scores_them() -> None:
    model, batches = RowsTwice(), torch.randn(4, 3, 5).split(2)
    kept = fastscore.score(model, batches, sample_dims=2, progress=False)
    assert "first" not in kept
    assert kept.skipped["first"].endswith("sample_dims=1 scores it")
    assert "first" in fastscore.score(model, batches, sample_dims=1, progress=False)


class OwnProducts(nn.Module):
    """Multiplies tokens by Parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(16, 8), nn.Parameter(torch.randn(8, 12)), nn.Linear(12, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        y = self.down((self.embed(input_ids) @ self.up).relu()) * attention_mask[..., None]
        return y.sum(1) / attention_mask.sum(1, keepdim=True)


def test_padding_is_in_no_mean_of_what_parameters_multiply() -> None:
    torch.manual_seed(0)
    model, ids = OwnProducts().double().eval(), torch.randint(16, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found = fastscore.score(model, [{"input_ids": ids, "attention_mask": mask}], progress=False)
    tokens = model.embed(ids)
    each = torch.stack([row[real].mean(0) for row, real in zip(tokens, mask.bool(), strict=True)])
    torch.testing.assert_close(found.means["up"], each.mean(0).detach(), rtol=1e-6, atol=1e-12)
