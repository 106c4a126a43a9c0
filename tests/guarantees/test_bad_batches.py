"""Batches that cannot be taken are named, before anything changes, and the way out that is named leads there."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from networks import NETWORKS
from oracles import untouched
from refusals import RESIDUAL, X, refused, score, scored, trained
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import fastscore
from fastscore import Scorer


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
    model, want = Takes(part), score(RESIDUAL.traced())
    for act in (lambda: score(model, [batch]), lambda: Scorer(model, batch)):
        refused(ValueError, re.escape(f"forward=lambda model, batch: {forward}"), model, act)
    found = score(model, [batch], forward=eval(f"lambda model, batch: {forward}"))
    assert all(torch.equal(found[f"net.{layer}"], values) for layer, values in want.items())


def test_a_forward_that_takes_the_batch_alone() -> None:
    model = trained()
    refused(ValueError, re.escape("forward= is given both: forward=lambda model, batch: model(batch)"), model,
            lambda: score(model, forward=lambda batch: model(batch)))
    with pytest.raises(ValueError, match=r"subscriptable$"):  # an error of its own
        score(model, forward=lambda model, batch: len[model, batch])


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
    refused(TypeError, "^batches: 'a', where a batch is meant", model, lambda: score(model, ["a", "b"]))


@pytest.mark.parametrize("x", [torch.randn(2, 5, 8, 8).double(), torch.randn(2, 3).double(),
                               torch.randn(2, 3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.int64)])
def test_a_batch_the_model_cannot_take(x: Tensor) -> None:
    model = trained()
    scores = score(RESIDUAL.traced())
    for act in (lambda: score(model, [x]), lambda: Scorer(model, x),
                lambda: fastscore.prune(model, scores, x, macs=0.5)):
        refused(ValueError, "example_inputs", model, act)


def test_a_later_batch_of_another_shape() -> None:
    """Flattened, the positions of another image size do not fit; the user's layer is named, and not what stands in."""
    network = NETWORKS["flattening"]
    model, x = network.model(), torch.randn(2, 3, 10, 10).double()
    refused(ValueError, r"^batches: .*\[2, 3, 10, 10\]: 4 \(Linear\): .*shapes cannot be multiplied", model,
            lambda: score(model, [network.inputs(2), x]))


def test_scores_of_image_sizes_that_the_graph_takes() -> None:
    """A fully convolutional network takes any size."""
    small = score(RESIDUAL.traced(), [X])
    both = score(RESIDUAL.traced(), [X, torch.randn(2, 3, 12, 10).double()])
    assert small.samples + 2 == both.samples
    assert small.origin == both.origin


class Packed(nn.Module):
    """A recurrent layer that takes a PackedSequence, or padded sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc, self.out = nn.GRU(5, 7, batch_first=True), nn.Linear(7, 8), nn.Linear(8, 3)

    def forward(self, x: Any) -> Tensor:
        last: Tensor = self.rnn(x)[1][0]
        return self.out(self.fc(last).relu())


@pytest.mark.parametrize(("dtype", "said"), [(torch.float64, "torch.float64"), (torch.uint8, "torch.uint8")])
def test_numbers_of_another_type_are_told(dtype: torch.dtype, said: str) -> None:
    model = trained().float()
    refused(ValueError, rf"cannot run on example_inputs \(of score: batches\).*The batch holds {said}, and the weights "
            "are torch.float32$", model, lambda: fastscore.score(model, [X.to(dtype)]))


@pytest.mark.parametrize(("model", "x", "dtype_told"), [
    (nn.Linear(4, 3), torch.zeros(2, 4).double(), True),
    (nn.GRU(4, 3), torch.zeros(2, 3, 4).double(), True),
    (nn.Sequential(nn.Softmax(1), nn.Linear(4, 3)), torch.zeros(2, 4, dtype=torch.uint8), True),
    (nn.BatchNorm2d(4), torch.zeros(2, 4, 3, 3).double(), True),
    (nn.Linear(4, 3), torch.zeros(2, 5), False),
    (nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Linear(2, 3)), torch.zeros(2, 5).double(), False)])
def test_types_are_told_where_they_are_the_cause(model: nn.Module, x: Tensor, dtype_told: bool) -> None:
    with pytest.raises(ValueError, match="cannot run") as caught:
        fastscore.score(model, [x])
    assert ("The batch holds" in str(caught.value)) == dtype_told


def test_a_dict_with_labels_has_a_way_out() -> None:
    model, batch = trained(), {"image": X, "label": torch.arange(len(X))}
    with pytest.raises(ValueError, match=r"with the keywords image, label.* model\(batch\['image'\]\)$") as caught:
        fastscore.score(model, [batch])
    expected = fastscore.score(model, [X])
    found = fastscore.score(model, [batch], forward=eval("lambda model, batch: " + str(caught.value).rsplit(" ", 1)[1]))
    assert all(torch.equal(found[layer], expected[layer]) for layer in expected)


def test_packed_sequences_have_a_way_out() -> None:
    """It leads to what each sequence by itself gives."""
    sequences = [torch.randn(length, 5) for length in (6, 5, 3, 2)]
    model, packed = Packed(), pack_sequence(sequences)
    said = r"PackedSequence has no row for each sample.*pad_packed_sequence\(.*forward=lambda"
    for batch in (packed, (packed, torch.arange(4)), {"x": packed}):
        for act in (lambda batch=batch: fastscore.score(model, [batch], forward=lambda model, batch: model(batch)),
                    lambda batch=batch: Scorer(model, batch)):
            refused(TypeError, said, model, act)
    with pytest.raises(TypeError, match=said) as caught:
        Scorer(model, packed)
    names = {"pack_padded_sequence": pack_padded_sequence}
    forward = eval(str(caught.value).split("forward=")[1], names)
    padded = pad_packed_sequence(packed, batch_first=True)
    assert fastscore.score(model, [padded], forward=forward).samples == 4
    together, alone = Scorer(model, padded, forward=forward), Scorer(model, sequences[0][None])
    with together:
        forward(model, padded).square().sum().backward()
    with alone:
        for sequence in sequences:
            model(sequence[None]).square().sum().backward()
    model.zero_grad()
    expected, found = alone.scores(), together.scores()
    for layer in expected:
        torch.testing.assert_close(found[layer], expected[layer], rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_have_a_way_out(layout: torch.layout) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    nested = torch.nested.nested_tensor([torch.randn(length, 5) for length in (6, 4)], layout=layout)
    for act in (lambda: fastscore.score(model, [nested]), lambda: Scorer(model, nested)):
        refused(TypeError, r"nested tensor has no row for each sample.*to_padded_tensor\(batch, 0\.0\)", model, act)
    padded = torch.nested.to_padded_tensor(nested, 0.0)
    assert fastscore.score(model, [padded]).samples == 2


TAKE_BATCHES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "score": lambda model, batches: score(model, batches),
    "prune_iteratively": lambda model, batches: fastscore.prune_iteratively(model, batches, steps=2, macs=0.6),
    "prune": lambda model, batches: fastscore.prune(model, scored(), X, macs=0.6, calibration=batches),
    "held_out": lambda model, batches: fastscore.prune(model, scored(), X, agreement=0.6, calibration=[X, X + 1],
                                                       held_out=batches),
    "recalibrate": lambda model, batches: fastscore.recalibrate(model, batches),
    "reconstruct": lambda model, batches: fastscore.reconstruct(model, _pruned(), batches),
    "distill": lambda model, batches: fastscore.distill(model, _pruned(), batches, steps=1),
    "distill, held_out": lambda model, batches: fastscore.distill(model, _pruned(), [X], steps=1, held_out=batches),
    "curve": lambda model, batches: fastscore.curve(model, scored(), batches, macs=[0.7]),
    "compare": lambda model, batches: fastscore.compare(model, batches, macs=[0.7])}


@cache
def _pruned() -> Any:
    return fastscore.prune(RESIDUAL.traced(), scored(), X, macs=0.6)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("take", TAKE_BATCHES)
def test_a_batch_without_a_row_for_each_sample(take: str, first: bool) -> None:
    """A tensor without dimensions, numbers, nothing: named wherever it comes, with the argument."""
    name = "held_out" if "held_out" in take else "calibration" if take == "prune" else "batches"
    model = trained()
    for bad, shown, advice in ((torch.tensor(1.0), r"tensor\(1\.\)", r"x\[None\] makes one"), (1.5, "1.5", ""),
                               (None, "None", ""), ([], r"\[\]", ""), ((1, 2), r"\(1, 2\)", ""),
                               (numpy.ones((9, 9)), "ndarray", "torch.from_numpy makes one")):
        refused(TypeError, f"^{name}: {shown}, where a batch is meant.*{advice}", model,
                lambda bad=bad: TAKE_BATCHES[take](model, [bad] if first else [X, bad]))


MANY = RESIDUAL.inputs(24)
MISFITS: dict[str, tuple[Any, str]] = {
    "channels": (MANY[:, :1], r"of torch.float64 \[\d+, 1, .*stem.0 \(Conv2d\): .*to have 3 channels.*; give what"),
    "labels": (torch.arange(24), r"of torch.int64 \[\d+\]: .*stem.0 \(Conv2d\): .*; give what the model takes"),
    "numbers": (MANY.float(), r"The batch holds torch.float32, and the weights are torch.float64$"),
    "keywords": ({"x": MANY, "labels": torch.arange(24)}, r"It was called with the keywords x, labels: where it takes"),
    "sparse": (MANY.to_sparse(), r"layout torch.sparse_coo.*\.to_dense\(\)"),
    "meta": (MANY.to("meta"), r"meta device, which holds no values")}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("take", TAKE_BATCHES)
def test_a_batch_that_the_model_cannot_run_on(take: str, misfit: str, first: bool) -> None:
    """The argument, the layer and the way out are named, whoever runs the model, wherever the batch comes."""
    bad, said = MISFITS[misfit]
    name = "held_out" if "held_out" in take else "calibration" if take == "prune" else "batches"
    if first and take in ("score", "prune_iteratively", "compare"):  # which trace it first
        said = r"stem.0 \(Conv2d\): RuntimeError" if misfit in ("channels", "labels") else said
    model = trained()
    with untouched(model), pytest.raises((ValueError, TypeError), match=rf"{name}\b.*: .*{said}"):
        TAKE_BATCHES[take](model, [bad, bad] if first else [MANY, bad])


@pytest.mark.parametrize("take", [fastscore.recalibrate, lambda model, batches, forward: fastscore.reconstruct(
    model, _pruned(), batches, forward=forward)], ids=["recalibrate", "reconstruct"])
def test_what_cannot_be_called_is_no_matter_of_the_batches(take: Callable[..., Any]) -> None:
    model = trained()
    refused(TypeError, r"^forward: 3, where a function forward\(model, batch\) is meant", model,
            lambda: take(model, [X], forward=3))
