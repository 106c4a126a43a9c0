"""reconstruct(), recalibrate() and prune(calibration=): what they promise, on whole networks."""

import copy
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NETWORKS
from oracles import untouched
from repairing import scored
from thinned import thinned
from torch import Tensor, nn

import fastscore
from fastscore.pruning.report import PruneReport
from fastscore.recovery.reconstruct import Method


@pytest.mark.parametrize("name", list(NETWORKS))
def test_every_network_is_repaired_and_the_model_given_stays(name: str) -> None:
    model, batches, scores = scored(name)
    with untouched(model):
        result = fastscore.prune(model, scores, batches[0][:1], calibration=batches, channels=0.6)
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
    model, batches, scores = scored(name)
    compensated = fastscore.prune(model, scores, batches[0][:1], compensate=True, channels=0.6)
    bare = fastscore.prune(model, scores, batches[0][:1], compensate=False, channels=0.6)
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
    model, batches, scores = scored("residual")
    result = fastscore.prune(model, scores, batches[0][:1], channels=0.6)
    mean = fastscore.reconstruct(model, result, batches, method="mean").model(batches[0])
    linear = fastscore.reconstruct(model, result, batches, method="linear", ridges=(math.inf,)).model(batches[0])
    torch.testing.assert_close(linear, mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["linear", "auto"])
def test_the_result_does_not_depend_on_batch_sizes(method: Method) -> None:
    """But for BatchNorms, whose statistics are those of batches."""
    model, batches, scores = scored("tokens")
    outputs = []
    for size in (24, 5):
        again = list(torch.cat(batches).split(size))
        result = fastscore.prune(model, scores, batches[0][:1], calibration=again, repair=method, channels=0.6)
        outputs.append(result.model(batches[0]))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-6)


def test_in_steps_every_step_is_repaired_and_all_of_them_together_can_be() -> None:
    model, batches, _ = scored("residual")
    with untouched(model):
        result = fastscore.prune_iteratively(model, batches, steps=2, macs=0.5, calibration=batches, repair="linear",
                                             ablation="mean", progress=False)
        again = fastscore.reconstruct(model, result, batches, method="mean")
    assert [[row.name for row in report.repairs if row.chosen] for report in result.steps] == [["linear"], ["linear"]]
    assert isinstance(again, fastscore.IterativeResult)
    shapes = [{key: value.shape for key, value in each.model.state_dict().items()} for each in (result, again)]
    assert shapes[0] == shapes[1]


def test_in_place_the_model_itself_becomes_the_repaired_one() -> None:
    model, batches, scores = scored("residual")
    expected = fastscore.prune(model, scores, batches[0][:1], calibration=batches, channels=0.6)
    result = fastscore.prune(model, scores, batches[0][:1], calibration=batches, inplace=True, channels=0.6)
    assert result.model is model
    assert list(model.state_dict()) == list(expected.model.state_dict())
    for key, value in expected.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0, msg=key)


def test_files_optimizers_and_modes_carry_the_repair(tmp_path: Path) -> None:
    model, batches, scores = scored("mobile")
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(batches[0]).sum().backward()
    optimizer.step()
    result = fastscore.prune(model, scores, batches[0][:1], calibration=batches, channels=0.6)
    assert all(module.training for module in result.model.modules())
    fastscore.save_pruned(result, tmp_path / "small.safetensors")
    loaded = fastscore.load_pruned(NETWORKS["mobile"].model, tmp_path / "small.safetensors")
    torch.testing.assert_close(loaded.eval()(batches[0]), copy.deepcopy(result.model).eval()(batches[0]))
    rebuilt = fastscore.rebuild_optimizer(optimizer, model, result)
    result.model(batches[0]).sum().backward()
    rebuilt.step()
    assert all(parameter.grad is not None for parameter in result.model.parameters())


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_what_stands_around_the_dense_model_is_seen_through(wrap: Any) -> None:
    model, batches, scores = scored("plain")
    result = fastscore.prune(wrap(model), scores, batches[0][:1], channels=0.6)
    inside, outside = (fastscore.reconstruct(each, result, batches, "linear") for each in (model, wrap(model)))
    assert torch.equal(inside.model(batches[0]), outside.model(batches[0]))


def test_under_inference_mode_the_smaller_model_can_be_trained() -> None:
    model, batches, scores = scored("residual")
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


@pytest.mark.parametrize(("method", "layer"), thinned(["mean", "linear", "asymmetric"], ["embed", "up"]))
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
