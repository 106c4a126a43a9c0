"""BatchNorms folded into the layers before them: what can be, is, and to rounding; what cannot be stays, and says why.
"""

import pytest
import torch
import torch.nn.functional as F
from computed_elsewhere import computed_elsewhere
from networks import randomize
from oracles import untouched
from torch import Tensor, nn
from torch.nn.utils import weight_norm
from torch.nn.utils.parametrizations import weight_norm as weight_parametrization

import fastscore
from fastscore import Scorer, Scores
from fastscore.fastpath.folding import Folding
from fastscore.modules.evaluation_copy import evaluation_copy


def plain_pass(model: nn.Module, x: Tensor) -> Scores:
    """The scores of score(), from hooks on the model as it is."""
    model.eval()
    scorer = Scorer(model, x[:1], gradient="random")
    with scorer:
        scorer.probe(model(x))
    return scorer.scores()


def assert_scored_as_it_is(model: nn.Module, x: Tensor) -> Scores:
    with untouched(model):
        fast = fastscore.score(model, [x], progress=False)
    plain = plain_pass(model, x)
    assert list(fast) == list(plain)
    for layer in plain:
        assert plain[layer].count_nonzero() > 0
        torch.testing.assert_close(fast[layer].double(), plain[layer].double(), rtol=1e-5, atol=0)
    return fast


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def classifier(*layers: nn.Module, channels: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return randomize(nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(channels, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                                   nn.Flatten(), nn.Linear(5, 4))).double().eval()


LAYERS = {
    "convolution": nn.Conv2d(3, 6, 3, stride=2, bias=False),
    "convolution with bias": nn.Conv2d(3, 6, 3, bias=True),
    "grouped": nn.Conv2d(3, 6, 3, groups=3),
    "transposed": nn.ConvTranspose2d(3, 6, 3, stride=2),
    "grouped transposed": nn.ConvTranspose2d(3, 6, 3, stride=2, groups=3, bias=False),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", list(LAYERS))
def test_a_folded_layer_puts_out_what_layer_and_norm_did(name: str, affine: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[name], nn.BatchNorm2d(6, affine=affine)).double().eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    eval_model, x = evaluation_copy(model), inputs(2, 3, 7, 7)
    with untouched(model):
        folding = Folding(eval_model, {"0": "1"}, ())
        torch.testing.assert_close(eval_model(x), model(x), rtol=1e-12, atol=1e-12)
        assert folding.folded == {"1": "0"}
        assert not torch.equal(eval_model[0](x), model[0](x))
        folding.undo("because")
        assert torch.equal(eval_model(x), model(x))
        assert torch.equal(eval_model[0](x), model[0](x))
    assert folding.not_folded == {"1": "because"}


def test_a_linear_takes_its_batchnorm_where_both_work_on_channels() -> None:
    torch.manual_seed(0)
    model = randomize(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6, bias=False),
                                    nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))).double()
    scores = assert_scored_as_it_is(model, inputs(6, 5))
    assert scores.plan.folded == {"1": "0", "4": "3"}
    assert not scores.plan.not_folded


class Tokens(nn.Module):
    """A BatchNorm over tokens, as many as the Linear before it has channels."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down, self.head = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.down(F.relu(self.norm(self.up(x))))).mean(1))


def test_a_batchnorm_over_tokens_is_not_folded_into_a_linear() -> None:
    torch.manual_seed(0)
    scores = assert_scored_as_it_is(randomize(Tokens()).double(), inputs(3, 7, 5))
    assert not scores.plan.folded


class WithActivation(nn.BatchNorm2d):
    """A BatchNorm that does more, as some libraries have."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(super().forward(x))


class Counting(nn.BatchNorm2d):
    """A BatchNorm that keeps an account."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize(("norm", "reason"), [
    (WithActivation(6), "comes before"), (Counting(6), "Counting may do more"),
    (nn.BatchNorm2d(6, track_running_stats=False), "no running statistics")])
def test_a_batchnorm_that_is_not_affine_or_may_not_be_stays(norm: nn.Module, reason: str) -> None:
    scores = assert_scored_as_it_is(classifier(nn.Conv2d(3, 6, 3), norm), inputs(4, 3, 8, 8))
    assert reason in scores.plan.not_folded["1"]
    assert reason in str(scores.plan)


def test_hooks_of_the_users_are_kept_and_their_layers_not_folded() -> None:
    """A hook that bends what the norm puts out changes the scores as it changes the model."""
    model, x = classifier(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), inputs(4, 3, 8, 8)
    without = assert_scored_as_it_is(model, x)
    assert without.plan.folded == {"1": "0"}
    watch = model[1].register_forward_hook(lambda module, args, output: None)
    watched = assert_scored_as_it_is(model, x)
    assert "hooks" in watched.plan.not_folded["1"]
    torch.testing.assert_close(watched["0"], without["0"])
    watch.remove()
    model[1].register_forward_hook(lambda module, args, output: output.tanh())
    changed = assert_scored_as_it_is(model, x)
    assert not changed.plan.folded
    assert not torch.allclose(changed["0"], without["0"])


def test_hooks_on_gradients_act_in_the_fast_pass_as_they_do_in_the_model() -> None:
    model, x = classifier(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), inputs(4, 3, 8, 8)
    without = plain_pass(model, x)
    model[3].register_full_backward_hook(lambda module, sent, received: (sent[0] * 3,))
    hooked = assert_scored_as_it_is(model, x)
    torch.testing.assert_close(hooked["0"], 9 * without["0"])


class Twice(nn.Module):
    """The same modules under two names and in a list, called by the last of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.alias, self.path = self.conv, [self.conv, self.norm]
        self.last, self.head = nn.Conv2d(6, 5, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.path:
            x = module(x)
        return self.head(F.relu(self.last(F.relu(x))).mean((2, 3)))


def test_modules_that_are_called_by_another_name_are_folded_there_too() -> None:
    torch.manual_seed(0)
    scores = assert_scored_as_it_is(randomize(Twice()).double(), inputs(4, 3, 8, 8))
    assert list(scores.plan.folded) == ["norm"]


class Tied(nn.Module):
    """A decoder that reads the encoder's weight, without a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.middle, self.back = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.back(F.relu(self.middle(F.relu(self.norm(self.encoder(x))))))
        return F.conv_transpose2d(x, self.encoder.weight).flatten(1)


def test_what_folding_would_change_elsewhere_is_not_folded() -> None:
    torch.manual_seed(0)
    model = randomize(Tied()).double()
    scores = assert_scored_as_it_is(model, inputs(4, 3, 8, 8))
    assert "middle" in scores
    assert scores.plan.not_folded == {"norm": "the model's output was another one afterwards"}


class SharedConvolution(nn.Module):
    """A convolution called twice, each time with a BatchNorm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4)
        self.shared = nn.Conv2d(6, 6, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(6)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for norm in self.norms:
            x = F.relu(norm(self.shared(x)))
        return self.head(x.mean((2, 3)))


def test_a_convolution_that_is_called_twice_is_not_folded() -> None:
    torch.manual_seed(0)
    scores = assert_scored_as_it_is(randomize(SharedConvolution()).double(), inputs(4, 3, 8, 8))
    assert not scores.plan.folded


@pytest.mark.parametrize("computed", [weight_norm, weight_parametrization])
def test_a_weight_that_is_computed_from_rows_alone_is_folded_as_what_it_is(computed) -> None:
    model = classifier(computed(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3))
    scores = assert_scored_as_it_is(model, inputs(4, 3, 9, 9))
    assert scores.plan.folded == {"1": "0"}
    assert list(scores) == ["0", "3", "5"]


def test_computed_weights_are_left_alone_and_the_others_are_scored() -> None:
    """A group that such a weight makes or reads has a reason instead of a score."""
    model = classifier(computed_elsewhere(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3))
    scores = assert_scored_as_it_is(model, inputs(4, 3, 9, 9))
    assert "computes" in scores.skipped["0"]
    assert "computed" in scores.plan.not_folded["1"]
    assert list(scores) == ["3", "5"]


class Rounded(torch.autograd.Function):
    """A gradient of the user's own: straight through a rounding."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return 2 * g


class Quantized(nn.Module):
    """Rounds what it is given, by a function of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return Rounded.apply(x)


def test_gradients_of_the_models_own_are_sent_back_as_it_sends_them() -> None:
    torch.manual_seed(0)
    model = classifier(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), Quantized())
    assert_scored_as_it_is(model, inputs(4, 3, 8, 8))


@pytest.mark.parametrize("activation", [nn.ReLU6, lambda inplace: nn.Hardtanh(-0.5, 0.7, inplace=inplace)])
def test_clamps_in_place_stop_the_gradient_where_pytorchs_do(activation) -> None:
    x = inputs(4, 3, 8, 8)
    scores = []
    for inplace in (True, False):
        torch.manual_seed(0)
        model = classifier(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), activation(inplace=inplace))
        scores.append(assert_scored_as_it_is(model, 4 * x))
    for layer in scores[0]:
        assert torch.equal(scores[0][layer], scores[1][layer])
