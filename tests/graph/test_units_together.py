"""Branches, experts, whole heads and dimensions of heads with channels, all under one budget."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracles import untouched
from residual_networks import SIZES, case, run
from thinned import NIGHTLY
from torch import nn

import fastscore
from fastscore.pruning.budgets.costs import total_macs

MIXTURE = ("blocks", "experts", "heads_and_dims")
CASES: dict[str, tuple[str, ...]] = {"Mixtral": MIXTURE, "Qwen3": ("blocks", "head_dims")}
if NIGHTLY:
    CASES["ViT"] = "blocks", "heads_and_dims"


def _case(name: str) -> tuple[nn.Module, Any]:
    if name != "Mixtral":
        return case(name)[:2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(
            **SIZES | {"num_hidden_layers": 2}, num_key_value_heads=2, num_local_experts=4,
            experts_implementation="batched_mm")).double().eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model, {"input_ids": torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(1))}


def _score(model: nn.Module, batch: Any, units: Any) -> fastscore.Scores:
    with torch.no_grad():
        v = torch.randn(run(model, batch).shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return fastscore.score(model, [batch], units=units, gradient="loss", normalize=False, forward=run, progress=False,
                           loss=lambda output, _: (output * v).sum())


def _kind(scores: fastscore.Scores, name: str) -> str:
    if len(scores[name]) == 1:
        return "branch"
    return "whole heads" if name.endswith("(whole heads)") else "experts" if name.endswith(".experts") else "channels"


@pytest.mark.parametrize("name", CASES)
def test_under_one_budget(name: str, tmp_path: Path) -> None:
    """Each is scored as by itself; what goes costs once, is told alike by mask and prune, and nothing of it is left."""
    model, batch = _case(name)
    units = CASES[name]
    with untouched(model):
        scores = _score(model, batch, units)
    assert scores.origin.units == "+".join(sorted(units, key=["heads_and_dims", "experts", "blocks"].index)) \
        if name != "Qwen3" else "head_dims+blocks"
    for each in units:
        alone = _score(model, batch, each)
        assert set(alone) <= set(scores) or each == "experts"
        for group in set(alone) & set(scores):
            if alone[group].shape == scores[group].shape and (each != "experts" or group.endswith(".experts")):
                torch.testing.assert_close(scores[group], alone[group], rtol=1e-6, atol=1e-20)
    kinds = {group: _kind(scores, group) for group in scores}
    assert len({*kinds.values()}) == 2 + ("heads_and_dims" in units) + ("experts" in units)
    generator, first = torch.Generator().manual_seed(3), dict.fromkeys(kinds.values(), True)
    totals = {}
    for group, total in scores.totals.items():  # one of each kind goes early, the others at random
        early, first[kinds[group]] = first[kinds[group]], False
        totals[group] = torch.rand(total.shape, generator=generator, dtype=torch.float64) * (0.05 if early else 1)
    scores = replace(scores, totals=totals)
    how: dict[str, Any] = {"forward": run, "compensate": False}
    for budget in ({"channels": 0.6}, {"macs": 0.5}, {"params": 0.6}):
        with untouched(model):
            result = fastscore.prune(model, scores, batch, progress=False, **budget, **how)
        small, report = result.model, result.report
        ((unit, share),) = budget.items()
        before, after = getattr(report, unit)
        assert after <= share * before
        assert report.params[1] == sum(parameter.numel() for parameter in small.parameters())
        assert report.macs[1] == total_macs(small, batch, run)
        left = {row.layer: row.channels[1] for row in report.groups if row.channels[1]}
        again = _score(small, batch, units)
        assert {group: len(again[group]) for group in again if group in left} == {
            group: count for group, count in left.items() if group in again}
        assert sum(left.values()) == report.channels[1]
        for group in left.keys() - set(again):  # what is kept: one head, or one expert more than are chosen
            assert group in again.skipped or group.removesuffix(" (whole heads)") in again
        if unit != "channels":
            continue
        with untouched(model), fastscore.mask(model, scores, 1 - share, batch, **how) as masked, torch.no_grad():
            assert {group: gone.tolist() for group, gone in masked.items()} == {
                group: gone.tolist() for group, gone in result.removed.items()}
            torch.testing.assert_close(run(small, batch), run(model, batch), rtol=1e-5, atol=1e-6)
        assert {kinds[group] for group in masked} == {*kinds.values()}
    fastscore.save_pruned(result, tmp_path / "small.safetensors")
    loaded = fastscore.load_pruned(_case(name)[0], tmp_path / "small.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(run(loaded, batch), run(small, batch))


@pytest.mark.parametrize(("units", "said"), [
    (("blocks", "norms"), "stand alone"), (("head_dims", "heads_and_dims"), "leave one out"), ("blocks+no", "none of"),
    ((), "none of")])
def test_what_does_not_go_together(units: Any, said: str) -> None:
    model, batch = case("ViT")[:2]
    with pytest.raises(ValueError, match=rf"^units: .*{said}"):
        fastscore.score(model, [batch], units=units, progress=False)
    with pytest.raises(ValueError, match=rf"^units: .*{said}"):
        fastscore.Scorer(model, batch, units=units)
