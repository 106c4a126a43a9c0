"""What is wrong is named, before anything changes, and the way out that is named leads there."""

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from networks import NETWORKS
from oracles import untouched
from refusals import RESIDUAL, X, refused, score, trained
from torch import Tensor, nn

import fastscore
from fastscore import Scorer

# Models

class NoTensor(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.wrap = RESIDUAL.model(), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.net(x))


@pytest.mark.parametrize(("wrap", "shown"), [
    (lambda z: {"main": z, "aux": z}, "dict with .*main.*aux"), (lambda z: (z, z), "tuple"),
    (lambda z: None, "NoneType"), (lambda z: 3.0, "float"),
    (lambda z: z.argmax(1), r"torch\.int64 tensor of shape \(\d,\)"), (lambda z: z.sum(), r"shape \(\)")])
def test_a_model_that_returns_no_tensor(wrap: Callable[[Tensor], Any], shown: str) -> None:
    model = NoTensor(wrap)
    scores = score(RESIDUAL.model())
    for act in (lambda: score(model), lambda: score(model, importance="magnitude-l2"), lambda: Scorer(model, X),
                lambda: fastscore.prune(model, scores, X, macs=0.5),
                lambda: fastscore.mask(model, scores, 0.3, X).__enter__()):
        refused(TypeError, f"^NoTensor returns .*{shown}.*forward=", model, act)


@pytest.mark.parametrize("other", ["resnet18", nn.Conv2d, None])
def test_what_is_no_model(other: Any) -> None:
    scores = score(RESIDUAL.model())
    for act in (lambda: score(other), lambda: Scorer(other, X), lambda: fastscore.prune(other, scores, X, macs=0.5),
                lambda: fastscore.mask(other, scores, 0.3, X).__enter__()):
        with pytest.raises(TypeError, match=r"^model: .*where a torch\.nn\.Module is meant"):
            act()


def test_a_model_without_values_or_gradients() -> None:
    meta = RESIDUAL.model().to("meta")
    with torch.inference_mode():
        inference = RESIDUAL.model()
    for model, reason in ((meta, "meta device"), (inference, "inference_mode")):
        for act in (lambda model=model: score(model), lambda model=model: Scorer(model, X)):
            state = torch.get_rng_state()
            with pytest.raises(ValueError, match=rf"^model: .*{reason}"):
                act()
            assert torch.equal(state, torch.get_rng_state())


def test_scores_that_are_none_and_a_folder_for_a_file(tmp_path: Path) -> None:
    model = RESIDUAL.model()
    with pytest.raises(TypeError, match=r"^scores: dict; give what fastscore.score returned"):
        fastscore.prune(model, dict(score(model)), X, macs=0.5)  # type: ignore[arg-type]
    for act in (lambda: score(model, resume=tmp_path), lambda: fastscore.Scores.load(tmp_path)):
        with pytest.raises(IsADirectoryError, match="it is a folder"):
            act()


@pytest.mark.parametrize(("call", "argument"), [
    *((lambda m, s, name=name, value=value: fastscore.prune(m, s, X, **{name: value}), name)
      for name in ("macs", "params", "channels", "latency", "agreement", "kl") for value in ("half", [0.5], True, {})),
    (lambda m, s: fastscore.prune(m, s, X, macs=0.5, round_to=[8]), "round_to"),
    (lambda m, s: fastscore.prune(m, s, X, macs=0.5, floor="low"), "floor"),
    (lambda m, s: fastscore.prune(m, s, X, macs=0.5, ignore=3), "ignore"),
    (lambda m, s: fastscore.prune(m, s, X, macs=0.5, forward="forward"), "forward"),
    (lambda m, s: fastscore.prune(m, s, X, macs=0.5, calibration="x"), "calibration"),
    (lambda m, s: fastscore.prune(m, s, X, macs=0.5, measured="yes"), "measured"),
    *((lambda m, s, x=x: fastscore.prune(m, s, x, macs=0.5), "example_inputs")
      for x in ("x", None, 3, (2, 3, 8, 8), X.numpy())),
    (lambda m, s: fastscore.mask(m, s, 0.3, "x").__enter__(), "example_inputs"),
    (lambda m, s: fastscore.mask(m, s, "x", X).__enter__(), "fraction"),
    (lambda m, s: fastscore.prune_iteratively(m, [X], macs="half", steps=2, progress=False), "macs"),
    (lambda m, s: fastscore.prune_iteratively(m, [X], macs=0.5, steps="two", progress=False), "steps"),
    (lambda m, s: score(m, seed="x"), "seed"),
    (lambda m, s: score(m, "x"), "batches"),
])
def test_another_type_than_is_meant(call: Callable[..., Any], argument: str) -> None:
    model = trained()
    scores = score(model)
    with untouched(model), pytest.raises(TypeError, match=f"^{argument}: .* meant"):
        call(model, scores)


def test_a_model_that_is_called_with_too_little() -> None:
    """A TypeError of the model's own."""
    with pytest.raises(ValueError, match=r"^Bilinear: it cannot run on example_inputs: TypeError: .*input2"):
        Scorer(nn.Bilinear(3, 3, 2).double(), X)


class Images(NamedTuple):
    images: Tensor
    labels: Tensor


@dataclass
class Scene:
    images: Tensor
    labels: Tensor


class Takes(nn.Module):
    """A model, called on what `part` finds in its input."""

    def __init__(self, part: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.net, self.part = RESIDUAL.model(), part

    def forward(self, batch: Any) -> Tensor:
        return self.net(self.part(batch))


@pytest.mark.parametrize(("part", "batch", "forward"), [
    (lambda batch: batch.images, Images(X, torch.arange(4)), "model(batch)"),
    (lambda batch: batch, Scene(X, torch.arange(4)), "model(batch.images)"),
    (lambda batch: batch["images"], {"images": X}, "model(batch)")])
def test_a_batch_that_the_model_takes_otherwise_has_a_way_out(part: Callable[[Any], Tensor], batch: Any,
                                                              forward: str) -> None:
    model, want = Takes(part), score(RESIDUAL.model())
    for act in (lambda: score(model, [batch]), lambda: Scorer(model, batch)):
        refused(ValueError, re.escape(f"forward=lambda model, batch: {forward}"), model, act)
    found = score(model, [batch], forward=eval(f"lambda model, batch: {forward}"))
    assert all(torch.equal(found[f"net.{layer}"], values) for layer, values in want.items())


@pytest.mark.parametrize(("model", "x", "reason"), [
    (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), X, "1: its channels are the model's output"),
    (nn.Sequential(nn.ReLU()), X, "it has no Conv or Linear"),
    (nn.Sequential(nn.BatchNorm2d(3)), X, "it has no Conv or Linear"),
    (nn.Sequential(nn.Conv2d(3, 1, 3), nn.Conv2d(1, 4, 3)), X, "0: all its channels can only be removed together"),
    (nn.Sequential(nn.Conv2d(3, 6, 3), nn.LayerNorm([6, 6, 6]), nn.Conv2d(6, 4, 3)), X, "0: its channels pass .*Norm"),
])
def test_no_channel_that_can_be_scored(model: nn.Module, x: Tensor, reason: str) -> None:
    model = model.double()
    for act in (lambda: score(model, [x]), lambda: score(model, [x], importance="magnitude-l2"),
                lambda: Scorer(model, x)):
        with untouched(model), pytest.raises(ValueError, match=r"^Sequential has no channel that can") as caught:
            act()
        assert re.search(reason, str(caught.value))


def test_everything_ignored() -> None:
    model = trained()
    refused(ValueError, r"no channel that can be scored\n(.|\n)*stem\.0: ignored", model,
            lambda: score(model, ignore=[nn.Conv2d]))
    refused(ValueError, r"^ignore: 'stem\.1x' matches no layer.*did you mean stem\.1", model,
            lambda: score(model, ignore="stem.1x"))
    scores = score(model)
    refused(ValueError, "^ignore: it leaves no channel that can go", model,
            lambda: fastscore.prune(model, scores, X, channels=0.5, ignore="*"))


# Numbers

def test_nan_and_infinity_name_the_layer() -> None:
    for value in (math.nan, math.inf, -math.inf):
        for layer in ("stem.0", "block1.conv2", "block2.shortcut.0", "head.fc"):
            model = trained()
            model.get_submodule(layer).weight.data.view(-1)[3] = value
            refused(FloatingPointError, f"^{layer}: NaN or infinity in its weights", model, lambda: score(model))  # noqa: B023
    for norm, buffer in (("block1.bn1", "running_mean"), ("stem.1", "running_var")):
        model = trained()
        getattr(model.get_submodule(norm), buffer)[1] = math.nan
        refused(FloatingPointError, rf"^{norm}: NaN or infinity in its output", model, lambda: score(model))  # noqa: B023


def test_nan_in_the_last_bias_or_in_an_operation() -> None:
    model = trained()
    model.head.fc.bias.data[0] = math.nan
    refused(FloatingPointError, r"^head\.fc: NaN or infinity in its weights", model, lambda: score(model))
    model = trained()
    model.block1.register_forward_hook(lambda module, args, output: output / 0)
    refused(FloatingPointError, r"NaN or infinity", model, lambda: score(model))


def test_nan_in_the_input() -> None:
    model, x = trained(), X.clone()
    x[2, 1] = math.nan
    refused(FloatingPointError, "^batches: NaN or infinity in the input", model, lambda: score(model, [X, x]))


def test_nan_in_weights_that_are_ranked() -> None:
    model = trained()
    model.block1.conv2.weight.data[0, 0] = math.nan
    refused(FloatingPointError, r"^stem\.0: NaN or infinity in the weights", model,
            lambda: score(model, importance="magnitude-l1"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(value: float) -> None:
    model = trained()
    refused(ValueError, f"^loss: it is -?{value}", model,
            lambda: score(model, gradient="loss", loss=lambda output, batch: output.sum() * value))


@pytest.mark.parametrize("loss", [lambda output, batch: 3.0, lambda output, batch: output, lambda output, batch: None,
                                  lambda output, batch: torch.tensor(1.0), lambda output, batch: output.detach().sum()])
def test_a_loss_that_is_no_scalar_of_the_output(loss: Callable[..., Any]) -> None:
    model = trained()
    refused(ValueError, "^loss: it must return a scalar tensor computed from the output", model,
            lambda: score(model, gradient="loss", loss=loss))


# Batches

def test_labels_missing() -> None:
    model = trained()
    for batches in ([X], [(X,)], [{"x": X}], [(X, None)], [(X, [0, 1, 2, 3])]):
        refused(ValueError, r"^batches: .*needs labels.*loss=.*gradient=\"random\"", model,
                lambda batches=batches: score(model, batches, gradient="loss"))


def test_batches_that_are_none() -> None:
    model = trained()
    refused(ValueError, "^batches: there is none", model, lambda: score(model, []))
    refused(TypeError, r"^batches: .*one tensor.*\[batch\]", model, lambda: score(model, X))
    refused(TypeError, r"^batches: .*\[batch\]", model, lambda: score(model, {"x": X}))
    refused(TypeError, "^batches: .*int", model, lambda: score(model, 3))
    refused(TypeError, "^batches: .*without a tensor", model, lambda: score(model, ["a", "b"]))


@pytest.mark.parametrize("x", [torch.randn(2, 5, 8, 8).double(), torch.randn(2, 3).double(),
                               torch.randn(2, 3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.int64)])
def test_a_batch_the_model_cannot_take(x: Tensor) -> None:
    model = trained()
    scores = score(RESIDUAL.model())
    for act in (lambda: score(model, [x]), lambda: Scorer(model, x),
                lambda: fastscore.prune(model, scores, x, macs=0.5)):
        refused(ValueError, "example_inputs", model, act)


def test_a_later_batch_of_another_shape() -> None:
    """Flattened, the positions of another image size do not fit; the loop ends with PyTorch's own error."""
    network = NETWORKS["flattening"]
    model, x = network.model(), torch.randn(2, 3, 10, 10).double()
    refused(RuntimeError, "shapes cannot be multiplied", model, lambda: score(model, [network.inputs(2), x]))


def test_scores_of_image_sizes_that_the_graph_takes() -> None:
    """A fully convolutional network takes any size."""
    small = score(RESIDUAL.model(), [X])
    both = score(RESIDUAL.model(), [X, torch.randn(2, 3, 12, 10).double()])
    assert small.samples + 2 == both.samples
    assert small.origin == both.origin


# Arguments

@pytest.mark.parametrize(("options", "message"), [
    ({"importance": "taylr"}, "^importance: 'taylr' is none of"), ({"gradient": "none"}, "^gradient: 'none'"),
    ({"reduction": "max"}, "^reduction: 'max'"), ({"probes": 0}, "^probes: 0"), ({"samples": 0}, "^samples: 0"),
    ({"gradient": "loss", "probes": 2}, "^probes: 2"), ({"distribution": "cauchy"}, "^distribution: 'cauchy' is none"),
    ({"seed": 2**64}, "seed is")])
def test_arguments_of_score(options: dict[str, Any], message: str) -> None:
    model = trained()
    refused(ValueError, message, model, lambda: score(model, **options))


@pytest.mark.parametrize(("options", "message"), [
    ({}, "^prune: name a budget"), ({"macs": 0.0}, r"^macs: 0.0 is outside \(0, 1\]"), ({"macs": 1.5}, "^macs: 1.5"),
    ({"params": -0.5}, "^params: -0.5"), ({"channels": math.nan}, "^channels: nan"),
    ({"macs": 0.5, "round_to": 0}, "round_to"),
    ({"macs": 0.5, "floor": 1.5}, "floor"), ({"macs": 0.5, "floor": math.nan}, "floor"),
    ({"macs": 0.5, "scope": "local"}, "^scope: 'local'"), ({"macs": 0.001}, "^macs: 0.001 cannot be reached"),
    ({"params": 0.3, "floor": 0.9}, "^params: 0.3 cannot be reached"),
    ({"channels": 0.5, "round_to": 64}, "^channels: 0.5 cannot be reached")])
@pytest.mark.parametrize("inplace", [False, True])
def test_arguments_of_prune(options: dict[str, Any], message: str, inplace: bool) -> None:
    model = trained()
    scores = score(model)
    refused(ValueError, message, model, lambda: fastscore.prune(model, scores, X, inplace=inplace, **options))


def test_scores_of_another_model() -> None:
    model = trained()
    other = {
        "another network": (score(NETWORKS["dense"].model()), "another model, .*conv0"),
        "wider": (score(nn.Sequential(nn.Conv2d(3, 9, 3), nn.Conv2d(9, 4, 3)).double(), [X]), "another model"),
        "before it was pruned": (score(fastscore.prune(RESIDUAL.model(), score(RESIDUAL.model()), X, macs=0.5).model),
                                 r"has \d channels and the scores know \d.*pruned\?"),
        "connected differently": (score(NETWORKS["inplace"].model(), ignore=["block2"]), ""),
    }
    rewired = RESIDUAL.model()
    rewired.block1.shortcut = nn.Conv2d(6, 6, 1).double()
    other["rewired"] = (score(rewired), "another model|connected differently")
    for name, (scores, message) in other.items():
        if name == "connected differently":  # the same channels in the same places, computed in place: the same model
            assert fastscore.prune(model, scores, X, macs=0.9).report.macs[1] > 0
            continue
        for act in (lambda scores=scores: fastscore.prune(model, scores, X, macs=0.5),
                    lambda scores=scores: fastscore.prune(model, scores, X, macs=0.5, inplace=True),
                    lambda scores=scores: fastscore.mask(model, scores, 0.3, X).__enter__()):
            refused(ValueError, f"^scores: .*({message})", model, act)


def test_scores_of_channels_that_are_kept_now() -> None:
    """The same model, called so that a layer's channels cannot go: told so, and no word of another model."""
    model = trained()
    scores = score(model)
    layer = next(iter(scores))

    def all_needed(model: nn.Module, x: Tensor) -> Tensor:
        output = model(x)
        return output + model.get_submodule(layer)(x).mean() if layer in dict(model.named_modules()) else output

    refused(ValueError, rf"^scores: they know channels of {layer}, which cannot go from this model on these", model,
            lambda: fastscore.prune(model, scores, X, macs=0.5, forward=all_needed))


class SequenceFirst(nn.Module):
    """[T, N, 6] -> [N, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two(self.one(x).relu().mean(0)).relu())


class SampleBySample(SequenceFirst):
    """[N, T, 6] -> [N, 2], in a loop."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([super(SampleBySample, self).forward(rows) for rows in x])


@pytest.mark.parametrize("frames", [4, 3])
def test_samples_that_come_second_have_a_way_out(frames: int) -> None:
    """As many frames as samples, or not; and the way leads there."""
    model, x = SequenceFirst().double().eval(), torch.randn(3, frames, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"no channel that can be scored\n(.*\n)*give batches \[N, \.\.\.\], and where "
                                         r"the model takes samples second, forward=lambda model, batch: model\(batch\."
                                         r"transpose\(0, 1\)\)$"):
        fastscore.score(model, [x.transpose(0, 1)], progress=False)
    scores, *alone = (fastscore.score(model, [part], forward=lambda model, batch: model(batch.transpose(0, 1)),
                                      progress=False) for part in (x, *x.split(1)))
    for name in ("one", "two"):
        torch.testing.assert_close(scores[name], torch.stack([each[name] for each in alone]).mean(0))


class OneKey(dict):
    """That no model takes as keywords."""


@dataclass
class Pair:
    """Of sequences."""

    src: Tensor
    tgt: Tensor
    scale: Tensor


class FromTo(SequenceFirst):
    """src [T, N, 6], tgt [S, N, 6] -> [S, N, 2]."""

    def forward(self, src: Any, tgt: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        if tgt is None:
            src, tgt, scale = (src.src, src.tgt, src.scale) if isinstance(src, Pair) else src
        return self.last(self.two((self.one(tgt) + self.one(src * scale).mean(0)).relu()).relu())


@pytest.mark.parametrize("lengths", [(5, 4), (4, 4)])
@pytest.mark.parametrize("wrap", [
    lambda *parts: dict(zip(("src", "tgt", "scale"), parts, strict=True)), Pair, lambda *parts: (parts, torch.zeros(3)),
    lambda *parts: OneKey(all=[*parts])], ids=["dict", "dataclass", "tuple", "forward="])
def test_samples_that_come_second_in_a_container_have_a_way_out(wrap: Callable[..., Any], lengths: tuple[int, int]
                                                                ) -> None:
    """As many steps as each other, or not; and the code that is named leads there."""
    torch.manual_seed(0)
    model, scale = FromTo().double().eval(), torch.rand(2, 6, dtype=torch.float64)[0]
    parts = [torch.randn(3, length, 6, dtype=torch.float64) for length in lengths]
    own = {"forward": lambda model, batch: model(*batch["all"])} if isinstance(wrap(*parts, scale), OneKey) else {}
    with pytest.raises(ValueError, match="counts samples") as raised:
        fastscore.score(model, [wrap(*(part.transpose(0, 1) for part in parts), scale)], progress=False, **own)
    (code,) = re.findall(r"forward=(lambda model, batch: .*?)(?:, own being the one given)?$", str(raised.value))
    assert not re.search(r"no dimension", str(raised.value))
    forward = eval(code, {"dataclasses": dataclasses, "own": own.get("forward")})
    scores, *alone = (fastscore.score(model, [wrap(*each, scale)], forward=forward, progress=False)
                      for each in (parts, *zip(*(part.split(1) for part in parts), strict=True)))
    assert list(scores) == ["one", "two"]
    for name, value in scores.items():
        torch.testing.assert_close(value, torch.stack([each[name] for each in alone]).mean(0))


class FixedLength(SequenceFirst):
    """[4, N, 6] -> [4, N, 2]; a batch of another length does not fit its positions."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(4, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x + self.positions).relu()
        return self.last(self.two(x + x.mean(0)).relu())


def test_samples_that_come_second_in_sequences_of_one_length_have_a_way_out() -> None:
    """Steps are not taken for samples."""
    torch.manual_seed(0)
    model, x = FixedLength().double().eval(), torch.randn(3, 4, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"second dimension counts samples.* and forward=") as raised:
        fastscore.score(model, [x.transpose(0, 1)], progress=False)
    forward = eval(str(raised.value).rpartition("forward=")[2])
    scores, *alone = (fastscore.score(model, [part], forward=forward, progress=False) for part in (x, *x.split(1)))
    for name in ("one", "two"):
        torch.testing.assert_close(scores[name], torch.stack([each[name] for each in alone]).mean(0))


def test_a_loop_over_samples_has_a_way_out() -> None:
    """And the way leads there."""
    model, x = SampleBySample().double().eval(), torch.randn(3, 4, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"no channel that can be scored\n(.*\n)*give batches of one sample each$"):
        fastscore.score(model, [x], progress=False)
    scores = fastscore.score(model, x.split(1), progress=False)
    assert list(scores) == ["one", "two"]
    expected = fastscore.score(model, [x], forward=lambda model, batch: SequenceFirst.forward(
        model, batch.transpose(0, 1)), progress=False)
    for name in scores:
        torch.testing.assert_close(scores[name], expected[name])
    fastscore.prune(model, scores, x, channels=0.5)
