"""Clamps and taps fused into layers: where only a clamp reads a layer, and the scores are those of plain hooks."""


import pytest
import torch
import torch.nn.functional as F
from computed_elsewhere import computed_elsewhere
from networks import NETWORKS, randomize
from oracles import untouched
from test_folding import plain_pass
from thin_members import PACKED, THIN
from thinned import NIGHTLY, thinned
from torch import Tensor, nn

import fastscore
from fastscore import Scorer, Scores
from fastscore.fastpath.packed_layers import ClampBounds

RELU: ClampBounds = (0.0, float("inf"))


def images(samples: int = 4, size: int = 12, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def assert_scored_as_by_hooks(model: nn.Module, x: Tensor, bound: float = 1e-4, **options: object) -> Scores:
    """In float32, to `bound` of a layer's largest score."""
    model = model.float().eval()
    with untouched(model):
        fast = fastscore.score(model, [x], progress=False, **options)
    plain = plain_pass(model, x)
    assert list(fast) == list(plain)
    for layer in plain:
        assert plain[layer].count_nonzero() > 0
        assert float((fast[layer] - plain[layer]).abs().max()) <= bound * float(plain[layer].max()), layer
    return fast


class Net(nn.Module):
    """Layers that readers share in ways of their own; `forward` is each subclass's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.relu, self.copying = nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.ReLU()
        self.three, self.fc = nn.Conv2d(6, 5, 1), nn.Linear(5, 4)
        randomize(self)

    def head(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.three(x)).mean((2, 3)))


class Chain(Net):
    """One module for both clamps, as torchvision's residual blocks have it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.norm(self.two(self.relu(self.one(x))))))


class Residual(Net):
    """The clamp's output goes into a layer and into a sum; the sum is clamped in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.one(x))
        y = self.norm(self.two(x))
        y += x
        return self.head(self.relu(y))


class TwoReaders(Net):
    """Something else reads what the clamp reads."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.head(self.copying(self.two(self.copying(x))) + x)


class ReadBefore(Net):
    """Something else reads it before it is clamped in place, and keeps nothing that autograd would miss."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        doubled = 2 * x
        return self.head(self.relu(self.two(self.relu(x))) + doubled)


class Changed(Net):
    """The layer's output is changed in place before it is clamped: the tensor is the same, its values are not."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        x.sub_(0.2)
        return self.head(self.relu(self.two(self.relu(x))))


class View(Net):
    """The clamp changes a part of the layer's output in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        part = x[:, :3]
        self.relu(part)
        return self.head(self.relu(self.two(x)))


class Functional(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.two(F.relu(self.one(x), inplace=True)))))


class TwoTaps(Net):
    """Two layers read the clamp's output, and a sum does."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.one(x))
        return self.head(self.copying(self.two(x) + F.conv2d(x, self.two.weight.detach())[..., :1, :1])
                         + self.copying(self.norm(x)))


class OwnForward(nn.Conv2d):
    """Sends its output's gradient back as it is, besides its own: nobody may write to that."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Passing(Net):
    def __init__(self) -> None:
        super().__init__()
        self.own = OwnForward(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.one(x))
        return self.head(self.copying(self.own(x)) + self.copying(self.norm(self.two(x))))


CLAMPED = {
    # -> the layers whose only reader is a clamp
    Chain: {"one": RELU, "two": RELU},
    Residual: {"one": RELU},
    TwoReaders: {"two": RELU},
    ReadBefore: {"two": RELU},
    Changed: {"two": RELU},
    View: {"two": RELU},
    Functional: {"two": RELU},  # of the first layer, autograd does not tell whether its input stays
}


@pytest.mark.parametrize("network", [*CLAMPED, TwoTaps, Passing])
def test_a_clamp_goes_into_the_layer_that_it_alone_reads(network: type[Net]) -> None:
    scores = assert_scored_as_by_hooks(network(), images())
    assert scores.plan is not None
    if network in CLAMPED:
        assert {name: ends for name, ends in scores.plan.packed.items() if ends} == {**CLAMPED[network], "three": RELU}
        assert set(scores.plan.packed) == {"one", "two", "three", "fc"}


@pytest.mark.parametrize(("options", "network"), thinned(
    [{}, {"probes": 3}, {"importance": "taylor-abs"}, {"ablation": "mean"}, {"reduction": "element"},
     {"units": "norms"}], [Chain, Residual, TwoTaps, Passing]))
def test_every_measure_and_several_probes(network: type[Net], options: dict[str, object]) -> None:
    model = network().eval()
    fast = fastscore.score(model, [images()], progress=False, **options)
    scorer = Scorer(model, images()[:1], gradient="random", **{name: value for name, value in options.items()
                                                               if name != "probes"})
    with scorer:
        output = model(images())
        for _ in range(options.get("probes", 1)):
            scorer.probe(output)
    plain = scorer.scores()
    for layer in plain:
        assert float((fast[layer] - plain[layer]).abs().max()) <= 1e-4 * float(plain[layer].abs().max()), layer


@pytest.mark.parametrize("clamp", [nn.ReLU(), nn.ReLU6(inplace=True), nn.Hardtanh(-0.5, 0.8), nn.Hardtanh(0.1, 2.0)])
def test_every_clamp(clamp: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), clamp, nn.Conv2d(6, 6, 3, groups=6), clamp,
                          nn.Conv2d(6, 5, 1), clamp, nn.Flatten(), nn.Linear(5 * 64, 8), clamp, nn.Linear(8, 4))
    scores = assert_scored_as_by_hooks(randomize(model), images())
    assert all(scores.plan.packed[name] is not None for name in ("0", "3", "5", "8"))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_clamp_of_few_channels(channels: int) -> None:
    """channels_last, as the pass is: fewer than 4 channels are walked otherwise by channel_sums."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, channels, 3), nn.ReLU(),
                          nn.Conv2d(channels, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
    for parameter in model.parameters():
        parameter.data.abs_()  # no channel is dead
    assert_scored_as_by_hooks(model, images())


@pytest.mark.parametrize("reduction", ["sum", "element"])
def test_ends_that_bfloat16_rounds(reduction: str) -> None:
    """0.35 is 0.3496 in bfloat16: what the clamp cut off is there below its end, yet lets no gradient through."""
    torch.manual_seed(0)
    clamp = nn.Hardtanh(-0.35, 0.35)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), clamp, nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), clamp,
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()
    wide, narrow = (fastscore.score(model, [images()], reduction=reduction, precision=precision, progress=False)
                    for precision in ("float32", "bfloat16"))
    for layer in wide:
        assert float((narrow[layer] - wide[layer]).abs().max()) <= 0.05 * float(wide[layer].max()), layer


@pytest.mark.parametrize("family", THIN if NIGHTLY else PACKED)
def test_the_packed_pass_of_every_family(family: str) -> None:
    """Within 2e-3 of a layer's largest score: in float32 rounding tips a ReLU or a maximum over now and then."""
    build, size = THIN[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = randomize(build())
    scores = assert_scored_as_by_hooks(model, images(4, size), 2e-3)
    assert len(scores.plan.packed) > 2
    if family == "googlenet":  # every ReLU of it is F.relu; what is before the first tap is not known so well
        assert [name for name, ends in scores.plan.packed.items() if ends is None] == ["conv1.conv", "fc"]


@pytest.mark.parametrize("name", list(NETWORKS))
def test_the_packed_pass_of_every_network_by_hand(name: str) -> None:
    network = NETWORKS[name]
    assert_scored_as_by_hooks(network.model(), network.inputs().float(), 2e-3)


def test_batches_of_other_sizes_and_shapes() -> None:
    """Weights are laid out for the first batch's images; others have the same scores as by themselves."""
    model = Residual().eval()
    batches = [images(4, 12), images(3, 17), images(1, 9), images(4, 12)]
    together = fastscore.score(model, batches, progress=False)
    scorer = Scorer(model, images(), gradient="random")
    with scorer:
        for batch in batches:
            scorer.probe(model(batch))
    for layer, plain in scorer.scores().items():
        torch.testing.assert_close(together[layer], plain, rtol=1e-4, atol=1e-5 * float(plain.max()))


def test_layers_under_autocast_run_as_they_are() -> None:
    class Cast(Chain):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x).float()

    scores = assert_scored_as_by_hooks(Cast(), images(), 3e-2)
    assert not scores.plan.packed
    assert "own dtype" in scores.plan.not_packed["two"]


@pytest.mark.filterwarnings("ignore:TF32")
def test_what_is_not_packed_is_in_the_plan() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU(),
                          nn.Conv2d(4, 4, 3, padding="same"), nn.ReLU(),
                          computed_elsewhere(nn.Conv2d(4, 4, 3)), nn.ReLU(), nn.Conv2d(4, 4, 1),
                          nn.Flatten(), nn.Linear(400, 3))
    scores = assert_scored_as_by_hooks(model, images())
    assert set(scores.plan.packed) == {"6", "8"}
    assert set(scores.plan.not_packed) == {"0", "2", "4"}
    for name, reason in (("0", "not of zeros"), ("2", "a word"), ("4", "a parametrization")):
        assert reason in scores.plan.not_packed[name]
        assert f"{name}: not packed: " in str(scores.plan)
    with torch.backends.mkldnn.flags(enabled=False):
        plain = fastscore.score(model.float().eval(), [images()], progress=False)
    assert not plain.plan.packed
    assert "no oneDNN" in plain.plan.not_packed["6"]
    assert not fastscore.score(model, [images()], progress=False, importance="molchanov-group").plan.packed


def test_a_layer_that_reads_its_weight_elsewhere_reads_the_models_own() -> None:
    class Tied(nn.Module):
        """Its first layer's weight is read once more, beside the layer; a BatchNorm is folded into that."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
            randomize(self)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.norm(self.first(x))) + F.linear(x, self.first.weight))

    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    scores = assert_scored_as_by_hooks(Tied(), x)
    assert scores.plan.folded or scores.plan.not_folded
