"""What the benchmarks compare computes what it says; no timing is asserted."""

import argparse
import itertools
import os
import subprocess
import sys
from functools import partial

import oracles
import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS
from torch import nn
from torchvision.models import VisionTransformer

import fastscore
from benchmarks import machine
from benchmarks.passes import memory, training_step
from benchmarks.peers import __main__ as peers
from benchmarks.peers import chart, growth, whole
from benchmarks.peers.contestants import BASELINE, CONTESTANTS, captum, fastscore_pass, gates, plain_hooks
from benchmarks.peers.measure import CannotRun, PeakBytes, Row, Stopwatch, compare
from benchmarks.peers.task import Task
from fastscore.graph import tracing

SAME_NUMBER = {"plain hooks": plain_hooks(), "plain hooks, frozen": plain_hooks(frozen=True), "captum": captum,
               "fastscore": fastscore_pass(gradient="loss", normalize=False)}


def task_of(name: str, samples: int = 4) -> Task:
    network = NETWORKS[name]
    model, x = network.model(), network.inputs(samples)
    return Task.of(model, x, torch.arange(samples) % model(x).shape[1])


def loss_gradient(task: Task) -> torch.Tensor:
    z = task.model(task.images).detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(z, task.labels), z)[0]


@pytest.mark.parametrize("contestant", SAME_NUMBER)
@pytest.mark.parametrize("network", ["plain", "inplace", "dense", "mobile", "grouped", "flattening", "tokens",
                                     "squeeze-excite"])
def test_contestants_compute_the_same_number(network, contestant):
    task = task_of(network)
    with oracles.untouched(task.model):
        found = SAME_NUMBER[contestant](task)(Stopwatch())
    wanted = {name: oracles.sums(task.model, group, task.images, loss_gradient(task)).square().mean(0)
              for name, group in NETWORKS[network].groups.items()}
    assert found.keys() == wanted.keys()
    for name, importance in wanted.items():
        tolerance = {"rtol": 1e-6, "atol": 0} if contestant == "fastscore" else {}  # scores are float32
        torch.testing.assert_close(found[name].double(), importance, **tolerance)


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(image_size=16, patch_size=8, num_layers=1, num_heads=4, hidden_dim=16, mlp_dim=32,
                              num_classes=5).eval()
    nn.init.normal_(model.heads.head.weight)  # zeros as it comes
    return model


@pytest.mark.parametrize("contestant", [name for name in SAME_NUMBER if name != "fastscore"])
def test_contestants_reach_attention_heads(contestant):
    task = Task.of(small_vit().double(), torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.arange(3))
    wanted = SAME_NUMBER["fastscore"](task)(Stopwatch())
    with oracles.untouched(task.model):
        found = SAME_NUMBER[contestant](task)(Stopwatch())
    assert [name for name in found if name.endswith("self_attention")]
    for name, importance in found.items():
        torch.testing.assert_close(wanted[name].double(), importance, rtol=1e-6, atol=0)
        assert importance.min() > 0


@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_hooks_compute_the_same_number(frozen):
    task = task_of("plain")
    run = plain_hooks(frozen, compiled=True)(task)
    wanted = plain_hooks(frozen)(task)(Stopwatch())
    for _ in range(2):  # totals start anew in each pass
        for name, importance in run(Stopwatch()).items():
            torch.testing.assert_close(importance, wanted[name])


@pytest.mark.parametrize("network", ["plain", "inplace", "mobile"])
def test_gates_are_molchanovs(network):
    task = task_of(network)
    with oracles.untouched(task.model):
        found = gates(task)(Stopwatch())
    theirs = fastscore.score(task.model, [(task.images, task.labels)], importance="molchanov-bn", units="norms",
                             gradient="loss", normalize=False, progress=False)
    task.loss(task.model).backward()
    norms = {name: module for name, module in task.model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert found.keys() == norms.keys() == set(theirs)
    for name, norm in norms.items():
        torch.testing.assert_close(found[name], (norm.weight * norm.weight.grad + norm.bias * norm.bias.grad) ** 2)
        torch.testing.assert_close(theirs[name].double(), found[name], rtol=1e-6, atol=0)


def test_gates_need_a_norm():
    with pytest.raises(CannotRun, match="no BatchNorm"):
        gates(task_of("tokens"))


def weight_products(task: Task, power: int) -> dict[str, torch.Tensor]:
    """Layer -> |w·∂w|**power of its weight, [outputs, inputs, everything else]."""
    task.loss(task.model).backward()
    weights = {name.removesuffix(".weight"): parameter for name, parameter in task.model.named_parameters()
               if name.endswith(".weight")}
    return {name: (weight * weight.grad).abs().pow(power).reshape(len(weight), *weight.shape[1:2] or [1], -1)
            for name, weight in weights.items()}


@pytest.mark.parametrize(("contestant", "samples", "power", "norms"), [
    (BASELINE, 4, 1, False),
    ("Torch-Pruning, Hessian", 1, 2, True),  # of several samples, version 1.6.1 keeps the last
])
def test_torch_pruning_by_its_formula(contestant, samples, power, norms):
    task = task_of("plain", samples)
    with oracles.untouched(task.model):
        found = CONTESTANTS[contestant](task)(Stopwatch())
    products = weight_products(task, power)
    for name, norm, reader in (("0", None, "3"), ("3", "4", "8")):
        joint = products[name].sum((1, 2)) + products[reader].sum((0, 2))
        if norms and norm is not None:
            joint = joint + products[norm].sum((1, 2))
        # a mean over the layers of the group, scaled to mean 1 over its channels
        torch.testing.assert_close(found[name].double(), joint / joint.mean(), rtol=1e-5, atol=0)  # theirs is float32


def test_every_contestant_scores_again_and_leaves_no_gradient():
    task = task_of("inplace")
    for name, prepare in CONTESTANTS.items():
        if "compiled" not in name:
            run, clock = prepare(task), Stopwatch()
            first = run(clock)
            assert clock.seconds > 0, name
            for layer, importance in run(clock).items():
                torch.testing.assert_close(importance, first[layer], msg=f"{name}: {layer}")
            assert bool(first) == (name != "forward and backward alone")
    assert all(parameter.grad is None for parameter in task.model.parameters())


def test_peak_counts_what_lives_at_once():
    kept = torch.empty(10**6)
    with PeakBytes() as peak:
        a, b = torch.empty(1000), torch.empty(2000)
        del a
        c = torch.empty(500)
        del b, c
        d = torch.empty(2900)
    assert peak.bytes == 4 * 3000
    assert len(kept) + len(d) == 10**6 + 2900


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_peak_counts_weights_laid_out_for_onednn():
    weight = torch.randn(64, 64, 3, 3)
    with PeakBytes() as peak:
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, [1, 1], [1, 1], [1, 1], 1, [2, 64, 8, 8])
        del packed
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, [1, 1], [1, 1], [1, 1], 1, [2, 64, 8, 8])
    assert packed.is_mkldnn
    assert 4 * weight.numel() <= peak.bytes <= 2.1 * 4 * weight.numel()


def test_compare_takes_ratios_within_rounds_and_says_who_cannot_run():
    taken = {"slow": itertools.cycle([99.0, 6.0, 8.0, 9.0]), "fast": itertools.cycle([99.0, 2.0, 4.0, 1.0])}

    def prepare(name):
        def run(clock):
            clock.seconds = next(taken[name])
            return name

        return run

    def out():
        raise CannotRun("it has no wheels")

    def broken():
        return lambda clock: 1 / 0

    found = compare({"slow": partial(prepare, "slow"), "fast": partial(prepare, "fast"), "out": out, "broken": broken},
                    "slow", 3, "cpu", note=str.upper)
    assert found["out"] == {"note": "it has no wheels"}
    assert found["broken"] == {"note": "ZeroDivisionError: division by zero"}
    assert found["fast"] == {"peak_mib": 0, "note": "FAST", "seconds": 2.0, "times_as_fast": 3.0, "least": 2.0,
                             "most": 9.0}
    assert found["slow"]["times_as_fast"] == 1


def wide(width: int = 32) -> Task:
    """A network with channels enough for a share of its MACs to be met."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3),
                          nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)).eval()
    return Task.of(model, torch.randn(6, 3, 12, 12), torch.arange(6) % 5)


@pytest.mark.parametrize("part", whole.PARTS)
def test_whole_calls_leave_the_same_macs(part):
    job = whole.Job(wide(), batch=4)
    for name, prepare in whole.PARTS[part].items():
        with oracles.untouched(job.task.model):
            run = prepare(job)
            clock = Stopwatch()
            model = run(clock)
        assert clock.seconds > 0
        assert job.share(model) == pytest.approx(0.5, abs=0.02), name
        assert model(job.task.images).shape == (6, 5)


@pytest.mark.parametrize(("part", "name", "times"), [("whole", "fastscore, whole call", 1),
                                                     ("prune", "fastscore, prune() alone", 0),
                                                     ("prune", "fastscore, tracing and prune()", 1)])
def test_every_turn_traces_the_model_or_none_does(part, name, times, monkeypatch):
    run = whole.PARTS[part][name](whole.Job(wide(), batch=4))
    traced = []
    trace = tracing._traced
    monkeypatch.setattr(tracing, "_traced", lambda *args: traced.append(args) or trace(*args))
    run(Stopwatch())
    run(Stopwatch())
    assert len(traced) == 2 * times


def test_attention_counts():
    tokens, width = 5, 16
    attention = tokens * width * 3 * width + 2 * tokens * tokens * width + tokens * width * width
    rest = 4 * width * 3 * 8 * 8 + 2 * tokens * width * 32 + width * 5
    assert whole.macs(small_vit(), torch.randn(1, 3, 16, 16)) == attention + rest


def test_whole_call_without_a_ratio_says_so():
    job = whole.Job(task_of("plain"), batch=4, macs=0.01)
    with pytest.raises(CannotRun, match="no global ratio"):
        whole.PARTS["whole"]["Torch-Pruning, whole call"](job)


def test_growth_varies_one_factor_at_a_time(monkeypatch, tmp_path):
    monkeypatch.setattr(growth, "BATCHES", (1, 2))
    monkeypatch.setattr(growth, "SIZES", (64, 224))
    monkeypatch.setattr(growth, "DEPTHS", ("a",))
    monkeypatch.setattr(growth, "PROBES", (1, 2))
    monkeypatch.setattr(growth, "TAPPED", (0.5, 1.0))
    made = []

    def make(name, images, size):
        made.append((name, images, size))
        return task_of("plain", min(images, 3))

    rows = [row for _, table in growth.tables(make, 1, "cpu") for row in table]
    assert not [row.note for row in rows if row.note]
    assert [row.model for row in rows if row.part == "taps"] == ["1", "1", "2", "2"]
    assert {row.part for row in rows} == set(growth.FACTORS)
    chart.draw(rows, {"processor": "x"}, tmp_path / "t.csv")
    assert (tmp_path / "t-growth.png").stat().st_size > 1000
    assert not (tmp_path / "t.png").exists()  # it is for passes
    assert made[:2] == [("resnet18", 1, 224), ("resnet18", 2, 224)]
    assert ("a", 8, 224) in made


def test_command_writes_table_and_chart(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "settle", lambda arguments: None)

    def command(part, *models):
        peers.main(["--models", *models, "--contestants", "fastscore, random", "--parts", part, "--batch", "1",
                    "--size", "32", "--repeats", "1", "--out", str(tmp_path / "peers")])
        return chart.read_csv(tmp_path / "peers.csv")

    rows, facts = command("pass", "resnet18")
    assert [(row.model, row.contestant) for row in rows] == [
        ("resnet18", contestant) for contestant in (BASELINE, "fastscore, random", "fastscore, random, no graph")]
    assert all(row.seconds > 0 and row.peak_mib > 0 for row in rows)
    assert facts["allocator"] == machine.malloc()
    assert machine.malloc() in capsys.readouterr().out
    assert (tmp_path / "peers.png").stat().st_size > 1000
    kept, _ = command("per-sample", "resnet18")
    assert kept[:3] == rows
    assert [(row.part, row.contestant) for row in kept[3:]] == [
        ("per-sample", name) for name in ("Torch-Pruning, Hessian", "fastscore, random")]
    assert kept[3].times_as_fast == 1


@torch._dynamo.config.patch(recompile_limit=1)
def test_as_many_models_are_compiled_as_there_are(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(Task, "random", lambda name, *how: task_of(name))
    arguments = argparse.Namespace(batch=None, size=8, device="cpu", layout="contiguous", repeats=1,
                                   contestants=["plain hooks, compiled"], without=[])
    for name in ("plain", "inplace", "dense"):
        rows = list(peers.passes("pass", name, arguments))
        assert [(row.contestant, row.note) for row in rows] == [(BASELINE, ""), ("plain hooks, compiled", "")]


def test_a_table_takes_the_place_of_the_one_before(tmp_path):
    def row(model, contestant, seconds, images=8):
        return Row("pass", model, contestant, images, 224, seconds, 1.0, 1.0, 1.0, 1.0)

    path = tmp_path / "t.csv"
    file = chart.File(path, {"threads": 2})
    file.add([row("a", BASELINE, 3.0), row("a", "gates", 4.0)])
    file.add([row("b", BASELINE, 5.0)])
    again = chart.File(path, {"threads": 2})
    again.add([row("a", BASELINE, 2.0, images=16)])
    again.add([row("a", BASELINE, 2.0)])
    assert chart.read_csv(path) == ([row("a", BASELINE, 2.0), row("b", BASELINE, 5.0),
                                     row("a", BASELINE, 2.0, images=16)], {"threads": "2"})
    with pytest.raises(SystemExit, match="threads"):
        chart.File(path, {"threads": 1})


def test_table_keeps_those_who_could_not_run(tmp_path):
    rows = [Row("pass", "a", BASELINE, 8, 224, 2.0, 1.0, 1.0, 1.0, 1.0),
            Row("pass", "a", "gates", 8, 224, note='it says "no", and a comma'),
            Row("pass", "a", "fastscore, random", 8, 224, 1.0, 1.0, 2.0, 1.5, 2.5)]
    chart.write_csv(rows, {"threads": 2}, tmp_path / "t.csv")
    assert chart.read_csv(tmp_path / "t.csv") == (rows, {"threads": "2"})
    chart.draw(rows[::-1], {"processor": "x"}, tmp_path / "t.csv")  # in any order
    assert (tmp_path / "t.png").stat().st_size > 1000
    assert "no" in peers.line(rows[1])


def test_malloc_settings_are_one_set_or_none(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    kept, default = machine.malloc_environment("keep"), machine.malloc_environment("default")
    assert kept.items() >= machine.ALLOCATORS["keep"].items()
    assert not {"MALLOC_ARENA_MAX", *machine.ALLOCATORS["keep"]} & default.keys()


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
def test_settle_starts_again_with_the_settings():
    code = ("import argparse; from benchmarks import machine; parser = argparse.ArgumentParser(); "
            "machine.add_arguments(parser); machine.settle(parser.parse_args()); print(machine.malloc())")
    environment = {**os.environ, "MALLOC_ARENA_MAX": "3"}
    done = subprocess.run([sys.executable, "-c", code, "--threads", "1"], env=environment, capture_output=True,
                          text=True, check=True)
    assert "MALLOC_MMAP_MAX_=0" in done.stdout
    assert "ARENA" not in done.stdout


def test_memory_of_a_pass_and_of_a_call():
    task = wide(64)
    plain = memory.growth(CONTESTANTS[memory.PLAIN], task)
    activations = sum(6 * 64 * side**2 * 4 for side in (10, 10, 8, 8, 6, 6))
    assert activations < plain["pass alone"]["tensors"] < 10 * activations
    assert plain["pass alone"]["tensors"] == pytest.approx(plain["whole call"]["tensors"], rel=0.01)
    ours = memory.growth(CONTESTANTS["fastscore, random"], task)
    folded = 4 * (task.model[0].weight.numel() + task.model[3].weight.numel())  # the copy's own weights
    assert activations / 4 < ours["pass alone"]["tensors"] < ours["whole call"]["tensors"] - folded


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_is_that_of_the_block():
    kept = torch.ones(2**24)
    with memory.PeakResident() as peak:
        block = torch.ones(2**25)
        del block
    assert peak.bytes == pytest.approx(2**27, rel=0.1)
    assert len(kept) == 2**24


def test_steps_with_and_without_a_scorer():
    task = wide()
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    train = training_step.training_step(task.model, task.images, task.labels)
    scorer = fastscore.Scorer(task.model, task.graph)
    without, scored = training_step.alternate(train, scorer, rounds=2, steps=3, device="cpu")
    assert len(without) == len(scored) == 2
    assert scorer.scores().samples == 3 * 3 * len(task.images)  # the warm-up too
    assert not any(module._forward_pre_hooks for module in task.model.modules())
    assert not torch.equal(before["0.weight"], task.model[0].weight)


def test_taps_of_small_layers():
    taps, cost, plain = training_step.per_tap(5, rounds=1, steps=1, device="cpu")
    assert taps == 4
    assert len(cost) == len(plain) == 1
