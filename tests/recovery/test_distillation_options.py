"""distill(): learning rates, gradients cut short, mixed precision, feature maps, padding."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decisive import IMAGES, QUIET, network, pruned, same, seeded, state
from torch import Tensor, nn

import fastscore
from fastscore.recovery.distillation import distill
from fastscore.recovery.features import FeatureMaps
from fastscore.recovery.optimizers import schedule


def test_the_learning_rate_rises_and_falls_along_a_cosine() -> None:
    rates: list[float] = []

    class Recording(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            rates.append(self.param_groups[0]["lr"])

    distill(network(), network(1), IMAGES.split(32), steps=20, warmup=0.2, patience=None,
            optimizer=lambda parameters: Recording(parameters, 0.4), **QUIET)
    assert rates[:4] == pytest.approx([0.08, 0.16, 0.24, 0.32])
    assert rates[4:] == pytest.approx([0.2 * (1 + math.cos(math.pi * step / 16)) for step in range(16)])
    assert schedule(0, 1, 0.0) == 1.0


@pytest.mark.parametrize(("clip", "precision"), [(1.0, None), (0.01, None), (1.0, "float16"), (None, None)])
def test_no_gradient_is_longer_than_clip(clip: float | None, precision: Any) -> None:
    norms: list[float] = []

    class Recording(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
            norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))

    distill(network(), network(1), IMAGES.split(32), steps=4, clip=clip, precision=precision, patience=None,
            optimizer=lambda parameters: Recording(parameters, 0.01), **QUIET)
    assert norms
    if clip is None:
        assert max(norms) > 1.0
    else:
        assert max(norms) == pytest.approx(clip, rel=1e-4)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision(precision: Any) -> None:
    model, result = pruned()
    dtypes = set()
    result.model[0].register_forward_hook(lambda module, args, output: dtypes.add((module.training, output.dtype)))
    report = distill(model, result, IMAGES.split(16), steps=60, lr=0.003, precision=precision, **QUIET)
    assert report.best.kl < 0.6 * report.looks[0].kl
    assert dtypes == {(True, getattr(torch, precision)), (False, torch.float32)}  # judged in full
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}


def test_feature_maps_of_the_channels_that_are_left() -> None:
    model, result = pruned()
    model.eval()
    result.model.eval()
    gone = result.removed_indices["3", "outputs"]
    assert len(gone)
    for dense, layer, removed, said in (
            (model, "7", {}, r"7 returns \[96, 16\] .*: pass the PruneResult in place of its model, and name a"),
            (model, "7", result.removed_indices, r"7 returns \[96, 16\] .*: name a convolution"),
            (result.model, "3", result.removed_indices, r"3 makes \d+ channels .*the network that went into prune")):
        with FeatureMaps(dense, result.model, [layer], removed) as maps:
            dense(IMAGES)
            result.model(IMAGES)
            with pytest.raises(ValueError, match=f"^features: {said}"):
                maps.distance()
    with FeatureMaps(model, result.model, ["3", "9"], result.removed_indices) as maps:
        model(IMAGES)
        result.model(IMAGES)
        found = maps.distance()
    stays = [channel for channel in range(16) if channel not in gone.tolist()]
    expected = []
    for layer, channels in ((3, stays), (9, list(range(5)))):
        dense, small = model[:layer + 1](IMAGES)[:, channels], result.model[:layer + 1](IMAGES)
        expected.append(float(((small - dense) ** 2).mean() / dense.var(unbiased=False)))
    assert float(found) == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_feature_maps_of_a_module_around_layers_are_refused_with_one_that_works() -> None:
    model, result = pruned()
    dense, smaller = (nn.Sequential(network[:8], network[8:]).eval() for network in (model, result.model))
    removed = {(f"0.{layer}", side): index for (layer, side), index in result.removed_indices.items()}
    with FeatureMaps(dense, smaller, ["0"], removed) as maps:
        dense(IMAGES)
        smaller(IMAGES)
        with pytest.raises(ValueError, match=r"^features: 0 returns .*: name one of them, such as 0\.\d$") as caught:
            maps.distance()
    with FeatureMaps(dense, smaller, [str(caught.value).rsplit(" ", 1)[1]], removed) as maps:
        dense(IMAGES)
        smaller(IMAGES)
        assert 0 < maps.distance() < 10


def test_feature_maps_are_learnt_too() -> None:
    distances = []
    for weight in (0.0, 10.0):
        model, result = pruned()
        distill(model, result, IMAGES.split(32), steps=60, features=["3"], feature_weight=weight, lr=0.003,
                patience=None, **QUIET)
        model.eval()
        result.model.eval()
        with FeatureMaps(model, result.model, ["3"], result.removed_indices) as maps:
            model(IMAGES)
            result.model(IMAGES)
            distances.append(float(maps.distance()))
    assert distances[1] < 0.8 * distances[0]


class Tokens(nn.Module):
    """[N, T] and its mask -> [N, T, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(11, 8), nn.Linear(8, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.linear(self.embedding(input_ids))


def test_padding_is_no_decision() -> None:
    ids = seeded(lambda: torch.randint(1, 10, (40, 6)))
    mask = (torch.arange(6) < seeded(lambda: torch.randint(2, 6, (40, 1)))).long()
    ends = []
    for padding in (0, 10):
        dense, smaller = seeded(Tokens), seeded(Tokens, 1)
        batch = {"input_ids": torch.where(mask == 1, ids, padding), "attention_mask": mask}
        report = distill(dense, smaller, [batch], held_out=[batch], steps=5, **QUIET)
        ends.append((report, state(smaller.linear)))
    assert ends[0][0] == ends[1][0]
    assert same(ends[0][1], ends[1][1])


def test_networks_that_change_places_are_told() -> None:
    """By a warning: a network may be meant to learn from one that it is an extension of."""
    dense, result = pruned()
    quiet = {"steps": 1, "held_out": [IMAGES], **QUIET}
    with pytest.warns(UserWarning, match=r"^smaller: it has .* what is left of it once channels are gone") as told:
        distill(result.model, copy.deepcopy(dense), [IMAGES], **quiet)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for one, other in ((dense, result), (dense, result.model), (network(), network(1)), (network(), network(1, 4)),
                           (network(), nn.Sequential(network(), nn.Linear(5, 5)))):
            distill(one, copy.deepcopy(other), [IMAGES], **quiet)
    with pytest.raises(TypeError, match=r"^model: PruneResult, which comes second.*distill\(dense, result, batches\)"):
        distill(result, dense, [IMAGES], **quiet)
    for what, argument, act in ((result, "model", lambda: fastscore.recalibrate(result, [IMAGES])),
                                (result, "model", lambda: fastscore.curve(result, None, [IMAGES])),
                                (None, "smaller", lambda: distill(dense, None, [IMAGES], **quiet))):
        within = "; its .model is one" if what is result else ""
        with pytest.raises(TypeError, match=f"^{argument}: .*, where a torch.nn.Module is meant{within}$"):
            act()


LOSSES: dict[str, tuple[Any, str]] = {
    "cross entropy": (F.cross_entropy, r"cross_entropy takes probabilities.*\.softmax\(1\)"),
    "its module": (nn.CrossEntropyLoss(), r"cross_entropy takes probabilities"),
    "within": (lambda got, dense: F.cross_entropy(got / 2, target=dense / 2), "cross_entropy takes probabilities"),
    "sigmoid": (F.binary_cross_entropy_with_logits, r"binary_cross_entropy_with_logits takes .*\.sigmoid\(\)"),
    "KL": (F.kl_div, r"kl_div takes logarithms.*\.log_softmax\(1\)"),
    "KL of a target": (lambda got, dense: F.kl_div(got.log_softmax(1), dense, reduction="batchmean"),
                       r"kl_div takes probabilities"),
    "detached": (lambda got, dense: (got - dense).detach().square().mean(), "no gradient goes from what it returned"),
    "of the other": (lambda got, dense: dense.square().mean(), "no gradient goes from what it returned")}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_means_nothing_of_logits(name: str) -> None:
    """It would be below any bound, or train nothing."""
    loss, said = LOSSES[name]
    model, smaller = network(), network(1)
    before = state(smaller)
    with pytest.raises(ValueError, match=f"^loss: {said}"):
        distill(model, smaller, IMAGES.split(32), steps=2, loss=loss, **QUIET)
    assert same(state(smaller), before)


@pytest.mark.parametrize("loss", [
    lambda got, dense: F.cross_entropy(got, dense.softmax(1)), lambda got, dense: F.cross_entropy(got, dense.argmax(1)),
    lambda got, dense: F.kl_div(got.log_softmax(1), dense.log_softmax(1), log_target=True, reduction="batchmean"),
    lambda got, dense: F.binary_cross_entropy_with_logits(got, dense.sigmoid())])
def test_losses_that_take_probabilities(loss: Any) -> None:
    report = distill(network(), network(1), IMAGES.split(32), steps=20, lr=0.01, patience=None, loss=loss, **QUIET)
    assert report.best.judged < report.looks[0].judged
