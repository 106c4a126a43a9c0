"""Drop-in scores of passes with infinite gradients, and beside copies and frozen parts, against brute force."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from loops import RESIDUAL, assert_exact, assert_same, brute_force, measured
from network_modules import Residual
from networks import randomize
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastscore import Scorer


def test_a_pass_that_brings_infinity_is_left_out_and_counted() -> None:
    """Two ways for a loss scale to overflow: at the output, and on the way down, past a gradient that is fine."""
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(12)
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
    model, x = RESIDUAL.traced(), RESIDUAL.inputs()
    scorer, again = Scorer(model, x), Scorer(model, x)
    with scorer:
        (model(x).sum() * torch.inf).backward()
    with pytest.raises(FloatingPointError, match=r"^the output: NaN or infinity"):
        scorer.scores()
    again.load_state_dict(scorer.state_dict())
    with pytest.raises(FloatingPointError, match=r"^every backward pass: NaN or infinity"):
        again.scores()


def test_a_probe_that_brings_infinity_is_left_out_and_the_next_one_counts() -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs()
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


def test_an_average_of_the_model_taken_along() -> None:
    """An EMA, copied while the taps are on, updated, run, saved: it measures nothing and is an ordinary model."""
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(8)
    copied = copy.deepcopy(model)
    scorer = Scorer(model, x)
    runs: list[tuple[nn.Module, AveragedModel]] = []
    for net in (model, copied):
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
        assert scores.skipped[f"net.{group}"].startswith("no gradient came to net.block1.conv")
        exact.pop(group)
    assert set(scores) == {f"net.{group}" for group in exact}
    assert_exact(scores, exact, "net.")
    again = Scorer(model, x)
    again.load_state_dict(scorer.state_dict())
    assert again.scores().skipped == scores.skipped


def test_what_comes_to_a_pass_after_another_has_begun_is_a_backward_pass_of_its_own() -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(6)
    scorer, apart = Scorer(model, x), RESIDUAL.traced()
    with scorer:
        first = model(x[:2])
        first.square().sum().backward(retain_graph=True)
        model(x[2:]).square().sum().backward()
        first[:, 0].sum().backward()
    expected = Scorer(apart, x)
    with expected:
        apart(x[:2]).square().sum().backward()
        apart(x[2:]).square().sum().backward()
        apart(x[:2])[:, 0].sum().backward()
    assert scorer.scores().samples == expected.scores().samples == 8
    assert_same(scorer.scores(), expected.scores())
    for one, other in zip(model.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_an_adversarial_step_counts_every_pass_of_the_model_that_judges() -> None:
    """Twice in a step, on what is made and on what is there, and once more for the maker, through frozen weights."""
    torch.manual_seed(0)
    model, apart, x = RESIDUAL.traced(), RESIDUAL.traced(), RESIDUAL.inputs(6)
    maker, z = nn.Linear(4, x[0].numel()).double(), torch.randn(6, 4, dtype=torch.float64)
    scorer, expected = Scorer(model, x), Scorer(apart, x)
    with scorer:
        made = maker(z).view_as(x)
        (model(x).square().sum() + model(made.detach()).sum()).backward()
        model.requires_grad_(False)
        model(made).square().sum().backward()
        model.requires_grad_(True)
    with expected:
        apart(x).square().sum().backward()
        apart(made.detach()).sum().backward()
        apart(made.detach()).square().sum().backward()
    assert scorer.scores().samples == 18
    assert_same(scorer.scores(), expected.scores())


def test_a_transform_of_torch_func_is_refused_and_leaves_what_was_measured() -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(6)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (one[None],)).square().sum()

    of_each = torch.func.vmap(torch.func.grad(loss), (None, 0))
    scorer = Scorer(model, x)
    with scorer:
        with pytest.raises(RuntimeError, match=r"torch\.func .*detach\(\)"):
            of_each(parameters, x)
        scorer.detach()  # the way out that is named
        of_each(parameters, x)
        scorer.attach()
        model(x).square().sum().backward()
    assert_exact(scorer.scores(), brute_force(RESIDUAL.model(), x, lambda z: z.square().sum()))
