"""Whatever the user's own code raises comes through, and the model is as it was."""

import copy
import re
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


@pytest.mark.skipif(not hasattr(Exception, "add_note"), reason="exceptions take notes from Python 3.11 on")
@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(), lambda output: output.sum(),
                                  lambda output, batch: output["logits"].sum(), failing])
def test_an_exception_of_a_loss_says_how_it_was_called(loss: Callable[..., Any]) -> None:
    model, y = trained(), torch.zeros(4, dtype=torch.int64)
    own = (TypeError, IndexError, Mine)
    with untouched(model), pytest.raises(own) as caught:
        score(model, [(X, y)], gradient="loss", loss=loss)
    note, = caught.value.__notes__
    assert re.match(r"loss: called as loss\(output, batch\), with an output \[4, \d+\] and the batch .* tuple;", note)
    way_out = eval(re.search(r"loss=(lambda .*)$", note)[1], {"F": F})
    found, expected = (score(model, [(X, y)], gradient="loss", loss=each) for each in (way_out, None))
    assert all(torch.equal(found[layer], values) for layer, values in expected.items())
    smaller = copy.deepcopy(model).requires_grad_()
    with pytest.raises(TypeError) as caught:
        fastscore.distill(model, smaller, [X], held_out=[X], steps=1, progress=False, loss=lambda got: got.sum())
    assert caught.value.__notes__[0].startswith("loss: called as loss(smaller's output, dense output), both [4, ")


@pytest.mark.parametrize("labels", [torch.zeros(4), torch.full((4,), 99), torch.zeros(2, dtype=torch.int64),
                                    torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, dtype=torch.int32),
                                    torch.full((4,), -1)])
def test_labels_that_cross_entropy_does_not_take(labels: Tensor) -> None:
    shown = re.escape(f"{labels.dtype} {list(labels.shape)}")
    refused(ValueError, f"^batches: cross entropy does not take their labels, {shown} beside an output .*loss=lambda",
            trained(), lambda: score(trained(), [(X, labels)], gradient="loss"))


@pytest.mark.parametrize(("value", "said"), [(lambda got, expected: got - expected, r"\[4, \d+\]"),
                                             (lambda got, expected: 1.0, "float")])
def test_a_loss_of_distill_that_is_no_scalar(value: Callable[..., Any], said: str) -> None:
    smaller = trained().requires_grad_()
    before = {name: each.clone() for name, each in smaller.state_dict().items()}
    with pytest.raises(ValueError, match=f"^loss: it returned {said}, where a scalar tensor is meant"):
        fastscore.distill(trained(), smaller, [X], held_out=[X], steps=1, progress=False, loss=value)
    assert all(torch.equal(each, before[name]) for name, each in smaller.state_dict().items())
