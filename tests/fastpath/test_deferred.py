"""Additions and ReLUs inside convolutions: what the model's code does with a tensor, whatever that is, stays what it
was; so that float32 can be held to plain hooks, it takes the path here that bfloat16 takes."""

import copy
import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from networks import randomize
from test_fusion import assert_scored_as_by_hooks, images
from torch import Tensor, nn

import fastscore
from fastscore import Scorer
from fastscore.fastpath import packed_layers
from fastscore.fastpath.packed_layers import Convolution
from fastscore.fastpath.precision import wrong_convolutions


@pytest.fixture(autouse=True)
def _float32_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_layers, "ADDING_DTYPES", packed_layers.DTYPES)


SHORTCUTS = {
    "the input": lambda block, x: x,
    "a layer": lambda block, x: block.side(x),
    "a copy": lambda block, x: x.clone(),
}
SUMS = {  # (output of the last convolution, shortcut) -> what goes on
    "in place": lambda out, shortcut: out.__iadd__(shortcut),
    "in place, by method": lambda out, shortcut: (out.add_(shortcut), out)[1],
    "a new tensor": lambda out, shortcut: out + shortcut,
    "operands swapped": lambda out, shortcut: torch.add(shortcut, out),
    "scaled": lambda out, shortcut: torch.add(out, shortcut, alpha=0.5),
    "in place of the shortcut": lambda out, shortcut: (shortcut := shortcut.clone()).__iadd__(out),
    "of a mean": lambda out, shortcut: out + shortcut.mean((2, 3), keepdim=True),
    "twice": lambda out, shortcut: out + shortcut + shortcut,
    "with itself": lambda out, shortcut: out + out,
    "of another layout": lambda out, shortcut: out + shortcut.contiguous(),
    "a number": lambda out, shortcut: out.add_(0.5),
}
CLAMPS = {
    "in place": lambda block, x: block.relu(x),
    "copying": lambda block, x: block.copying(x),
    "ReLU6": lambda block, x: block.six(x),
    "functional": lambda block, x: F.relu(x),
    "none": lambda block, x: x,
}
KEPT = {  # what else reads what: (out before the sum, shortcut, sum) -> read later
    "nothing": lambda out, shortcut, add: (add(out, shortcut), None),
    "the output": lambda out, shortcut, add: (add(out, shortcut), out),
    "the output, before": lambda out, shortcut, add: (lambda before: (add(out, shortcut), before))(2 * out),
    "a part of it": lambda out, shortcut, add: (lambda part: (add(out, shortcut), part))(out[:, :, 1:, 1:]),
    "the sum": lambda out, shortcut, add: (lambda total: (total, total))(add(out, shortcut)),
    "its size": lambda out, shortcut, add: (lambda ones: (add(out, shortcut), ones))(torch.ones(out.shape)),
    "without gradient": lambda out, shortcut, add: (lambda before: (add(out, shortcut), before))(out.detach().exp()),
    "the shortcut, changed since": lambda out, shortcut, add: (lambda s: (add(out, s), s.mul_(2.0)))(shortcut * 1.0),
}


class Block(nn.Module):
    """A residual block, in one of many ways to write it."""

    def __init__(self, shortcut: str, addition: str, clamp: str, kept: str, normed: bool) -> None:
        super().__init__()
        self.one, self.two, self.side = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.norm = nn.BatchNorm2d(6) if normed else nn.Identity()
        self.relu, self.copying, self.six = nn.ReLU(inplace=True), nn.ReLU(), nn.ReLU6()
        self.ways = SHORTCUTS[shortcut], SUMS[addition], CLAMPS[clamp], KEPT[kept]

    def forward(self, x: Tensor) -> Tensor:
        shortcut, add, clamp, keep = self.ways
        out = self.norm(self.two(self.copying(self.one(x))))
        y, kept = keep(out, shortcut(self, x), add)
        y = clamp(self, y)
        return y if kept is None else y + 0.3 * kept.mean((2, 3), keepdim=True)


class Residual(nn.Module):
    def __init__(self, *blocks: Block) -> None:
        super().__init__()
        self.stem, self.relu, self.blocks = nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Sequential(*blocks)
        self.last, self.fc = nn.Conv2d(6, 5, 1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.stem(x)))
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


def residual(*ways: tuple[str, str, str, str, bool]) -> nn.Module:
    torch.manual_seed(0)
    return randomize(Residual(*(Block(*way) for way in ways)))


way = st.tuples(st.sampled_from(list(SHORTCUTS)), st.sampled_from(list(SUMS)), st.sampled_from(list(CLAMPS)),
                st.sampled_from(list(KEPT)), st.booleans())


@settings(max_examples=400 if os.environ.get("FASTSCORE_NIGHTLY") else 6, deadline=None)
@given(st.lists(way, min_size=1, max_size=2))
@example([("the input", "in place", "in place", "the output", True),
          ("a layer", "in place", "copying", "the sum", True)])
@example([("a layer", "in place, by method", "in place", "a part of it", False)])
@example([("a copy", "a new tensor", "copying", "the output", True),
          ("the input", "operands swapped", "copying", "the shortcut, changed since", True)])
def test_residual_blocks_however_they_are_written(ways: list[tuple[str, str, str, str, bool]]) -> None:
    assert_scored_as_by_hooks(residual(*ways), images())


@pytest.mark.parametrize(("way", "joined"), [
    (("the input", "in place", "in place", "nothing", True), True),
    (("a layer", "in place", "in place", "nothing", True), True),
    (("the input", "in place, by method", "copying", "nothing", False), True),
    (("a copy", "operands swapped", "copying", "nothing", True), True),
    (("the input", "a new tensor", "in place", "its size", True), False),
    (("the input", "in place", "copying", "the sum", True), False),  # something reads the sum before it is clamped
    (("the input", "scaled", "in place", "nothing", True), False),
    (("the input", "of a mean", "in place", "nothing", True), False),
    (("the input", "in place of the shortcut", "in place", "nothing", True), False),
    (("the input", "in place", "ReLU6", "nothing", True), False)])
def test_which_additions_go_into_the_convolution(way: tuple[str, str, str, str, bool], joined: bool) -> None:
    plan = assert_scored_as_by_hooks(residual(way), images()).plan
    assert plan.added == (("blocks.0.two",) if joined else ())
    assert ("1 with an addition and a ReLU" in str(plan)) == joined


def test_an_input_that_is_changed_before_the_output_is_read() -> None:
    class Changing(nn.Module):
        """Writes to what its second convolution has read, before it adds to that; always, or in the second batch."""

        def __init__(self, always: bool) -> None:
            super().__init__()
            self.stem, self.two, self.three = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 5, 3)
            self.relu, self.fc, self.always = nn.ReLU(), nn.Linear(5, 4), always

        def forward(self, x: Tensor) -> Tensor:
            shortcut = self.relu(self.stem(x))
            read = shortcut * 1.0
            out = self.two(read)
            if self.always or bool(x[0, 0, 0, 0] > 50):
                read.detach().mul_(2.0)  # behind autograd's back
            return self.fc(self.relu(self.three(self.relu(out + shortcut))).mean((2, 3)))

    torch.manual_seed(0)
    scores = fastscore.score(Changing(True).eval(), [images()], progress=False)
    assert list(scores) == ["three"]
    assert scores.plan.packed["two"] is None
    assert scores.plan.added == ()
    with pytest.raises(RuntimeError, match=r"^two: its input was changed in place .* FASTSCORE_PORTABLE=1"):
        fastscore.score(Changing(False).eval(), [images(), images() + 100], progress=False)


sizes = st.integers(1, 3)


@settings(max_examples=40, deadline=None)
@example(kernel=(1, 3), stride=(1, 2), padding=(0, 0), dilation=3, size=(7, 1), wider=1, bias=False, samples=1,
         dtype=torch.bfloat16)
@given(kernel=st.tuples(sizes, sizes), stride=st.tuples(sizes, sizes),
       padding=st.tuples(st.integers(0, 2), st.integers(0, 2)), dilation=sizes,
       size=st.tuples(st.integers(7, 9), sizes), wider=sizes, bias=st.booleans(), samples=sizes,
       dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_an_addition_and_a_relu_inside_a_convolution(
        kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: int,
        size: tuple[int, int], wider: int, bias: bool, samples: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make = partial(torch.randn, generator=torch.Generator().manual_seed(3), dtype=dtype)
    shape = (size[0], size[1] + 6)
    with torch.no_grad():
        module = nn.Conv2d(6, 6 * wider, kernel, stride, padding, dilation, bias=bias).to(dtype)
        assume(not wrong_convolutions(module, {"": (samples, 6, *shape)}, dtype))  # by PyTorch itself, on AMX
        layer = Convolution(module, shape)
        x = make(samples, 6, *shape).contiguous(memory_format=torch.channels_last)
        y = copy.deepcopy(module).double()(x.double())
        other = make(y.shape).contiguous(memory_format=torch.channels_last)
        before = other.clone()
        assert layer.takes(x, other)
        found = layer.add_relu(x, other)
        for unfit in (other[..., :-1], other.double(), other[:, :1], other.mean((2, 3), keepdim=True)):
            assert not layer.takes(x, unfit) or (unfit.shape == other.shape and unfit.dtype == dtype)
    assert torch.equal(other, before)
    bound = {torch.float32: 2e-6, torch.bfloat16: 8e-3}[dtype]
    wanted = (y + other.double()).relu()
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert float((found.double() - wanted).abs().max()) <= bound * max(1.0, float(wanted.max()))


def test_bfloat16_alone_takes_that_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = residual(("the input", "in place", "in place", "nothing", True),
                     ("a layer", "in place", "in place", "nothing", True)).eval()
    wide, narrow = (fastscore.score(model, [images()] * 2, precision=precision, progress=False)
                    for precision in ("float32", "bfloat16"))
    assert wide.plan.added == ()
    assert narrow.plan.added == ("blocks.0.two", "blocks.1.two")
    for layer in wide:
        assert float((narrow[layer] - wide[layer]).abs().max()) <= 0.06 * float(wide[layer].max()), layer


RELUS = {
    "F.relu": F.relu, "in place": partial(F.relu, inplace=True), "torch.relu": torch.relu, "x.relu()": Tensor.relu,
    "x.relu_()": Tensor.relu_, "torch.relu_": torch.relu_,
    "in place, read since": lambda x: (F.relu(x, inplace=True), x)[1],
}


@pytest.mark.parametrize("way", list(RELUS))
@pytest.mark.parametrize("normed", [True, False])
def test_a_relu_that_is_no_module_goes_into_the_convolution(way: str, normed: bool) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 5, 3, padding=1)
            self.norm, self.fc = nn.BatchNorm2d(6) if normed else nn.Identity(), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = RELUS[way](self.norm(self.two(self.one(x).sigmoid())))
            kept = self.three(x)
            return self.fc((F.relu(kept) + kept).mean((2, 3)))

    torch.manual_seed(0)
    plan = assert_scored_as_by_hooks(randomize(Functional()), images()).plan
    assert plan.packed == {"one": None, "two": packed_layers.RELU, "three": None, "fc": None}
    assert "4 layers packed, 1 of them with a clamp" in str(plan)


class Square(torch.autograd.Function):
    """A function of a user's own, which sees what a stand-in is to C++."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


class Flagged(nn.Module):
    """`marked` batches go another way than the rest."""

    def __init__(self, other: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 5, 3)
        self.fc, self.other = nn.Linear(5, 4), other

    def forward(self, x: Tensor) -> Tensor:
        other = bool(x[0, 0, 0, 0] > 50)
        x = self.two(self.one(x).tanh())
        x = self.other(x) if other else F.relu(x)
        return self.fc(self.three(x).mean((2, 3)))


def marked(samples: int) -> Tensor:
    x = images(samples)
    x[0, 0, 0, 0] = 60
    return x


@pytest.mark.parametrize("other", [
    lambda x: x, lambda x: F.relu(x + 1), lambda x: x * F.relu(x), lambda x: (F.relu_(x), Square.apply(x))[1],
    lambda x: F.relu(x[:, :, 1:]), lambda x: F.relu(x) + x, lambda x: x.detach() * x.sigmoid(),
    lambda x: (x.mul_(2), F.relu(x))[1], lambda x: F.relu(input=x, inplace=True) * F.relu(x)])
def test_a_relu_that_only_some_batches_take(other: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = randomize(Flagged(other)).eval()
    batches = [images(4), marked(3), images(4), marked(2)]
    fast = fastscore.score(model, batches, progress=False)
    assert fast.plan.packed["two"] == packed_layers.RELU
    scorer = Scorer(model, batches[0], gradient="random")
    with scorer:
        for batch in batches:
            scorer.probe(model(batch))
    for layer, plain in scorer.scores().items():
        assert float((fast[layer] - plain).abs().max()) <= 1e-4 * float(plain.max()), layer


def test_a_function_that_alone_reads_a_stand_in_is_an_error() -> None:
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match=r"^two: a torch.autograd.Function reads .* FASTSCORE_PORTABLE=1"):
        fastscore.score(randomize(Flagged(Square.apply)).eval(), [images(4), marked(3)], progress=False)
