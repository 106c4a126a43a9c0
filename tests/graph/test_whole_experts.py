"""Whole experts of mixtures: scored by one gate each, never chosen where they are masked, removed with their rows."""

from collections.abc import Callable
from dataclasses import replace
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
from fastscore.integrations.transformers import forward, save_pretrained

SIZES = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "vocab_size": 50, "use_cache": False, "max_position_embeddings": 16,
         "num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
TOKENS = {"input_ids": torch.randint(1, 50, (3, 5), generator=torch.Generator().manual_seed(1))}
MIXTURES = [f"model.layers.{i}.mlp.experts" for i in range(2)]


def _mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=6))


def _qwen() -> nn.Module:
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=6, moe_intermediate_size=6, norm_topk_prob=False))


class _Chooser:
    """The forward of a router by its definition, that never chooses `gone`."""

    def __init__(self, router: Any, gone: Tensor) -> None:
        self.router, self.gone = router, gone

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = x.flatten(0, -2) @ self.router.weight.t()
        logits[:, self.gone] = -torch.inf
        chosen, index = logits.softmax(-1).topk(2)
        shares = getattr(self.router, "norm_topk_prob", True)
        return logits, chosen / chosen.sum(-1, keepdim=True) if shares else chosen, index


@pytest.mark.parametrize("build", [_mixtral, _qwen])
def test_an_expert_is_a_unit(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = whole_way.noisy(build)
    with torch.no_grad():
        z = forward(model, TOKENS)
    v = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(units: str) -> fastscore.Scores:
        return fastscore.score(model, [TOKENS], units=units, gradient="loss", normalize=False, forward=forward,
                               loss=lambda output, batch: (output * v).sum(), progress=False)

    with untouched(model):
        graph, scores = trace(model, TOKENS, forward, units="experts"), score("experts")
        assert [group.name for group in graph.experts] == MIXTURES
        assert {name: scores[name] for name in scores if name not in MIXTURES}.keys() == score("groups").keys()
        for group in graph.experts:  # PyTorch's own forward, with a gate on each expert's second matrix
            rows, name = [], f"{group.name}.down_proj"
            for n in range(3):
                gate = torch.ones(6, dtype=torch.float64, requires_grad=True)
                weight = model.get_parameter(name).detach() * gate[:, None, None]
                one = torch.func.functional_call(model, {name: weight}, (TOKENS["input_ids"][n:n + 1],)).logits
                rows.append(torch.autograd.grad((one[0] * v[n]).sum(), gate)[0])
            torch.testing.assert_close(scores[group.name].double(), torch.stack(rows).square().mean(0), rtol=1e-5,
                                       atol=1e-12)
        alone = replace(scores, totals={name: scores.totals[name] for name in MIXTURES})
        options: dict[str, Any] = {"forward": forward, "compensate": False}
        result = fastscore.prune(model, alone, TOKENS, channels=0.5, **options)
        with torch.no_grad(), fastscore.mask(model, alone, 0.5, TOKENS, **options) as removed:
            masked = forward(model, TOKENS)
        assert {name: index.tolist() for name, index in removed.items()} == {
            name: index.tolist() for name, index in result.removed.items()}
    small = result.model
    for name, gone in removed.items():
        router = model.get_submodule(name.replace("experts", "gate"))
        router.forward = _Chooser(router, gone)
    with torch.no_grad():
        want = forward(model, TOKENS)
        torch.testing.assert_close(forward(small, TOKENS), want)
        torch.testing.assert_close(masked, want)
        assert not torch.allclose(want, z, rtol=1e-3)
    for name, gone in removed.items():
        experts, router = small.get_submodule(name), small.get_submodule(name.replace("experts", "gate"))
        assert len(experts.gate_up_proj) == len(experts.down_proj) == experts.num_experts == 6 - len(gone)
        assert len(router.weight) == router.num_experts == 6 - len(gone)
    fastscore.save_pruned(small, tmp_path / "small.safetensors")
    loaded = fastscore.load_pruned(whole_way.noisy(build, seed=1), tmp_path / "small.safetensors")
    assert torch.equal(forward(loaded, TOKENS), forward(small, TOKENS))
    forward(small, TOKENS).square().sum().backward()


def test_as_many_stay_as_are_chosen_and_parameters_are_counted(tmp_path: Path) -> None:
    """With the width between the matrices, which all experts have, under one budget; by a Scorer too."""
    model = whole_way.noisy(_mixtral)
    scores = fastscore.score(model, [TOKENS], units="experts", forward=forward, progress=False)
    assert not any("gate" in name for name in scores.skipped)  # the rows of routers go with experts
    scorer = fastscore.Scorer(model, TOKENS, units="experts", gradient="random", output=lambda output: output.logits)
    with scorer:
        scorer.probe(model(**TOKENS).logits)
    for name in scores:
        torch.testing.assert_close(scorer.scores()[name], scores[name])
    result = fastscore.prune(model, scores, TOKENS, params=0.4, forward=forward)
    assert set(result.removed) > set(MIXTURES)
    assert result.report.params[1] == sum(parameter.numel() for parameter in result.model.parameters())
    alone = replace(scores, totals={name: scores.totals[name] for name in MIXTURES})
    least = fastscore.prune(model, alone, TOKENS, channels=1 / 3, forward=forward)
    assert {len(index) for index in least.removed.values()} == {4}
    with pytest.raises(ValueError, match="cannot be reached"):
        fastscore.prune(model, alone, TOKENS, channels=0.3, forward=forward)
    plain = save_pretrained(least.model.float(), tmp_path)
    assert plain.config.num_local_experts == 2
    with pytest.raises(ValueError, match='units: "experts" are gated whole'):
        fastscore.score(model, [TOKENS], units="experts", reduction="element", forward=forward)


def _deepseek() -> nn.Module:
    """A router that casts its weight, and keeps a buffer that its choice depends on."""
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(
        **SIZES | {"num_hidden_layers": 1}, n_routed_experts=4, moe_intermediate_size=6, n_group=2, topk_group=1,
        first_k_dense_replace=0, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
        n_shared_experts=1))


def test_a_router_that_casts_its_weight_stays_as_it_is() -> None:
    """What runs as a layer is asked for a cast as a parameter would be, and must not change for good."""
    model = _deepseek().bfloat16().eval()
    with untouched(model):
        scores = fastscore.score(model, [TOKENS], units="experts", forward=forward, progress=False)
        with fastscore.mask(model, scores, 0.3, TOKENS, forward=forward), torch.no_grad():
            masked = forward(model, TOKENS)
        small = fastscore.prune(model, scores, TOKENS, channels=0.7, forward=forward, progress=False).model
    gate = "model.layers.0.mlp.gate.weight"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert dict(small.named_parameters())[gate].dtype == torch.bfloat16
    torch.testing.assert_close(forward(small, TOKENS), masked, rtol=0.1, atol=0.1)
    assert "no router beside it takes the most probable" in scores.skipped["model.layers.0.mlp.experts (whole experts)"]


def test_a_loss_that_balances_experts_goes_on() -> None:
    """It counts those of all layers together, by a number that the model keeps."""
    model = whole_way.noisy(_mixtral)
    model.config.output_router_logits = True
    scores = fastscore.score(model, [TOKENS], units="experts", forward=forward, progress=False)
    assert set(MIXTURES) <= set(scores)
    small = fastscore.prune(model, scores, TOKENS, channels=0.7, scope="layer", forward=forward, progress=False).model
    counts = [len(layer.mlp.gate.weight) for layer in small.model.layers]
    assert counts == [small.num_experts] * 2
    assert counts[0] < 6
    output = small(**TOKENS, labels=TOKENS["input_ids"])
    chosen = [logits.softmax(-1) for logits in output.router_logits]
    taken = torch.cat([nn.functional.one_hot(each.topk(2).indices, counts[0]).sum(1) for each in chosen]).double()
    want = counts[0] * (taken.mean(0) * torch.cat(chosen).mean(0)).sum()
    torch.testing.assert_close(output.aux_loss.double(), want.double(), rtol=1e-5, atol=0)
    few = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        **SIZES | {"num_hidden_layers": 1}, num_local_experts=2)).eval()
    kept = fastscore.score(few, [TOKENS], units="experts", forward=forward, progress=False).skipped
    assert kept[f"{MIXTURES[0]} (whole experts)"] == "all are chosen for every token"


def test_a_reason_blames_the_code_of_the_user_not_what_stands_in() -> None:
    """What experts make is given the shape of what they read, which is another width once channels are gone."""
    class Reshaping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block, self.head = nn.Linear(6, 16), _mixtral().model.layers[0].mlp, nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            read: Any = self.first(x)
            return self.head(self.block(read.relu()).sin().view(read.shape))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Reshaping().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        reasons = trace(model, torch.randn(2, 5, 6)).skipped
    assert not any("ExpertLinear" in reason for reason in reasons.values())
