"""Models that people use, end to end, and the page that says so.

Small members of several families; FASTSCORE_NIGHTLY=1 checks every line of docs/models.md.
"""

import os

import architectures
import pytest
import reach
import torch
from architectures import in_short, row, trained
from model_case import Case
from models_page import PAGE, on_page
from oracles import untouched
from real_models import CASES
from torch import Tensor, nn

import fastscore
from fastscore.batches.calls import call_model
from fastscore.cli import models

ON_PAGE = on_page()


@pytest.mark.parametrize("case", [case for case in CASES if case.small
                                  or (case.name in ON_PAGE and os.environ.get("FASTSCORE_NIGHTLY"))],
                         ids=lambda case: case.name)
def test_the_page_is_true(case: Case) -> None:
    found = row(case)
    if case.small:
        groups, *_, exact = found.scores.split()
        assert (found.scores, exact) == (f"{groups} of {groups} exact", "exact")
        assert (found.masked, found.exported, found.trained) == ("yes", "yes", "yes")
    assert ON_PAGE.get(case.name, str(found)) == str(found)


def test_the_page_has_a_line_for_a_member_of_each_family() -> None:
    assert {case.name for case in CASES if case.small} <= ON_PAGE.keys() <= {case.name for case in CASES}


def test_a_long_reason_ends_with_a_word() -> None:
    said = "blocks.0.fc works along another dimension than that of its channels: its input has them last, others first"
    assert in_short(said) == "… works along another dimension than that of its channels: its input has them …"
    assert in_short("fc is frozen for now") == "fc is frozen for now"


class Faint(nn.Module):
    """A network whose output moves by `share` of what its last layer says."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.layers, self.share = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), share

    def forward(self, x: Tensor) -> Tensor:
        return self.share * self.layers(x)


def test_a_step_of_training_is_not_rounded_away() -> None:
    """However small gradients are, they arrived; of zeros, and of what is not finite, the row says so."""
    assert trained(Faint(1e-12), torch.randn(2, 4), call_model) == "yes"
    with pytest.raises(AssertionError, match="0 of 4 weights moved"):
        trained(Faint(0.0), torch.randn(2, 4), call_model)
    with pytest.raises(AssertionError):
        trained(Faint(float("inf")), torch.randn(2, 4), call_model)


@pytest.mark.parametrize("family", reach.FAMILIES, ids=lambda family: family.name)
def test_each_family_can_shrink_by_what_was_asked_for(family: reach.Family) -> None:
    """By the rows of the page, each of which is checked above."""
    assert {row: share for row in family.rows if not (share := reach.shares(ON_PAGE, row)[1]) >= family.wanted} == {}
    assert set(reach.table(ON_PAGE)) <= set(PAGE.read_text().splitlines())


@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_fpn",
                                  *(["retinanet_resnet50_fpn"] if "FASTSCORE_NIGHTLY" in os.environ else [])])
def test_pruned_detectors_detect_and_train(name: str) -> None:
    """As torchvision calls them: with lists of images, and targets in training."""
    (case,) = (case for case in CASES if case.name == name)
    model, x = architectures.prepared(case)
    with untouched(model):
        scores = fastscore.score(model, [x], forward=case.forward, progress=False)
        pruned = fastscore.prune(model, scores, x[:1], macs=0.7, forward=case.forward).model
    images = [torch.rand(3, 48, 64), torch.rand(3, 64, 48)]
    for detector in (model, pruned):
        detector.transform.min_size, detector.transform.max_size = (64,), 64
    with torch.no_grad():
        assert [set(found) for found in pruned(images)] == [{"boxes", "labels", "scores"}] * 2
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0]]), "labels": torch.tensor([1])} for _ in images]
    sum(pruned.train()(images, targets).values()).backward()
    assert sum(parameter.grad is not None for parameter in pruned.parameters()) > 50


def test_timm_by_name() -> None:
    assert models.load("timm:resnet18", classes=7).fc.out_features == 7
    with pytest.raises(ValueError, match=r"^model: timm has no 'resnet18q'; near it: resnet18"):
        models.load("timm:resnet18q")
    with pytest.raises(ValueError, match=r"^weights: timm has no 'my_own' for resnet18; it has DEFAULT, "):
        models.load("timm:resnet18", weights="my_own")
