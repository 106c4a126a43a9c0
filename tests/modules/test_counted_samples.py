"""Whether a batch of several samples may go another way than one, against what it does."""

from contextlib import nullcontext

import pytest
import torch
from thinned import thinned
from torch import Tensor, nn

from fastscore.modules.counted_samples import Ways
from fastscore.modules.evaluation_copy import evaluation_copy

ONE = 2  # rows of x for each sample


class Counts(nn.Module):
    """Says which way it went. of: the number that it holds."""

    def __init__(self, of: float = 6) -> None:
        super().__init__()
        self.of, self.went = of, 0

    def forward(self, x: Tensor) -> Tensor:
        self.went = self.way(x)
        return x

    def way(self, x: Tensor) -> int:
        raise NotImplementedError


class More(Counts):
    def way(self, x: Tensor) -> int:
        return 1 if x.shape[0] > 16 else 0


class TurnedRound(Counts):
    def way(self, x: Tensor) -> int:
        if 16 <= len(x):  # noqa: SIM300
            return 1
        return 0


class Same(Counts):
    def way(self, x: Tensor) -> int:
        n, _ = x.shape
        if (n
                == self.of):
            return 1
        return 0


class NotOne(Counts):
    def way(self, x: Tensor) -> int:
        return int(self.inner(x)) if x.size(0) != 2 else 2

    def inner(self, x: Tensor) -> bool:
        return True


class NotThere(Counts):
    def way(self, x: Tensor) -> int:
        if x.dim() > 5:
            return 1 if len(x) > 4 else 2
        return 0


class Pairs(Counts):
    def way(self, x: Tensor) -> int:
        pairs = (x[:, None] - x[None]).flatten(0, 1)
        return 1 if len(pairs) > 60 else 0


class Squared(Counts):
    def way(self, x: Tensor) -> int:
        n = x.shape[0]
        return 1 if n * n > 60 else 0


class Remaining(Counts):
    def way(self, x: Tensor) -> int:
        n, _ = x.shape
        rest = n % 5
        if rest == 3:
            return 1
        return 2 if (n - 1) // 6 == 0 else 3


EXACT = [More, TurnedRound, NotOne, NotThere]


class Within(Counts):
    """Where it cannot be seen."""

    def way(self, x: Tensor) -> int:
        return [1 if len(x) > 16 else 0 for _ in range(2)].pop()


class Between(Counts):
    def way(self, x: Tensor) -> int:
        return 1 if 3 < len(x) < 9 else 0


def went(model: Counts, samples: int) -> int:
    model(torch.zeros(ONE * samples, 3))
    return model.went


MORE = [Same, Within, Between, Pairs, Squared, Remaining]


@pytest.mark.parametrize(("kind", "of"), thinned([*EXACT, *MORE], [6, 3, 6.0]))
def test_a_batch_that_goes_another_way_is_told(kind: type[Counts], of: float) -> None:
    model = kind(of)
    ways = Ways(model)
    assert ways.may_differ(1)  # no run was seen
    with ways.watched(nullcontext):
        one = went(model, 1)
    for samples in range(1, 20):
        other = went(model, samples) != one
        assert ways.may_differ(samples) >= other
        assert ways.may_differ(samples) == other or kind not in EXACT


class Attention(nn.Module):
    """Of which a copy has its code changed: how wide its heads are."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 2, nn.Linear(8, 24), nn.Linear(8, 8)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        x = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(n, t, c)
        if n > 3:
            x = x - x.mean(0)
        return self.proj(x)


def test_code_that_copies_change_is_seen() -> None:
    model = nn.Sequential(Attention())
    copied, ways = evaluation_copy(model), Ways(model)
    assert type(copied[0]) is not Attention
    with ways.watched(nullcontext):
        copied(torch.zeros(1, 3, 8))
    assert [ways.may_differ(samples) for samples in (3, 4)] == [False, True]


def test_a_run_that_stops_shows_nothing() -> None:
    model = More()
    ways = Ways(model)
    with pytest.raises(ZeroDivisionError), ways.watched(nullcontext):
        raise ZeroDivisionError
    assert ways.may_differ(2)


def test_code_without_comparisons_goes_one_way() -> None:
    assert not Ways(nn.Sequential(nn.Linear(3, 3), nn.ReLU())).may_differ(16)
