"""Layers that are neither Conv nor Linear: scored, cut, repaired, saved."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import whole_way
from oracles import untouched
from torch import Tensor, nn

import fastscore

TOKENS = {"input_ids": torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(1))}


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=4, n_inner=12, n_positions=8, bos_token_id=1, eos_token_id=2,
        use_cache=False))


MLP, HEADS = "transformer.h.0.mlp.c_fc", "transformer.h.0.attn.c_attn"


def test_gpt2_loses_heads_and_hidden_channels(tmp_path: Path) -> None:
    small = whole_way.check(_gpt2, TOKENS, [MLP, HEADS], tmp_path, only=False).model
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


@pytest.mark.parametrize("method", ["linear", "asymmetric"])
def test_a_conv1d_is_repaired_as_a_linear_is(method: Any) -> None:
    batches = [{"input_ids": torch.randint(1, 50, (4, 8), generator=torch.Generator().manual_seed(n))}
               for n in range(6)]
    outputs = []
    for model in (whole_way.noisy(_gpt2), _as_linears(whole_way.noisy(_gpt2))):
        scores = fastscore.score(model, batches, progress=False)
        result = fastscore.prune(model, scores, TOKENS, channels=0.7, scope="layer")
        repaired = fastscore.reconstruct(model, result, batches, method=method, ridges=(1e-3,), forward=_logits)
        outputs.append([_logits(each.model, TOKENS).detach() for each in (result, repaired)])
        assert not torch.allclose(*outputs[-1])
    for conv, linear in zip(*outputs, strict=True):
        torch.testing.assert_close(conv, linear, rtol=1e-4, atol=1e-5)


MOE = {"hidden_size": 16, "intermediate_size": 10, "num_hidden_layers": 1, "num_attention_heads": 2,
       "num_key_value_heads": 2, "vocab_size": 50, "use_cache": False, "max_position_embeddings": 16,
       "experts_implementation": "batched_mm"}  # the others run in float32 alone, or branch on what rows hold


def _mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**MOE, num_local_experts=4))


def _qwen() -> nn.Module:
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        **MOE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6))


def _gpt_oss() -> nn.Module:
    """Whose experts lie turned, with biases and with gates between what they gate."""
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(
        **MOE, head_dim=8, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0, sliding_window=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}))


EXPERTS = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(("build", "width"), [(_mixtral, 8), (_qwen, 4)])
def test_experts_lose_the_width_between_their_two_matrices(build: Callable[[], nn.Module], width: int,
                                                           tmp_path: Path) -> None:
    """From 20 and 12, to half or below: rows of the second matrix go on beginning at multiples of 16 bytes."""
    small = whole_way.check(build, TOKENS, [f"{EXPERTS}.gate_up_proj"], tmp_path, only=False).model
    experts = small.get_submodule(EXPERTS)
    assert tuple(experts.gate_up_proj.shape) == (4, width, 16)
    assert tuple(experts.down_proj.shape) == (4, 16, width // 2)
    assert experts.intermediate_dim == width // 2
    assert set(dict(small.named_parameters())) == set(dict(build().named_parameters()))


def test_experts_that_lie_turned(tmp_path: Path) -> None:
    """Lose their width, each with what gates it; the stream before and behind them goes as well."""
    small = whole_way.check(_gpt_oss, TOKENS, [f"{EXPERTS}.gate_up_proj"], tmp_path, only=False).model
    experts = small.get_submodule(EXPERTS)
    assert [tuple(parameter.shape) for parameter in experts.parameters()] == [(4, 16, 8), (4, 8), (4, 4, 16), (4, 16)]
    assert experts.intermediate_size == 4
    assert set(dict(small.named_parameters())) == set(dict(_gpt_oss().named_parameters()))
    model = whole_way.noisy(_gpt_oss)
    scores = fastscore.score(model, [TOKENS], progress=False)
    assert set(scores) == {"model.embed_tokens", "model.layers.0.self_attn.q_proj", f"{EXPERTS}.gate_up_proj"}
    options = {"scope": "layer", "compensate": False}
    small = fastscore.prune(model, scores, TOKENS, channels=0.5, **options).model
    with torch.no_grad(), fastscore.mask(model, scores, 0.5, TOKENS, **options):
        torch.testing.assert_close(small(**TOKENS).logits, model(**TOKENS).logits)


def test_experts_while_they_are_tapped() -> None:
    """The user's model computes the same, its state dict has the same names, and padding does not count."""
    model = whole_way.noisy(_mixtral)
    state = model.state_dict()
    tokens = torch.cat([TOKENS["input_ids"], torch.zeros(3, 2, dtype=torch.int64)], 1)
    padded = {"input_ids": tokens, "attention_mask": (torch.arange(8) < 6).long().expand(3, -1)}
    expected = model(**TOKENS).logits
    found = []
    for batch in (TOKENS, padded):
        scorer = fastscore.Scorer(model, batch, importance="taylor-abs", normalize=False)
        with untouched(model), scorer:
            output = model(**batch).logits[:, :6]
            torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
            assert list(model.state_dict()) == list(state)
            output.square().sum().backward()
            model.zero_grad(set_to_none=True)
        with scorer:
            model.load_state_dict(state)
        found.append(scorer.scores())
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-5, atol=1e-9)


def test_experts_are_worth_the_weights_of_all_of_them_and_have_no_bias_to_compensate_in() -> None:
    model = whole_way.noisy(_mixtral)
    name = f"{EXPERTS}.gate_up_proj"
    weight = model.get_parameter(name).detach()
    scores = fastscore.score(model, [TOKENS], importance="magnitude-l2", progress=False)
    exact = weight.square().sum((0, 2)).view(2, -1).sum(0).sqrt().repeat(2)
    torch.testing.assert_close(scores[name].double(), exact, rtol=1e-6, atol=0)
    scores = fastscore.score(model, [TOKENS], progress=False)
    only = [each for each in scores if each != name]
    with_, without = (fastscore.prune(model, scores, TOKENS, channels=0.5, ignore=only, compensate=compensate).model
                      for compensate in (True, False))
    for one, other in zip(with_.parameters(), without.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_repair_leaves_experts_and_mends_the_rest() -> None:
    model = whole_way.noisy(_mixtral)
    scores = fastscore.score(model, [TOKENS], progress=False)
    result = fastscore.prune(model, scores, TOKENS, channels=0.5, scope="layer")
    batches = [{"input_ids": torch.randint(1, 50, (4, 8), generator=torch.Generator().manual_seed(n))}
               for n in range(4)]
    repaired = fastscore.reconstruct(model, result, batches, method="linear", ridges=(1e-3,), forward=_logits).model
    found = dict(repaired.named_parameters())
    equal = {name: torch.equal(parameter, found[name]) for name, parameter in result.model.named_parameters()}
    assert all(same for name, same in equal.items() if ".mlp." in name)
    assert not equal["model.layers.0.self_attn.o_proj.weight"]


@pytest.mark.parametrize("build", [_mixtral, _qwen])
def test_the_stream_of_a_mixture_goes_through_its_experts(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = whole_way.noisy(build)
    stream = "model.embed_tokens"
    scores = fastscore.score(model, [TOKENS], progress=False)
    options = {"scope": "layer", "compensate": False}
    with untouched(model):
        small = fastscore.prune(model, scores, TOKENS, channels=0.6, **options).model
        with torch.no_grad(), fastscore.mask(model, scores, 0.4, TOKENS, **options) as removed:
            masked = _logits(model, TOKENS)
    kept = 16 - len(removed[stream])
    assert kept < 16
    with torch.no_grad():
        torch.testing.assert_close(_logits(small, TOKENS), masked, rtol=1e-4, atol=1e-5 * float(masked.abs().max()))
    gate, experts = small.model.layers[0].mlp.gate, small.model.layers[0].mlp.experts
    assert (gate.weight.shape[1], gate.hidden_dim, experts.hidden_dim) == (kept,) * 3
    fastscore.save_pruned(small, tmp_path / "small.safetensors")
    loaded = fastscore.load_pruned(whole_way.noisy(build, seed=1), tmp_path / "small.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(_logits(loaded, TOKENS), _logits(small, TOKENS))


class _Recurrent(nn.Module):
    """An LSTM between layers that projects its state; in float64 its steps are operations that the tracer sees."""

    def __init__(self, layers: int, both: bool) -> None:
        super().__init__()
        self.embed, self.hidden, self.last = nn.Linear(6, 8), nn.Linear(20 if both else 10, 9), nn.Linear(9, 3)
        self.rnn = nn.LSTM(8, 12, layers, batch_first=True, bidirectional=both, proj_size=10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(self.rnn(self.embed(x).tanh())[0][:, -1]).relu())


@pytest.mark.parametrize(("layers", "both"), [(1, False), (2, True)])
def test_the_steps_of_a_recurrence_come_to_an_end(layers: int, both: bool) -> None:
    """Channels that are followed round and round, wider each time, once ran for ever."""
    model = whole_way.noisy(lambda: _Recurrent(layers, both))
    x = torch.randn(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with untouched(model):
        scores = fastscore.score(model, [x], progress=False)
        small = fastscore.prune(model, scores, x, channels=0.7, compensate=False).model
        with torch.no_grad(), fastscore.mask(model, scores, 0.3, x, compensate=False):
            expected = model(x)
    assert set(scores) == {"embed", "rnn.weight_ih_l0", "rnn.weight_hr_l0", "hidden"}
    torch.testing.assert_close(small(x), expected)


class _Routes(nn.Linear):
    """As the routers of PhiMoE: a Linear that returns several things."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(x)
        return logits, logits.softmax(-1)


class _Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router = nn.Linear(5, 6), _Routes(6, 3)
        self.inner, self.head = nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        return self.head(self.inner(y).tanh() * self.router(y)[1][:, :1])


def test_a_linear_that_returns_several_things_reads_what_goes() -> None:
    torch.manual_seed(0)
    model, x = _Routed().double().eval(), torch.randn(8, 5, dtype=torch.float64)
    scores = fastscore.score(model, [x], progress=False)
    assert set(scores) == {"embed", "inner"}
    assert {"router.weight", "head"} <= set(scores.skipped)
    result = fastscore.prune(model, scores, x, channels=0.5, progress=False, calibration=list(x.split(2)))
    assert result.report.channels[1] <= 0.5 * result.report.channels[0]
    assert torch.isfinite(result.model(x)).all()
