"""A model, or scores, that cannot be taken: named, before anything changes."""

import copy
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import untouched
from refusals import RESIDUAL, X, refused, score, trained
from torch import Tensor, nn

import fastscore
from fastscore import Scorer


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
    scores = score(RESIDUAL.traced())
    for act in (lambda: score(model), lambda: score(model, importance="magnitude-l2"), lambda: Scorer(model, X),
                lambda: fastscore.prune(model, scores, X, macs=0.5),
                lambda: fastscore.mask(model, scores, 0.3, X).__enter__()):
        refused(TypeError, f"^NoTensor returns .*{shown}.*forward=", model, act)


@pytest.mark.parametrize("other", ["resnet18", nn.Conv2d, None])
def test_what_is_no_model(other: Any) -> None:
    scores = score(RESIDUAL.traced())
    for act in (lambda: score(other), lambda: Scorer(other, X), lambda: fastscore.prune(other, scores, X, macs=0.5),
                lambda: fastscore.mask(other, scores, 0.3, X).__enter__()):
        with pytest.raises(TypeError, match=r"^model: .*where a torch\.nn\.Module is meant"):
            act()


@pytest.mark.parametrize(("other", "way_out"), [
    (lambda model: {"model": model, "epoch": 3}, r"; its \['model'\] is one$"),
    (lambda model: model.state_dict(), r"^model: OrderedDict, where .*; build it, and load_state_dict\("),
    (lambda model: "checkpoint.pth", r"^model: 'checkpoint.pth', where .*; build it, and load_state_dict\(")])
def test_a_checkpoint_for_its_model(other: Callable[[nn.Module], Any], way_out: str) -> None:
    model = RESIDUAL.model()
    with pytest.raises(TypeError, match=way_out):
        score(other(model))


def test_what_torch_export_wrote_out() -> None:
    """A program, in which no layers are: those that keep them, as torch.fx traces them, are scored."""
    model = RESIDUAL.model()
    exported = torch.export.export(model, (X,)).module()
    for act in (lambda: score(exported), lambda: Scorer(exported, X)):
        with pytest.raises(TypeError, match=r"^model: GraphModule, which torch\.export made, has no layers .*: pass "
                                            r"the nn\.Module that it was made from, and export the smaller one"):
            act()
    assert list(score(torch.fx.symbolic_trace(model))) == list(score(model))


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
    smaller = fastscore.prune(model, score(model), X, macs=0.5)
    for act in (lambda: score(model, resume=tmp_path), lambda: fastscore.Scores.load(tmp_path),
                lambda: score(model).save(tmp_path), lambda: fastscore.save_pruned(smaller, tmp_path)):
        with pytest.raises(IsADirectoryError, match="it is a folder"):
            act()


def test_a_model_that_is_called_with_too_little() -> None:
    """A TypeError of the model's own."""
    with pytest.raises(ValueError, match=r"^Bilinear: it cannot run on example_inputs \(of score: batches\): "
                       "TypeError: .*input2"):
        Scorer(nn.Bilinear(3, 3, 2).double(), X)


@pytest.mark.parametrize(("model", "x", "reason"), [
    (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), X, "1: its channels are the model's output"),
    (nn.Sequential(nn.ReLU()), X, "it has no Conv or Linear"),
    (nn.Sequential(nn.BatchNorm2d(3)), X, "it has no Conv or Linear"),
    (nn.Sequential(nn.Conv2d(3, 1, 3), nn.Conv2d(1, 4, 3)), X, "0: it is one channel, which has to stay"),
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
    refused(ValueError, r"^ignore: 'stem\.1x' matches no layer.*did you mean 'stem\.1'", model,
            lambda: score(model, ignore="stem.1x"))
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).double()
    refused(ValueError, r"^ignore: 0 matches no layer of Sequential; did you mean '0'", plain,
            lambda: score(plain, ignore=[0]))  # names are texts
    scores = score(model)
    refused(ValueError, "^ignore: it leaves no channel that can go", model,
            lambda: fastscore.prune(model, scores, X, channels=0.5, ignore="*"))


def test_networks_that_nothing_can_be_written_to_or_copied() -> None:
    model = trained()
    result = fastscore.prune(model, score(model), X, macs=0.5)
    with torch.inference_mode():
        frozen = copy.deepcopy(result.model)
    refused(ValueError, "^smaller: .* was made under torch.inference_mode, and cannot learn", model,
            lambda: fastscore.distill(model, frozen, [X]))
    compiled = copy.deepcopy(model)
    compiled.block1.conv1 = torch.compile(compiled.block1.conv1, backend="eager")
    with pytest.raises(ValueError, match=r"^model: block1\.conv1 is what torch.compile made of a part"):
        fastscore.reconstruct(compiled, result, [X])


def test_what_cannot_be_copied_is_named() -> None:
    model = trained()
    scores = score(model)
    other = trained()
    other.block1.lock = threading.Lock()
    for act in (lambda: score(other), lambda: Scorer(other, X), lambda: fastscore.prune(other, scores, X, macs=0.5)):
        with pytest.raises(ValueError, match=r"block1\.lock \(lock\) cannot be copied \(.*take it out of the model"):
            act()
