"""Nothing is kept alive by scoring: no tensor, no model, no reference cycle."""

import gc
import weakref

from networks import NETWORKS
from torch import Tensor, nn

import fastscore
from fastscore import Scorer

PLAIN = NETWORKS["plain"]


def batches_of_training(model: nn.Module, x: Tensor, count: int) -> None:
    for _ in range(count):
        model(x).square().sum().backward()
        model.zero_grad(set_to_none=True)


def bytes_of_tensors() -> int:
    gc.collect()
    return sum(x.untyped_storage().nbytes() for x in gc.get_objects() if issubclass(type(x), Tensor))


def test_a_thousand_batches_leave_no_tensor_behind():
    model, x = PLAIN.model(), PLAIN.inputs(1)
    scorer = Scorer(model, x)
    with scorer:
        batches_of_training(model, x, 10)
        before = bytes_of_tensors()
        batches_of_training(model, x, 1000)
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
