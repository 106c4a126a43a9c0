"""Groups whose surgery the model's own code does not bear are left alone, by name; what is left can be pruned."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import whole_way
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace

WIDTH = 8


class Standardised(nn.Conv2d):
    """A convolution that standardises each filter over all its inputs, and does not leave it at that."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H, W]."""
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return 2 * self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Equalised(nn.Linear):
    """A Linear whose weight is scaled by how many inputs it has."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C] -> [N, C']."""
        return F.linear(x.relu(), self.weight / self.weight.shape[1] ** 0.5, self.bias)


class Fixed(nn.Module):
    """A module that insists on its width, as diffusers' resampling layers do."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, 8, ...] -> the same."""
        assert x.shape[1] == WIDTH
        return x


class Scaled(nn.Module):
    """Code that divides by the number of channels, in no layer."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> the same."""
        return x / x.shape[1] ** 0.5


class Beside(nn.Module):
    """`first` and `second` with something of the case between them; `good` and `last`, which are always in order."""

    def __init__(self, between: nn.Module | None = None, second: Callable[[int, int], nn.Module] | None = None) -> None:
        super().__init__()
        self.first, self.between = nn.Conv2d(3, WIDTH, 1), nn.Identity() if between is None else between
        self.second = (second or (lambda c, d: nn.Conv2d(c, d, 1)))(WIDTH, 6)
        self.good, self.last = nn.Conv2d(6, 10, 1), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 4]."""
        x = self.second(self.between(F.relu(self.first(x))))
        return self.last(F.relu(self.good(x.tanh()))).mean((2, 3))


class State(Beside):
    """A recurrent state of a width that the code fixes, added to what `first` makes."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 4]."""
        state = x.new_zeros(len(x), WIDTH, *x.shape[2:])
        x = self.second(F.relu(self.first(x)) + state)
        return self.last(F.relu(self.good(x.tanh()))).mean((2, 3))


class Tied(Beside):
    """The weight of `first`, read by a function beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Conv2d(6, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 4]."""
        y = self.second(F.relu(self.first(x))).tanh()
        again = F.conv_transpose2d(self.code(y), self.first.weight)
        return self.last(F.relu(self.good(y))).mean((2, 3)) + again.mean((1, 2, 3))[:, None]


CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a weight from all inputs": (lambda: Beside(second=lambda c, d: Standardised(c, d, 1)),
                                 r"^second \(Standardised\) computes something else with fewer channels"),
    "a bare assert": (lambda: Beside(Fixed()), r"does not run with fewer channels there \(between \(Fixed\): Assert"),
    "a width in the code": (lambda: Beside(Scaled()), r"^second reads something else"),
    "a recurrent state": (lambda: State(), r"^the code of State makes zeros of 8 channels that meet them, a number"),
    "a weight read elsewhere": (lambda: Tied(), r"^the code of Tied reads the weight of first as well$"),
}


@pytest.mark.parametrize("name", list(CASES))
def test_a_group_that_does_not_bear_surgery_is_left_alone(name: str) -> None:
    """With the reason in one line; the groups beside it stay, and what is scored is pruned to what mask() computes."""
    build, reason = CASES[name]
    torch.manual_seed(0)
    model, x = build().double().eval(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    with untouched(model):
        graph = trace(model, x)
    assert {group.name for group in graph.groups} == {"second", "good"}
    assert re.search(reason, graph.skipped["first"]), graph.skipped["first"]
    assert "\n" not in graph.skipped["first"]
    scores = fastscore.score(model, [x], progress=False)
    for share in (0.3, 0.6, 0.9):
        pruned = fastscore.prune(model, scores, x, channels=share, compensate=False).model
        with torch.no_grad(), fastscore.mask(model, scores, 1 - share, x, compensate=False):
            torch.testing.assert_close(pruned(x), model(x))


def test_what_a_layer_makes_may_go_where_what_it_reads_may_not() -> None:
    """A filter's standardisation is its own: its row goes whole."""
    model = nn.Sequential(Standardised(3, 6, 1), nn.ReLU(), Standardised(6, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1))
    graph = trace(model, torch.randn(2, 3, 4, 4))
    assert [group.name for group in graph.groups] == ["2"]
    assert graph.skipped["0"].startswith("2 (Standardised) computes something else")


def test_a_linear_that_knows_how_many_inputs_it_has() -> None:
    """The last layer, of the model's output, reads what can go in one case and not in the other."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Equalised(6, 6), nn.ReLU(), nn.Linear(6, 3))
    assert [group.name for group in trace(model, torch.randn(2, 4)).groups] == ["2"]


class AsWide(nn.Module):
    """Code that takes what a convolution makes to be as wide as what it reads, as in Segformer's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.reduce = nn.Conv2d(6, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 2, 2)
        self.out = nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 6, H, W] -> the same."""
        y = self.embed(x).tanh()
        rows = self.reduce(y).reshape(len(y), y.shape[1], -1).transpose(1, 2)
        return x + self.out(rows.tanh()).mean(1)[:, :, None, None]


def test_groups_of_one_width_that_meet_lose_different_numbers() -> None:
    """Whatever they are called: prune() takes what it likes of each."""
    torch.manual_seed(0)
    model = nn.Sequential(*(AsWide() for _ in range(3)), nn.Conv2d(6, 2, 1)).double().eval()
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    scores = fastscore.score(model, [x], progress=False)
    assert list(scores) == ["0.embed", "1.embed", "2.embed"]  # with the channels of their `reduce`
    for budget in (0.8, 0.4):
        fastscore.prune(model, scores, x, macs=budget, compensate=False)


def test_every_culprit_among_many_is_found() -> None:
    """Two of six, and no other, by bisection."""
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(7))
            self.fixed = Fixed()

        def forward(self, x: Tensor) -> Tensor:
            for number, layer in enumerate(self.layers):
                x = layer(x).tanh()
                x = self.fixed(x) if number in (1, 4) else x
            return x

    graph = trace(Net(), torch.randn(3, WIDTH))
    assert [group.name for group in graph.groups] == ["layers.0", "layers.2", "layers.3", "layers.5"]
    assert all("fixed (Fixed): AssertionError" in graph.skipped[f"layers.{number}"] for number in (1, 4))


def test_weights_of_nothing_hide_no_fault() -> None:
    """A branch that a zero closes, as a residual block's last BatchNorm often does, is tried all the same."""
    model = Beside(second=lambda c, d: nn.Sequential(Standardised(c, d, 1), nn.BatchNorm2d(d)))
    nn.init.zeros_(model.second[1].weight)
    graph = trace(model, torch.randn(2, 3, 5, 5))
    assert "computes something else" in graph.skipped["first"]


def test_an_odd_number_of_channels_is_tried() -> None:
    """Halves of eight are even, and a model may take no odd number."""
    class Paired(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.ones(x.shape[1] // 2).repeat(2)[:, None, None]

    assert "does not run with fewer channels there" in trace(Beside(Paired()), torch.randn(2, 3, 5, 5)).skipped["first"]


def test_what_the_weights_are_does_not_matter() -> None:
    """The trial compares layers by themselves, to rounding, in 16 bits too."""
    model, x = Beside().bfloat16(), torch.randn(2, 3, 5, 5).bfloat16()
    assert [group.name for group in trace(model, x).groups] == ["first", "second", "good"]


class Reduction(nn.Module):
    """SegFormer's: the code gives what a convolution makes the width of what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(len(x), x.shape[1], -1).mT


class Reduced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.reduce, self.head = nn.Conv2d(3, 8, 1), Reduction(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.reduce(torch.relu(self.stem(x)))).mean(1))


def test_groups_whose_widths_must_be_the_same_go_together(tmp_path: Path) -> None:
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = whole_way.check(Reduced, x, ["stem"], tmp_path)
    assert [layer.weight.shape[0] for layer in (result.model.stem, result.model.reduce.conv)] == [4, 4]
    assert not {"stem", "reduce.conv"} & set(trace(Reduced().double().eval(), x).skipped)


class Swapped(Beside):
    """A layer that runs with what is computed of its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 4]."""
        computed = {name: self.compute(value) for name, value in self.second.named_parameters()}
        x = torch.func.functional_call(self.second, computed, (F.relu(self.first(x)),))
        return self.last(F.relu(self.good(x.tanh()))).mean((2, 3))


@pytest.mark.parametrize(("compute", "groups"), [(lambda w: 1.5 * w, ["first", "second", "good"]),
                                                 (lambda w: w - w.mean(), ["good"])])
def test_parameters_that_are_put_in_for_a_call(compute: Callable[[Tensor], Tensor], groups: list[str], tmp_path: Path
                                               ) -> None:
    """By torch.func.functional_call: computed of each number alone, or of all, which a smaller layer has not."""
    def build() -> nn.Module:
        model = Swapped()
        model.compute = compute
        return model

    x = torch.randn(3, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole_way.check(build, x, groups, tmp_path)
    kept = trace(build().double().eval(), x).skipped
    assert kept["last"] == "its channels are the model's output"
    assert all(kept[name] == "the code of Swapped reads the weight of second as well"
               for name in {"first", "second"} - set(groups))
