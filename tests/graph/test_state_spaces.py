"""The inner width of Mamba's mixers: scored by brute force, masked, cut, and saved; generated from with and without its
cache."""

import copy
import os
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
import transformers
import whole_way
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace
from fastscore.integrations.transformers import forward
from fastscore.pruning.budgets.costs import total_macs

SIZES: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 20, "state_size": 3, "expand": 2}
BATCH = {"input_ids": torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(0))}


def _model(name: str = "Mamba", **more: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**{**SIZES, **more})
        model = getattr(transformers, f"{name}ForCausalLM")(config).double().eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.generation_config.pad_token_id = 0
    return model


def _importances(model: nn.Module, mixer: str, v: Tensor) -> Tensor:
    """Mean of (v·dz/dgate)² over samples, of a gate on what x_proj and out_proj read, one sample after another."""
    rows = []
    for tokens, direction in zip(BATCH["input_ids"].split(1), v.split(1), strict=True):
        gate = torch.ones(16, dtype=torch.float64, requires_grad=True)
        weights = {name: dict(model.named_parameters())[name] * gate
                   for name in (f"{mixer}.x_proj.weight", f"{mixer}.out_proj.weight")}
        z = torch.func.functional_call(model, weights, (), {"input_ids": tokens}).logits
        rows.append(torch.autograd.grad((z * direction).sum(), gate)[0])
    return torch.stack(rows).square().mean(0)


@pytest.mark.parametrize("name", ["Mamba", *(["FalconMamba"] if "FASTSCORE_NIGHTLY" in os.environ else [])])
def test_inner_channels_go(name: str, tmp_path: Path) -> None:
    model = _model(name)
    groups = ["backbone.layers.0.mixer.in_proj"]
    with oracles.untouched(model), torch.no_grad():
        graph = trace(model, BATCH, forward)
        z = model(**BATCH).logits
    assert set(groups) <= {group.name for group in graph.groups}
    assert not [name for name in graph.skipped if name.endswith(("conv1d", "dt_proj", "in_proj", "out_proj"))]
    assert "sums over its channels" in graph.skipped["backbone.layers.0.mixer.x_proj"]  # its states stay
    v = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores = fastscore.score(model, [BATCH], gradient="loss", normalize=False, forward=forward, progress=False,
                             loss=lambda output, batch: (output * v).sum())
    for group in groups:
        want = _importances(model, group.removesuffix(".in_proj"), v)
        torch.testing.assert_close(scores[group].double(), want, rtol=1e-4, atol=1e-5 * float(want.max()))
    options: dict[str, Any] = {"scope": "layer", "forward": forward}
    result = fastscore.prune(model, scores, BATCH, channels=0.6, progress=False, compensate=False, **options)
    small: Any = result.model
    with torch.no_grad():
        with oracles.untouched(model), fastscore.mask(model, scores, 0.4, BATCH, compensate=False, **options):
            want = model(**BATCH).logits
        torch.testing.assert_close(small(**BATCH).logits, want, rtol=1e-4, atol=1e-5)  # the scan is in float32
        assert not torch.allclose(want, z, rtol=1e-2, atol=1e-3)
    mixer = small.backbone.layers[0].mixer
    left = 16 - len(result.removed[groups[0]])
    assert left < 16
    assert (mixer.in_proj.out_features, mixer.intermediate_size, mixer.conv1d.groups, mixer.x_proj.in_features,
            tuple(mixer.A_log.shape), len(mixer.D), mixer.dt_proj.out_features, mixer.out_proj.in_features) == (
        2 * left, left, left, left, (left, 3), left, left, left)
    assert result.report.macs == tuple(total_macs(each, BATCH, forward) for each in (model, small))
    made = [small.generate(BATCH["input_ids"], max_new_tokens=4, do_sample=False, use_cache=cached)
            for cached in (True, False)]
    assert torch.equal(*made)
    fastscore.save_pruned(result, tmp_path / "small.safetensors")
    with torch.no_grad():
        again = fastscore.load_pruned(_model(name), tmp_path / "small.safetensors")
        assert torch.equal(again(**BATCH).logits, small(**BATCH).logits)
    trained = copy.deepcopy(small).train()
    trained(**BATCH).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in trained.parameters())


def test_what_takes_no_mean_is_said() -> None:
    """Kernels read the weights of what follows alone: its bias would be lost in training."""
    model = _model()
    scores = fastscore.score(model, [BATCH], forward=forward, progress=False)
    result = fastscore.prune(model, scores, BATCH, channels=0.7, scope="layer", forward=forward, progress=False)
    assert result.model.backbone.layers[0].mixer.x_proj.bias is None
    assert result.model.backbone.layers[0].mixer.out_proj.bias is None
    assert result.model.backbone.layers[0].mixer.in_proj.bias is not None  # which is called
    assert "is read by its weight alone in the kernels" in result.report.notes["biases"]


class Tied(nn.Module):
    """Two mixers, one of which shares a layer with the other."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.MambaConfig(**{**SIZES, "num_hidden_layers": 2})
        self.mixers = nn.ModuleList(transformers.models.mamba.modeling_mamba.MambaMixer(config, layer)
                                    for layer in range(2))
        self.mixers[1].dt_proj.weight = self.mixers[0].dt_proj.weight
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for mixer in self.mixers:
            x = x + mixer(x)
        return self.head(x.mean(1))


def test_what_others_hold_is_kept() -> None:
    graph = trace(whole_way.noisy(Tied), torch.randn(2, 5, 4).double())
    assert not [group.name for group in graph.groups if group.name.endswith("in_proj")]
    for layer in ("in_proj", "conv1d", "dt_proj"):
        assert {f"mixers.{number}.{layer}" for number in range(2)} <= set(graph.skipped)
