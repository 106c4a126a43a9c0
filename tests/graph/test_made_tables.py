"""What modules make of nothing that layers made, as sinusoids of positions, loses the channels that it meets."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from whole_way import check, noisy

import fastscore
from fastscore.graph.tracing import trace

WIDTH = 8


class Sinusoids(nn.Module):
    """Positions by sines and cosines, made anew in each call: the width is a number of frequencies, too."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        half = self.width // 2
        angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] / 10 ** (torch.arange(half).to(x) / (half - 1))
        made = torch.zeros(x.shape[1], self.width, dtype=x.dtype)
        made[:, :half], made[:, half:] = angles.sin(), angles.cos()
        return made[None].expand(len(x), -1, -1)


class Grown(nn.Module):
    """As fairseq's, of XGLM and NLLB: a table in a buffer, which is made anew for more positions than it has, and read
    where no gradient comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.arange(99), persistent=False)
        self.register_buffer("table", self.rows(5), persistent=False)

    @staticmethod
    def rows(count: int) -> Tensor:
        angles = torch.arange(count)[:, None] / 10 ** torch.linspace(0, 1, WIDTH // 2)
        return torch.cat([angles.sin(), angles.cos()], 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > len(self.table):
            self.table = self.rows(x.shape[1]).to(self.table)
        return self.table[self.places[:x.shape[1]]].detach()


class Scaled(nn.Module):
    """Which holds another that makes it, and has none of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = Sinusoids()

    def forward(self, x: Tensor) -> Tensor:
        return self.positions(x) * 0.5 + 1


class OfImage(nn.Module):
    """Waves of an image, channels first, of a width that its code has."""

    def forward(self, x: Tensor) -> Tensor:
        places = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)
        waves = torch.arange(1, 9, dtype=x.dtype)[:, None, None]
        return torch.cos(waves[:4] * places).repeat(2, 1, 1) + waves


class OfInput(nn.Module):
    """Made of what the model is given."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x.sum(-1, keepdim=True) * torch.arange(1, WIDTH + 1).to(x))


class Tokens(nn.Module):
    """Tokens that meet a table."""

    def __init__(self, table: Callable[[], nn.Module] = Sinusoids, times: bool = False) -> None:
        super().__init__()
        self.embed, self.table, self.times = nn.Linear(3, WIDTH), table(), times
        self.mlp, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        table = self.table(x)
        x = x * table if self.times else x + table
        return self.head(x + self.mlp(x).relu())


class Images(Tokens):
    """An image that meets waves, in the middle of it."""

    def __init__(self) -> None:
        super().__init__(OfImage)
        self.embed, self.mlp = nn.Conv2d(3, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).tanh()
        x = x + self.mlp(x + self.table(x))
        return self.head(x.mean((2, 3)))


class OfTheInput(Tokens):
    """A table of the model's own input."""

    def __init__(self) -> None:
        super().__init__(OfInput)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.table(x)
        return self.head(x + self.mlp(x).relu())


class Kept(Tokens):
    """As VideoMAE's: a table in an attribute, neither a parameter nor a buffer, and read without a gradient."""

    def __init__(self) -> None:
        super().__init__(nn.Identity)
        self.rows = Grown.rows(9)[None]

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.rows[:, :x.shape[1]].detach().type_as(x).to(device=x.device, copy=True)
        return self.head(x + self.mlp(x).relu())


class KeptOfImages(Images):
    """The same for each column of an image, turned."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = Grown.rows(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).tanh() * (self.columns.t() + 2)[:, None]
        return self.head((x + self.mlp(x)).mean((2, 3)))


class Adding(nn.Module):
    """Adds what it keeps, and has nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = Grown.rows(9).double()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rows[:x.shape[1]] * 0.5


class Added(Tokens):
    def __init__(self) -> None:
        super().__init__(Adding)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(self.embed(x))
        return self.head(x + self.mlp(x).relu())


class Detached(Tokens):
    """A buffer, of a module that has more, of which no gradient comes back."""

    def __init__(self) -> None:
        super().__init__(nn.Identity)
        self.register_buffer("rows", Grown.rows(9))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.rows[:x.shape[1]].detach()
        return self.head(x + self.mlp(x).relu())


class OfTwo(Tokens):
    """Two streams meet it, and go as one."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.out = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.out(self.other(x) * self.table(x))


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "added": (Tokens, (2, 5, 3)), "times": (lambda: Tokens(times=True), (2, 5, 3)),
    "held": (lambda: Tokens(Scaled), (2, 5, 3)), "grown": (lambda: Tokens(Grown), (2, 5, 3)),
    "images": (Images, (2, 3, 6, 6)),
    "kept": (Kept, (2, 5, 3)), "kept, of images": (KeptOfImages, (2, 3, 5, 6)), "kept, and added": (Added, (2, 5, 3)),
    "a buffer": (Detached, (2, 5, 3)), "of the input": (OfTheInput, (2, 5, 3)), "of two": (OfTwo, (2, 5, 3))}


@pytest.mark.parametrize("kind", KINDS)
def test_channels_go_with_the_table(kind: str, tmp_path: Path) -> None:
    build, shape = KINDS[kind]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    result = check(build, x, ["embed"], tmp_path, only=False)
    small, longer = result.model, torch.cat([x, x[:, 1:]], 1) if len(shape) == 3 else x
    with torch.no_grad():
        want = small(longer)  # of more positions
        for again in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
            assert torch.equal(again(longer), want)
    second = fastscore.prune(small, fastscore.score(small, [x], progress=False), x, channels=0.7, scope="layer",
                             compensate=False)
    assert len(second.removed["embed"])
    with torch.no_grad(), fastscore.mask(small, fastscore.score(small, [x], progress=False), second, x,
                                         compensate=False):
        torch.testing.assert_close(second.model(longer), small(longer))


class OfWidth(nn.Module):
    """As many frequencies as what it is given has channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(torch.arange(x.shape[1])[:, None] * 3 ** -torch.linspace(0, 1, x.shape[2])).to(x)


class Elsewhere(Tokens):
    """The table is read by something else, too."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        table = self.table(x)
        return self.head(x + table + self.mlp(x).relu()) * table.sum(-1, keepdim=True)


class Beside(Tokens):
    """What the module has beside it: its forward is not called."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + Sinusoids.forward(self.table, x)
        return self.head(x + self.mlp(x).relu())


class MadeAnew(Kept):
    """For more positions than it has."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.rows.shape[1]:
            self.rows = Grown.rows(x.shape[1])[None]
        return super().forward(x)


@pytest.mark.parametrize("build", [lambda: Tokens(OfWidth), Elsewhere, Beside, MadeAnew])
def test_where_it_is_more_than_that_it_stays(build: Callable[[], nn.Module]) -> None:
    graph = trace(noisy(build), torch.randn(2, 5, 3).double())
    assert "embed" in graph.skipped
    assert "embed" not in [group.name for group in graph.groups]
