"""What the first run of a copy shows, and nothing has happened by then: layers that a closure holds, or that are made
then; batches that are written to."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore import Scorer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.out: Tensor | None = None
        self.seen: dict[str, Tensor] = {}

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x)).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def wrapped_layer(block: Block) -> None:
    block.inner.forward = lambda x, old=block.inner.forward: old(x) * 0.9  # type: ignore[method-assign]


def wrapped_model(block: Block) -> None:
    block.features = lambda x: block.norm(block.inner(x)).relu()  # type: ignore[method-assign]


def hook_that_reads(block: Block) -> None:
    block.inner.register_forward_hook(lambda module, args, output: output * block.norm.weight)


def hook_that_writes(block: Block) -> None:
    block.inner.register_forward_hook(lambda module, args, output: setattr(block, "out", output))
    block.features = block.features_kept  # type: ignore[method-assign, attr-defined]


class Kept(Block):
    def features_kept(self, x: Tensor) -> Tensor:
        self.inner(x)
        assert self.out is not None
        return self.norm(self.out).relu()


class KeptInDict(Block):
    def features(self, x: Tensor) -> Tensor:
        self.inner(x)
        return self.norm(self.seen["inner"]).relu()


def hook_that_writes_to_a_dict(block: Block) -> None:
    block.inner.register_forward_hook(lambda module, args, output: block.seen.update(inner=output))


CLOSURES: list[tuple[type[Block], Callable[[Any], None], str]] = [
    (Block, wrapped_layer, r"inner\.weight is read"), (Block, wrapped_model, r"inner\.weight is read"),
    (Block, hook_that_reads, r"norm\.weight is read"), (Kept, hook_that_writes, "out is written"),
    (KeptInDict, hook_that_writes_to_a_dict, "seen is written")]


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize(("kind", "close", "said"), CLOSURES)
def test_layers_that_are_called_through_a_closure(kind: type[Block], close: Callable[[Any], None], said: str,
                                                  has_run: bool) -> None:
    model, x = kind().train(), torch.randn(4, 5)
    close(model)
    if has_run:
        with torch.no_grad():
            model(x)
    out, seen = model.out, dict(model.seen)
    for act in (lambda: fastscore.score(model, [x], progress=False), lambda: Scorer(model, x),
                lambda: fastscore.score(model, [x], importance="magnitude-l2", progress=False)):
        with untouched(model), pytest.raises(ValueError, match=rf"^model: {said} through a function.*make it a method"):
            act()
    assert model.out is out
    assert {key: id(value) for key, value in model.seen.items()} == {key: id(value) for key, value in seen.items()}


def test_what_looks_at_a_shape_or_is_bound_to_the_copy_is_no_matter() -> None:
    model, x = Block(), torch.randn(4, 5)
    dtype_of = lambda: (model.inner.weight.dtype, model.inner.weight.shape, model.inner.weight.device)  # noqa: E731
    model.inner.register_forward_pre_hook(lambda module, args: (args[0].to(dtype_of()[0]),))
    assert set(fastscore.score(model, [x], progress=False)) == {"inner"}


def test_a_forward_that_calls_a_model_of_its_own() -> None:
    model, x = Block(), torch.randn(4, 5)
    with untouched(model), pytest.raises(ValueError, match="a forward= must call the model that it is given"):
        fastscore.score(model, [x], forward=lambda _, batch: model(batch), progress=False)


class Normalizing(Block):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            x -= 0.4
            x /= 0.5
        else:
            x = (x - 0.4) / 0.5
        return super().forward(x)


def test_a_batch_that_the_model_writes_to_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model, x = Normalizing(True).eval(), torch.randn(4, 5)
    plain = Normalizing(False).eval()
    plain.load_state_dict(model.state_dict())
    before = x.clone()
    scores, expected = (fastscore.score(each, [x, (x, torch.zeros(4))], probes="exact", progress=False)
                        for each in (model, plain))
    assert torch.equal(x, before)
    torch.testing.assert_close(scores["inner"], expected["inner"])
    small, other = (fastscore.prune(each, scores, x, channels=0.5, calibration=[x]).model for each in (model, plain))
    with fastscore.mask(model, scores, 0.5, x):
        pass
    assert torch.equal(x, before)
    torch.testing.assert_close(small(x.clone()), other(x.clone()))


def test_a_forward_that_lets_the_model_write_to_the_batch() -> None:
    model, x = Normalizing(True), torch.randn(4, 5)
    before = x.clone()
    with untouched(model), pytest.raises(ValueError, match=r"Normalizing: it writes in place to the batch.*clone\(\)"):
        fastscore.score(model, [x], forward=lambda model, batch: model(batch), progress=False)
    assert torch.equal(x, before)
    assert set(fastscore.score(model, [x], forward=lambda model, batch: model(batch.clone()), progress=False))
    assert torch.equal(x, before)


class Builds(Block):
    def __init__(self) -> None:
        super().__init__()
        self.last: nn.Linear | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        if self.last is None:
            self.last = nn.Linear(y.shape[1], 2)
        return self.last(y)


def test_a_layer_that_the_first_run_makes() -> None:
    model, x = Builds(), torch.randn(4, 5)
    with untouched(model), pytest.raises(ValueError, match=r"^model: last\.bias is made when .*call it once"):
        fastscore.score(model, [x], progress=False)
    model(x)
    assert set(fastscore.score(model, [x], progress=False)) == {"inner"}
