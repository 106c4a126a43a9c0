"""Layers whose weight PyTorch's utilities compute lose channels as those do that hold it."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from computed_elsewhere import computed_elsewhere
from oracles import untouched
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from whole_way import check, noisy

import fastscore
from fastscore.graph.tracing import trace

Norm = Callable[[nn.Module], object]


class Adapter(nn.Module):
    """A user's own parametrization: a product of low rank beside a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(len(weight), 2)), nn.Parameter(torch.randn(2, weight[0].numel()))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that is read."""
        return weight + (self.up @ self.down).view_as(weight)


class Chance(nn.Module):
    """One that is never the same."""

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that is read."""
        return weight * torch.rand(())


def _mask(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight", 0.3)


def _masks(layer: nn.Module) -> None:
    """One upon the other, and of the bias."""
    prune.l1_unstructured(layer, "weight", 0.2)
    prune.ln_structured(layer, "weight", 0.2, 2, 0)
    if layer.bias is not None:
        prune.random_unstructured(layer, "bias", 0.3)


def _bias(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "bias", 0.5)


def _adapter(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Adapter(layer.weight))


KINDS: dict[str, Norm] = {
    "a mask": _mask, "masks": _masks, "spectral_norm": nn.utils.spectral_norm,
    "parametrizations.spectral_norm": parametrizations.spectral_norm, "a user's": _adapter,
    "orthogonal": partial(parametrizations.orthogonal, orthogonal_map="cayley")}


class Codec(nn.Module):
    """An autoencoder of sound, all of whose layers have it."""

    def __init__(self, norm: Norm, up: Norm) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv1d(2, 8, 3, padding=1), nn.Conv1d(8, 6, 3, padding=1, bias=False)
        self.up, self.last = nn.ConvTranspose1d(6, 8, 4, 2, 1), nn.Linear(8, 3)
        for layer in (self.stem, self.inner, self.last):
            norm(layer)
        up(self.up)

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.stem(x))
        return self.last(F.elu(self.up(F.elu(self.inner(x)))).mean(2))


def _x(*shape: int) -> Tensor:
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)).double()


def _codec(kind: str) -> Codec:
    norm = KINDS[kind]
    return Codec(norm, norm)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str, tmp_path: Path) -> None:
    """By brute force, from data to a file: what loses channels holds its weight; all others are what they were."""
    model, x = noisy(lambda: _codec(kind)), _x(2, 6)
    before = {name: type(layer) for name, layer in model.named_children()}
    scores = fastscore.score(model, [x], progress=False)
    with untouched(model):
        part = fastscore.prune(model, scores, x, channels=0.8, ignore=["inner"]).model
    assert {name: type(layer) for name, layer in model.named_children()} == before
    assert {name: tensor.shape for name, tensor in part.inner.state_dict().items()} == \
        {name: tensor.shape for name, tensor in model.inner.state_dict().items()}
    assert set(part.up.state_dict()) == {"weight", "bias"}
    result = check(lambda: _codec(kind), x, ["stem", "inner", "up"], tmp_path, only=False)
    assert {type(layer) for layer in result.model.children()} == {nn.Conv1d, nn.ConvTranspose1d, nn.Linear}
    assert set(result.model.state_dict()) == set(Codec(lambda _: None, lambda _: None).state_dict())
    assert "a mask" in result.report.notes["weights"]
    assert result.report.params[0] == sum(parameter.numel() for parameter in model.parameters())


def test_a_mask_of_a_bias_alone(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
        for layer in model[::2]:
            _bias(layer)
        return model

    check(build, _x(5), ["0", "2"], tmp_path)


class Attention(nn.Module):
    """Of two heads, with masks, as global pruning leaves one."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(8, 8) for _ in range(4))
        self.num_heads, self.head_dim, self.last = 2, 4, nn.Linear(8, 3)
        prune.global_unstructured([(layer, "weight") for layer in self.children()], prune.L1Unstructured, amount=0.3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.last(self.out_proj(x).relu().mean(1))


@pytest.mark.parametrize("units", ["groups", "heads_and_dims"])
def test_heads(units: str) -> None:
    """Go as they would of the model that holds the weights."""
    (model, plain), x = (noisy(lambda: nn.Sequential(nn.Linear(5, 8), Attention())) for _ in range(2)), _x(4, 5)
    for layer in list(plain[1].children()):
        prune.remove(layer, "weight")
    options = {"scope": "layer", "compensate": False}
    with untouched(model), torch.no_grad():
        scores, expected = (fastscore.score(each, [x], units=units, progress=False) for each in (model, plain))
        assert list(scores) == list(expected)
        assert any("1" in name for name in scores)
        for name in scores:
            torch.testing.assert_close(scores[name], expected[name])
        small, other = (fastscore.prune(each, expected, x, channels=0.5, **options).model for each in (model, plain))
        torch.testing.assert_close(small(x), other(x))
        with fastscore.mask(model, scores, 0.5, x, **options):
            torch.testing.assert_close(model(x), small(x))
    assert small[1].out_proj.in_features < 8


def test_magnitudes_are_those_of_the_weight_that_is_read() -> None:
    """A row whose mask is zero counts nothing, however large its parameter."""
    model, x = noisy(lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))), _x(5)
    mask = torch.ones(8, 5).index_fill(0, torch.tensor([2, 5]), 0)
    prune.custom_from_mask(model[0], "weight", mask)
    with torch.no_grad():
        model[0].weight_orig[2] = 1e3
    scores = fastscore.score(model, [x], importance="magnitude-l1", progress=False)
    plain = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    with torch.no_grad():
        plain[0].weight.copy_(mask * model[0].weight_orig)
        plain[0].bias.copy_(model[0].bias)
        plain[2].load_state_dict(model[2].state_dict())
    expected = fastscore.score(plain, [x], importance="magnitude-l1", progress=False)
    assert torch.equal(scores["0"], expected["0"])


@pytest.mark.parametrize("kind", ["masks", "spectral_norm"])
@pytest.mark.parametrize("repair", ["linear", "asymmetric"])
def test_repairs_are_of_the_weight_that_is_held(kind: str, repair: str) -> None:
    """As of a model that never had anything else."""
    x = torch.randn(64, 2, 6, generator=torch.Generator().manual_seed(2)).double()
    model = noisy(lambda: _codec(kind))
    plain = Codec(lambda _: None, lambda _: None).double().eval()
    with torch.no_grad():
        model(x)
        for name, layer in plain.named_children():
            for key in ("weight", "bias"):
                if layer._parameters[key] is not None:
                    layer._parameters[key].copy_(getattr(model.get_submodule(name), key))
    options = {"channels": 0.5, "calibration": x.split(16), "repair": repair, "scope": "layer"}
    scores = fastscore.score(plain, [x], importance="magnitude-l2", progress=False)
    expected, small = (fastscore.prune(each, scores, x, **options).model for each in (plain, model))
    with torch.no_grad():
        torch.testing.assert_close(small(x), expected(x), rtol=1e-6, atol=1e-8)


def test_an_optimizer_and_steps_go_on() -> None:
    """In training mode too, where spectral_norm goes on with its estimate: not of a run that is ours."""
    for kind in ("masks", "spectral_norm", "parametrizations.spectral_norm", "a user's"):
        model, x = noisy(lambda kind=kind: _codec(kind)).train(), _x(2, 6)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        model(x).square().mean().backward()
        optimizer.step()
        with untouched(model):
            scores = fastscore.score(model, [x], progress=False)
            result = fastscore.prune(model, scores, x, channels=0.5, ignore=["stem"])
            steps = fastscore.prune_iteratively(model, [x], steps=2, channels=0.6, progress=False)
        rebuilt = fastscore.rebuild_optimizer(optimizer, model, result)
        assert {id(p) for group in rebuilt.param_groups for p in group["params"]} == \
            set(map(id, result.model.parameters()))
        assert steps.model.training


@pytest.mark.parametrize(("norm", "reason"), [
    (lambda model: parametrize.register_parametrization(model[2], "weight", Chance(), unsafe=True),
     r"the weight of 2 is computed \(a parametrization\): remove it first, by torch\.nn\.utils\.parametrize\..*"),
    (lambda model: computed_elsewhere(model[2], model[4]),
     r"2 computes its weight from more than its own parameters \(.*4\.weight\)"),
    (lambda model: (nn.utils.weight_norm(model[2]), prune.random_unstructured(model[2], "weight_v", 0.3)),
     r"the weight of 2 is computed \(a parametrization\): remove it first, by torch\.nn\.utils\.prune\.remove.*")])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_is_more_than_that_is_kept(norm: Callable[[nn.Sequential], object], reason: str) -> None:
    """With the reason."""
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4)
    norm(model)
    graph = trace(model, x)
    assert (graph.groups, set(graph.skipped) >= {"0", "2", "4"}) == ((), True)
    assert re.fullmatch(reason, graph.skipped["0"]), graph.skipped["0"]


def test_what_shares_its_parameter_is_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(),
                          nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    model[4].weight = model[2].weight
    _mask(model[2])
    graph = trace(model, torch.randn(3, 4))
    assert [group.name for group in graph.groups] == ["6"]
    assert graph.skipped["0"] == "2 computes its weight from a weight_orig that it shares with another layer"
