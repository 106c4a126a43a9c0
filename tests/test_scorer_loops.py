"""Drop-in scores in the loops that people write, each against brute force in float64 or against the plain loop."""

import copy
import io
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, Group, Residual, randomize, straight
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import fastscore
from fastscore import Scorer, Scores
from fastscore.tracing import trace

RESIDUAL = NETWORKS["residual"]


def assert_same(one: Scores, other: Scores, tolerance: float = 1e-6) -> None:
    assert list(one) == list(other)
    for layer in one:
        assert float((one[layer] - other[layer]).abs().max()) <= tolerance * float(other[layer].max()), layer


def measured(model: nn.Module, *parts: Tensor, **options: Any) -> Scores:
    """The plain loop: one squared loss for each part."""
    scorer = Scorer(model, parts[0], **options)
    with scorer:
        for part in parts:
            model(part).square().sum().backward()
    model.zero_grad()
    return scorer.scores()


def brute_force(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """taylor-sq, normalised, of a model whose output is one tensor: mean over samples of (s / length)²."""
    z = model(x).detach().requires_grad_()
    (v,) = torch.autograd.grad(loss(z), z)
    length = v.flatten(1).norm(dim=1, keepdim=True)
    return {name: (oracles.sums(model, group, x, v) / length).square().mean(0)
            for name, group in RESIDUAL.groups.items()}


def assert_exact(scores: Scores, exact: dict[str, Tensor], prefix: str = "") -> None:
    for name, values in exact.items():
        torch.testing.assert_close(scores[prefix + name].double(), values, rtol=1e-6, atol=0)


# --- passes with infinite gradients


def test_a_pass_that_brings_infinity_is_left_out_and_counted() -> None:
    """Two ways for a loss scale to overflow: at the output, and on the way down, past a gradient that is fine."""
    model, x = RESIDUAL.model(), RESIDUAL.inputs(12)
    scorer = Scorer(model, x[:4])
    overflow = False

    def burst(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if overflow:
            output.register_hook(lambda gradient: gradient * 1e300 * 1e300)

    handle = model.block1.register_forward_hook(burst)
    with scorer:
        model(x[:4]).square().sum().backward()
        (model(x[4:8]).square().sum() * torch.inf).backward()
        overflow = True
        model(x[4:8]).square().sum().backward()
        overflow = False
        model(x[8:]).square().sum().backward()
    handle.remove()
    assert scorer.left_out == 2
    with pytest.warns(UserWarning, match=r"^2 backward passes brought NaN or infinity.*, the last at block1"):
        scores = scorer.scores()
    assert scores.samples == 8
    assert_same(scores, measured(model, x[:4], x[8:]), 0)
    again = Scorer(model, x[:4])
    again.load_state_dict(scorer.state_dict())
    assert again.left_out == 2
    with pytest.warns(UserWarning, match=r"^2 backward passes"):
        assert_same(again.scores(), scores, 0)


def test_where_every_pass_brings_infinity_there_are_no_scores() -> None:
    model, x = RESIDUAL.model(), RESIDUAL.inputs()
    scorer, again = Scorer(model, x), Scorer(model, x)
    with scorer:
        (model(x).sum() * torch.inf).backward()
    with pytest.raises(FloatingPointError, match=r"^the output: NaN or infinity"):
        scorer.scores()
    again.load_state_dict(scorer.state_dict())
    with pytest.raises(FloatingPointError, match=r"^every backward pass: NaN or infinity"):
        again.scores()


def test_a_probe_that_brings_infinity_is_left_out_and_the_next_one_counts() -> None:
    model, x = RESIDUAL.model(), RESIDUAL.inputs()
    scorer, plain = (Scorer(model, x, gradient="random", importance="taylor-abs") for _ in range(2))
    with scorer, plain:
        output = model(x)
        scorer.propagate(output, torch.full_like(output, torch.nan))
        scorer.propagate(output, output.detach())
        plain.propagate(output, output.detach())
    with pytest.warns(UserWarning, match=r"^1 backward pass"):
        scores = scorer.scores()
    assert scores.samples == 4
    assert_same(scores, plain.scores(), 0)


@pytest.mark.filterwarnings("ignore:.*brought NaN or infinity")
def test_gradient_scaler_skips_steps_and_scores_do_not_count_them() -> None:
    torch.manual_seed(0)
    model = randomize(Residual()).eval()
    x, y = RESIDUAL.inputs(8).float(), torch.arange(8) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=1000)
    scorer, skipped = Scorer(model, x), 0
    with scorer:
        for _ in range(26):
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scale = scaler.get_scale()
            scaler.update()
            optimizer.zero_grad()
            skipped += scaler.get_scale() < scale
            if scaler.get_scale() == scale:
                break
    assert skipped > 0
    assert scorer.left_out > 0
    plain = Scorer(model, x)
    with plain:
        F.cross_entropy(model(x), y).backward()
    assert_same(scorer.scores(), plain.scores(), 0.1)


# --- activation checkpointing


class Checkpointed(Residual):
    reentrant = True
    first = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = checkpoint(self.block1, x, use_reentrant=self.reentrant) if self.first else self.block1(x)
        return self.head(checkpoint(self.block2, x, use_reentrant=self.reentrant))


def checkpointed(reentrant: bool) -> nn.Module:
    model = Checkpointed().double().eval()
    model.load_state_dict(RESIDUAL.model().state_dict())
    model.reentrant = reentrant
    return model


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_measured(reentrant: bool) -> None:
    model, x = checkpointed(reentrant), RESIDUAL.inputs(6)
    assert trace(model, x).fingerprint == trace(RESIDUAL.model(), x).fingerprint
    assert_exact(measured(model, x), brute_force(RESIDUAL.model(), x, lambda z: z.square().sum()))
    assert_same(measured(model, x[:2], x[2:]), measured(RESIDUAL.model(), x[:2], x[2:]))
    assert_same(fastscore.score(model, [x], progress=False), fastscore.score(RESIDUAL.model(), [x], progress=False))


def test_two_passes_in_one_backward_pass_through_checkpoints() -> None:
    x = RESIDUAL.inputs(6)
    model = checkpointed(reentrant=False)
    scorer = Scorer(model, x)
    with scorer:
        (model(x[:2]).square().sum() + model(x[2:]).square().sum()).backward()
    assert_same(scorer.scores(), measured(RESIDUAL.model(), x[:2], x[2:]))
    model = checkpointed(reentrant=True)
    scorer = Scorer(model, x)
    with scorer:
        loss = model(x[:2]).square().sum() + model(x[2:]).square().sum()
        with pytest.raises(RuntimeError, match=r"covers 2 forward passes.*use_reentrant=False"):
            loss.backward()


def test_probes_through_checkpoints() -> None:
    x = RESIDUAL.inputs()
    model, reentrant, plain = checkpointed(reentrant=False), checkpointed(reentrant=True), RESIDUAL.model()
    scorer, expected = Scorer(model, x, gradient="random"), Scorer(plain, x, gradient="random")
    with scorer, expected:
        scorer.probe(model(x))
        expected.probe(plain(x))
    assert_same(scorer.scores(), expected.scores())
    scorer = Scorer(reentrant, x, gradient="random")
    with scorer:
        scorer.probe(reentrant(x))
    assert list(scorer.scores()) == ["block2.conv2"]  # behind the last checkpoint
    assert "use_reentrant=True" in scorer.scores().skipped["block1.conv1"]
    reentrant.first = False
    scorer = Scorer(reentrant, x, gradient="random")
    with scorer, pytest.raises(RuntimeError, match=r"use_reentrant=False"):
        scorer.probe(reentrant(x))


def test_a_gradient_penalty_through_checkpoints_is_no_training_step() -> None:
    model, x = checkpointed(reentrant=False), RESIDUAL.inputs().requires_grad_()
    scorer = Scorer(model, x.detach())
    with scorer:
        loss = model(x).square().sum()
        torch.autograd.grad(loss, x, retain_graph=True)
        loss.backward()
    assert_same(scorer.scores(), measured(RESIDUAL.model(), x.detach()))


# --- torch.compile


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Any:
    yield
    torch.compiler.reset()


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.ReLU(), nn.Linear(6, 5))
    return nn.Sequential(nn.Linear(3, 6), inner, nn.ReLU(), nn.Linear(5, 2)).double()


POINTS = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(("whole", "backend"), [(True, "eager"), (True, "aot_eager"), (False, "eager")])
def test_a_model_compiled_around_its_taps(whole: bool, backend: str) -> None:
    model, x = perceptron(), POINTS
    expected = measured(model, x[:3], x[3:])
    scorer = Scorer(model, x)
    running = torch.compile(model, backend=backend) if whole else model
    if not whole:
        model[1].compile(backend=backend)
    with scorer:
        for part in (x[:3], x[3:]):
            running(part).square().sum().backward()
    assert_same(scorer.scores(), expected)
    running(x).square().sum().backward()  # without the taps: no trace of them, no error
    assert scorer.scores().samples == 6


def test_probes_of_a_compiled_model() -> None:
    model, x = perceptron(), POINTS
    scorer, plain = (Scorer(model, x, gradient="random") for _ in range(2))
    with plain:
        plain.probe(model(x))
    with scorer:
        scorer.probe(torch.compile(model, backend="eager")(x))
    assert_same(scorer.scores(), plain.scores())
    model, x = RESIDUAL.model(), RESIDUAL.inputs()
    freeing = Scorer(model, x, gradient="random")
    with freeing, pytest.raises(RuntimeError, match=r"^output: torch\.compile .*donated_buffer = False"):
        freeing.probe(torch.compile(model, backend="aot_eager")(x))


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_that_was_compiled_and_ran_before_is_refused_at_its_first_backward_pass(whole: bool) -> None:
    model, x = perceptron(), POINTS
    running = torch.compile(model, backend="eager") if whole else model
    if not whole:
        model[1].compile(backend="eager")
    running(x).square().sum().backward()
    scorer = Scorer(model, x)
    layer = "3" if whole else "1.1"
    with scorer, pytest.raises(RuntimeError, match=rf"^{layer}: a backward pass reached its weight.*torch\.compiler"):
        running(x).square().sum().backward()
    with scorer:
        torch.compiler.reset()  # the way out that the message names
        running(x).square().sum().backward()
    assert_same(scorer.scores(), measured(perceptron(), x))


# --- copies and frozen parts


def test_an_average_of_the_model_taken_along() -> None:
    """An EMA, copied while the taps are on, updated, run, saved: it measures nothing and is an ordinary model."""
    model, x = RESIDUAL.model(), RESIDUAL.inputs(8)
    twin = copy.deepcopy(model)
    scorer = Scorer(model, x)
    runs: list[tuple[nn.Module, AveragedModel]] = []
    for net in (model, twin):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        if net is model:
            scorer.attach()
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        for part in x.split(4):
            net(part).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(net)
            average(part).sum().backward()
        runs.append((net, average))
    file = io.BytesIO()
    torch.save(runs[0][1].module, file)
    scorer.detach()
    assert scorer.scores().samples == 8
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    for ours, plain in zip(runs[0], runs[1], strict=True):
        for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(saved(x), runs[1][1](x))


class Backbone(nn.Module):
    """The first block frozen: by its parameters, or run without gradients while training."""

    def __init__(self, no_grad: bool) -> None:
        super().__init__()
        self.net, self.no_grad = RESIDUAL.model(), no_grad
        for part in (self.net.stem, self.net.block1):
            part.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not (self.training and self.no_grad)):
            x = self.net.block1(self.net.stem(x))
        return self.net.head(self.net.block2(x))


def test_frozen_parameters_are_scored_and_get_no_gradient() -> None:
    model, x = Backbone(no_grad=False), RESIDUAL.inputs(6)
    scorer = Scorer(model, x)
    with scorer:
        model(x).square().sum().backward()
    assert_exact(scorer.scores(), brute_force(RESIDUAL.model(), x, lambda z: z.square().sum()), "net.")
    assert all(parameter.grad is None for parameter in model.net.stem.parameters())
    assert all(parameter.grad is not None for parameter in model.net.block2.parameters())


def test_what_no_backward_pass_comes_to_has_no_score_and_says_why() -> None:
    model, x = Backbone(no_grad=True), RESIDUAL.inputs(6)
    assert model.training
    assert not model.net.training
    scorer = Scorer(model, x, importance="taylor-sq")
    with scorer:
        model(x).square().sum().backward()
    scores, exact = scorer.scores(), brute_force(RESIDUAL.model(), x, lambda z: z.square().sum())
    for group in ("stem.0", "block1.conv1"):  # block2 reads stem.0, too, but half a score would be none
        assert scores.skipped[f"net.{group}"].startswith("no backward pass came to net.block1.conv")
        exact.pop(group)
    assert set(scores) == {f"net.{group}" for group in exact}
    assert_exact(scores, exact, "net.")
    again = Scorer(model, x)
    again.load_state_dict(scorer.state_dict())
    assert again.scores().skipped == scores.skipped


# --- several outputs, several losses


class TwoHeads(nn.Module):
    """A main and an auxiliary head, as GoogLeNet and the segmentation networks have."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.net, self.shape = RESIDUAL.model(), shape
        self.aux = nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> Any:
        features = self.net.block1(self.net.stem(x))
        main, aux = self.net.head(self.net.block2(features)), self.aux(features.mean((2, 3)))
        if self.shape == "one tensor":
            return torch.cat([main, aux], 1)
        return {"dict": {"main": main, "aux": aux, "hidden": features}, "tuple": (main, aux)}[self.shape]


def two_heads(shape: str) -> TwoHeads:
    torch.manual_seed(3)
    return TwoHeads(shape)


def losses(main: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.arange(len(main)) % 3
    return F.cross_entropy(main, y), 0.4 * F.cross_entropy(aux, y)


def two_heads_exact(x: Tensor) -> dict[str, Tensor]:
    """Both outputs as one long one, whose gradient is of length 1 for each sample."""
    model = two_heads("one tensor")
    z = model(x).detach().requires_grad_()
    (v,) = torch.autograd.grad(sum(losses(z[:, :4], z[:, 4:])), z)
    exact = {}
    for name, group in RESIDUAL.groups.items():
        edges = {f"net.{layer}": at for layer, at in group.edges.items()}
        if name == "stem.0":
            edges["aux"] = straight(6)
        s = oracles.sums(model, Group(group.channels, edges), x, v) / v.norm(dim=1, keepdim=True)
        exact[f"net.{name}"] = s.square().mean(0)
    return exact


PICK: dict[str, Callable[[Any], list[Tensor]]] = {
    "dict": lambda returned: [returned["main"], returned["aux"]], "tuple": lambda returned: list(returned)}


@pytest.mark.parametrize("way", ["sum", "one after the other", "one backward call"])
@pytest.mark.parametrize("shape", ["dict", "tuple"])
def test_several_outputs_and_losses_are_one_long_output(shape: str, way: str) -> None:
    model, x = two_heads(shape), RESIDUAL.inputs(6)
    scorer = Scorer(model, x, output=PICK[shape])
    with scorer:
        main, aux = losses(*PICK[shape](model(x)))
        if way == "sum":
            (main + aux).backward()
        elif way == "one backward call":
            torch.autograd.backward([main, aux])
        else:
            main.backward(retain_graph=True)
            aux.backward()
    assert_exact(scorer.scores(), two_heads_exact(x))


def test_one_of_several_outputs() -> None:
    model, x = two_heads("dict"), RESIDUAL.inputs(6)
    scorer = Scorer(model, x, output=lambda returned: returned["main"])
    with scorer:
        model(x)["main"].square().sum().backward()
    scores, exact = scorer.scores(), brute_force(RESIDUAL.model(), x, lambda z: z.square().sum())
    assert "aux" in scores.skipped["net.stem.0"]  # the other head reads it as well
    exact.pop("stem.0")
    assert_exact(scores, exact, "net.")


@pytest.mark.parametrize("shape", ["dict", "tuple"])
def test_a_probe_of_several_outputs_is_one_of_all_of_them(shape: str) -> None:
    model, joined, x = two_heads(shape), two_heads("one tensor"), RESIDUAL.inputs(6)
    scorer = Scorer(model, x, output=PICK[shape], gradient="random")
    plain = Scorer(joined, x, gradient="random")
    with scorer, plain:
        scorer.probe(model(x))
        plain.probe(joined(x))
    assert_same(scorer.scores(), plain.scores())


def test_an_output_that_cannot_be_told_is_refused() -> None:
    model, x = two_heads("dict"), RESIDUAL.inputs(6)
    with oracles.untouched(model):
        with pytest.raises(TypeError, match=r"returns dict with \['main'\] \[6, 4\], \['aux'\].*output=lambda"):
            Scorer(model, x)
        with pytest.raises(TypeError, match=r"output=lambda"):
            Scorer(model, x, output=lambda returned: returned["main"].argmax(1))
        with pytest.raises(ValueError, match=r"output: its tensors have 6, 3 rows"):
            Scorer(model, x, output=lambda returned: [returned["main"], returned["aux"][:3]])


class WithLoss(nn.Module):
    """Computes its own loss, and hands out a copy of its output in another precision, as wrappers for autocast do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = RESIDUAL.model()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": logits.square().sum(), "logits": logits.float()}


def test_a_loss_from_inside_the_model_beside_a_copy_of_its_output() -> None:
    model, x = WithLoss(), RESIDUAL.inputs(6)
    scorer = Scorer(model, x)
    with scorer:
        model(x)["loss"].backward()
    assert_exact(scorer.scores(), brute_force(RESIDUAL.model(), x, lambda z: z.square().sum()), "net.")
