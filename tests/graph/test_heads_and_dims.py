"""Whole heads and dimensions of heads in one budget: each position of a weight goes, and costs, once."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from head_dims import SIZES, Attend, Oracle, call, inputs, model_of, network, run
from oracles import params, untouched
from torch import Tensor, nn

import fastscore
from fastscore.graph import scored_units
from fastscore.graph.cutting.surgery import remove_channels
from fastscore.graph.tracing import trace
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.pruning.budgets.costs import Costs, total_macs

NIGHTLY = "FASTSCORE_NIGHTLY" in os.environ
WHOLE = " (whole heads)"


def _case(name: str) -> tuple[nn.Module, Any, str, Oracle]:
    if name in ("timm", "Llama", "GPT-NeoX"):
        return model_of(name)
    layout, count, shared, turned = {"apart": ("apart", 4, 2, ""), "turned": ("fused", 4, 2, "halves"),
                                     "by head": ("by head", 3, 3, "")}[name]
    names = ("q_proj", "k_proj", "v_proj") if layout == "apart" else ("qkv_proj",) * 3
    return network(layout, count, shared, 4, True, turned), inputs(), f"one.{names[0]}", Oracle(
        tuple(f"one.{layer}.weight" for layer in (*names, "o_proj")), count, shared, 4, turned, layout == "by head")


def _score(model: nn.Module, batch: Any, units: Any) -> fastscore.Scores:
    return fastscore.score(model, [batch], units=units, probes="exact", normalize=False, forward=run, progress=False)


@pytest.mark.parametrize("name", ["turned", *(["timm", "apart", "by head", "Llama", "GPT-NeoX"] if NIGHTLY else [])])
def test_in_one_budget(name: str, tmp_path: Path) -> None:
    """Scores are those of each kind alone; smaller is masked; budgets count what is there; files give it back."""
    model, batch, group, oracle = _case(name)
    with untouched(model):
        scores = _score(model, batch, "heads_and_dims")
    for units, other, own in (("head_dims", group, group), ("groups", group, group + WHOLE)):
        want = _score(model, batch, units)[other]
        torch.testing.assert_close(scores[own], want, rtol=1e-5, atol=1e-6 * float(want.max()))
    others = [other for other in scores if not other.startswith(group) and not other.endswith(WHOLE)]
    # so that both go: of heads the first, and of dimensions about half, of which neither is enough
    budget = 1 - (0.5 + 0.25 / oracle.shared) * sum(params(model.get_submodule(layer.removesuffix(".weight")))
                           for layer in {*oracle.weights}) / params(model)
    heads = torch.arange(len(scores[group + WHOLE])) // (len(scores[group + WHOLE]) // oracle.shared)
    totals = {group: torch.rand(len(scores[group]), dtype=torch.float64) + oracle.units * 1e-3,
              group + WHOLE: torch.where(heads == 0, 1e-3, 1e3).double()}
    chosen = fastscore.Scores(totals, scores.origin, means=scores.means, coverage=scores.coverage)
    with untouched(model):
        result = fastscore.prune(model, chosen, batch, params=budget, ignore=others, cost_aware=False, compensate=False,
                                 forward=run, progress=False)
    assert {*result.removed} == {group, group + WHOLE}
    assert params(result.model) == result.report.params[1] <= budget * params(model)
    assert total_macs(result.model, batch, run) == result.report.macs[1] < result.report.macs[0]
    gone, lost = result.removed[group], result.removed[group + WHOLE]
    assert set((heads == 0).nonzero()[:, 0].tolist()) < set(lost.tolist())  # and columns of dimensions that went
    with torch.no_grad():
        gates = torch.ones(len(oracle.units), dtype=torch.float64).index_fill(0, gone, 0)
        values = oracle.gated(model, gates, (0,), True)
        values[oracle.weights[3]] = values[oracle.weights[3]].index_fill(1, lost, 0)  # what reads the head
        want = call(model, values, batch)
        exact = 1e-10 if name not in ("Llama", "GPT-NeoX") else 1e-5
        torch.testing.assert_close(run(result.model, batch), want, rtol=exact, atol=exact)
        fastscore.save_pruned(result, tmp_path / "small.safetensors")
        again = fastscore.load_pruned(model, tmp_path / "small.safetensors")
        assert torch.equal(run(again, batch), run(result.model, batch))
        share = result.report.channels[1] / result.report.channels[0]
        with untouched(model), fastscore.mask(model, chosen, 1 - share, batch, ignore=others, compensate=False,
                                              forward=run) as masked:
            assert {*masked} == {group, group + WHOLE}
            got = run(model, batch)
        small = fastscore.prune(model, chosen, batch, channels=share, ignore=others, compensate=False, forward=run,
                                progress=False)
        assert {name: at.tolist() for name, at in masked.items()} == {
            name: at.tolist() for name, at in small.removed.items()}
        torch.testing.assert_close(got, run(small.model, batch), rtol=exact, atol=exact)
    # repaired, by the means of what went in either way
    repaired = fastscore.prune(model, chosen, batch, params=budget, ignore=others, cost_aware=False, forward=run,
                               progress=False)
    bias = repaired.model.get_parameter(oracle.weights[3].replace("weight", "bias"))
    weight = model.get_parameter(oracle.weights[3])
    assert {at for at, channel in oracle.places(3)[oracle.weights[3]] if channel in gone.tolist()} <= {*lost.tolist()}
    means = scores.means[oracle.weights[3].removesuffix(".weight")]
    old = dict(model.named_parameters()).get(oracle.weights[3].replace("weight", "bias"), torch.zeros(len(bias)))
    torch.testing.assert_close(bias, old + weight[:, lost] @ means[lost].to(weight), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["turned", "by head"])
def test_costs_are_those_of_what_is_there(name: str) -> None:
    """In whatever order heads and dimensions go and come back: parameters by the true ones, channels by hand."""
    model, x, group, oracle = _case(name)
    graph = scored_units.of_graph(model, trace(model, x, units="heads_and_dims"), "heads_and_dims")
    groups = tuple(each for each in graph.groups if each.name.startswith(group))
    costs, generator = Costs(model, groups, x), torch.Generator().manual_seed(0)
    dims, whole = groups
    steps = [(dims.name, (oracle.units == unit).nonzero()[:, 0].tolist()) for unit in oracle.units.unique()]
    steps += [(whole.name, (whole.unit == unit).nonzero()[:, 0].tolist()) for unit in whole.unit.unique()[1:]]
    gone: list[int] = []
    for _ in range(24):
        step = int(torch.randint(len(steps), (), generator=generator))
        if step in gone:
            gone.remove(step)
            costs.restore(*steps[step])
        else:
            gone.append(step)
            costs.remove(*steps[step])
        removed = {each.name: torch.tensor(sorted(at for number in gone if steps[number][0] == each.name
                                                  for at in steps[number][1]), dtype=torch.int64) for each in groups}
        if _even(removed[dims.name], oracle.width):
            assert costs.totals["params"] == params(remove_channels(evaluation_copy(model), groups, removed))
        rows = {weight: set(range(len(model.get_parameter(weight)))) for weight in oracle.weights[:3]}
        places = {part: oracle.places(part)[oracle.weights[part]] for part in range(4)}
        heads_gone = {at // oracle.width for at in removed[whole.name].tolist()}
        for part in range(3):
            ratio = oracle.heads // oracle.shared if part else 1
            for number, (row, channel) in enumerate(places[part]):
                if channel in removed[dims.name].tolist() or number // oracle.width * ratio in heads_gone:
                    rows[oracle.weights[part]].discard(row)
        left = {channel for part in range(3) for row, channel in places[part] if row in rows[oracle.weights[part]]}
        assert costs.channels_left(dims.name) == len(left)
        columns = [number for number, (_, channel) in enumerate(places[3])
                   if channel not in removed[dims.name].tolist() and number // oracle.width not in heads_gone]
        assert costs.channels_left(whole.name) == len(columns)
    for step in gone:
        costs.restore(*steps[step])
    assert costs.totals == costs.dense


def _even(removed: Tensor, width: int) -> bool:
    """Whether every head loses as many dimensions, of all parts: else nothing runs."""
    return len(set(torch.bincount(removed // width, minlength=1).tolist())) <= 1


def test_in_steps() -> None:
    """What went is told in the dense model's channels, whichever went first."""
    model, x, group, oracle = _case("turned")
    result = fastscore.prune_iteratively(model, [x], steps=2, channels=0.3, units="heads_and_dims", probes="exact",
                                         ignore=["embed", "two", "head"], cost_aware=False, compensate=False,
                                         progress=False)
    gone, lost = result.removed[group], result.removed[group + WHOLE]
    assert result.model.one.num_heads < 4
    assert result.model.one.head_dim < 4
    assert len(lost) == 16 - result.model.one.o_proj.in_features
    gates = torch.ones(len(oracle.units), dtype=torch.float64).index_fill(0, gone, 0)
    with torch.no_grad():
        values = oracle.gated(model, gates, (0,), True)
        values[oracle.weights[3]] = values[oracle.weights[3]].index_fill(1, lost, 0)
        torch.testing.assert_close(result.model(x), call(model, values, x))


class Counted(Attend):
    """Its code runs with fewer heads, and with narrower ones, and with both computes something else."""

    def forward(self, x: Tensor, tables: Any = None) -> Tensor:
        return super().forward(x * (1.0 + (4 - self.num_heads) * (4 - self.head_dim)), tables)


def test_what_does_not_go_together_is_said() -> None:
    """Dimensions are kept beside heads, by name; what cannot go has the reason that it has alone."""
    model = network("apart", 4, 4, 4, True)
    counted = Counted("apart", 4, 4, 4, True).double()
    counted.load_state_dict(model.one.state_dict())
    model.one = counted
    scores = fastscore.score(model, [inputs()], units="heads_and_dims", progress=False)
    assert "one.q_proj" in scores
    assert "one.q_proj" + WHOLE not in scores
    assert scores.skipped["one.q_proj (head dimensions)"] == \
        "Counted computes something else with fewer heads that are narrower, too"
    assert len(scores["one.q_proj"]) == 16  # whole heads
    assert len(scores["two.q_proj"]) == 32
    assert len(scores["two.q_proj" + WHOLE]) == 16
    with pytest.raises(ValueError, match="taylor importance"):
        fastscore.score(model, [inputs()], units="heads_and_dims", importance="random", progress=False)


def test_a_count_of_heads_that_the_config_keeps() -> None:
    """Read by the code of a class whose heads have been narrowed, too: Phi-3's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Phi3ForCausalLM(transformers.Phi3Config(
            **SIZES | {"num_hidden_layers": 1}, num_key_value_heads=2, pad_token_id=0)).double().eval()
    batch = {"input_ids": torch.randint(0, 6, (2, 4))}
    graph = trace(model, batch, run, units="heads_and_dims")
    assert not graph.not_both
    for units in ("head_dims", "groups"):  # one after the other
        scores = fastscore.score(model, [batch], units=units, forward=run, progress=False)
        others = [name for name in scores if "self_attn" not in name]
        with torch.no_grad(), fastscore.mask(model, scores, 0.5, batch, ignore=others, compensate=False, forward=run):
            want = run(model, batch)
        model = fastscore.prune(model, scores, batch, channels=0.5, ignore=others, compensate=False, forward=run,
                                progress=False).model
        with torch.no_grad():
            torch.testing.assert_close(run(model, batch), want, rtol=1e-5, atol=1e-5)
    attention = model.model.layers[0].self_attn
    assert (attention.head_dim, attention.num_key_value_heads, attention.o_proj.in_features) == (2, 1, 4)
