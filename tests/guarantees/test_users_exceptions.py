"""Whatever the user's own code raises comes through, and the model is as it was."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import untouched
from refusals import X, refused, score, trained
from torch import Tensor, nn

import fastscore
from fastscore import Scorer
from fastscore.graph.tracing import trace


class Mine(Exception):
    """Raised by the user's code."""


def failing(*args: Any, **kwargs: Any) -> Any:
    raise Mine


def interrupted(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("fail", [failing, interrupted])
def test_the_users_code_raises(fail: Callable[..., Any]) -> None:
    error = Mine if fail is failing else KeyboardInterrupt
    model = trained()
    y = torch.zeros(4, dtype=torch.int64)

    def loader() -> Iterator[Tensor]:
        yield X
        torch.rand(3)
        fail()

    calls, traced = 0, 0

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if traced and calls > traced + 1:  # past tracing
            fail()
        return model(batch)

    refused(error, None, model, lambda: score(model, loader()))
    refused(error, None, model, lambda: score(model, [(X, y)], gradient="loss", loss=fail))
    trace(trained(), X, forward)  # another such model, so that score() below traces for itself
    calls, traced = 0, calls
    refused(error, None, model, lambda: score(model, [X] * 20, forward=forward))
    assert calls > traced + 1

    def loop(scorer: Scorer) -> None:
        with scorer:
            F.cross_entropy(model.eval()(X), y)
            model.train()
            fail()

    for gradient in ("loss", "random"):
        scorer = Scorer(model, X, gradient=gradient)  # type: ignore[arg-type]
        model.train()
        running = {name: buffer.clone() for name, buffer in model.named_buffers()}
        refused(error, None, model, lambda: loop(scorer))  # noqa: B023
        assert all(torch.equal(buffer, running[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("fail", [failing, interrupted])
@pytest.mark.parametrize("register", [lambda m, hook: m.register_forward_hook(hook),
                                      lambda m, hook: m.register_forward_pre_hook(hook)])
def test_the_users_hook_raises(register: Callable[..., Any], fail: Callable[..., Any]) -> None:
    model = trained()
    scores = score(model)
    register(model.block2.conv1, fail)
    error = (Mine, ValueError) if fail is failing else KeyboardInterrupt
    for act in (lambda: score(model), lambda: Scorer(model, X), lambda: fastscore.prune(model, scores, X, macs=0.5),
                lambda: fastscore.prune(model, scores, X, macs=0.5, inplace=True),
                lambda: fastscore.mask(model, scores, 0.3, X).__enter__()):
        with untouched(model), pytest.raises(error) as caught:  # type: ignore[arg-type]
            act()
        chain = [caught.value, caught.value.__cause__]
        assert any(isinstance(link, (Mine, KeyboardInterrupt)) for link in chain)


def test_the_users_hook_raises_in_a_later_batch() -> None:
    model = trained()
    calls = 0

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal calls
        calls += 1
        if len(output) == 2:
            raise Mine

    model.block2.conv1.register_forward_hook(hook)
    refused(Mine, None, model, lambda: score(model, [X, X[:2]]))
    assert calls > 1


@pytest.mark.parametrize("bears", [2, 4, 8])
def test_a_forward_that_runs_once_and_not_again(bears: int) -> None:
    """No layer is to blame, and none is named."""
    calls = 0

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > bears:
            raise Mine("no more")
        return model(x)

    model = trained()
    if bears == 2:  # its own exception, where nothing is tried
        refused(Mine, "no more", model, lambda: score(model, forward=forward))
    else:
        refused(ValueError, r"it ran on example_inputs, and a copy of it does not \(Mine: no more\)", model,
                lambda: score(model, forward=forward))
