"""reconstruct(), recalibrate() and prune(calibration=): what they promise, on whole networks."""

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NETWORKS
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.batches import call_model
from fastscore.pruning.report import PruneReport
from fastscore.recovery.divergence import divergence
from fastscore.recovery.recalibration import recalibrate_on
from fastscore.recovery.reconstruct import Method, _Bench

BUDGETS: dict[str, float] = {"channels": 0.6}


def trained_like(name: str, samples: int = 24) -> tuple[nn.Module, list[Tensor], fastscore.Scores]:
    network = NETWORKS[name]
    model, x = network.model(), network.inputs(samples)
    batches = list(x.split(8))
    return model, batches, fastscore.score(model, batches, ablation="mean", progress=False)


def kl(dense: nn.Module, smaller: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        return divergence(map(dense, batches), map(smaller, batches)).kl


@pytest.mark.parametrize("name", list(NETWORKS))
def test_every_network_is_repaired_and_the_model_given_stays(name: str) -> None:
    model, batches, scores = trained_like(name)
    with untouched(model):
        result = fastscore.prune(model, scores, batches[0][:1], calibration=batches, **BUDGETS)  # type: ignore[arg-type]
    rows = result.report.repairs
    assert rows[0].name == "none"
    assert {"mean", "linear"} <= {row.name for row in rows}
    (best,) = (row for row in rows if row.chosen)
    assert best.kl == min(row.kl for row in rows)
    assert result.report.params[1] == sum(parameter.numel() for parameter in result.model.parameters())
    assert torch.isfinite(result.model(batches[0])).all()
    assert PruneReport.of(asdict(result.report)) == result.report
    assert str(best) in str(result.report)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_the_mean_alone_is_mean_compensation(name: str) -> None:
    """Of all samples, whatever was held out on the way."""
    model, batches, scores = trained_like(name)
    compensated = fastscore.prune(model, scores, batches[0][:1], compensate=True, **BUDGETS)  # type: ignore[arg-type]
    bare = fastscore.prune(model, scores, batches[0][:1], compensate=False, **BUDGETS)  # type: ignore[arg-type]
    for result in (compensated, bare):  # a bias that is not there yet is made
        found = fastscore.reconstruct(model, result, batches, method="mean")
        assert found.new_biases == compensated.new_biases
        for (key, value), expected in zip(found.model.state_dict().items(), compensated.model.state_dict().values(),
                                          strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9, msg=key)


class Copies(nn.Module):
    """Of every group, the second half of the channels are linear functions of the first; several consumers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.left = nn.Conv2d(12, 4, 3, stride=2, padding=1, dilation=2)
        self.right = nn.Conv2d(12, 4, 1, bias=False)
        self.up = nn.ConvTranspose2d(12, 4, 3, stride=2)
        self.fc = nn.Linear(12, 5)
        with torch.no_grad():
            mix = torch.randn(6, 6) / 2
            self.stem.weight[6:] = torch.einsum("ab,b...->a...", mix, self.stem.weight[:6])
            self.stem.bias[6:] = mix @ self.stem.bias[:6]  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = [layer(x).tanh().mean((2, 3)) for layer in (self.left, self.right, self.up)]
        return self.fc(torch.cat(y, 1))


def with_lowest(scores: fastscore.Scores, group: str, channels: list[int]) -> fastscore.Scores:
    totals = {name: torch.ones_like(total) for name, total in scores.totals.items()}
    totals[group][..., channels] = 0
    return replace(scores, totals=totals)


def test_channels_that_others_tell_are_not_missed() -> None:
    torch.manual_seed(0)
    model = Copies().eval()
    batches = [torch.randn(8, 3, 8, 8) for _ in range(4)]
    scores = with_lowest(fastscore.score(model, batches, importance="magnitude-l2", progress=False), "stem",
                         list(range(6, 12)))
    result = fastscore.prune(model, scores, batches[0][:1], channels=0.75, cost_aware=False)
    assert result.removed["stem"].tolist() == list(range(6, 12))
    repaired = fastscore.reconstruct(model, result, batches, method="linear", ridges=(0.0,))
    with torch.no_grad():
        expected = model(batches[0])
        torch.testing.assert_close(repaired.model(batches[0]), expected, rtol=1e-5, atol=1e-5)
        assert (result.model(batches[0]) - expected).abs().max() > 1e-2


class TwoHeads(nn.Module):
    """An attention whose second head looks where the first does, at linear functions of what that sees."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 5)
        weight, bias, mix = self.attn.in_proj_weight, self.attn.in_proj_bias, torch.randn(4, 4)
        with torch.no_grad():
            nn.init.normal_(bias)
            for first in (0, 8):  # queries, keys
                weight[first + 4:first + 8], bias[first + 4:first + 8] = weight[first:first + 4], bias[first:first + 4]
            weight[20:], bias[20:] = mix @ weight[16:20], mix @ bias[16:20]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attn(x, x, x, need_weights=False)[0].tanh())


def test_a_head_that_another_tells_is_not_missed() -> None:
    torch.manual_seed(0)
    model, batches = TwoHeads().eval(), [torch.randn(8, 6, 8) for _ in range(4)]
    scores = with_lowest(fastscore.score(model, batches, progress=False), "attn", [4, 5, 6, 7])
    with untouched(model):
        result = fastscore.prune(model, scores, batches[0][:1], channels=0.75, cost_aware=False)
        repaired = fastscore.reconstruct(model, result, batches, method="linear", ridges=(0.0,))
    assert {name: index.tolist() for name, index in result.removed.items()} == {"attn": [4, 5, 6, 7]}
    with torch.no_grad():
        expected = model(batches[0])
        torch.testing.assert_close(repaired.model(batches[0]), expected, rtol=1e-5, atol=1e-5)
        assert (result.model(batches[0]) - expected).abs().max() > 1e-2


def test_an_infinite_ridge_is_the_mean() -> None:
    model, batches, scores = trained_like("residual")
    result = fastscore.prune(model, scores, batches[0][:1], **BUDGETS)  # type: ignore[arg-type]
    mean = fastscore.reconstruct(model, result, batches, method="mean").model(batches[0])
    linear = fastscore.reconstruct(model, result, batches, method="linear", ridges=(math.inf,)).model(batches[0])
    torch.testing.assert_close(linear, mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["linear", "auto"])
def test_the_result_does_not_depend_on_batch_sizes(method: Method) -> None:
    """But for BatchNorms, whose statistics are those of batches."""
    model, batches, scores = trained_like("tokens")
    outputs = []
    for size in (24, 5):
        again = list(torch.cat(batches).split(size))
        result = fastscore.prune(model, scores, batches[0][:1], calibration=again, repair=method,
                                 **BUDGETS)  # type: ignore[arg-type]
        outputs.append(result.model(batches[0]))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-6)


def test_in_steps_every_step_is_repaired_and_all_of_them_together_can_be() -> None:
    model, batches, _ = trained_like("residual")
    with untouched(model):
        result = fastscore.prune_iteratively(model, batches, steps=2, macs=0.5, calibration=batches, repair="linear",
                                             ablation="mean", progress=False)
        again = fastscore.reconstruct(model, result, batches, method="mean")
    assert [[row.name for row in report.repairs if row.chosen] for report in result.steps] == [["linear"], ["linear"]]
    assert isinstance(again, fastscore.IterativeResult)
    shapes = [{key: value.shape for key, value in each.model.state_dict().items()} for each in (result, again)]
    assert shapes[0] == shapes[1]


def test_in_place_the_model_itself_becomes_the_repaired_one() -> None:
    model, batches, scores = trained_like("residual")
    expected = fastscore.prune(model, scores, batches[0][:1], calibration=batches, **BUDGETS)  # type: ignore[arg-type]
    result = fastscore.prune(model, scores, batches[0][:1], calibration=batches, inplace=True,
                             **BUDGETS)  # type: ignore[arg-type]
    assert result.model is model
    assert list(model.state_dict()) == list(expected.model.state_dict())
    for key, value in expected.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0, msg=key)


def test_files_optimizers_and_modes_carry_the_repair(tmp_path: Path) -> None:
    model, batches, scores = trained_like("mobile")
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(batches[0]).sum().backward()
    optimizer.step()
    result = fastscore.prune(model, scores, batches[0][:1], calibration=batches, **BUDGETS)  # type: ignore[arg-type]
    assert all(module.training for module in result.model.modules())
    fastscore.save_pruned(result, tmp_path / "small.safetensors")
    loaded = fastscore.load_pruned(NETWORKS["mobile"].model, tmp_path / "small.safetensors")
    torch.testing.assert_close(loaded.eval()(batches[0]), copy.deepcopy(result.model).eval()(batches[0]))
    rebuilt = fastscore.rebuild_optimizer(optimizer, model, result)
    result.model(batches[0]).sum().backward()
    rebuilt.step()
    assert all(parameter.grad is not None for parameter in result.model.parameters())


# What is refused

class Shuffled:
    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        self.batches = self.batches[1:] + self.batches[:1]
        return iter(self.batches)


@pytest.mark.parametrize(("make", "error", "words"), [
    (lambda batches: [], ValueError, "calibration: there is no batch"),
    (lambda batches: [batches[0][:0]], ValueError, "calibration: there is no batch"),
    (lambda batches: [batches[0][:1]], ValueError, "calibration: 1 sample"),
    (iter, ValueError, "calibration: it can be read only once"),
    (lambda batches: batches[0], TypeError, "calibration: one tensor"),
    (lambda batches: [batch[:, :1] for batch in batches], ValueError, "calibration: the model cannot take"),
    (lambda batches: [batches[0] * math.nan, *batches[1:]], FloatingPointError, "NaN or infinity in what it reads"),
    (Shuffled, ValueError, "calibration: its first batch is another"),
])
@pytest.mark.parametrize("inplace", [False, True])
def test_what_cannot_calibrate_is_refused_before_anything_changes(make: Any, error: type[Exception], words: str,
                                                                   inplace: bool) -> None:
    model, batches, scores = trained_like("residual")
    with untouched(model), pytest.raises(error, match=words):
        fastscore.prune(model, scores, batches[0][:1], calibration=make(batches), inplace=inplace,
                        **BUDGETS)  # type: ignore[arg-type]


def test_arguments_that_contradict_each_other() -> None:
    model, batches, scores = trained_like("residual")
    x = batches[0][:1]
    with pytest.raises(ValueError, match=r"calibration: .*compensate=False"):
        fastscore.prune(model, scores, x, channels=0.6, calibration=batches, compensate=False)
    result = fastscore.prune(model, scores, x, channels=0.6)
    with pytest.raises(ValueError, match="method: 'none' is none of"):
        fastscore.reconstruct(model, result, batches, method="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model: "):
        fastscore.reconstruct(result.model, result, batches)
    with pytest.raises(TypeError, match=r"result: .*not its model alone"):
        fastscore.reconstruct(model, result.model, batches)  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"repair: 'linear' .*calibration=batches"):
        fastscore.prune(model, scores, x, channels=0.6, repair="linear")
    with pytest.raises(ValueError, match="repair: 'none' is none of"):
        fastscore.prune(model, scores, x, channels=0.6, repair="none", calibration=batches)  # type: ignore[arg-type]


def test_of_a_model_pruned_twice_the_first_dense_one_is_refused() -> None:
    """Its layers are wide enough for what went in the second step; the result would be another network."""
    model, batches, scores = trained_like("residual")
    first = fastscore.prune(model, scores, batches[0][:1], channels=0.8)
    again = fastscore.score(first.model, batches, ablation="mean", progress=False)
    second = fastscore.prune(first.model, again, batches[0][:1], channels=0.8)
    with untouched(model), pytest.raises(ValueError, match=r"model: .*the last prune\(\)"):
        fastscore.reconstruct(model, second, batches)
    assert fastscore.reconstruct(first.model, second, batches, "mean").report.channels == second.report.channels


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_what_stands_around_the_dense_model_is_seen_through(wrap: Any) -> None:
    model, batches, scores = trained_like("plain")
    result = fastscore.prune(wrap(model), scores, batches[0][:1], channels=0.6)
    inside, outside = (fastscore.reconstruct(each, result, batches, "linear") for each in (model, wrap(model)))
    assert torch.equal(inside.model(batches[0]), outside.model(batches[0]))


class Squeezing(nn.Module):
    """Drops the dimension of samples too, where there is one sample; without pooling, what a convolution reads."""

    def __init__(self, pool: bool) -> None:
        super().__init__()
        self.one, self.two, self.head, self.pool = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(6, 3), pool

    def forward(self, x: Tensor) -> Tensor:
        if self.pool:
            return self.head(self.two(self.one(x)).mean((2, 3), keepdim=True).squeeze())
        return self.head(self.two(self.one(x).squeeze()).mean((-1, -2)))


@pytest.mark.parametrize("pool", [False, True])
def test_a_sample_that_the_model_squeezes_away_is_named(pool: bool) -> None:
    """One is held out of each batch of four here. With as many channels as columns its rows would look alike.
    So few channels are left that every layer loses some."""
    model, x = Squeezing(pool), torch.randn(8, 3, 10, 10)
    scores = fastscore.score(model, [x], progress=False)
    with untouched(model), pytest.raises(ValueError, match=r"reads \[.*without a dimension for samples.*squeeze"):
        fastscore.prune(model, scores, x[:2], channels=0.4, calibration=x.split(4))


def test_under_inference_mode_the_smaller_model_can_be_trained() -> None:
    model, batches, scores = trained_like("residual")
    with torch.inference_mode():
        x = batches[0][:1].clone()
        quick = fastscore.prune(model, scores, x, channels=0.6)
        results = (quick, fastscore.prune(model, scores, x, channels=0.6, calibration=[b.clone() for b in batches]),
                   fastscore.reconstruct(model, quick, batches, "linear"))
    for result in results:
        result.model.train()(batches[0]).square().sum().backward()
        assert all(parameter.grad is not None for parameter in result.model.parameters())


class _Tables(nn.Module):
    """Positions in a buffer, and a head without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.register_buffer("positions", torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.positions
        return self.head(x + self.down(torch.relu(self.up(x))))


@pytest.mark.parametrize("method", ["mean", "linear", "asymmetric"])
@pytest.mark.parametrize("layer", ["embed", "up"])
def test_budgets_hold_after_repair_and_buffers_go_too(layer: str, method: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, batches = _Tables().double(), list(torch.randn(24, 4, 5, dtype=torch.float64).split(8))
    scores = fastscore.score(model, batches, progress=False)
    scores = replace(scores, totals={layer: scores.totals[layer]})
    result = fastscore.prune(model, scores, batches[0], params=0.9, calibration=batches, repair=method, progress=False)
    before, after = result.report.params
    assert after == sum(parameter.numel() for parameter in result.model.parameters()) <= 0.9 * before
    biased = {name for name, module in result.model.named_modules() if getattr(module, "bias", None) is not None}
    assert biased == {"embed", "up", "down"} | ({"head"} if layer == "embed" else set())
    assert result.model.positions.shape == (4, result.model.embed.out_features)


def test_a_model_with_other_layers_is_not_the_dense_one() -> None:
    model, batches = _Tables().double(), list(torch.randn(24, 4, 5, dtype=torch.float64).split(8))
    result = fastscore.prune(model, fastscore.score(model, batches, progress=False), batches[0], params=0.9)
    with pytest.raises(ValueError, match=r"not the dense one that the result was pruned from: .* is not there"):
        fastscore.reconstruct(nn.Sequential(nn.Linear(5, 20)).double(), result, batches)


def where_means_mislead() -> tuple[nn.Module, Tensor, fastscore.Scores]:
    """One sample that fits is far off in the channel that goes, which no other tells of: its mean misleads."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(96, 8)
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([0.1, *[1.0] * 7])))
    x[0] = torch.tensor([1e4, *[0.0] * 7])
    scores = fastscore.score(model, [x], importance="magnitude-l2", progress=False)
    return model, x, scores


def test_nothing_is_repaired_where_that_is_nearest() -> None:
    model, x, scores = where_means_mislead()
    report = fastscore.prune(model, scores, x, channels=0.9, calibration=[x], progress=False).report
    assert [row.name for row in report.repairs if row.chosen] == ["none"]


class _Doubled(nn.Module):
    """One layer runs with other weights than it holds, while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.func.functional_call(self.two, {"weight": self.two.weight * 2}, (self.one(x).relu(),))
        return self.head(x.relu().mean((2, 3)))


@pytest.mark.parametrize("method", ["auto", "asymmetric"])
def test_layers_that_run_with_other_weights_for_a_while_are_not_refitted(method: Method) -> None:
    """No repair is far from what it was judged to be, and the cut of a network with those weights for good is as far
    from the dense one."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = _Doubled().double().eval()
        batches = [torch.randn(4, 3, 6, 6, dtype=torch.float64) for _ in range(8)]
        scores = fastscore.score(model, batches[:1], progress=False)
        with untouched(model):
            result = fastscore.prune(model, scores, batches[0], macs=0.7, calibration=batches, repair=method,
                                     progress=False)
        rows = {row.name: row.kl for row in reversed(result.report.repairs)}
        assert max(rows.values()) < 10 * rows["none"]
        assert kl(model, result.model, batches) < 2 * min(rows["none"], max(row.kl for row in result.report.repairs
                                                                            if row.chosen))


@pytest.mark.parametrize("method", ["auto", "mean", "linear", "asymmetric"])
def test_what_is_returned_is_what_was_judged(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """A last fit that goes astray, as in a model that keeps something from call to call, is not returned."""
    model, batches, scores = trained_like("plain")
    cut = fastscore.prune(model, scores, batches[0][:1], channels=0.6)
    good = fastscore.reconstruct(model, cut, batches, method=method, progress=False)
    assert "last fit" not in good.report.notes
    fitted = _Bench._fitted

    def astray(self: Any, *args: Any) -> Any:
        result = fitted(self, *args)
        with torch.no_grad():
            for parameter in result.model.parameters():
                parameter.mul_(10)
        return result

    monkeypatch.setattr(_Bench, "_fitted", astray)
    found = fastscore.reconstruct(model, cut, batches, method=method, progress=False)
    assert found.report.repairs == good.report.repairs
    (chosen,) = (row for row in found.report.repairs if row.chosen)
    if chosen.name != "none":
        held_out = [x[torch.arange(8 * i, 8 * i + len(x)) % 4 == 1] for i, x in enumerate(batches)]
        assert kl(model, found.model, held_out) == pytest.approx(chosen.kl, rel=1e-6)
        assert f"against {chosen.kl:.3g}: what is returned was fitted without them" in found.report.notes["last fit"]


def test_a_repair_that_was_asked_for_and_harms_is_said() -> None:
    model, x, scores = where_means_mislead()
    with pytest.warns(UserWarning, match=r'repair: "mean" leaves a network further .* than the cut alone, KL .*"auto"'):
        fastscore.prune(model, scores, x, channels=0.9, calibration=[x], repair="mean", progress=False)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batches_of_which_one_sample_is_left_are_no_matter_to_batchnorms(size: int) -> None:
    """At one position, such a one has one value of each channel; the last of 5 has one from the start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    batches = list(torch.randn(16, 6).split(size))
    scores = fastscore.score(model, batches, progress=False)
    with untouched(model):
        result = fastscore.prune(model, scores, batches[0], channels=0.7, calibration=batches, progress=False)
    assert any(row.recalibrated for row in result.report.repairs) == (size > 1)
    assert torch.isfinite(result.model.eval()(batches[0])).all()


def test_batches_without_variance_do_not_count_in_a_recalibration() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Flatten(0), nn.Unflatten(0, (-1, 3)), nn.BatchNorm1d(3)).double()
    x = [torch.randn(n, 3, dtype=torch.float64) for n in (4, 1, 5)]
    expected = fastscore.recalibrate(copy.deepcopy(model), [x[0], x[2]]).state_dict()
    recalibrate_on(model, iter(x), call_model, None, leave_out_single=True)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
