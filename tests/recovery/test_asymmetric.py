"""Asymmetric reconstruction against least squares on the rows themselves, and the passes that halt for it."""

import copy
import math
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.batches.calls import call_model
from fastscore.graph.tracing import trace
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.recovery import front_to_back, reconstruct
from fastscore.recovery.asymmetric import Joint, bias, error, fit, rescaled
from fastscore.recovery.calibration import Calibration
from fastscore.recovery.front_to_back import refit, sites
from fastscore.recovery.linear import solve
from fastscore.recovery.lockstep import Lockstep
from fastscore.recovery.rows import is_product, made_rows, read_rows, weight_rows
from fastscore.recovery.shortcuts import Shortcut, shortcuts

QUICK = settings(max_examples=40, deadline=None)
LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), (8,)),
    "tokens": (lambda: nn.Linear(8, 6), (7, 8)),
    "conv": (lambda: nn.Conv2d(8, 6, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1), groups=2), (8, 9, 7)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect", bias=False), (8, 5, 4)),
    "pointwise": (lambda: nn.Conv2d(8, 6, 1), (8, 5, 4)),
    "pointwise, in steps": (lambda: nn.Conv2d(8, 6, 1, stride=(1, 2)), (8, 5, 4)),
    "pointwise, large": (lambda: nn.Conv2d(8, 6, 1), (8, 20, 20)),
    "same": (lambda: nn.Conv1d(8, 4, 4, padding="same"), (8, 300)),
    "volume": (lambda: nn.Conv3d(8, 3, 2), (8, 3, 4, 5)),
}


@pytest.mark.parametrize("name", list(LAYERS))
def test_a_layer_is_a_product_of_its_rows(name: str) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[name][0](), torch.randn(3, *LAYERS[name][1])
    y = layer(x)
    assert is_product(layer, x, y)
    assert not is_product(layer, x, y + 0.1 * torch.randn_like(y))
    rows = torch.einsum("ngk,gok->ngo", read_rows(layer, x).double(), weight_rows(layer)).flatten(1)
    torch.testing.assert_close((rows + (0 if layer.bias is None else layer.bias)).float(), made_rows(layer, y),
                               rtol=1e-4, atol=1e-4)
    turned = x.transpose(1, -1).contiguous().transpose(1, -1) if name != "tokens" else x  # as channels_last lies
    assert torch.equal(read_rows(layer, turned), read_rows(layer, x))


def test_what_is_no_product_is_told() -> None:
    layer, x = nn.ConvTranspose2d(4, 4, 2), torch.randn(2, 4, 5, 5)
    assert not is_product(layer, x, layer(x))


class Rows:
    """What a layer of two blocks reads and should make, in two parts of several batches."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.start = torch.randn(2, 3, 4, dtype=torch.float64)
        mix = torch.randn(8, 8, dtype=torch.float64)
        self.x = torch.randn(2, 300, 8, dtype=torch.float64) @ mix + torch.randn(8, dtype=torch.float64)
        self.x = self.x.unflatten(2, (2, 4))
        self.t = torch.einsum("pngk,gok->pngo", self.x, torch.randn_like(self.start))
        self.t += torch.randn_like(self.t) + 2
        self.joints = [Joint.empty(2, 4, 3) for _ in range(2)]
        for joint, x, t in zip(self.joints, self.x, self.t, strict=True):
            for a, b in zip(x.split(70), t.split(70), strict=True):
                joint.add(a, b)


@QUICK
@given(st.integers(0, 2**31))
def test_without_a_ridge_it_is_least_squares(seed: int) -> None:
    rows = Rows(seed)
    found = fit(rows.joints[0], rows.start, 0.0)
    for block in range(2):
        x, t = (value[0][:, block] - value[0][:, block].mean(0) for value in (rows.x, rows.t))
        torch.testing.assert_close(found[block], torch.linalg.lstsq(x, t).solution.T, rtol=1e-6, atol=1e-6)
    assert torch.equal(fit(rows.joints[0], rows.start, math.inf), rows.start)
    torch.testing.assert_close(fit(rows.joints[0], rows.start, 1e9), rows.start, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 0.3])
def test_blocks_are_solved_together_as_each_alone(ridge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A depthwise layer has as many as channels: one by one, they took as long as four passes over the images."""
    torch.manual_seed(0)
    x = torch.randn(40, 5, 6, dtype=torch.float64)
    x[:, 1, 2] = 0.0  # dead
    x[:, 3, 4] = x[:, 3, 0] - x[:, 3, 1]  # singular, and so is the next, in which nothing varies
    x[:, 4] = 0.0
    gram, cross = torch.einsum("ngk,ngl->gkl", x, x), torch.einsum("ngo,ngk->gok", torch.randn(40, 5, 3).double(), x)
    calls: list[torch.Size] = []
    factored = torch.linalg.cholesky if ridge == 0.3 else torch.linalg.eigh

    def spy(matrix: Tensor) -> Any:
        calls.append(matrix.shape)
        return factored(matrix)

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, factored.__name__.removeprefix("linalg_"), spy)
        found = solve(gram, cross, ridge)
    assert calls == [torch.Size([5, 6, 6])]
    for block in range(5):
        varies = gram[block].diagonal() > 0
        scale = torch.where(varies, gram[block].diagonal(), 1.0)
        alone = cross[block] @ torch.linalg.pinv(gram[block] + ridge * torch.diag(scale), hermitian=True, rtol=1e-9)
        if ridge or block < 3:
            torch.testing.assert_close(found[block], alone * varies, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found[block], solve(gram[block], cross[block], ridge), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found[block] @ (gram[block] + ridge * torch.diag(scale)) * varies, cross[block],
                                   rtol=1e-4, atol=1e-4)


@QUICK
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.3, math.inf]))
def test_errors_and_outputs_are_those_of_the_rows(seed: int, ridge: float) -> None:
    rows = Rows(seed)
    weight = fit(rows.joints[0], rows.start, ridge)
    made = torch.einsum("pngk,gok->pngo", rows.x, weight)
    errors = made[1] - rows.t[1] - (made[0].mean(0) - rows.t[0].mean(0))
    assert error(weight, *rows.joints) == pytest.approx(float(errors.square().sum((1, 2)).mean()), rel=1e-6)
    scaled = rescaled(weight, rows.joints[0])
    made = torch.einsum("ngk,gok->ngo", rows.x[0], scaled).flatten(1) + bias(scaled, rows.joints[0])
    expected = rows.t[0].flatten(1)
    torch.testing.assert_close(made.mean(0), expected.mean(0), rtol=1e-6, atol=1e-6)
    gain = (scaled / weight)[..., 0].flatten()
    inside = (gain > 0.501) & (gain < 1.999)
    torch.testing.assert_close(made.std(0)[inside], expected.std(0)[inside], rtol=1e-6, atol=1e-6)


class Residual(nn.Module):
    """Blocks beside shortcuts of every kind that is, or is not, known beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a1, self.a2, self.an = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 1)
        self.c, self.down = nn.Conv2d(8, 8, 1, stride=2), nn.Conv2d(8, 8, 1, stride=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.an(self.a2(self.a1(x).relu()))
        y = self.b(x)
        y += x
        x = y
        x = self.c(x) + self.down(x)  # made after the layer that it is added to
        return self.fc(x.mean((2, 3)))


def with_statistics(model: nn.Module) -> nn.Module:
    model.train()
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(16, 3, 6, 6))
    return model.eval()


def test_shortcuts_that_are_there_before_the_layer_are_found() -> None:
    torch.manual_seed(0)
    model, x = with_statistics(Residual()), torch.randn(2, 3, 6, 6)
    found = shortcuts(model, lambda: model(x), trace(model, x).normalized_by)
    assert found.keys() == {"a2", "b", "down"}
    assert found["a2"] == Shortcut("a1", "input", "an")
    assert found["b"] == Shortcut("b", "input", None) or found["b"].module != "a1"
    assert found["down"] == Shortcut("c", "output", None)


def test_a_layer_beside_a_shortcut_makes_good_what_that_has_lost() -> None:
    """The shortcut of the smaller network is spoiled in a way that the branch can tell."""
    torch.manual_seed(0)
    model = with_statistics(Residual())
    dense, batches = evaluation_copy(model), [torch.randn(16, 3, 6, 6) for _ in range(4)]
    calibration, graph = Calibration(batches, torch.device("cpu")), trace(model, batches[0][:2])
    left = []
    with torch.no_grad():
        where = sites(dense, calibration.first(), call_model, {("a1", "inputs"): torch.tensor([0])},
                      graph.normalized_by)
        assert list(where) == ["a1", "a2", "b", "c", "down", "fc"]
        where = {name: where[name] for name in ("a1", "a2")}
        for known in (where, {name: replace(site, shortcut=None) for name, site in where.items()}):
            small = copy.deepcopy(model)
            small.norm.bias += 0.3  # type: ignore[operator]
            if not left:
                left.append(float((dense(batches[0]) - small(batches[0])).square().mean()))
            refit(dense, small, known, calibration, "all", dict.fromkeys(where, 1e-6), call_model, None)
            left.append(float((dense(batches[0]) - small(batches[0])).square().mean()))
    spoiled, with_shortcuts, without = left
    assert with_shortcuts < 0.7 * min(spoiled, without), left


def test_a_network_that_has_lost_nothing_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = with_statistics(Residual())
    dense, small = evaluation_copy(model), copy.deepcopy(model)
    batches = [torch.randn(16, 3, 6, 6) for _ in range(4)]
    with torch.no_grad():
        calibration = Calibration(batches, torch.device("cpu"))
        where = sites(dense, calibration.first(), call_model, {("a1", "inputs"): torch.tensor([0])},
                      trace(model, batches[0][:2]).normalized_by)
        refit(dense, small, where, calibration, "fit", {}, call_model, None)
        for key, value in model.state_dict().items():
            torch.testing.assert_close(small.state_dict()[key], value, rtol=1e-3, atol=1e-3, msg=key)


def test_wide_layers_keep_their_weights_up_to_a_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_to_back, "WIDEST", 7)
    torch.manual_seed(0)
    model = with_statistics(Residual())
    dense, small = evaluation_copy(model), copy.deepcopy(model)
    batches = [torch.randn(16, 3, 6, 6) for _ in range(4)]
    with torch.no_grad():
        small.norm.weight *= 0.8
        calibration = Calibration(batches, torch.device("cpu"))
        where = sites(dense, calibration.first(), call_model, {("a1", "inputs"): torch.tensor([0])},
                      trace(model, batches[0][:2]).normalized_by)
        refit(dense, small, where, calibration, "fit", {}, call_model, None)
        for name in ("a1", "fc"):
            ratio = small.get_submodule(name).weight / model.get_submodule(name).weight
            torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
            assert (ratio - 1).abs().max() > 0.01


def test_passes_halt_together_and_end_where_they_are() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    batches = [torch.randn(2, 3) for _ in range(3)]
    threads = threading.active_count()
    with Lockstep(model, call_model, "input", ["0", "2"], {("1", "output"): ["kept"]}) as passes:
        each = [passes.begin(batch) for batch in batches]
        for batch, one in zip(batches, each, strict=True):
            assert torch.equal(one.to("0"), batch)  # type: ignore[arg-type]
            assert not one.seen
        with torch.no_grad():
            model[0].weight.zero_()  # type: ignore[union-attr, operator]
            expected = model[0].bias.relu().expand(2, 3)  # type: ignore[union-attr, operator]
        for one in each[:2]:
            assert torch.equal(one.to("2"), expected)  # type: ignore[arg-type]
            assert torch.equal(one.seen["kept"], expected)
        assert each[0].to("0") is None  # it is past that, and comes to its end
        assert each[0].to("2") is None
    assert threading.active_count() == threads
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model)


def test_an_error_in_a_pass_is_raised_where_it_was_told_to_go_on() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 2)).eval()
    threads = threading.active_count()
    with Lockstep(model, call_model, "output", ["0", "1"], {}) as passes:
        one = passes.begin(torch.randn(2, 3))
        assert one.to("0") is not None
        with pytest.raises(RuntimeError, match="shapes"):
            one.to("1")
    assert threading.active_count() == threads


@pytest.mark.parametrize("where", ["before it starts", "as it starts", "as it runs", "as it halts"])
def test_passes_end_wherever_the_caller_is_interrupted(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while one pass is halted and another on its way; what would wait forever is found by a time limit."""
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    threads, ended = threading.active_count(), []
    start, acquire = threading.Thread.start, threading.Semaphore.acquire

    def starts(thread: threading.Thread) -> None:
        if where == "as it starts":
            start(thread)
        raise KeyboardInterrupt

    def waits(semaphore: threading.Semaphore, *args: Any) -> bool:
        if threading.current_thread() is main:
            if where == "as it halts":
                acquire(semaphore)
            raise KeyboardInterrupt
        return acquire(semaphore, *args)

    def run() -> None:
        with Lockstep(model, call_model, "input", ["0", "2"], {}) as passes, monkeypatch.context() as patch:
            halted, other = passes.begin(torch.randn(2, 3)), passes.begin(torch.randn(2, 3))
            halted.to("0")
            if where in ("as it runs", "as it halts"):
                patch.setattr(threading.Semaphore, "acquire", waits)
            else:
                patch.setattr(threading.Thread, "start", starts)
            other.to("0")

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            run()
        ended.append(True)

    main = threading.Thread(target=interrupted, daemon=True)
    main.start()
    main.join(60)
    assert ended
    assert threading.active_count() == threads
    assert not any(module._forward_pre_hooks for module in model)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_on_every_network(name: str) -> None:
    network = NETWORKS[name]
    model, x = network.traced(), network.inputs(24)
    batches = list(x.split(8))
    scores = fastscore.score(model, batches, ablation="mean", progress=False)
    result = fastscore.prune(model, scores, x[:1], channels=0.6)
    kept: dict[str, Any] = {key: value.clone() for key, value in result.model.state_dict().items()}
    with untouched(model):
        repaired = fastscore.reconstruct(model, result, batches, method="asymmetric")
    assert all(torch.equal(value, kept[key]) for key, value in result.model.state_dict().items())
    assert [row.name for row in repaired.report.repairs] == ["none", "asymmetric", "asymmetric"]
    assert torch.isfinite(repaired.model(x)).all()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in repaired.model.modules())
    assert repaired.report.params[1] == sum(parameter.numel() for parameter in repaired.model.parameters())


def test_held_out_samples_take_one_of_two_stiffnesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ridges of all layers, times one number; the last fit, on all samples, is as stiff as the best."""
    seen: list[tuple[str, dict[str, float]]] = []

    def spy(*args: Any) -> None:
        refit(*args)
        seen.append((args[4], dict(args[5])))

    monkeypatch.setattr(reconstruct, "refit", spy)
    network = NETWORKS["residual"]
    model, batches = network.traced(), list(network.inputs(24).split(8))
    scores = fastscore.score(model, batches, ablation="mean", progress=False)
    cut = fastscore.prune(model, scores, batches[0][:1], channels=0.6)
    for stiffnesses in ((1.0, 8.0), (1.0, 0.01)):
        monkeypatch.setattr(reconstruct, "STIFFNESSES", stiffnesses)
        seen.clear()
        rows = fastscore.reconstruct(model, cut, batches, method="asymmetric").report.repairs
        tried = [row for row in rows if row.name == "asymmetric"]
        assert [row.stiffness for row in tried] == list(stiffnesses)
        (best,) = (row for row in rows if row.chosen)
        assert best.kl == min(row.kl for row in tried)
        assert (f", stiffness {best.stiffness:g}:" in str(best)) == (best.stiffness != 1)
        (_, ridges), (_, other), (part, last) = seen
        assert part == "all"
        assert other == {name: stiffnesses[1] * ridge for name, ridge in ridges.items()}
        assert last == {name: best.stiffness * ridge for name, ridge in ridges.items()}
