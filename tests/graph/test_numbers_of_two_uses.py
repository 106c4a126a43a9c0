"""Numbers that are the size of a view and something else as well, in code that the example does not run."""

import re

import pytest
import torch
from torch import Tensor, nn
from whole_way import noisy

import fastscore
from fastscore.graph.tracing import trace

CHANNELS, SIDE = 6, 4
FLAT = CHANNELS * SIDE * SIDE


def grown(y: Tensor, by: int) -> Tensor:
    return y * by


def grown_as(net: "Net", y: Tensor) -> Tensor:
    return y * net.flat


def flattened(y: Tensor, size: int) -> Tensor:
    return y.view(-1, size)


class Net(nn.Module):
    """Convolutions, and a classifier of what they make; `more` runs for more than five images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, CHANNELS, 3, padding=1)
        self.classifier = nn.Linear(FLAT, 4)
        self.flat = FLAT

    def more(self, y: Tensor) -> Tensor:
        return y

    def features(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu()).relu()

    def forward(self, x: Tensor) -> Tensor:
        y = self.classifier(self.features(x).view(-1, self.flat))
        return y if len(x) < 5 else self.more(y)


class Threshold(Net):
    def more(self, y: Tensor) -> Tensor:
        return y if len(y) < self.flat else 2 * y


class ThresholdThatRuns(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if len(x) <= self.flat else 2 * y


class Sliced(Net):
    def more(self, y: Tensor) -> Tensor:
        return y[:self.flat]


class SlicedInVain(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:self.flat]


class Repeated(Net):
    def more(self, y: Tensor) -> Tensor:
        for _ in range(self.flat):
            y = y + 0.01
        return y


class Multiplied(Net):
    def more(self, y: Tensor) -> Tensor:
        return y * self.flat


class Divided(Net):
    def more(self, y: Tensor) -> Tensor:
        less = self.flat - 1
        scale = less / 7
        return y * scale


class ADefault(Net):
    def more(self, y: Tensor) -> Tensor:
        def grow(y: Tensor, by: int = self.flat) -> Tensor:
            return y * by
        return grow(y)


class AClosure(Net):
    def more(self, y: Tensor) -> Tensor:
        flat = self.flat
        return (lambda y: y * flat)(y)


class Handed(Net):
    def more(self, y: Tensor) -> Tensor:
        return grown(y, self.flat)


class HandedToAMethod(Net):
    def grown(self, y: Tensor, by: int = 1) -> Tensor:
        return y * by

    def more(self, y: Tensor) -> Tensor:
        return self.grown(y, by=self.flat)


class HandedItself(Net):
    def more(self, y: Tensor) -> Tensor:
        return grown_as(self, y)


class AProperty(Net):
    @property
    def most(self) -> int:
        return self.flat

    def more(self, y: Tensor) -> Tensor:
        return y * self.most


class ByName(Net):
    def more(self, y: Tensor) -> Tensor:
        return y * getattr(self, "flat")  # noqa: B009


class PutElsewhere(Net):
    def more(self, y: Tensor) -> Tensor:
        self.most = self.flat + 1
        return self.grown(y)

    def grown(self, y: Tensor) -> Tensor:
        return y * self.most


class Written(Net):
    def forward(self, x: Tensor) -> Tensor:
        flat = 96
        y = self.classifier(self.features(x).view(-1, flat))
        return y if len(x) < flat else 2 * y


class Reader(nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self._net = (net,)

    def forward(self, y: Tensor) -> Tensor:
        (net,) = self._net
        return y * net.flat


class InAnotherModule(Net):
    def __init__(self) -> None:
        super().__init__()
        self.reader = Reader(self)

    def more(self, y: Tensor) -> Tensor:
        return self.reader(y)


class Flatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flat = FLAT

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, self.flat)


class InTheModuleAround(Net):
    def __init__(self) -> None:
        super().__init__()
        self.flatten = Flatten()

    def forward(self, x: Tensor) -> Tensor:
        y = self.classifier(self.flatten(self.features(x)))
        return y if len(x) < 5 else y * self.flatten.flat


class AHook(Net):
    def __init__(self) -> None:
        super().__init__()
        self.classifier.register_forward_hook(self.grow)

    def grow(self, layer: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
        return y if len(y) < 5 else y * self.flat


class HandedToALambda(Net):
    def __init__(self) -> None:
        super().__init__()
        self.grow = lambda y, by: y * by

    def more(self, y: Tensor) -> Tensor:
        return self.grow(y, self.flat)


class ThroughAFunction(Net):
    def more(self, y: Tensor) -> Tensor:
        return torch.reshape(y * self.flat, (-1, 4))


class WithALayer(Net):
    def more(self, y: Tensor) -> Tensor:
        return y * self.flat if self.classifier is not None else y


TWO_USES = (Threshold, ThresholdThatRuns, Sliced, SlicedInVain, Repeated, Multiplied, Divided, ADefault, AClosure,
            Handed, HandedToAMethod, HandedToALambda, HandedItself, ThroughAFunction, WithALayer, AProperty, ByName,
            PutElsewhere, Written, InAnotherModule, InTheModuleAround, AHook)


class Guarded(Net):
    """Says what is wrong, and how much it would cost, beside a module of its own with a number of that
    name."""

    def __init__(self) -> None:
        super().__init__()
        self.other = Flatten()
        self.other.flat = 7

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        assert self.flat > y.shape[1], f"{self.flat} are few"
        if y[0].numel() != self.flat or self.flat < 1:
            raise ValueError(f"not {self.flat}")
        return super().forward(x)

    def more(self, y: Tensor) -> Tensor:
        return y + y.new_ones(1).expand(self.other.flat).sum()

    def flops(self) -> int:
        return self.flat * 4

    def extra_repr(self) -> str:
        return f"flat={self.flat}"


class Aliased(Net):
    def forward(self, x: Tensor) -> Tensor:
        size = -1, (flat := self.flat)
        y = self.features(x)
        if len(x) < 5:
            return self.classifier(y.view(*size))
        return self.more(self.classifier(y.view(len(x), flat)))


class HandedOn(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(flattened(self.features(x), self.flat))


class OfAChild(InTheModuleAround):
    def __init__(self) -> None:
        super().__init__()
        del self.flat

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        return self.classifier(self.flatten(y) if len(y) < 5 else y.view(len(y), self.flatten.flat))


class WithoutALayer(Net):
    """In a branch for models that lack a layer which this one has, and in one for those that have one."""

    lacking: nn.Module | None = None

    def more(self, y: Tensor) -> Tensor:
        if self.classifier is None:
            return y * self.flat
        if self.lacking is not None and self.first is not None:
            y = y[:self.flat]
        return 2 * y


class RuledOut(Net):
    """In branches of others of its class, which are told by a flag: as patches are merged before or after a norm."""

    def __init__(self, after: bool = False) -> None:
        super().__init__()
        self.after = after
        self.another = None if after else RuledOut(True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        y = (y.view(-1, self.flat) if self.after else y * 2).view(-1, self.flat)
        return self.more(self.classifier(y))

    def more(self, y: Tensor) -> Tensor:
        if self.after:
            y = y * self.flat
        return y


class MayBeSet(RuledOut):
    """By a flag that a method sets, which no example calls."""

    def turn(self) -> None:
        self.after = not self.after


ONE_USE = (Guarded, Aliased, HandedOn, OfAChild, WithoutALayer, RuledOut)


def images() -> Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pruned(way: type[Net]) -> tuple[fastscore.Scores, nn.Module]:
    """The scores, and a model with half its channels that makes what the masked one does, of more images as well."""
    x, model = images(), noisy(way)
    scores = fastscore.score(model, [x], progress=False)
    options = {"scope": "layer", "compensate": False}
    small = fastscore.prune(model, scores, x, channels=0.5, **options).model
    with torch.no_grad(), fastscore.mask(model, scores, 0.5, x, **options):
        for times in (1, 2, 20, 40):
            many = x.repeat(times, 1, 1, 1)
            torch.testing.assert_close(small(many), model(many), rtol=1e-9, atol=1e-9)
    return scores, small


@pytest.mark.parametrize("way", TWO_USES)
def test_of_two_uses_stay(way: type[Net]) -> None:
    scores, small = pruned(way)
    assert set(scores) == {"first"}
    assert small.flat == FLAT


def test_a_flag_that_may_be_set_rules_nothing_out() -> None:
    assert "in the code of RuledOut.more" in trace(noisy(MayBeSet), images()).skipped["last"]


@pytest.mark.parametrize("way", ONE_USE)
def test_of_one_use_go(way: type[Net]) -> None:
    scores, small = pruned(way)
    assert set(scores) == {"first", "last"}
    assert small.last.out_channels == CHANNELS // 2


@pytest.mark.parametrize(("way", "where"), [
    (Threshold, r"flat of Threshold .* in the code of Threshold.more \(len\(y\) < self.flat\)"),
    (Handed, r"in the code of grown \(return y \* by\)"), (Written, r"96 of Written .* \(len\(x\) < flat\)"),
    (Sliced, r"in the code of Sliced.more \(y\[:self.flat\]\)"), (InAnotherModule, r"in the code of Reader.forward")])
def test_the_reason_says_where(way: type[Net], where: str) -> None:
    assert re.search(where, trace(noisy(way), images()).skipped["last"])


def test_code_that_nobody_can_read() -> None:
    names: dict[str, type[Net]] = {}
    exec("class Unread(Net):\n"
         "    def more(self, y):\n"
         "        return y * self.flat\n", {"Net": Net, "__name__": "nowhere"}, names)
    assert "the code of Unread.more, which cannot be read" in trace(noisy(names["Unread"]), images()).skipped["last"]


def test_a_variable_around_code_that_holds_nothing_yet() -> None:
    def kind(known: bool) -> type[Net]:
        class Around(Net):
            def more(self, y: Tensor) -> Tensor:
                return y * other.flat

        if known:
            other = Net()
        return Around

    assert "(return y * other.flat)" in trace(noisy(kind(False)), images()).skipped["last"]
