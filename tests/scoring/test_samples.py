"""Scores where the samples are not the rows of what layers read: each against every sample run alone, in float64."""

import itertools
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
import whole_way
from torch import Tensor, nn

import fastscore
from fastscore import Scorer
from fastscore.graph.tracing import trace


def relu_mlp(*widths: int) -> nn.Sequential:
    layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class SequenceFirst(nn.Module):
    """[N, T, 6] -> [T, N, 16] through an encoder, PyTorch's default -> [N, 3]."""

    def __init__(self, pool: Callable[[Tensor], Tensor] = lambda x: x.mean(0)) -> None:
        super().__init__()
        self.embed, self.pool, self.head = nn.Linear(6, 16), pool, nn.Linear(16, 3)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.encoder(self.embed(x.transpose(0, 1)))))


class Frames(nn.Module):
    """[N, T, 3, 8, 8]: every frame by itself, in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(),
                                 nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(0, 1)).unflatten(0, x.shape[:2]).square().mean(1)


class FramesFirst(Frames):
    """The same, all samples of a frame together."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (-1, len(x))).square().mean(0)


class Windows(nn.Module):
    """[N, 8, 8, 6] in four windows of 4 x 4, each [N * windows, 16, C], with attention within."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.mlp, self.head = relu_mlp(6, 10, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        w = x.unflatten(2, (2, 4)).unflatten(1, (2, 4)).transpose(2, 3).reshape(n * 4, 16, 6)
        w = w + self.attention(w, w, w, need_weights=False)[0]
        w = w + self.mlp(w)
        return self.head(w.reshape(n, 4, 16, 6).amax(2).mean(1))


class Stacked(nn.Module):
    """Two views in one batch, one after another, as RAFT and Siamese networks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(),
                                 nn.Linear(8 * 16, 4))

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.net(torch.cat([x, x.flip(-1)])).chunk(2)
        return one * two


class ChannelsFirstTokens(nn.Module):
    """Rows and columns of an image folded into the batch, as in axial attention."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns, self.head = relu_mlp(5, 8, 5), relu_mlp(5, 7, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, H, W, 5]
        n, h, w, _ = x.shape
        x = x + self.rows(x.reshape(n * h, w, 5)).reshape(x.shape)
        y = self.columns(x.permute(2, 0, 1, 3).reshape(w * n, h, 5)).reshape(w, n, h, 5)
        return self.head((x + y.permute(1, 2, 0, 3)).amax((1, 2)))


class CallsAlike(nn.Module):
    """One network on tokens and on their mean: its calls read different layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.head = relu_mlp(5, 9, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 5]
        return self.head(self.mlp(x.transpose(0, 1)).mean(0) * self.mlp(x.mean(1)))


class Queries(nn.Module):
    """Learned queries through a network of their own, without samples; keys from the input."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(count, 5))
        self.of_queries, self.of_keys = relu_mlp(5, 9, 4), relu_mlp(6, 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.of_keys(x) @ self.of_queries(self.queries).T


class Experts(nn.Module):
    """Tokens go to one expert or the other by what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 2)
        self.experts, self.mlp = nn.ModuleList([relu_mlp(6, 8, 6), relu_mlp(6, 8, 6)]), relu_mlp(6, 7, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        to, y = self.router(rows).argmax(1), torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            at = (to == number).nonzero()[:, 0]
            y = y.index_add(0, at, expert(rows[at]))
        return self.mlp((rows + y).unflatten(0, x.shape[:2]).mean(1))


class Neighbours(nn.Module):
    """Every sample is shown the mean of the batch: its rows reach the outputs of all."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = relu_mlp(5, 8, 6), relu_mlp(6, 7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(x)
        return self.late((x - x.mean(0)).relu())


class Flipped(nn.Module):
    """A branch that sees the batch in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.flipped = relu_mlp(5, 8, 3), relu_mlp(5, 7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + self.flipped(x.flip(0)).flip(0)


class Constant(nn.Module):
    """A learned vector, without any dimension but its channels, added to every sample's map."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.randn(5))
        self.mlp, self.conv, self.last = relu_mlp(5, 9, 6), nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.conv(x) + self.mlp(self.vector).view(1, -1, 1, 1)).relu()).mean((2, 3))


class ZeroBranch(nn.Module):
    """A residual branch whose last layer is zero, as it is at first: no gradient comes back through it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch, self.head = nn.Linear(5, 8), relu_mlp(8, 9, 8), nn.Linear(8, 3)
        nn.init.zeros_(self.branch[2].weight)
        nn.init.zeros_(self.branch[2].bias)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 5]
        x = self.first(x.transpose(0, 1)).relu()
        return self.head((x + self.branch(x)).mean(0))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    # model, shape of a sample, groups that can only be told with one sample in a batch, or by following rows
    "sequence first, T = N": (SequenceFirst, (4, 6), set()),
    "sequence first, T = 1": (SequenceFirst, (1, 6), set()),
    "sequence first, T = 7": (SequenceFirst, (7, 6), set()),
    "sequence first, its first token": (lambda: SequenceFirst(lambda x: x[0]), (7, 6), set()),
    "frames, T = N": (Frames, (4, 3, 8, 8), set()),
    "frames": (Frames, (3, 3, 8, 8), set()),
    "frames, samples together": (FramesFirst, (3, 3, 8, 8), set()),
    "windows": (Windows, (8, 8, 6), set()),
    "stacked": (Stacked, (3, 8, 8), set()),
    "rows and columns": (ChannelsFirstTokens, (3, 4, 5), set()),
    "two layouts in one layer": (CallsAlike, (4, 5), set()),
    "queries, Q = N": (lambda: Queries(4), (6,), {"of_queries.0"}),
    "queries": (lambda: Queries(3), (6,), {"of_queries.0"}),
    "experts": (Experts, (5, 6), {"experts.0.0", "experts.1.0"}),
    "neighbours": (Neighbours, (5,), {"early.0"}),
    "flipped": (Flipped, (5,), {"flipped.0"}),
    "constant": (Constant, (3, 8, 8), {"mlp.0"}),
    "zero branch": (ZeroBranch, (4, 5), set()),
}


MOVING = {"experts.0.0", "experts.1.0", "flipped.0"}  # each of their rows is of one sample, wherever it lies


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, set[str]]:
    build, shape, untold = CASES[request.param]
    torch.manual_seed(0)
    return build().double().eval(), torch.randn(4, *shape, dtype=torch.float64), untold


def loss_of(v: Tensor, x: Tensor) -> Callable[[Tensor, Any], Tensor]:
    """Σ v_n·z_n for the samples of a batch, which are told by what they hold."""
    def loss(output: Tensor, batch: Tensor) -> Tensor:
        rows = [next(n for n in range(len(x)) if torch.equal(x[n], sample)) for sample in batch]
        return (output * v[rows]).sum()

    return loss


def score(model: nn.Module, batches: list[Tensor], v: Tensor, x: Tensor, **options: Any) -> fastscore.Scores:
    return fastscore.score(model, batches, gradient="loss", normalize=False, loss=loss_of(v, x), progress=False,
                           **options)


def test_a_batch_is_worth_its_samples_alone(case: tuple[nn.Module, Tensor, set[str]]) -> None:
    model, x, untold = case
    graph = trace(model, x)
    with torch.no_grad():
        v = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with oracles.untouched(model):
        scores = score(model, [x], v, x)
        parts = score(model, [x[:3], x[3:]], v, x)
    untold = untold - MOVING
    assert set(scores) == {group.name for group in graph.groups} - untold
    assert set(parts) == set(scores)
    for name in untold:
        assert "one sample each" in scores.skipped[name]
    if type(model) is Neighbours:  # no sample is alone what it is among others
        return
    single = score(model, list(x.split(1)), v, x)  # the way out that the reasons name
    assert set(single) == {group.name for group in graph.groups}
    for group in graph.groups:
        want = whole_way.sums(model, group, x, v).square().mean(0)
        for found in (scores, parts, single):
            if group.name in found:
                torch.testing.assert_close(found[group.name].double(), want, rtol=1e-6, atol=1e-30,
                                           msg=lambda text, name=group.name: f"{name}: {text}")


def test_the_same_in_a_loop_of_ones_own(case: tuple[nn.Module, Tensor, set[str]]) -> None:
    """Traced with one sample: groups whose samples cannot be told apart are found out on the way."""
    model, x, untold = case
    with torch.no_grad():
        v = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for example in (x[:1], x):
        scorer = Scorer(model, example, normalize=False)
        with scorer:
            (model(x) * v).sum().backward()
        model.zero_grad(set_to_none=True)
        scores, want = scorer.scores(), score(model, [x], v, x)
        assert set(scores) == set(want) - untold
        assert untold <= set(scores.skipped)
        for name in scores:
            torch.testing.assert_close(scores[name], want[name], rtol=1e-6, atol=1e-30)


def test_a_model_that_takes_its_samples_second() -> None:
    """nn.TransformerEncoder as it is by default, on as many tokens as samples."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0), 2).double().eval()
    x, v = torch.randn(4, 4, 6, dtype=torch.float64), torch.randn(4, 4, 6, dtype=torch.float64)
    with oracles.untouched(model), pytest.raises(ValueError, match=r"^batches, or .*: their second dimension"):
        fastscore.score(model, [x.transpose(0, 1)], progress=False)
    with pytest.raises(ValueError, match=r"or example_inputs: their second dimension .* forward="):
        Scorer(model, x.transpose(0, 1))

    class BatchFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.transpose(0, 1)).transpose(0, 1)

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch.transpose(0, 1))

    how: dict[str, Any] = {"gradient": "loss", "normalize": False, "progress": False, "forward": forward}
    scores = fastscore.score(model, [x], loss=lambda output, batch: (output * v.transpose(0, 1)).sum(), **how)
    scorer = Scorer(model, x, normalize=False, forward=forward)
    with scorer:
        (model(x.transpose(0, 1)) * v.transpose(0, 1)).sum().backward()
    model.zero_grad(set_to_none=True)
    graph = trace(BatchFirst().eval(), x)
    assert {f"net.{name}" for name in scores} == {group.name for group in graph.groups}
    for group in graph.groups:
        want = whole_way.sums(BatchFirst().eval(), group, x, v).square().mean(0)
        for found in (scores, scorer.scores()):
            torch.testing.assert_close(found[group.name.removeprefix("net.")].double(), want, rtol=1e-6, atol=1e-30)
    whole, parts = (fastscore.score(model, batches, progress=False, forward=forward)
                    for batches in ([x], [x[:1], x[1:]]))
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name])  # the random gradient of a sample is its own


def test_a_layer_called_by_keyword() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(input=self.two(input=self.one(x).relu()).relu())

    torch.manual_seed(0)
    model, x, v = Keyword().double().eval(), torch.randn(4, 5).double(), torch.randn(4, 3).double()
    scores, graph = score(model, [x], v, x), trace(model, x)
    assert set(scores) == {"one", "two"}
    for group in graph.groups:
        want = whole_way.sums(model, group, x, v).square().mean(0)
        torch.testing.assert_close(scores[group.name].double(), want, rtol=1e-6, atol=1e-30)
    small = fastscore.prune(model, scores, x, channels=0.6)
    with torch.no_grad(), fastscore.mask(model, scores, 0.4, x):
        masked = model(x)
    torch.testing.assert_close(small.model(x), masked)
