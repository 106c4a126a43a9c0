"""Parts that torch.jit made are kept, by name, and the rest of the model goes as it would beside the modules that they
were made from."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore import Scorer
from fastscore.graph.tracing import trace

WIDTH = 6
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*TorchScript")


class Part(nn.Module):
    """Two results of two arguments, one of which may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        return self.narrow(self.wide(x).relu()) + gate, gate.argmax(-1)


class Written(nn.Module):
    """Its first operation writes to what it is called on."""

    def forward(self, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        return x.relu_(), gate.argmax(-1)


class Model(nn.Module):
    """Layers before a part, beside it and behind it."""

    def __init__(self, make: Callable[[nn.Module], nn.Module], part: Callable[[], nn.Module] = Part) -> None:
        super().__init__()
        self.before, self.beside, self.gate, self.after, self.more, self.last = (
            nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.part = make(part())

    def forward(self, x: Tensor) -> Tensor:
        y, chosen = self.part(self.before(x), self.gate(self.beside(x).relu()))
        return self.last(self.more(self.after(y + chosen[:, None]).relu()).relu())


def _traced(part: nn.Module) -> nn.Module:
    return torch.jit.trace(part, (torch.randn(2, WIDTH), torch.randn(2, WIDTH)))


def _models(make: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, nn.Module, Tensor]:
    """(with the part, with the module that it was made from, a batch)."""
    torch.manual_seed(0)
    with_part, plain = Model(make).double().eval(), Model(lambda part: part).double().eval()
    plain.load_state_dict(with_part.state_dict())
    return with_part, plain, torch.randn(4, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("make", [torch.jit.script, _traced])
def test_a_part_is_kept_by_name_and_the_rest_is_scored_and_goes(make: Callable[[nn.Module], nn.Module],
                                                                tmp_path: Path) -> None:
    model, plain, x = _models(make)
    passes = "its channels pass through part (Part), which torch.jit made, and which cannot lose channels"
    graph, dense = trace(model, x), trace(plain, x)
    assert [group.name for group in graph.groups] == ["beside", "after", "more"]
    assert {layer: reason for layer, reason in graph.skipped.items() if layer != "part"} == {
        "before": passes, "gate": passes, "last": "its channels are the model's output"}
    assert "put the nn.Module there that it was made from" in graph.skipped["part"]
    assert graph.macs["part"] == dense.macs["part.wide"] + dense.macs["part.narrow"]
    with untouched(model):
        scores = fastscore.score(model, [x], probes=2, progress=False)
        want = fastscore.score(plain, [x], probes=2, progress=False)
        scorer = Scorer(model, x, gradient="random")
        with scorer:
            output = model(x)
            scorer.probe(output)
            scorer.probe(output)
        for layer in scores:
            assert torch.equal(scores[layer], want[layer])
            assert torch.equal(scorer.scores()[layer], want[layer])
        options = {"scope": "layer", "compensate": False}
        small = fastscore.prune(model, scores, x, channels=0.5, **options).model
        with torch.no_grad(), fastscore.mask(model, scores, 0.5, x, **options):
            torch.testing.assert_close(small(x), model(x))
    small(x).square().sum().backward()
    assert all(parameter.is_leaf and parameter.grad is not None for parameter in small.parameters())
    fastscore.save_pruned(small, tmp_path / "small.safetensors")
    loaded = fastscore.load_pruned(model, tmp_path / "small.safetensors")
    assert torch.equal(loaded(x), small(x))
    assert all(parameter.is_leaf for parameter in loaded.parameters())
    result = fastscore.prune(model, scores, x, channels=0.5, inplace=True, **options)
    assert torch.equal(result.model(x), small(x))


def test_an_optimizer_goes_on_with_the_part() -> None:
    model, _, x = _models(torch.jit.script)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).square().sum().backward()
    optimizer.step()
    result = fastscore.prune(model, fastscore.score(model, [x], progress=False), x, channels=0.5)
    rebuilt = fastscore.rebuild_optimizer(optimizer, model, result)
    assert list(rebuilt.param_groups[0]["params"]) == list(result.model.parameters())
    of_part = [rebuilt.state[parameter]["exp_avg"] for parameter in result.model.part.parameters()]
    for found, parameter in zip(of_part, model.part.parameters(), strict=True):
        assert torch.equal(found, optimizer.state[parameter]["exp_avg"])


def test_the_module_that_it_was_made_from_can_go_instead() -> None:
    """What the reason says."""
    model, plain, x = _models(torch.jit.script)
    scores = fastscore.score(plain, [x], progress=False)
    assert {"before", "part.wide"} <= set(scores)
    small = fastscore.prune(plain, scores, x, channels=0.5).model
    want = small(x)
    small.part = torch.jit.script(small.part)
    torch.testing.assert_close(small(x), want)
    assert model(x).shape == want.shape


def test_a_part_that_writes_to_its_input_is_refused() -> None:
    """A model whose later code may read what was written has no part that could be kept."""
    model, x = Model(torch.jit.script, Written).eval(), torch.randn(2, WIDTH)
    with untouched(model), pytest.raises(ValueError, match=r"Written, which torch\.jit made, writes in place"):
        trace(model, x)
