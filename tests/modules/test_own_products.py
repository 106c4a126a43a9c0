"""Parameters that a module's own code multiplies by lose channels as the weights of layers do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whole_way import check, noisy

import fastscore
from fastscore.graph.tracing import trace


def _p(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)


class Net(nn.Module):
    """Layers a (5 to 8) and out (8 to 2), and parameters between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(5, 8), nn.Linear(8, 2)


class Head(Net):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.head = _p(8, 6), _p(6, 3)
        del self.out

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.relu(self.a(x)) @ self.w) @ self.head


class Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1, self.w2, self.b2, self.w3 = _p(8, 5), _p(8), _p(6, 8), _p(6), _p(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(torch.addmm(self.b2, F.relu(F.linear(x, self.w1, self.b1)), self.w2.t()))
        return (self.w3 @ x.t()).t()


class Einsums(Net):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b, self.v = _p(8, 6), _p(6), _p(2, 6)
        del self.out

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("...c,co->o...", F.relu(self.a(x)), self.w) + self.b[:, None]
        return torch.einsum("oc,cn->no", self.v, F.relu(h))


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ws, self.named = nn.ParameterList([_p(8, 5), _p(6, 8)]), nn.ParameterDict({"last": _p(6, 2)})

    def forward(self, x: Tensor) -> Tensor:
        for w in self.ws:
            x = torch.tanh(F.linear(x, w))
        return x @ self.named["last"]


class Equalised(nn.Module):
    """One whose weight is scaled in each pass, by a number that its code keeps."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = _p(outputs, inputs), _p(outputs), inputs ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


class LowRank(Net):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = _p(8, 4), _p(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(F.relu(self.a(x)) @ self.down @ self.up))


class LoRA(Net):
    def __init__(self) -> None:
        super().__init__()
        self.A, self.B = _p(3, 5), _p(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.a(x) + (x @ self.A.t()) @ self.B.t() * 0.5))


class Experts(nn.Module):
    """All of all samples, by one product."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out = nn.Linear(5, 3), nn.Linear(5, 2)
        self.w1, self.b1, self.w2 = _p(3, 5, 8), _p(3, 1, 8), _p(3, 8, 5)

    def experts(self, x: Tensor) -> Tensor:
        return torch.bmm(F.relu(torch.bmm(x.expand(3, *x.shape), self.w1) + self.b1), self.w2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.einsum("ne,end->nd", self.gate(x).softmax(-1), self.experts(x)))


class ExpertsByEinsum(Experts):
    def experts(self, x: Tensor) -> Tensor:
        h = F.relu(torch.einsum("nd,edh->enh", x, self.w1) + self.b1)
        return torch.einsum("enh,ehd->end", h, self.w2)


class ExpertsAtOnce(ExpertsByEinsum):
    """Whose outputs are weighed and summed in the einsum that makes them."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(torch.einsum("nd,edh->enh", x, self.w1) + self.b1)
        return self.out(torch.einsum("enh,ehd,ne->nd", h, self.w2, self.gate(x).softmax(-1)))


class ExpertsInALoop(Experts):
    def experts(self, x: Tensor) -> Tensor:
        return torch.stack([F.relu(x @ w1 + b1) @ self.w2[e]
                            for e, (w1, b1) in enumerate(zip(self.w1, self.b1, strict=True))])


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 9), nn.Linear(9, 8)

    def head(self, h: Tensor) -> Tensor:
        return F.linear(h, self.embed.weight)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        return self.head(self.norm(h + self.down(F.relu(self.up(h)))))


class TiedByName(TiedHead):
    """Whose own attribute is the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.vocabulary = self.embed.weight

    def head(self, h: Tensor) -> Tensor:
        return h @ self.vocabulary.t()


class TiedLayer(TiedHead):
    """Whose weight a Linear holds as well, which stands before the embedding."""

    def __init__(self) -> None:
        super().__init__()
        embed, self.read = self._modules.pop("embed"), nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 11))
        self.embed = embed
        self.read[2].weight = embed.weight

    def head(self, h: Tensor) -> Tensor:
        return self.read(h)


class Autoencoder(Net):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.b = nn.Linear(8, 6), _p(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(F.linear(F.relu(self.encode(F.relu(self.a(x)))), self.encode.weight.t(), self.b)))


class Memory(Net):
    def __init__(self) -> None:
        super().__init__()
        self.memory = _p(7, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((torch.tanh(self.a(x)) @ self.memory.t()).softmax(-1) @ self.memory)


class Convolutions(nn.Module):
    """One of them scaled, one depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1, self.w2, self.w3, self.b3 = _p(8, 3, 3, 3), _p(8), _p(8, 1, 3, 3), _p(6, 8, 1, 1), _p(6)
        self.out, self.scale = nn.Linear(6, 2), 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.w1 * self.scale, self.b1, padding=1))
        x = F.relu(F.conv2d(x, self.w2, stride=2, groups=self.w2.shape[0]))
        return self.out(F.relu(torch.conv2d(x, self.w3, bias=self.b3)).mean((2, 3)))


class OverTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ws = nn.ParameterList([_p(6, 3, 3), _p(4, 6, 3), _p(2, 4, 1)])

    def forward(self, x: Tensor) -> Tensor:
        for number, w in enumerate(self.ws):
            x = torch.tanh(F.conv1d(x, w, padding="same", dilation=1 + number))
        return x.mean(2)


KINDS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "head": (Head, ["a", "w"]), "functions": (Functions, ["w1", "w2"]), "einsums": (Einsums, ["a", "w"]),
    "listed": (Listed, ["ws.0", "ws.1"]),
    "equalised": (lambda: nn.Sequential(Equalised(5, 8), nn.ReLU(), Equalised(8, 6), nn.ReLU(), Equalised(6, 2)),
                  ["0.weight", "2.weight"]),
    "low rank": (LowRank, ["a", "down", "up"]), "lora": (LoRA, ["A", "B"]), "experts": (Experts, ["w1", "w2"]),
    "einsum of experts": (ExpertsByEinsum, ["w1", "w2"]), "einsum of three": (ExpertsAtOnce, ["w1", "w2"]),
    "loop over experts": (ExpertsInALoop, ["w1", "w2"]),
    "tied head": (TiedHead, ["embed", "up"]), "tied by name": (TiedByName, ["embed", "up"]),
    "tied layer": (TiedLayer, ["down", "up"]),
    "tied autoencoder": (Autoencoder, ["a", "encode"]), "memory": (Memory, ["a"]),
    "convolutions": (Convolutions, ["w1", "w3"]), "over time": (OverTime, ["ws.0", "ws.1"])}


def _x(kind: str, n: int = 4, seed: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    ids = kind in ("tied head", "tied by name", "tied layer")
    if kind in ("convolutions", "over time"):
        return torch.randn(n, 3, *((7, 7) if kind == "convolutions" else (7,)), generator=random).double()
    return torch.randint(0, 11, (n, 6), generator=random) if ids else torch.randn(n, 5, generator=random).double()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str, tmp_path: Path) -> None:
    """By brute force, from data to a file."""
    build, groups = KINDS[kind]
    check(build, _x(kind), groups, tmp_path)


@pytest.mark.parametrize("kind", ["functions", "loop over experts", "tied by name", "tied layer", "memory",
                                  "convolutions"])
def test_the_same_in_float32_and_in_a_scorer(kind: str) -> None:
    """Where layers are packed, and in a user's own model, which trains on."""
    build, groups = KINDS[kind]
    model, x = noisy(build), _x(kind)
    options = {"gradient": "loss", "normalize": False, "loss": lambda output, batch: output.square().sum()}
    exact = fastscore.score(model, [x], progress=False, **options)
    assert set(exact) == set(groups)
    small = noisy(build).float()
    fast = fastscore.score(small, [x.float() if x.is_floating_point() else x], progress=False, **options)
    with fastscore.Scorer(model, x, normalize=False) as scorer:
        model(x).square().sum().backward()
    within = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(within[name], parameter.grad)
    for name in exact:
        torch.testing.assert_close(fast[name], exact[name].float(), rtol=1e-3, atol=1e-3 * float(exact[name].max()))
        torch.testing.assert_close(scorer.scores()[name], exact[name])


def _as_layers() -> nn.Module:
    """What Functions is, of layers."""
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2, bias=False))


@pytest.mark.parametrize("importance", ["taylor-sq", "magnitude-l1", "magnitude-l2"])
def test_as_of_the_same_network_of_layers(importance: str) -> None:
    own, layers, x = noisy(Functions), _as_layers().double(), _x("functions")
    with torch.no_grad():
        for number, (w, b) in enumerate((("w1", "b1"), ("w2", "b2"), ("w3", ""))):
            layers[2 * number].weight.copy_(own.get_parameter(w))
            if b:
                layers[2 * number].bias.copy_(own.get_parameter(b))
    scores, expected = (fastscore.score(each, [x], importance=importance, progress=False) for each in (own, layers))
    for one, other in zip(("w1", "w2"), ("0", "2"), strict=True):
        torch.testing.assert_close(scores[one], expected[other])
    own, layers = (fastscore.prune(each, given, x, params=0.7, compensate=False).report
                   for each, given in ((own, scores), (layers, expected)))
    assert own.params == layers.params


def test_an_optimizer_and_rounds() -> None:
    model, x = noisy(Head), _x("head")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(x).square().mean().backward()
    optimizer.step()
    scores = fastscore.score(model, [x], progress=False)
    result = fastscore.prune(model, scores, x, channels=0.5, scope="layer")
    rebuilt = fastscore.rebuild_optimizer(optimizer, model, result)
    stays = torch.ones(8, dtype=torch.bool).index_fill(0, result.removed["a"], False)
    goes = torch.ones(6, dtype=torch.bool).index_fill(0, result.removed["w"], False)
    assert torch.equal(rebuilt.state[result.model.w]["momentum_buffer"],
                       optimizer.state[model.w]["momentum_buffer"][stays][:, goes])
    again = fastscore.score(result.model, [x], progress=False)
    assert fastscore.prune(result.model, again, x, channels=0.5, scope="layer").model.w.shape == (2, 1)
    assert type(result.model) is Head


class ByWidth(Equalised):
    """By a number of what its weight is now."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.weight.shape[1] ** -0.5, self.bias)


def test_a_scale_that_knows_the_width_keeps_it() -> None:
    model = noisy(lambda: nn.Sequential(ByWidth(5, 8), nn.ReLU(), ByWidth(8, 2)))
    assert trace(model, _x("functions")).skipped["0.weight"] == \
        "the model returns something else with fewer channels there"


class Normalised(Net):
    """Weight normalisation by hand: of all inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.g = _p(8, 8), _p(8)

    def forward(self, x: Tensor) -> Tensor:
        w = self.g[:, None] * self.v / self.v.norm(dim=1, keepdim=True)
        return self.out(F.relu(F.linear(F.relu(self.a(x)), w)))


def test_what_a_weight_is_computed_from_stays() -> None:
    skipped = trace(noisy(Normalised), _x("head")).skipped
    assert skipped["v"] == "the code of Normalised computes what it multiplies by from its v [8, 8], in each pass"


class ReadElsewhere(Net):
    """Whose parameter is not multiplied by alone."""

    def __init__(self) -> None:
        super().__init__()
        self.w = _p(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(F.relu(self.a(x)) @ self.w)) + self.w.square().mean()


def test_what_other_code_reads_stays() -> None:
    assert [group.name for group in trace(noisy(ReadElsewhere), _x("head")).groups] == []
