"""prune_iteratively(): the budgets of every step, the same end after a kill, and what it must not do."""

import copy
import itertools
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NETWORKS
from oracles import params, untouched
from started import environment
from thinned import thinned
from torch import Tensor, nn

import fastscore
from fastscore.pruning.budgets import latency
from fastscore.pruning.budgets.costs import total_macs
from fastscore.pruning.report import Timing

RESIDUAL = NETWORKS["residual"]


def setting() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    labels = torch.arange(4)
    return RESIDUAL.traced(), [(RESIDUAL.inputs(4, seed), labels) for seed in (1, 2)]


def train(batches: list[tuple[Tensor, Tensor]]) -> Callable[[nn.Module], None]:
    """A step of SGD for each batch, with dropout, so that random numbers count."""

    def finetune(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        model.train()
        for x, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(nn.functional.dropout(x, 0.1)), labels).backward()
            optimizer.step()

    return finetune


def same(one: fastscore.IterativeResult, other: fastscore.IterativeResult) -> bool:
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()) and \
        one.report == other.report and one.steps == other.steps and one.new_biases == other.new_biases and \
        {layer: index.tolist() for layer, index in one.removed.items()} == \
        {layer: index.tolist() for layer, index in other.removed.items()} and \
        [module.training for module in one.model.modules()] == [module.training for module in other.model.modules()]


@pytest.mark.parametrize(("unit", "schedule"), thinned(["channels", "params", "macs"], ["geometric", "linear"]))
def test_every_step_meets_its_budget(unit: str, schedule: str) -> None:
    model, batches = setting()
    x = batches[0][0]
    count = {"macs": lambda m: total_macs(m, x), "params": params}.get(unit)
    seen: list[nn.Module] = []

    def finetune(smaller: nn.Module) -> None:
        train(batches)(smaller)
        seen.append(smaller)

    with untouched(model):
        result = fastscore.prune_iteratively(model, batches, steps=4, schedule=schedule, finetune=finetune,
                                             progress=False, **{unit: 0.4})
    assert len(result.steps) == 4
    assert seen[-1] is result.model
    before, left = getattr(result.report, unit)[0], []
    gone = 0
    for step, (report, smaller) in enumerate(zip(result.steps, seen, strict=True), 1):
        share = 0.4 ** (step / 4) if schedule == "geometric" else 1 - 0.6 * step / 4
        gone += report.channels[0] - report.channels[1]
        left.append(count(smaller) if count else before - gone)
        assert left[-1] <= share * before * (1 + 1e-9)
        if count:
            assert getattr(report, unit)[1] == left[-1]
        else:
            assert left[-1] > share * before - 1  # channels go one by one here
    assert getattr(result.report, unit) == (count(model) if count else 26, left[-1])
    assert left == sorted(left, reverse=True)


def test_the_report_and_what_was_removed_are_of_the_whole_way() -> None:
    model, batches = setting()
    result = fastscore.prune_iteratively(model, batches, steps=3, params=0.4, compensate=True, progress=False)
    report = result.report
    assert report.params == (params(model), params(result.model))
    assert report.macs == tuple(total_macs(m.eval(), batches[0][0]) for m in (model, result.model))
    for row in report.groups:
        old, new = (m.get_submodule(row.layer).out_channels for m in (model, result.model))
        assert row.channels == (old, new)
        assert len(result.removed.get(row.layer, ())) == old - new
    assert report.channels == tuple(sum(row.channels[side] for row in report.groups) for side in (0, 1))
    # without fine-tuning, the weights that are left are those of the dense model
    kept = sorted(set(range(6)) - set(result.removed["stem.0"].tolist()))
    assert torch.equal(result.model.stem[0].weight, model.stem[0].weight[kept])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert fastscore.rebuild_optimizer(optimizer, model, result).param_groups[0]["lr"] == 0.1


def test_one_step_is_prune() -> None:
    model, batches = setting()
    once = fastscore.prune_iteratively(model, batches, steps=1, macs=0.5, progress=False)
    scores = fastscore.score(model, batches, progress=False)
    plain = fastscore.prune(model, scores, batches[0][0][:1], macs=0.5)
    assert once.report == plain.report
    assert all(torch.equal(a, b) for a, b in zip(once.model.parameters(), plain.model.parameters(), strict=True))


def test_scores_are_made_anew() -> None:
    """What fine-tuning made important stays, whatever it was before."""
    model, batches = setting()

    def finetune(smaller: nn.Module) -> None:
        with torch.no_grad():
            smaller.block2.conv1.weight[0] *= 100

    result = fastscore.prune_iteratively(model, batches, steps=4, channels=0.4, importance="magnitude-l2",
                                         finetune=finetune, progress=False)
    assert result.model.block2.conv1.weight.abs().max() > 1e6 * model.block2.conv1.weight.abs().max()


@pytest.mark.parametrize("killed", [1, 2, 3])
def test_interrupted_and_called_again_it_ends_the_same(killed: int, tmp_path: Path) -> None:
    model, batches = setting()
    arguments = {"steps": 3, "macs": 0.4, "compensate": True, "progress": False, "scope": "layer"}
    whole = fastscore.prune_iteratively(model, batches, finetune=train(batches), **arguments)
    calls = itertools.count(1)

    def dies(smaller: nn.Module) -> None:
        train(batches)(smaller)
        if next(calls) == killed:
            raise KeyboardInterrupt

    with untouched(model), pytest.raises(KeyboardInterrupt):
        fastscore.prune_iteratively(model, batches, finetune=dies, resume=tmp_path / "c", **arguments)
    torch.randn(7)  # the caller's random numbers are elsewhere by now
    done = []

    def counted(smaller: nn.Module) -> None:
        done.append(smaller)
        train(batches)(smaller)

    with untouched(model):
        again = fastscore.prune_iteratively(model, batches, finetune=counted, resume=tmp_path / "c", **arguments)
    assert len(done) == 4 - killed
    assert same(again, whole)
    fastscore.save_pruned(again, tmp_path / "p")
    assert torch.equal(fastscore.load_pruned(RESIDUAL.model, tmp_path / "p").eval()(batches[0][0]),
                       again.model.eval()(batches[0][0]))
    finished = fastscore.prune_iteratively(model, batches, finetune=dies, resume=tmp_path / "c", **arguments)
    finished.model.eval()  # as the one above
    assert same(finished, again)


def test_a_model_pruned_before_goes_on_and_is_saved(tmp_path: Path) -> None:
    model, batches = setting()
    once = fastscore.prune(model, fastscore.score(model, batches, progress=False), batches[0][0], macs=0.8).model
    for _ in range(2):  # the second call finds everything done
        result = fastscore.prune_iteratively(once, batches, steps=2, macs=0.5, resume=tmp_path / "c",
                                             progress=False)
    fastscore.save_pruned(result, tmp_path / "p")
    loaded = fastscore.load_pruned(RESIDUAL.model, tmp_path / "p")
    assert torch.equal(loaded(batches[0][0]), result.model(batches[0][0]))


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_iterative as t, fastscore
model, batches = t.setting()
def finetune(smaller):
    t.train(batches)(smaller)
    if smaller.head.fc.in_features < 7 and os.environ["KILL"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
fastscore.prune_iteratively(model, batches, steps=3, channels=0.4, scope="layer", finetune=finetune, progress=False,
                            resume=sys.argv[2])
"""


def test_killed_by_the_system(tmp_path: Path) -> None:
    run = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path / "c")]
    killed = subprocess.run(run, env=environment(KILL="1"), check=False)
    assert killed.returncode == -signal.SIGKILL
    model, batches = setting()
    arguments = {"steps": 3, "channels": 0.4, "scope": "layer", "finetune": train(batches), "progress": False}
    again = fastscore.prune_iteratively(model, batches, resume=tmp_path / "c", **arguments)
    assert same(again, fastscore.prune_iteratively(model, batches, **arguments))


def test_checkpoints_of_other_runs_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    model, batches = setting()
    path = tmp_path / "c"
    arguments = {"steps": 2, "macs": 0.5, "progress": False, "resume": path}
    fastscore.prune_iteratively(model, batches, **arguments)
    for change, named in (({"steps": 3}, "steps"), ({"macs": 0.4}, "shares"), ({"seed": 3}, "seed"),
                          ({"schedule": "linear"}, "schedule"), ({"ignore": ["stem"]}, "ignore")):
        with untouched(model), pytest.raises(ValueError, match=f"^resume: .* differs in {named}"):
            fastscore.prune_iteratively(model, batches, **{**arguments, **change})
    with pytest.raises(ValueError, match=r"^resume: .* differs in weights"):
        fastscore.prune_iteratively(RESIDUAL.model(seed=3), batches, **arguments)
    contents = path.read_bytes()
    path.write_bytes(contents[:-5])
    with untouched(model), pytest.raises(ValueError, match="delete it to start again"):
        fastscore.prune_iteratively(model, batches, **arguments)


def test_floors_count_in_the_dense_models_channels_and_ignored_modules_stay() -> None:
    model, batches = setting()
    result = fastscore.prune_iteratively(model, batches, steps=4, channels=0.55, floor=0.5, ignore=[model.block1.conv1],
                                         progress=False)
    assert result.model.block1.conv1.out_channels == 5
    for row in result.report.groups:
        assert row.channels[1] >= row.channels[0] / 2
    with pytest.raises(ValueError, match=r"^step \d of 4 \(channels 0\.\d+ of the original\): channels: .*cannot be"):
        fastscore.prune_iteratively(model, batches, steps=4, channels=0.3, floor=0.5, progress=False)


def test_channels_down_to_one_in_each_layer() -> None:
    """Layers with one channel left drop out of the count of what can go, not out of the budget."""
    model, batches = setting()
    result = fastscore.prune_iteratively(model, batches, steps=5, channels=4 / 26, progress=False)
    assert result.report.channels == (26, 4)
    assert [row.channels[1] for row in result.report.groups] == [1] * 4


@pytest.mark.parametrize("noise", [0.0, 0.08])
def test_in_measured_time(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)

    def clock(one: Any, two: Any, device: torch.device, patience: int = 1) -> Timing:
        (dense, x), (other, _) = one.args, two.args
        factor = 1 + noise * (2 * float(torch.rand((), generator=generator)) - 1)
        return Timing((1.0, total_macs(other, x) / total_macs(dense, x) * factor), 0.0)

    monkeypatch.setattr(latency, "time_pair", clock)
    model, batches = setting()
    result = fastscore.prune_iteratively(model, batches, steps=3, latency=0.5, progress=False)
    assert result.report.macs[1] / result.report.macs[0] <= 0.5 * (1 + noise) / (1 - noise)
    assert result.steps[0].candidates


def test_a_data_loader_and_keyword_batches() -> None:
    model, batches = setting()
    data = torch.utils.data.DataLoader(torch.cat([x for x, _ in batches]), batch_size=3, shuffle=True)
    with untouched(model):
        first, second = (fastscore.prune_iteratively(model, data, steps=2, macs=0.6, progress=False) for _ in range(2))
    assert same(first, second)  # in the same order each time, although it is shuffled
    linear = NETWORKS["mlp"].traced()

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(linear)

        def forward(self, *, x: Tensor) -> Tensor:
            return self.net(x)

    result = fastscore.prune_iteratively(Named().eval(), [{"x": NETWORKS["mlp"].inputs(5)}], steps=2, channels=0.5,
                                         progress=False)
    assert result.report.channels == (13, 6)


def test_bad_input() -> None:
    model, batches = setting()

    def generator() -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches

    cases: list[tuple[object, dict[str, object], type[Exception], str]] = [
        (generator(), {}, ValueError, "^batches: it can be read only once"),
        ([], {}, ValueError, "^batches: there is none"),
        (batches, {"steps": 0}, ValueError, "^steps: 0"),
        (batches, {"schedule": "cosine"}, ValueError, "^schedule: 'cosine' is none of geometric, linear"),
        (batches, {"macs": None}, ValueError, "^prune_iteratively: name a budget"),
        (batches, {"macs": 1.5}, ValueError, r"^macs: 1.5 is outside \(0, 1\]"),
        (batches, {"sampels": 4}, TypeError, "'sampels' is an option of neither"),
        (batches, {"inplace": True}, TypeError, "'inplace'"),
        (batches, {"agreement": 0.9}, TypeError, r"^prune_iteratively: agreement= is of prune\(\)"),
        (batches, {"kl": 0.1}, TypeError, r"^prune_iteratively: kl= is of prune\(\)"),
        (batches, {"ignore": ["nothing"]}, ValueError, "^ignore: 'nothing'"),
        (batches, {"floor": {"nothing": 0.5}}, ValueError, r"^step 1 of 2 .*: floor: 'nothing'")]
    for given, options, error, message in cases:
        with untouched(model), pytest.raises(error, match=message):
            fastscore.prune_iteratively(model, given, **{"steps": 2, "macs": 0.5, "progress": False, **options})  # type: ignore[arg-type]


def test_a_step_whose_budget_holds_already_scores_nothing() -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(5, 6)
    read, tuned = [], []

    class Counted(list[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            read.append(1)
            return super().__iter__()

    result = fastscore.prune_iteratively(model, Counted([x]), steps=4, channels=0.5, round_to=4,
                                         finetune=tuned.append, progress=False)
    assert [report.channels for report in result.steps] == [(8, 4), (4, 4), (4, 4), (4, 4)]
    assert result.report.channels == (8, 4)
    assert len(read) == 2  # an example, and the first step
    assert len(tuned) == 4


def test_when_halves_agree_is_said_to_scoring() -> None:
    model, batches = setting()
    one, other = (fastscore.prune_iteratively(model, batches, steps=2, macs=0.5, progress=False, **options)
                  for options in ({}, {"agreement": (0.3, 0.9)}))
    assert one.removed.keys() == other.removed.keys()


class Opened(nn.Module):
    """Whose second layer nothing can be said of, until training is told to open it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.closed = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x).relu())
        return self.head(x.sort(-1).values if self.closed else x.relu())


def test_channels_that_fine_tuning_lets_go_count_from_then_on() -> None:
    torch.manual_seed(0)
    model, x = Opened().eval(), torch.randn(8, 6)

    def opened(model: nn.Module) -> None:
        model.closed = False

    result = fastscore.prune_iteratively(model, [x], steps=2, channels=0.5, scope="layer", finetune=opened,
                                         progress=False)
    layers = {row.layer: row.channels for row in result.report.groups}
    assert (layers["one"][0], layers["two"][0]) == (16, 12)
    assert result.report.channels == (28, result.model.one.out_features + result.model.two.out_features)
    assert result.report.channels[1] <= 14
