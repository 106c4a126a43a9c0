"""What the benchmarks compare computes what it says; no timing is asserted."""


import oracles
import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS
from tasks import small_vit, task_of, wide
from thinned import NIGHTLY
from torch import nn

import fastscore
from benchmarks.peers import whole
from benchmarks.peers.contestants import BASELINE, CONTESTANTS, captum, fastscore_pass, gates, plain_hooks
from benchmarks.peers.measure import CannotRun, Stopwatch
from benchmarks.peers.task import Task
from fastscore.graph import tracing

SAME_NUMBER = {"plain hooks": plain_hooks(), "plain hooks, frozen": plain_hooks(frozen=True), "captum": captum,
               "fastscore": fastscore_pass(gradient="loss", normalize=False)}


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


@pytest.mark.parametrize("frozen", [True, False] if NIGHTLY else [True])
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
