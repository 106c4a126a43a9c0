"""Splits and slices at places that a module keeps in attributes: their channels go, and the attributes follow."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whole_way import check, noisy

import fastscore
from fastscore.graph.cutting.cut_widths import Cut, Width
from fastscore.graph.tracing import trace


class Cutting(nn.Module):
    """What `stem` makes is cut into parts, each of which goes its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)
        self.numbers()

    def numbers(self) -> None:
        """What it keeps, and layers for its parts."""
        raise NotImplementedError

    def parts(self, x: Tensor) -> Tensor:
        """[N, 8, H, W] -> [N, 8, H, W]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 4]."""
        return self.last(self.parts(self.stem(x).tanh()).mean((2, 3)))


class Mixed(Cutting):
    """MixNet's: parts of several widths, in a list."""

    def numbers(self) -> None:
        self.splits = [5, 3]
        self.convs = nn.ModuleList(nn.Conv2d(width, width, size, padding=size // 2, groups=width)
                                   for width, size in zip(self.splits, (1, 3), strict=True))

    def parts(self, x: Tensor) -> Tensor:
        return torch.cat([conv(part) for conv, part in zip(self.convs, x.split(self.splits, 1), strict=True)], 1).relu()


class Partial(Cutting):
    """FasterNet's: two numbers; a part of the channels is convolved."""

    def numbers(self) -> None:
        self.dim_conv, self.dim_rest = 3, 5
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def parts(self, x: Tensor) -> Tensor:
        convolved, rest = torch.split(x, [self.dim_conv, self.dim_rest], dim=1)
        return torch.cat([self.conv(convolved), rest], 1).relu()


class Scaled(Cutting):
    """Res2Net's: as wide parts, each added to what became of the one before."""

    def numbers(self) -> None:
        self.width = 4
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))

    def parts(self, x: Tensor) -> Tensor:
        first, second = x.split(self.width, 1)
        y = self.convs[0](first).relu()
        return torch.cat([y, self.convs[1](second + y).relu()], 1)


class Halved(Cutting):
    """Cross-stage partial networks': half of a number."""

    def numbers(self) -> None:
        self.expand_chs = 8
        self.conv = nn.Conv2d(4, 4, 1)

    def parts(self, x: Tensor) -> Tensor:
        one, other = x.split(self.expand_chs // 2, dim=1)
        return torch.cat([self.conv(one).relu(), other], 1)


class Sliced(Cutting):
    """ReXNet's and DPN's: slices, up to a number and from there on."""

    def numbers(self) -> None:
        self.begins = 3
        self.conv = nn.Conv2d(3, 6, 1)
        self.last = nn.Linear(11, 4)

    def parts(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x[:, :self.begins]).relu(), x[:, self.begins:]], 1)


class Block(nn.Module):
    """It keeps how many channels it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.conv = 3, nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).tanh()


class Rest(Cutting):
    """RAFT's: as many as another module says, and what is left."""

    def numbers(self) -> None:
        self.block = Block()

    def parts(self, x: Tensor) -> Tensor:
        first, rest = torch.split(x, [self.block.state, x.shape[1] - self.block.state], dim=1)
        return torch.cat([self.block(first), rest.relu()], 1)


class Narrowed(Rest):
    """By narrow()."""

    def parts(self, x: Tensor) -> Tensor:
        width = self.block.state
        return torch.cat([self.block(x.narrow(1, 0, width)), torch.narrow(x, 1, width, x.shape[1] - width).relu()], 1)


class Crossed(Cutting):
    """Of a cross-stage partial network: the part from a place on is read by the first layer that is found."""

    def numbers(self) -> None:
        self.half = 5
        self.conv = nn.Conv2d(3, 3, 1)

    def parts(self, x: Tensor) -> Tensor:
        one, other = x[:, :self.half], x[:, self.half:]
        return torch.cat([one, self.conv(other).relu()], 1)


class Flattened(Cutting):
    """A view of each part, of which the widest is a multiple of the first."""

    def numbers(self) -> None:
        self.splits = [2, 6]

    def parts(self, x: Tensor) -> Tensor:
        return torch.cat([part.flatten(2).relu() for part in x.split(self.splits, 1)], 1).view(x.shape)


class Whole(Cutting):
    """One number for a part, and one for all: what is left of it."""

    def numbers(self) -> None:
        self.dim, self.pdim, self.conv = 8, 5, nn.Conv2d(5, 5, 3, padding=1)

    def parts(self, x: Tensor) -> Tensor:
        convolved, rest = torch.split(x, [self.pdim, self.dim - self.pdim], dim=1)
        return torch.cat([self.conv(convolved), rest], 1).relu()


class SingleHead(Whole):
    """SHViT's attention of a part of the channels: one number for queries and keys, another for values and the part."""

    def numbers(self) -> None:
        super().numbers()
        self.qk_dim, self.qkv = 7, nn.Conv2d(5, 19, 1)

    def parts(self, x: Tensor) -> Tensor:
        part, rest = torch.split(x, [self.pdim, self.dim - self.pdim], dim=1)
        q, k, v = (each.flatten(2) for each in torch.split(
            self.qkv(self.conv(part)), [self.qk_dim, self.qk_dim, self.pdim], dim=1))
        y = v @ (q.mT @ k).softmax(-1).mT
        return torch.cat([y.reshape(len(x), self.pdim, *x.shape[2:]), rest], 1).relu()


class Cascade(Cutting):
    """EfficientViT's: what one head makes of its part of the channels is added to the part of the next."""

    def numbers(self) -> None:
        self.key_dim, self.val_dim = 7, 4
        self.qkvs = nn.ModuleList(nn.Conv2d(4, 18, 1) for _ in range(2))
        self.dws = nn.ModuleList(nn.Conv2d(7, 7, 3, padding=1, groups=7) for _ in range(2))
        self.proj = nn.Conv2d(8, 8, 1)

    def parts(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        parts, made = x.chunk(len(self.qkvs), dim=1), list[Tensor]()
        for part, qkv, dw in zip(parts, self.qkvs, self.dws, strict=True):
            y = part + made[-1] if made else part
            q, k, v = qkv(y).view(n, -1, height, width).split([self.key_dim, self.key_dim, self.val_dim], dim=1)
            q, k, v = dw(q).flatten(2), k.flatten(2), v.flatten(2)
            made.append((v @ (q.mT @ k).softmax(-1).mT).view(n, self.val_dim, height, width))
        return x + self.proj(torch.cat(made, 1).relu())


class Alike(Cascade):
    """With as wide values as keys: which number is whose, no value says."""

    def numbers(self) -> None:
        self.key_dim, self.val_dim = 4, 4
        self.qkvs = nn.ModuleList(nn.Conv2d(4, 12, 1) for _ in range(2))
        self.dws = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, groups=4) for _ in range(2))
        self.proj = nn.Conv2d(8, 8, 1)


class Two(Partial):
    """Two numbers that are alike."""

    def numbers(self) -> None:
        self.dim_conv = self.dim_rest = 4
        self.conv = nn.Conv2d(4, 4, 3, padding=1)


KINDS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "a list": (Mixed, ["stem"]), "two numbers": (Partial, ["stem", "conv"]), "a number": (Scaled, ["stem", "convs.1"]),
    "half a number": (Halved, ["stem", "conv"]), "slices": (Sliced, ["stem", "conv"]),
    "the rest": (Rest, ["stem", "block.conv"]), "narrow": (Narrowed, ["stem", "block.conv"]),
    "crossed": (Crossed, ["stem", "conv"]), "of a whole": (Whole, ["stem", "conv"]),
    "flattened": (Flattened, ["stem"]), "single head": (SingleHead, ["stem", "conv"]), "cascade": (Cascade, ["stem"]),
    "alike": (Alike, ["stem"]), "two alike": (Two, ["stem", "conv"])}


@pytest.mark.parametrize("kind", list(KINDS))
def test_parts_lose_channels(kind: str, tmp_path: Path) -> None:
    """By brute force, from data to a file; each part keeps one channel at least."""
    build, groups = KINDS[kind]
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1)).double()
    result = check(build, x, groups, tmp_path, only=False)
    units = {group.name: int(group.unit.max()) + 1 for group in trace(noisy(build), x).groups}
    assert units["stem"] == {"a number": 4, "half a number": 4, "cascade": 4, "alike": 4}.get(kind, 8)
    before, after = (vars(noisy(build)), vars(result.model))
    numbers = [name for name, value in before.items() if name in after and not name.startswith("_")
               and type(value) in (int, list) and value != after[name]]
    assert numbers == {"a list": ["splits"], "two numbers": ["dim_conv", "dim_rest"], "a number": ["width"],
                       "half a number": ["expand_chs"], "slices": ["begins"], "crossed": ["half"],
                       "of a whole": ["dim", "pdim"], "flattened": ["splits"], "single head": ["dim", "pdim"],
                       "cascade": ["val_dim"], "alike": ["val_dim"], "two alike": ["dim_conv", "dim_rest"],
                       }.get(kind, [])
    assert kind not in ("the rest", "narrow") or result.model.block.state == result.model.block.conv.in_channels < 3
    again = fastscore.prune(result.model, fastscore.score(result.model, [x], progress=False), x, channels=0.7,
                            scope="layer", compensate=False).model
    fastscore.save_pruned(again, tmp_path / "again.safetensors")
    loaded = fastscore.load_pruned(noisy(build, seed=1), tmp_path / "again.safetensors").eval()
    assert torch.equal(loaded(x), again(x))
    assert [vars(loaded)[name] for name in numbers] == [vars(again)[name] for name in numbers]


def test_places_that_nothing_is_kept_of_stay() -> None:
    """A number of no module. One that is computed of an attribute, known elsewhere, or stands in the code, follows."""
    begin = 3

    class Outside(Sliced):
        def parts(self, x: Tensor) -> Tensor:
            return torch.cat([self.conv(x[:, :begin]).relu(), x[:, begin:]], 1)

    class LiteralRest(Partial):
        def parts(self, x: Tensor) -> Tensor:
            convolved, rest = torch.split(x, [self.dim_conv, 5], dim=1)
            return torch.cat([self.conv(convolved), rest], 1).relu()

    class Computed(Sliced):
        def parts(self, x: Tensor) -> Tensor:
            self.more = self.begins + 1
            return torch.cat([self.conv(x[:, :self.more - 1]).relu(), x[:, self.more - 1:]], 1)

    class Elsewhere(Sliced):
        def parts(self, x: Tensor) -> Tensor:
            begin = self.conv.in_channels + 0 * self.begins
            return torch.cat([self.conv(x[:, :begin]).relu(), x[:, begin:]], 1)

    x = torch.randn(2, 3, 5, 5).double()
    graph = trace(noisy(Outside), x)
    assert [group.name for group in graph.groups] == ["conv"]
    assert "at positions that the model's code fixes" in graph.skipped["stem"]
    for build in (Computed, Elsewhere, LiteralRest):
        model = noisy(build)
        scores = fastscore.score(model, [x], progress=False)
        small = fastscore.prune(model, scores, x, channels=0.5, scope="layer", compensate=False).model
        assert small.stem.out_channels < 8
        with torch.no_grad(), fastscore.mask(model, scores, 0.5, x, scope="layer", compensate=False):
            torch.testing.assert_close(small(x), model(x))


def test_one_number_for_two_tensors_is_kept() -> None:
    """It would be one number for both no longer."""
    class Twice(Sliced):
        def numbers(self) -> None:
            super().numbers()
            self.other = nn.Conv2d(3, 8, 1)
            self.last = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            one, other = self.stem(x).tanh(), self.other(x).tanh()
            y = torch.cat([self.conv(one[:, :self.begins]), F.pad(other[:, :self.begins] + 0, (0, 0, 0, 0)),
                           other[:, self.begins:][:, :2]], 1)
            return self.last(torch.cat([y, one[:, self.begins:]], 1).mean((2, 3)))

    graph = trace(noisy(Twice), torch.randn(2, 3, 5, 5).double())
    assert {"stem", "other"} & graph.skipped.keys()


def test_what_is_read_off_the_values() -> None:
    """By which attributes a cut is known: a list before numbers, the whole before its half."""
    def cut(**kept: object) -> Cut:
        return Cut(None, nn.Identity(), kept)

    assert cut(a=3, sizes=[3, 5]).of_sizes([3, 5]) == [Width("sizes.0", 0, 3), Width("sizes.1", 3, 8)]
    assert cut(a=3, b=5).of_sizes((3, 5)) == [Width("a", 0, 3), Width("b", 3, 8)]
    assert cut(a=4).of_sizes([4, 4]) == [Width("a", 0, 4)]
    assert cut(a=8).of_sizes([4, 4]) == [Width("a//2", 0, 4)]
    assert cut(a=3).of_sizes([3, 5]) == [Width("a", 0, 3)]  # and what is left
    assert cut(a=5).of_sizes([3, 5]) == [Width("a", 3, 8)]
    assert cut(a=3, b=8).of_sizes([3, 5]) == [Width("a", 0, 3), Width("b", 0, 8)]  # and what is left of b
    assert cut(a=2, b=3).of_sizes([2, 2, 3]) == [Width("a", 0, 2), Width("a", 2, 4), Width("b", 4, 7)]
    assert cut(a=3).of_sizes([1, 3, 4]) is cut(a=1).of_sizes([3, 5]) is cut(a=3).of_bounds([2]) is None
    assert cut(a=3, b=5).of_bounds([3, 5]) == [Width("a", 0, 3), Width("b", 0, 5)]
