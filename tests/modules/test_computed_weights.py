"""Layers that compute their weight from their parameters lose channels as those do that hold it."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from oracles import untouched
from torch import Tensor, nn
from whole_way import check, noisy

import fastscore
from fastscore.graph.tracing import trace
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.weights import computed_weights
from fastscore.modules.weights.computed_weights import computed_weight


class Standardised(nn.Conv2d):
    """Weight standardisation, with a gain for each filter, as in NFNets."""

    def __init__(self, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W']."""
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = self.gain * weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-6).sqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Normalised(nn.Linear):
    """Rows of length one."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C] -> [N, C']."""
        return F.linear(x, weight=F.normalize(self.weight), bias=self.bias)


class Along(nn.Conv1d):
    """Through the method that PyTorch's own forward calls."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, T] -> [N, C', T']."""
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2), keepdim=True), self.bias)


class Images(nn.Module):
    """A residual block, with a grouped convolution, of layers that compute their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = Standardised(3, 8, 3, padding=1), Standardised(8, 6, 3, stride=2, padding=1)
        self.grouped, self.last = Standardised(6, 8, 3, padding=1, groups=2), Normalised(8, 4)
        self.shortcut = nn.Conv2d(8, 8, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        return self.last(F.silu(self.shortcut(x) + self.grouped(F.silu(self.inner(x)))).mean((2, 3)))


def _x(*shape: int) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).double()


def test_images(tmp_path: Path) -> None:
    """By brute force, from data to a file. A layer that loses something holds its weight, and no gain."""
    result = check(Images, _x(3, 8, 8), ["stem", "inner", "grouped"], tmp_path, only=False)
    layers = {name: type(layer) for name, layer in result.model.named_children()}
    assert layers == dict.fromkeys(("stem", "inner", "grouped", "shortcut"), nn.Conv2d) | {"last": nn.Linear}
    assert not any(name.endswith("gain") for name in result.model.state_dict())
    assert result.report.notes["weights"].startswith("stem and 3 like it computed its weight")
    assert result.report.params[0] == sum(parameter.numel() for parameter in Images().parameters())


def test_sequences(tmp_path: Path) -> None:
    """Of one dimension, and of none."""
    def build() -> nn.Module:
        return nn.Sequential(Along(3, 6, 3), nn.Tanh(), nn.Flatten(), Normalised(24, 8), nn.Tanh(), nn.Linear(8, 2))

    check(build, _x(3, 6), ["0", "3"], tmp_path)


class Counting(nn.Linear):
    """Keeps how often it ran, and what it read last."""

    calls, read = 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.read = self.calls + 1, x.shape
        return F.linear(x, self.weight.tanh(), self.bias)


def test_the_users_layers_are_not_run() -> None:
    model = noisy(lambda: nn.Sequential(Counting(5, 8), nn.ReLU(), Counting(8, 6), nn.ReLU(), nn.Linear(6, 3)))
    scores = fastscore.score(model, [_x(5)], progress=False)
    fastscore.prune(model, scores, _x(5), channels=0.6)
    with fastscore.mask(model, scores, 0.4, _x(5)):
        pass
    assert [(layer.calls, layer.read) for layer in model if isinstance(layer, Counting)] == [(0, None)] * 2


def test_a_layer_that_loses_nothing_stays_what_it_is() -> None:
    """And so does the model that was given."""
    model, x = noisy(Images), _x(3, 8, 8)
    scores = fastscore.score(model, [x], progress=False)
    small = fastscore.prune(model, scores, x, channels=0.5, scope="layer", ignore=["shortcut", "stem"]).model
    assert {type(small.stem), type(small.inner), type(model.inner)} == {Standardised, nn.Conv2d}
    assert torch.equal(small.stem.gain, model.stem.gain)


@pytest.mark.parametrize("repair", ["linear", "asymmetric"])
def test_repairs_are_of_the_weight_that_is_held(repair: str) -> None:
    """Halves of channels that stay go: what is fitted gives the dense model back. Layers behind, whole, compute on."""
    model = noisy(lambda: nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), Standardised(8, 6, 3), nn.Tanh(),
                                        Standardised(6, 5, 1), nn.Flatten(), Normalised(80, 3)))
    with torch.no_grad():
        model[0].weight[4:], model[0].bias[4:] = model[0].weight[:4], model[0].bias[:4] / 2
        model[0].gain[4:] = model[0].gain[:4] / 2
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    scores = fastscore.score(model, [x], importance="magnitude-l2", progress=False)
    options = {"channels": 0.5, "scope": "layer", "ignore": ["4"]}
    cut = fastscore.prune(model, scores, x, **options, compensate=False)
    repaired = fastscore.prune(model, scores, x, **options, calibration=x.split(16), repair=repair).model
    assert cut.removed["0"].tolist() == [4, 5, 6, 7]
    with torch.no_grad():
        lost, error = ((small(x) - model(x)).square().mean() for small in (cut.model, repaired))
    assert error < 1e-4 * lost
    assert [type(repaired[i]) for i in (0, 2, 4, 6)] == [nn.Conv2d, nn.Conv2d, Standardised, Normalised]


def test_an_optimizer_goes_on() -> None:
    """With what it knows of parameters that stay, and nothing of a weight that is a new one."""
    model, x = noisy(Images).train(), _x(3, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(x).square().mean().backward()
    optimizer.step()
    result = fastscore.prune(model, fastscore.score(model, [x], progress=False), x, channels=0.5, scope="layer",
                             ignore=["stem", "shortcut"])
    rebuilt = fastscore.rebuild_optimizer(optimizer, model, result)
    small = result.model
    assert {id(p) for group in rebuilt.param_groups for p in group["params"]} == set(map(id, small.parameters()))
    assert small.inner.weight not in rebuilt.state
    stays = torch.ones(6, dtype=torch.bool).index_fill(0, result.removed["inner"], False)
    for new, old in ((small.inner.bias, optimizer.state[model.inner.bias]["momentum_buffer"][stays]),
                     (small.stem.gain, optimizer.state[model.stem.gain]["momentum_buffer"])):
        assert torch.equal(rebuilt.state[new]["momentum_buffer"], old)


def _legacy(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


class Causal(nn.Conv1d):
    """Pads what it reads itself, as convolutions of sound do."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, T] -> [N, C', T]."""
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))


class Codec(nn.Module):
    """An autoencoder of sound, whose layers are all normalised by `norm`."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.stem, self.inner = norm(Causal(2, 8, 3)), norm(nn.Conv1d(8, 6, 3, padding=1, bias=False))
        self.up, self.last = norm(nn.ConvTranspose1d(6, 8, 4, 2, 1)), norm(nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.stem(x))
        return self.last(F.elu(self.up(F.elu(self.inner(x)))).mean(2))


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, _legacy])
def test_weight_norm(norm: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    """Either form of it, by brute force, from data to a file: what loses channels holds its weight, and is of the class
    that it had; the model that was given is what it was."""
    model, x = noisy(lambda: Codec(norm)), _x(2, 6)
    before = {name: type(layer) for name, layer in model.named_children()}
    with untouched(model):
        scores = fastscore.score(model, [x], progress=False)
        result = fastscore.prune(model, scores, x, channels=0.5, scope="layer", compensate=False)
    assert {name: type(layer) for name, layer in model.named_children()} == before
    assert list(scores) == ["stem", "inner", "up"]
    assert {name: type(layer) for name, layer in result.model.named_children()} == {
        "stem": Causal, "inner": nn.Conv1d, "up": nn.ConvTranspose1d, "last": nn.Linear}
    assert result.report.params == tuple(sum(parameter.numel() for parameter in each.parameters())
                                         for each in (model, result.model))
    check(lambda: Codec(norm), x, ["stem", "inner", "up"], tmp_path, only=False)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, _legacy])
def test_a_layer_with_weight_norm_is_ignored(norm: Callable[[nn.Module], nn.Module]) -> None:
    """However it is called, in all that takes ignore=, and in every step down; it stays what it is."""
    model, x = noisy(lambda: Codec(norm)), _x(2, 6)
    scores = fastscore.score(model, [x], progress=False)
    for entry in ("inner", "inner*", model.inner, type(model.inner)):
        ignore = [entry]
        with untouched(model):
            for importance in ("taylor-sq", "magnitude-l2"):
                assert list(fastscore.score(model, [x], importance=importance, ignore=ignore,
                                            progress=False)) == ["up"]
            with fastscore.Scorer(model, x, gradient="random", ignore=ignore) as scorer:
                scorer.probe(model(x))
            assert list(scorer.scores()) == ["up"]
            small = fastscore.prune(model, scores, x, channels=0.8, ignore=ignore).model
            steps = fastscore.prune_iteratively(model, [x], steps=2, channels=0.8, ignore=ignore, progress=False).model
        for each in (small, steps):
            assert type(each.inner) is type(model.inner)
            assert {name: tensor.shape for name, tensor in each.inner.named_parameters()} == \
                {name: tensor.shape for name, tensor in model.inner.named_parameters()}
    with pytest.raises(ValueError, match="no channel that can be scored"):
        fastscore.score(model, [x], ignore="*", progress=False)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, _legacy])
def test_an_optimizer_of_weight_norm_goes_on(norm: Callable[[nn.Module], nn.Module]) -> None:
    """Its groups hold what there is now."""
    model, x = noisy(lambda: Codec(norm)), _x(2, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    result = fastscore.prune(model, fastscore.score(model, [x], progress=False), x, channels=0.5, ignore=["stem"])
    rebuilt = fastscore.rebuild_optimizer(optimizer, model, result)
    assert {id(p) for group in rebuilt.param_groups for p in group["params"]} == set(map(id, result.model.parameters()))


class Padded(Standardised):
    """Pads what it reads itself: no plain convolution does that."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W']."""
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Dynamic(Standardised):
    """The weight depends on what is read."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W']."""
        return self._conv_forward(x, self.weight * x.mean().sigmoid(), self.bias)


class Noisy(Standardised):
    """And here on chance."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W']."""
        return self._conv_forward(x, self.weight * torch.rand(()), self.bias)


class Scaled(Standardised):
    """Does more than the product."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W']."""
        return 2 * super().forward(x)


class Masked(nn.Conv2d):
    """A part of the weight is zero for good, which a plain one would learn away."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.register_buffer("mask", torch.ones_like(self.weight).tril())

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W']."""
        return self._conv_forward(x, self.weight * self.mask, self.bias)


@pytest.mark.parametrize("kind", [nn.Conv2d, Padded, Dynamic, Noisy, Scaled, Masked])
def test_other_layers_are_none(kind: Callable[..., nn.Module]) -> None:
    """What a plain layer would not compute, or not learn, is not made one."""
    assert computed_weight(kind(3, 4, 3)) is None


def swin() -> nn.Module:
    kinds = torchvision.models.swin_transformer
    return kinds.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4], block=kinds.SwinTransformerBlockV2,
                                 downsample_layer=kinds.PatchMergingV2)


@pytest.mark.parametrize("build", [lambda: nn.TransformerEncoderLayer(8, 2, 12), swin, lambda: nn.LSTM(4, 6)])
def test_layers_of_fastscores_own_multiply_by_what_they_hold(build: Callable[[], nn.Module],
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """So that none need be run to see it."""
    layers: list[Any] = [module for module in evaluation_copy(build()).modules()
                         if isinstance(module, nn.Linear) and type(module).__module__.startswith("fastscore.")]
    assert layers
    assert all(weight is None or weight is layer.weight for layer in layers
               for weight in [computed_weights._probed(layer)])
    monkeypatch.setattr(computed_weights, "_product", None)
    assert not any(computed_weight(layer) is not None for layer in layers)


def test_a_weight_of_which_nothing_plain_can_be_made_keeps_what_it_reads() -> None:
    """With the reason."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), Padded(6, 5, 3), nn.Conv2d(5, 2, 1))
    graph = trace(model, torch.randn(2, 3, 4, 4))
    assert [group.name for group in graph.groups] == ["2"]
    assert graph.skipped["0"].endswith("its weight, or what else its code does, is computed from all")
