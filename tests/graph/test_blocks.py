"""Residual branches that go whole: found, scored by one gate each, chosen with channels under one budget, removed."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import untouched
from residual_networks import CASES, Residual, case, run
from thinned import NIGHTLY, first_of_its_file
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import fastscore
from fastscore.graph.tracing import trace
from fastscore.modules.zero_branch import ZeroBranch
from fastscore.pruning.budgets.costs import total_macs


def _last(model: nn.Module, branch: str, batch: Any) -> str:
    """The module whose output is what a branch adds."""
    group = next(group for group in trace(model, batch, run, units="blocks").blocks if group.name == branch)
    return next(group.role("branch")).layer


def _gated(model: nn.Module, branch: str, batch: Any, gate: Tensor) -> Tensor:
    last, model = _last(model, branch, batch), copy.deepcopy(model)

    def multiply(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        first = first * gate.view(-1, *[1] * (first.dim() - 1))
        return (first, *output[1:]) if isinstance(output, tuple) else first

    model.get_submodule(last).register_forward_hook(multiply)
    return run(model, batch)


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_one_gate(name: str) -> None:
    model, batch, found = case(name)
    with untouched(model):
        graph = trace(model, batch, run, units="blocks")
        assert [group.name for group in graph.blocks] == found
        with torch.no_grad():
            z = run(model, batch)
        v = torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=z.dtype)
        scores = fastscore.score(model, [batch], units="blocks", gradient="loss", normalize=False, forward=run,
                                 loss=lambda output, _: (output * v).sum(), progress=False)
        assert not set(found) & set(fastscore.score(model, [batch], forward=run, progress=False))
    told_apart = {group.name for group in (*graph.groups, *graph.blocks)} - scores.skipped.keys()
    assert set(scores) == told_apart >= set(found)
    for branch in found:
        gate = torch.ones(3, dtype=torch.float64, requires_grad=True)
        (s,) = torch.autograd.grad((_gated(model, branch, batch, gate) * v).sum(), gate)
        torch.testing.assert_close(scores[branch].double(), s.square().mean()[None], rtol=1e-6, atol=1e-20)


# test_units_together.py has Qwen3, too
@pytest.mark.parametrize("name", [name for name in CASES if NIGHTLY or name != "Qwen3"])
def test_branches_go_with_channels_under_one_budget(name: str, tmp_path: Path) -> None:
    model, batch, found = case(name)
    scores = fastscore.score(model, [batch], units="blocks", forward=run, progress=False)
    scores = replace(scores, totals={group: total * (1e-6 if group in found else 1)  # so that some go
                                     for group, total in scores.totals.items()})
    with untouched(model):
        for unit, share in (("macs", 0.6), ("params", 0.7)):
            result = fastscore.prune(model, scores, batch, forward=run, compensate=False, **{unit: share})
            before, after = getattr(result.report, unit)
            assert share * before >= after
            assert sum(p.numel() for p in result.model.parameters()) == result.report.params[1]
            assert total_macs(result.model, batch, run) == result.report.macs[1]
        gone = [branch for branch in result.removed if branch in found]
        assert gone
        lowest = min(found, key=lambda branch: float(scores[branch]))
        scores_of_one = replace(scores, totals={lowest: scores.totals[lowest]})
        single = fastscore.prune(model, scores_of_one, batch, forward=run, params=0.99)
        assert list(single.removed) == [lowest]
        with torch.no_grad():
            want, got = _gated(model, lowest, batch, torch.zeros(3).double()), run(single.model, batch)
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
            with fastscore.mask(model, scores_of_one, 0.99, batch, forward=run):
                torch.testing.assert_close(run(model, batch), want, rtol=1e-10, atol=1e-12)
    assert isinstance(single.model.get_submodule(_last(model, lowest, batch)), ZeroBranch)
    small = result.model
    with torch.no_grad():
        output = run(small, batch)
    if first_of_its_file(isinstance(batch, dict)):  # of models of images, and of text
        args, kwargs = ((), {**batch, "use_cache": False}) if isinstance(batch, dict) else ((batch,), {})
        exported = torch.export.export(small, args, kwargs).module()(*args, **kwargs)
        torch.testing.assert_close(exported if isinstance(exported, Tensor) else exported.logits, output)
    fastscore.save_pruned(result, tmp_path / "small.safetensors")
    loaded = fastscore.load_pruned(case(name)[0], tmp_path / "small.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(run(loaded, batch), output)
    optimizer = fastscore.rebuild_optimizer(torch.optim.SGD(model.parameters(), 1e-3), model, result)
    first = run(small, batch).square().mean()
    first.backward()
    optimizer.step()
    assert run(small, batch).square().mean() < first
    again = fastscore.score(small, [batch], units="blocks", forward=run, progress=False)
    assert not set(gone) & set(again)


def test_a_branch_and_its_heads_have_names_of_their_own() -> None:
    """The heads of nn.MultiheadAttention are called as the module is, which is a branch."""
    torch.manual_seed(0)
    model, x = VisionTransformer(8, 4, 1, 3, 12, 8, num_classes=4).eval(), torch.randn(3, 3, 8, 8)
    nn.init.normal_(model.heads.head.weight)
    attention = "encoder.layers.encoder_layer_0.self_attention"
    scores = fastscore.score(model, [x], units="blocks", progress=False)
    assert (len(scores[attention]), len(scores[f"{attention} (whole)"])) == (12, 1)
    for name in (attention, f"{attention} (whole)"):
        least = replace(scores, totals={other: total * (other != name) for other, total in scores.totals.items()})
        result = fastscore.prune(model, least, x, channels=0.8, compensate=False)
        assert name in result.removed
        with torch.no_grad(), fastscore.mask(model, least, 0.2, x, compensate=False):
            torch.testing.assert_close(result.model(x), model(x))


@pytest.mark.parametrize("last", [False, True])
def test_a_branch_that_holds_a_group_norm_is_masked(last: bool) -> None:
    """Also one that ends in it; with channels beside it that go, and without."""
    torch.manual_seed(0)
    branch = Residual(nn.Conv2d(8, 6, 1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 8, 1),
                       *[nn.GroupNorm(2, 8)] * last)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), branch, nn.Conv2d(8, 4, 1)).double().eval()
    x = torch.randn(3, 3, 6, 6).double()
    scores = fastscore.score(model, [x], units="blocks", progress=False)
    whole = next(name for name in scores if len(scores[name]) == 1)
    first = replace(scores, totals={name: total * (1e-9 if name == whole else 1)
                                    for name, total in scores.totals.items()})
    found = []
    for share in (0.3, 0.6):
        gone = fastscore.prune(model, first, x, channels=1 - share, compensate=False, progress=False)
        with torch.no_grad(), fastscore.mask(model, first, share, x, compensate=False) as masked:
            assert set(masked) == set(gone.removed)
            torch.testing.assert_close(model(x), gone.model(x), rtol=1e-10, atol=1e-12)
        found.append(set(masked))
    assert found == [{whole}, {whole, "0"}]
