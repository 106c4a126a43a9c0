"""distill(): against known optima, and what it must leave alone."""

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decisive import IMAGES, QUIET, network, pruned, same, seeded, state
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastscore
from fastscore.recovery.distillation import distill
from fastscore.recovery.distillation_run import Objective
from fastscore.recovery.held_out import held_out_rows
from fastscore.recovery.training_batches import ENOUGH, HELD_OUT, TrainingBatches


class Fewer(nn.Module):
    """A linear layer that reads the first `inputs` features alone."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs).double()
        self.inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[:, :self.inputs])


def test_a_linear_network_ends_at_the_least_squares_solution() -> None:
    dense = seeded(lambda: nn.Linear(6, 3).double())
    smaller = seeded(lambda: Fewer(4, 3), 1)
    x = seeded(lambda: torch.randn(64, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) / 3 + 0.5)
    report = distill(dense, smaller, [x], held_out=[x], steps=600, loss=F.mse_loss, optimizer="sgd", lr=0.2, **QUIET)
    rows = torch.cat([x[:, :4], torch.ones(64, 1, dtype=torch.float64)], 1)
    optimum = torch.linalg.lstsq(rows, dense(x)).solution
    torch.testing.assert_close(smaller.linear.weight.T, optimum[:4], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(smaller.linear.bias, optimum[4], atol=1e-3, rtol=1e-3)
    least = F.mse_loss(rows @ optimum, dense(x)).item()
    assert least <= report.best.judged < least * (1 + 1e-4)
    assert math.isnan(report.best.kl)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_the_smaller_network_can_say_it_learns_to_say(temperature: float, optimizer: Any) -> None:
    """Equal networks but for their start: the optimum is zero, and the weights equal but for a shift of all logits."""
    dense, smaller = (seeded(lambda: nn.Linear(6, 3), seed) for seed in (0, 1))
    x = seeded(lambda: 2 * torch.randn(256, 6))
    report = distill(dense, smaller, x.split(64), steps=300, temperature=temperature, optimizer=optimizer,
                     lr={"sgd": 0.5, "adamw": 0.1}[optimizer], patience=None, **QUIET)
    assert report.looks[0].kl > 0.05
    assert report.best.kl < 1e-6
    apart = smaller.weight - dense.weight
    assert (apart - apart.mean(0)).abs().max() < 5e-3


@pytest.mark.parametrize("shape", [(4, 7), (4, 3, 7), (4, 7, 2, 3), (4,), (4, 1)])
def test_the_loss_is_the_divergence_at_a_temperature(shape: tuple[int, ...]) -> None:
    got, expected = (seeded(lambda: 3 * torch.randn(shape, dtype=torch.float64), seed) for seed in (0, 1))
    loss = Objective(None, 2.5, None, 1.0)({"": got}, {"": expected})  # type: ignore[arg-type]

    def decisions(x: Tensor) -> list[Tensor]:
        if len(shape) == 1 or shape[1] == 1:
            return [torch.stack([torch.zeros(()).double(), value]) for value in x.flatten()]
        rows = x.permute(0, 2, 3, 1) if len(shape) == 4 else x
        return list(rows.reshape(-1, 7))

    total = 0.0
    for p, q in zip(decisions(expected), decisions(got), strict=True):
        p, q = ((z / 2.5).exp() / (z / 2.5).exp().sum() for z in (p, q))
        total += float((p * (p / q).log()).sum())
    assert float(loss) == pytest.approx(2.5 ** 2 * total / len(decisions(got)), rel=1e-12)


def test_a_pruned_network_is_nearer_to_the_dense_one_and_nothing_else_changes() -> None:
    model, result = pruned()
    model.train()
    result.model.train()
    result.model[1].eval()
    result.model[0].weight.grad = torch.ones_like(result.model[0].weight)
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    dense, before, modes = state(model), state(result.model), [m.training for m in result.model.modules()]
    random_numbers = torch.get_rng_state()
    with torch.inference_mode():
        report = distill(model, result, list(IMAGES.split(16)), steps=60, lr=0.003, **QUIET)
    assert report.best.kl < 0.5 * report.looks[0].kl
    assert same(state(model), dense)
    assert all(module.training for module in model.modules())
    assert [dict(module._forward_hooks) for module in model.modules()] == hooks
    assert not same(state(result.model), before)
    assert [m.training for m in result.model.modules()] == modes
    assert torch.equal(result.model[0].weight.grad, torch.ones_like(result.model[0].weight))
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert f"{report.best.kl:.3g}  best" in str(report)
    judges = sum(len(batch) for batch in TrainingBatches(list(IMAGES.split(16)), None, 0).judges())
    assert f"judged by {judges} decisions about samples that it is not trained on" in str(report)
    assert judges == report.best.decisions > 0
    assert [line.split()[1] for line in str(report).splitlines()[1:3]] == ["-", f"{report.looks[1].loss:.4g}"]
    assert "nothing better than the start" not in str(report)


def test_the_distilled_network_is_saved_and_loaded(tmp_path: Any) -> None:
    model, result = pruned()
    distill(model, result.model, IMAGES.split(32), steps=5, **QUIET)
    fastscore.save_pruned(result, tmp_path / "small.safetensors")
    loaded = fastscore.load_pruned(network, tmp_path / "small.safetensors")
    assert same(state(loaded), state(result.model))


class Unreadable:
    """A label that nobody may look at."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return object.__getattribute__(self, name)
        raise AssertionError(f"a label was read: {name}")


def test_labels_are_never_read() -> None:
    ends = []
    for batches in ([(x, Unreadable()) for x in IMAGES.split(32)], IMAGES.split(32),
                    DataLoader(TensorDataset(IMAGES, torch.full([96], math.nan)), 32)):
        model, result = pruned()
        distill(model, result, batches, held_out=[(IMAGES[:8], Unreadable())], steps=6, **QUIET)
        ends.append(state(result.model))
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


def test_frozen_parameters_stay() -> None:
    model, result = pruned()
    result.model[3].requires_grad_(False)
    frozen = state(result.model[3])
    distill(model, result, IMAGES.split(32), steps=6, **QUIET)
    assert same(state(result.model[3]), frozen)


def test_the_weights_that_were_best_are_kept() -> None:
    """Learning far too fast is worse than nothing, and so nothing is what remains."""
    model, result = pruned()
    before = state(result.model)
    report = distill(model, result, IMAGES.split(32), steps=12, optimizer="sgd", lr=30.0, warmup=0.0, looks=4, **QUIET)
    assert [look.step for look in report.looks] == [0, 3, 6, 9, 12]
    assert all(look.kl > report.best.kl for look in report.looks[1:])
    assert same(state(result.model), before)
    assert str(report).endswith("nothing better than the start was found: the weights are as they were")
    kept = distill(model, result, IMAGES.split(32), steps=60, lr=0.003, **QUIET).best
    judges = TrainingBatches(IMAGES.split(32), None, 0).judges()
    with torch.no_grad():
        p, q = (torch.cat([net.eval()(x[0] if isinstance(x, tuple) else x) for x in judges]).double().log_softmax(1)
                for net in (model, result.model))
    assert kept.kl == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-9)
    assert kept.agreement == float((p.argmax(1) == q.argmax(1)).double().mean())


def test_it_stops_where_nothing_gets_better() -> None:
    model = network()
    def never_better(got: Tensor, expected: Tensor) -> Tensor:
        return 0 * F.mse_loss(got, expected)

    report = distill(model, copy.deepcopy(model), IMAGES.split(32), steps=40, looks=20, patience=3, loss=never_better,
                     **QUIET)
    assert (report.best.step, report.steps, report.planned) == (0, 8, 40)
    said = "stopped after 8 of 40 steps: held-out samples saw nothing better"
    assert str(report).endswith(said)
    assert repr(report) == f"<DistillationReport: {len(report.looks)} rows; best after 0 of 8 steps>"
    assert said in report._repr_html_()
    assert list(report.to_pandas()["step"]) == [look.step for look in report.looks]
    whole = distill(model, copy.deepcopy(model), IMAGES.split(32), steps=10, patience=None, loss=never_better, **QUIET)
    assert whole.steps == 10


class Watched(nn.Module):
    """Keeps the images that it was trained on and judged by."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen: dict[bool, set[float]] = {True: set(), False: set()}
        self.batches: list[list[float]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen[self.training] |= set(x[:, 0, 0, 0].tolist())
        if self.training:
            self.batches.append(x[:, 0, 0, 0].tolist())
        return self.inner(x)


@pytest.mark.parametrize("batch_size", [7, 16, 96])
def test_no_sample_is_both_trained_on_and_judged_by(batch_size: int) -> None:
    images = seeded(lambda: torch.randn(400, 3, 2, 2), 3)
    smaller = Watched(network(1, 8))
    loader = DataLoader(TensorDataset(images), batch_size, shuffle=True)
    distill(network(), smaller, loader, steps=math.ceil(400 / batch_size) * 2, looks=2, **QUIET)
    trained, judged = smaller.seen[True], smaller.seen[False]
    assert not trained & judged
    assert 0.5 < len(judged) * HELD_OUT / 400 < 1.6
    assert len(trained | judged) > 400 - 8  # but for a last batch too small for a BatchNorm
    in_order = TrainingBatches(images.split(50), None, 0).judges()
    assert {value for (x,) in [b if isinstance(b, tuple) else (b,) for b in in_order]
            for value in x[:, 0, 0, 0].tolist()} == judged
    first, second = smaller.batches[0], smaller.batches[math.ceil(400 / batch_size)]
    assert first != second  # shuffled anew


@pytest.mark.parametrize("count", [3, 5, 16])
def test_some_of_a_few_samples_judge_too(count: int) -> None:
    """By chance none of them may be among the one of eight."""
    few = [images for seed in range(200)
           if not held_out_rows(images := seeded(partial(torch.randn, count, 3, 2, 2), seed), HELD_OUT).any()
           and 0 < held_out_rows(images, 2).sum() < count - 1]
    assert few
    for images in few[:4]:
        smaller = Watched(network(1, 8))
        distill(network(), smaller, DataLoader(TensorDataset(images), count, shuffle=True), steps=2, looks=1, **QUIET)
        trained, judged = smaller.seen[True], smaller.seen[False]
        assert trained
        assert judged
        assert not trained & judged
        assert trained | judged == set(images[:, 0, 0, 0].tolist())


@pytest.mark.parametrize(("count", "held_out", "said"), [
    (1, 0, "they hold 1 sample, of which, by what they hold, none is held out"),
    (3, 0, "they hold 3 samples, of which, by what they hold, none is held out"),
    (1, 1, "they hold 1 sample, of which, by what they hold, all are held out"),
    (2, 2, "they hold 2 samples, of which, by what they hold, all are held out"),
    (2, 1, "none has 2 samples to train on, as BatchNorm needs: 1 of 2 samples judges and is not trained on"),
    (4, 3, "none has 2 samples to train on, as BatchNorm needs: 3 of 4 samples judge and are not trained on")])
def test_too_few_samples(count: int, held_out: int, said: str) -> None:
    """They are told by content, so that of a few none may judge, or all; of as many as the error asks for, some do."""
    few = next(images for seed in range(200)
               if held_out_rows(images := seeded(partial(torch.randn, count, 3, 2, 2), seed), 2).sum() == held_out
               and not held_out_rows(images, 4).any())
    smaller = network(1, 8)
    before = state(smaller)
    with pytest.raises(ValueError, match=rf"^batches: {said}.* {ENOUGH} or more.*, or held_out=$"):
        distill(network(), smaller, [few], steps=2, **QUIET)
    assert same(state(smaller), before)
    distill(network(), smaller, [IMAGES[:ENOUGH]], steps=2, **QUIET)
    distill(network(), smaller, [few.repeat(2, 1, 1, 1)], held_out=[few], steps=2, **QUIET)
    with pytest.raises(ValueError, match=r"as BatchNorm needs: give larger ones$"):
        distill(network(), smaller, [few[:1]], held_out=[few], steps=2, **QUIET)


def test_held_out_samples_of_ones_own() -> None:
    smaller = Watched(network(1, 8))
    distill(network(), smaller, [IMAGES[:64]], held_out=[IMAGES[64:]], steps=2, looks=1, **QUIET)
    assert smaller.seen[True] == set(IMAGES[:64, 0, 0, 0].tolist())
    assert smaller.seen[False] == set(IMAGES[64:, 0, 0, 0].tolist())


def test_not_a_number_is_named_and_the_network_comes_back() -> None:
    model, result = pruned()
    before = state(result.model)
    with pytest.raises(FloatingPointError, match=r"loss: nan by step 3; an lr below 0\.03 may help"):
        distill(model, result, [IMAGES[:32], IMAGES[32:64] * math.nan], held_out=[IMAGES[64:]], steps=6, looks=2,
                **QUIET)
    assert same(state(result.model), before)

    def stop(got: Tensor, expected: Tensor) -> Tensor:
        if result.model.training and not same(state(result.model), before):
            raise KeyboardInterrupt
        return F.mse_loss(got, expected)

    with pytest.raises(KeyboardInterrupt):
        distill(model, result, IMAGES.split(32), steps=6, loss=stop, **QUIET)
    assert same(state(result.model), before)
    assert not any(module.training for module in result.model.modules())


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"steps": 0}, ValueError, "steps: 0; it must be 1 or more"),
    ({"looks": 0}, ValueError, "looks: 0; it must be 1 or more"),
    ({"patience": 0}, ValueError, "patience: 0; it must be 1 or more"),
    ({"temperature": 0.0}, ValueError, "temperature: 0.0; it must be above 0$"),
    ({"feature_weight": -1}, ValueError, "feature_weight: -1; it must be 0 or more"),
    ({"clip": 0.0}, ValueError, "clip: 0.0; it must be above 0, or None"),
    ({"warmup": 1.0}, ValueError, r"warmup: 1.0 is outside \[0, 1\)"),
    ({"precision": "float64"}, ValueError, "precision: 'float64' is none of None, 'bfloat16', 'float16'"),
    ({"optimizer": "adam"}, ValueError, "optimizer: 'adam' is none of 'sgd', 'adamw'"),
    ({"lr": -1.0}, ValueError, "lr: -1.0; it must be above 0"),
    ({"lr": 0.1, "optimizer": torch.optim.SGD}, ValueError, "lr: an optimizer of your own brings its own"),
    ({"features": ["nothing"]}, ValueError, "features: the dense network has no module 'nothing'"),
    ({"batches": IMAGES}, TypeError, "batches: one tensor, where an iterable of batches is meant"),
    ({"batches": iter([IMAGES])}, ValueError, "batches: it can be read only once"),
    ({"batches": []}, ValueError, "batches: there is none, or none that holds a sample"),
    ({"batches": [IMAGES[:0]]}, ValueError, "batches: there is none, or none that holds a sample"),
    ({"batches": ["text"]}, TypeError, "batches: .*, where a batch is meant"),
    ({"batches": IMAGES[:2].split(1), "held_out": [IMAGES]}, ValueError, "batches: none has 2 samples to train on"),
    ({"held_out": IMAGES}, TypeError, "held_out: one tensor"),
    ({"held_out": []}, ValueError, "held_out: the batches that judge hold no sample"),
])
def test_what_cannot_be_is_refused_before_anything_changes(options: dict[str, Any], error: type[Exception],
                                                           message: str) -> None:
    model, result = pruned()
    before = state(result.model)
    with pytest.raises(error, match=message):
        distill(model, result, **{"batches": IMAGES.split(32), "steps": 4, **QUIET, **options})
    assert same(state(result.model), before)
    assert not any(module.training for module in result.model.modules())


def test_networks_that_cannot_learn_from_each_other() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"smaller: 0\.weight shares its memory with the dense model"):
        distill(model, model, IMAGES.split(32), **QUIET)
    with pytest.raises(ValueError, match="smaller: all its parameters are frozen"):
        distill(model, network(1).requires_grad_(False), IMAGES.split(32), **QUIET)
    other = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
    with pytest.raises(ValueError, match=r"smaller: it returns \[\d+, 3\] where the dense network returns \[\d+, 5\]"):
        distill(model, other, IMAGES.split(32), **QUIET)
