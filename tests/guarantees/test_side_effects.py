"""Whatever is done with a model, and in whatever order: afterwards it is as it was, and nothing is kept alive."""

import copy
import gc
import io
import os
import pickle
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS
from random_networks import generate
from torch import Tensor, nn

import fastscore
from fastscore import Scorer
from fastscore.graph.tracing import trace

PLAIN = NETWORKS["plain"]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """oracles.untouched, and the states of the process that scoring might turn."""
    def states() -> dict[str, object]:
        return {"threads": torch.get_num_threads(), "autocast": torch.is_autocast_enabled("cpu"),
                "autocast dtype": torch.get_autocast_dtype("cpu"), "autocast cache": torch.is_autocast_cache_enabled(),
                "inference": torch.is_inference_mode_enabled(), "default dtype": torch.get_default_dtype(),
                "deterministic": torch.are_deterministic_algorithms_enabled(), "anomalies": torch.is_anomaly_enabled()}

    before = states()
    with oracles.untouched(model):
        yield
    assert states() == before


class Trouble(Exception):
    pass


def raising(at: int) -> Callable[[nn.Module, Tensor], Tensor]:
    """A forward that fails the `at`-th time."""
    calls = iter(range(at))

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        output: Tensor = model(batch)
        if next(calls, None) is None:
            raise Trouble
        return output

    return forward


def score(model: nn.Module, x: Tensor) -> None:
    fastscore.score(model, [x, x[:1]], progress=False)


def score_and_fail(model: nn.Module, x: Tensor, at: int) -> None:
    with pytest.raises((Trouble, ValueError), match="Trouble" if at == 0 else None):  # the first call is the tracer's
        fastscore.score(model, [x] * 9, forward=raising(at), progress=False)


def score_under_autocast(model: nn.Module, x: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fastscore.score(model, [x], progress=False)


def attach_and_detach(model: nn.Module, x: Tensor) -> None:
    scorer = Scorer(model, x)
    scorer.attach()
    with pytest.raises(RuntimeError, match="attached already"):
        scorer.attach()
    scorer.detach()
    scorer.detach()


def probe(model: nn.Module, x: Tensor) -> None:
    scorer = Scorer(model, x, gradient="random")
    with scorer:
        output = model(x)
        scorer.probe(output)
        scorer.probe(output)
    scorer.scores()


def fail_inside(model: nn.Module, x: Tensor) -> None:
    def fail(batch: Tensor) -> None:
        with Scorer(model, x):
            model(batch)
            raise Trouble

    with pytest.raises(Trouble):
        fail(x)


def nest(model: nn.Module, x: Tensor) -> None:
    """Scorers within one another, taken off in the wrong order, and a score in between."""
    one, other = Scorer(model, x, gradient="random"), Scorer(model, x, importance="taylor-abs", gradient="random")
    one.attach()
    other.attach()
    output = model(x)
    one.probe(output)
    other.probe(output)
    score(model, x)
    one.detach()
    other.probe(model(x))
    other.detach()
    one.scores(), other.scores()


def copy_inside(model: nn.Module, x: Tensor) -> None:
    with Scorer(model, x, gradient="random"):
        copied = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(copied(x), model(x))


def pickle_afterwards(model: nn.Module, x: Tensor) -> None:
    """A module that can be pickled still can; random networks, which hold functions, never could."""
    probe(model, x)
    if model.__class__.__module__.startswith("torch.nn"):
        copied = pickle.loads(pickle.dumps(model))
        assert torch.equal(copied(x), model(x))
    torch.save(model.state_dict(), io.BytesIO())


def mask_and_prune(model: nn.Module, x: Tensor) -> None:
    scores = fastscore.score(model, [x], progress=False)
    with torch.no_grad(), fastscore.mask(model, scores, 0.2, x):
        model(x)
    fastscore.prune(model, scores, x, channels=0.9)


def mask_and_fail(model: nn.Module, x: Tensor) -> None:
    scores = fastscore.score(model, [x], progress=False)
    with pytest.raises(Trouble), fastscore.mask(model, scores, 0.2, x):
        raise Trouble


ACTIONS: list[Callable[[nn.Module, Tensor], None]] = [
    score, score_under_autocast, attach_and_detach, probe, fail_inside, nest, copy_inside, pickle_afterwards,
    mask_and_prune, mask_and_fail, *(lambda model, x, at=at: score_and_fail(model, x, at) for at in (0, 2, 5))]
MODELS: list[Callable[[], tuple[nn.Module, Tensor]]] = [
    *(lambda name=name: (NETWORKS[name].model(), NETWORKS[name].inputs(2)) for name in
      ("plain", "residual", "inplace", "mobile", "unet", "mlp", "recurrent")),
    *(lambda seed=seed: (generate(seed).model, generate(seed).inputs(2)) for seed in (6, 11, 17, 27))]


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(MODELS), st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=4), st.data())
def test_any_sequence(make, actions, data):
    model, x = make()
    training = data.draw(st.lists(st.booleans(), min_size=3, max_size=3))
    for i, module in enumerate(model.modules()):
        if isinstance(module, nn.Dropout):
            module.train(training[i % 3])
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(training[i % 3])
        if i % 2 and parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, i)
    next(model.parameters()).requires_grad_()  # or nothing would have a gradient to send
    with untouched(model):
        for action in actions:
            action(model, x)


def batches_of_training(model: nn.Module, scorer: Scorer, x: Tensor, count: int) -> None:
    for _ in range(count):
        model(x).square().sum().backward()
        model.zero_grad(set_to_none=True)


def bytes_of_tensors() -> int:
    gc.collect()
    return sum(x.untyped_storage().nbytes() for x in gc.get_objects()
               if issubclass(type(x), Tensor) and x.layout == torch.strided)  # others', such as oneDNN's, are not asked


def test_many_batches_leave_no_tensor_behind():
    model, x = PLAIN.model(), PLAIN.inputs(1)
    scorer = Scorer(model, x)
    with scorer:
        batches_of_training(model, scorer, x, 10)
        before = bytes_of_tensors()
        batches_of_training(model, scorer, x, 200)
        assert bytes_of_tensors() <= before
    scorer.scores()


def test_no_cycle_keeps_model_scorer_or_tensors_alive():
    """Without the garbage collector: what is dropped is gone at once."""
    model, x = PLAIN.model(), PLAIN.inputs(2)
    scorer = Scorer(model, x)
    gc.collect()
    gc.disable()
    try:
        with scorer:
            output = model(x)
            output.square().sum().backward()
        kept = [weakref.ref(thing) for thing in (output, x, scorer, model)]
        scorer.scores()
        del output, x, scorer, model
        assert [ref() is None for ref in kept] == [True] * 4
    finally:
        gc.enable()


def test_score_keeps_nothing():
    model, x = PLAIN.model(), PLAIN.inputs(2)
    scores = fastscore.score(model, [x], progress=False)
    gc.collect()
    kept = [weakref.ref(thing) for thing in (model, x)]
    del model, x
    assert [ref() is None for ref in kept] == [True, True]
    assert len(scores) == 2


@pytest.mark.parametrize("name", ["residual", "dense"])
def test_copies_of_a_model_are_gone_as_soon_as_the_call_is_over(name):
    """Without the garbage collector: tracing, scoring and pruning work on copies, and autograd keeps what those saw."""
    def modules() -> int:
        return sum(issubclass(type(thing), nn.Module) for thing in gc.get_objects())

    model, x = NETWORKS[name].model().float(), NETWORKS[name].inputs(2).float()
    fastscore.score(copy.deepcopy(model), [x], progress=False)
    gc.collect()
    gc.disable()
    try:
        before = modules()
        for precision in (None, "bfloat16"):
            scores = fastscore.score(model, [x], precision=precision, progress=False)
            assert modules() == before, precision
        result = fastscore.prune(model, scores, x, macs=0.7)
        assert modules() == before + len(list(result.model.modules()))
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["inplace", *(("residual", "mobile") if "FASTSCORE_NIGHTLY" in os.environ else ())])
def test_compiled_models_are_left_as_they_were(name: str) -> None:
    network = NETWORKS[name]
    model, x = network.model(), network.inputs(4)
    # what torch.compile itself puts on a module that has run is there before
    torch.compile(model, backend="eager")(x)
    torch.compiler.reset()
    scorer = Scorer(model, x[:1])
    with untouched(model):
        with scorer:
            compiled = torch.compile(model, backend="eager")
            compiled(x).square().sum().backward()
        model.zero_grad()
        with pytest.raises(RuntimeError, match=r"shape|size|channels"), scorer:
            compiled(x[:, :1])
        scores = fastscore.score(model, [x], progress=False)
        with fastscore.mask(model, scores, 0.2, x):
            compiled(x)
    assert scorer.scores().samples == 4
    torch.testing.assert_close(compiled(x), model(x))


def drawing(model: nn.Module, batch: Tensor) -> Tensor:
    """A forward whose code draws random numbers of every kind."""
    random.random()
    np.random.rand()
    torch.rand(())
    return model(batch)


def test_random_numbers_of_python_and_numpy_come_back_too() -> None:
    model, x = PLAIN.model(), PLAIN.inputs(8)
    scores = fastscore.score(model, [x], progress=False)
    result = fastscore.prune(model, scores, x, macs=0.8)
    options = {"forward": drawing, "progress": False}
    for what in (
            lambda: trace(PLAIN.model(), x, drawing),
            lambda: Scorer(PLAIN.model(), x, forward=drawing),
            lambda: fastscore.score(model, [x], **options),
            lambda: fastscore.prune(model, scores, x, macs=0.8, calibration=[x, x], **options),
            lambda: fastscore.reconstruct(model, result, [x, x], **options),
            lambda: fastscore.distill(model, copy.deepcopy(result.model), [x], steps=2, held_out=[x], **options),
            lambda: fastscore.curve(model, scores, [x, x], [0.8], **options),
            lambda: fastscore.prune_iteratively(model, [x], steps=1, macs=0.8, forward=drawing),
            lambda: fastscore.mask(model, scores, 0.2, x, forward=drawing).__enter__()):
        with oracles.untouched(copy.deepcopy(model)):
            what()


def test_every_step_of_pruning_draws_from_numbers_of_its_own_whatever_was_drawn_before() -> None:
    def drawn(before: int) -> list[tuple[float, ...]]:
        found: list[tuple[float, ...]] = []
        def finetune(model: nn.Module) -> None:
            found.append((random.random(), float(np.random.rand()), float(torch.rand(()))))

        random.seed(before)
        fastscore.prune_iteratively(PLAIN.model(), [PLAIN.inputs(4)], steps=2, macs=0.7, finetune=finetune)
        return found

    first, second = drawn(0)
    assert [first, second] == drawn(1)
    assert all(one != other for one, other in zip(first, second, strict=True))
