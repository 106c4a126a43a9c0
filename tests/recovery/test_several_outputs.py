"""Networks with several outputs: each is judged by itself, and what was taken for decisions is said."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.batches.calls import call_model
from fastscore.batches.outputs import OutputError
from fastscore.pruning.report import PruneReport
from fastscore.recovery.decisions import Decisions
from fastscore.recovery.divergence import divergence


@dataclass
class Found:
    classes: Tensor
    boxes: Tensor


class Heads(nn.Module):
    """The second head's logits are larger by 30: side by side, the largest of all is always one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 32), nn.Linear(12, 32)
        self.classes, self.boxes = nn.Linear(32, 10), nn.Linear(32, 5)
        with torch.no_grad():
            self.boxes.bias += 30

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (self.classes(self.first(x).relu()), self.boxes(self.second(x).relu()))


def side_by_side(model: nn.Module, batch: Any) -> Tensor:
    return torch.cat(model(batch), 1)


WAYS = {"tuple": lambda model, batch: model(batch), "list": lambda model, batch: [*model(batch)],
        "dict": lambda model, batch: dict(zip(("classes", "boxes"), model(batch), strict=True)),
        "dataclass": lambda model, batch: Found(*model(batch)), "side by side": side_by_side}
NAMES = {"tuple": ("[0]", "[1]"), "list": ("[0]", "[1]"), "dict": ("['classes']", "['boxes']"),
         "dataclass": (".classes", ".boxes"), "side by side": ("[:, 0:10]", "[:, 10:15]")}


@pytest.mark.parametrize("way", WAYS)
def test_each_output_is_judged_by_itself(way: str) -> None:
    torch.manual_seed(0)
    model, other, x = Heads().eval(), Heads().eval(), torch.randn(40, 12)
    run = Decisions(WAYS[way])
    with torch.no_grad():
        found = divergence([run(model, x)], [run(other, x)])
        alone = [divergence([p], [q]) for p, q in zip(model(x), other(x), strict=True)]
        together = divergence([side_by_side(model, x)], [side_by_side(other, x)])
    assert tuple(found.outputs) == NAMES[way]
    assert list(found.outputs.values()) == alone
    assert found.kl == pytest.approx(sum(each.kl for each in alone))
    assert found.agreement == min(each.agreement for each in alone)
    assert together.kl < 0.9 * found.kl
    assert f"{NAMES[way][0]} by the largest of 10 over dimension 1; {NAMES[way][1]} by the largest of 5" in str(run)
    one = WAYS[way]
    if way != "side by side":
        key: Any = {"tuple": 1, "list": 1}.get(way, "boxes")
        chosen = Decisions(one, [key])
        with torch.no_grad():
            assert tuple(chosen(model, x)) == NAMES[way][1:]
        with pytest.raises(ValueError, match=r"outputs: 'masks' is not among what forward= returns: .*boxes|\[1\]"):
            Decisions(one, ["masks"])(model, x)


def test_what_one_tensor_is_taken_for() -> None:
    x = torch.randn(4, 6)

    def said(function: Any) -> str:
        run = Decisions(lambda model, batch: function(batch))
        run(nn.Identity(), x)
        return str(run)

    assert said(lambda x: x).startswith("by the largest of 6 over dimension 1; where that is several outputs side by")
    assert said(lambda x: torch.cat([x[:, :1], -x[:, :1]], 1)).startswith("by the largest of 2")  # of two classes
    assert said(lambda x: torch.cat([x, x])).startswith("by the largest of 6")  # of samples
    assert said(lambda x: x[:, 0]).startswith("by squared error")
    plain = Decisions(call_model)
    plain(nn.Identity(), x)
    assert str(plain) == ('by the largest of 6 over dimension 1; where those are values, say so: outputs={"": "error"} '
                          '(--outputs error)')
    with pytest.raises(OutputError, match="or a tuple of those that count"):
        Decisions(call_model)(Heads().eval(), torch.randn(2, 12))


def case(forward: Any) -> tuple[nn.Module, list[Tensor], fastscore.Scores]:
    torch.manual_seed(0)
    model, batches = Heads().eval(), list(torch.randn(96, 12).split(8))
    return model, batches, fastscore.score(model, batches, ablation="mean", forward=forward, progress=False)


@pytest.mark.parametrize("way", ["side by side", "dict"])
def test_a_group_that_one_output_alone_reads_is_not_cut_to_nothing(way: str) -> None:
    """Side by side, what the classes lose cannot be seen beside the boxes: 65 % agreed, and 82 without measuring."""
    forward: Any = WAYS[way]
    model, batches, scores = case(forward)
    fresh = torch.randn(400, 12)

    def right(network: nn.Module) -> float:
        with torch.no_grad():
            return min(float((one.argmax(1) == other.argmax(1)).float().mean())
                       for one, other in zip(network(fresh), model(fresh), strict=True))

    with untouched(model):
        found = {measured: fastscore.prune(model, scores, batches[0], macs=0.6, forward=forward, calibration=batches,
                                           measured=measured, progress=False) for measured in (None, False)}
    assert right(found[None].model) >= right(found[False].model) - 0.02
    text = str(found[None].report)
    assert "2 outputs, each by itself (agreement: the least, KL: the sum)" in text
    assert "choice: " in text
    chosen = next(row for row in found[None].report.repairs if row.chosen)
    assert tuple(chosen.outputs) == NAMES[way]
    assert chosen.kl == pytest.approx(sum(kl for _, kl in chosen.outputs.values()))
    assert PruneReport.of(_as_json(found[None].report)) == found[None].report


def _as_json(report: PruneReport) -> Any:
    import json
    from dataclasses import asdict

    return json.loads(json.dumps(asdict(report)))


def test_outputs_that_are_no_decisions_are_left_out() -> None:
    forward: Any = WAYS["dict"]
    model, batches, scores = case(forward)
    found = fastscore.prune(model, scores, batches[0], macs=0.7, forward=forward, calibration=batches,
                            outputs=["classes"], repair="linear", progress=False)
    assert not found.report.repairs[0].outputs
    assert found.report.decided.startswith("['classes'] by the largest of 10")
    rows = fastscore.curve(model, scores, batches, (0.7,), forward=forward, outputs=["classes"], repair="mean",
                           progress=False)
    assert "outputs: ['classes'] by the largest of 10" in str(rows)


def test_an_output_that_there_is_not_is_no_fault_of_the_batches() -> None:
    forward: Any = WAYS["tuple"]
    model, batches, scores = case(forward)
    with pytest.raises(ValueError, match=r"^outputs: 'classes' is not among what forward= returns: \[0\], \[1\]"):
        fastscore.prune(model, scores, batches[0], macs=0.7, forward=forward, calibration=batches, outputs=["classes"],
                        repair="linear", progress=False)


def test_several_outputs_are_distilled_each_by_itself() -> None:
    model, batches, _ = case(WAYS["tuple"])
    smaller = Heads().eval()
    report = fastscore.distill(model, smaller, batches, steps=4, looks=2, forward=WAYS["tuple"], progress=False)
    assert report.best.kl <= report.looks[0].kl
    whole = fastscore.distill(model, smaller, batches, steps=1, looks=1, forward=WAYS["tuple"], progress=False,
                              loss=lambda got, expected: (got - expected).square().mean() * got.shape[1])
    assert whole.steps == 1


def test_of_a_branch_that_is_gone_no_head_is_left() -> None:
    """Its row of whole heads knows of the heads alone that went one by one."""
    said = [fastscore.pruning.report.GroupReport("q_proj (whole heads)", (192, left), (2, 1), (2, 1), (3, 3)).in_heads
            for left in (0, 96)]
    assert said == ["3 → 0 heads of 64 dimensions", "3 → 3 heads, of 64 → 32 dimensions each"]


@pytest.mark.parametrize("channels", [[(40, 1), (20, 1)], [(40, 2), (40, 40)]])
def test_a_group_of_which_next_to_nothing_is_left_is_said(channels: Sequence[tuple[int, int]]) -> None:
    rows = tuple(fastscore.pruning.report.GroupReport(f"layer{number}", pair, (2, 1), (2, 1))
                 for number, pair in enumerate(channels))
    text = str(PruneReport(rows, (80, 40), (2, 1), (2, 1), {}))
    assert ("layer0: 1 of 40 channels left" in text) == (channels[0][1] == 1)
    assert "layer1: " not in text
