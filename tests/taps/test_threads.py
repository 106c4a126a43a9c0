"""Scoring from several Python threads at once."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import oracles
import torch
from networks import NETWORKS
from torch.utils import checkpoint

import fastscore
from fastscore import Scorer, ops
from fastscore.modules.wrappers import without_checkpoints
from fastscore.ops import reference
from fastscore.rng import fork_rng

THREADS = 4


def at_once(jobs: list[Callable[[], object]]) -> list[object]:
    """What the jobs return, begun at the same moment, each in a thread of its own."""
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], object]) -> object:
        start.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))


def test_ops():
    generator = torch.Generator().manual_seed(0)
    operands = [[torch.randn(8, 16, 14, 14, generator=generator) for _ in range(2)] for _ in range(THREADS)]
    want = [ops.channel_sums(*pair) for pair in operands]
    for _ in range(20):
        found = at_once([lambda pair=pair: ops.channel_sums(*pair) for pair in operands])
        assert all(torch.equal(x, y) for one, other in zip(found, want, strict=True)
                   for x, y in zip(one, other, strict=True))
    want = [ops.clamp_backward(y, g, y, -0.5, 0.5) for y, g in operands]
    for _ in range(20):
        found = at_once([lambda y=y, g=g: ops.clamp_backward(y, g, y, -0.5, 0.5) for y, g in operands])
        assert all(torch.equal(x, y) for one, other in zip(found, want, strict=True)
                   for x, y in zip(one, other, strict=True))
    gradients = at_once([lambda seed=seed: ops.random_gradient(torch.arange(50), 77, seed) for seed in range(THREADS)])
    for seed, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, reference.random_gradient(torch.arange(50), 77, seed))


def equal(found: fastscore.Scores, want: fastscore.Scores) -> bool:
    return list(found) == list(want) and all(torch.equal(found.totals[layer], want.totals[layer]) for layer in want)


def test_scores_of_different_models():
    networks = [NETWORKS[name] for name in ("plain", "residual", "dense", "mobile")]
    models = [network.traced() for network in networks]

    def score(i: int) -> fastscore.Scores:
        return fastscore.score(models[i], networks[i].inputs(6).split(2), progress=False)

    want = [score(i) for i in range(len(models))]
    for _ in range(3):
        found = at_once([lambda i=i: score(i) for i in range(len(models))])
        assert all(equal(one, other) for one, other in zip(found, want, strict=True))


def test_scores_of_one_model():
    """score() works on a copy of its own, so threads may share a model; dropout draws nothing in evaluation mode."""
    network = NETWORKS["inplace"]
    model = network.traced().train()
    want = {probes: fastscore.score(model, [network.inputs()], probes=probes, progress=False) for probes in (1, 2)}
    with oracles.untouched(model):
        found = at_once([lambda probes=probes: fastscore.score(model, [network.inputs()], probes=probes, progress=False)
                         for probes in (1, 2, 1, 2)])
    assert all(equal(scores, want[probes]) for scores, probes in zip(found, (1, 2, 1, 2), strict=True))


def test_scorers_on_models_of_their_own():
    network = NETWORKS["residual"]
    models = [network.model(seed) for seed in range(THREADS)]  # here, as threads share their random numbers

    def train(seed: int) -> fastscore.Scores:
        model, x = copy.deepcopy(models[seed]), network.inputs(4, seed)
        scorer = Scorer(model, x)
        with scorer:
            for part in x.split(2):
                model(part).square().sum().backward()
        return scorer.scores()

    want = [train(seed) for seed in range(THREADS)]
    for _ in range(3):
        found = at_once([lambda seed=seed: train(seed) for seed in range(THREADS)])
        assert all(equal(one, other) for one, other in zip(found, want, strict=True))


def test_random_number_states_come_back_whichever_thread_ends_last():
    before = torch.get_rng_state()
    one, other = fork_rng(torch.device("cpu")), fork_rng(torch.device("cpu"))
    one.__enter__()
    torch.manual_seed(0)
    other.__enter__()  # of another thread, say
    torch.rand(3)
    one.__exit__(None, None, None)
    torch.rand(3)
    other.__exit__(None, None, None)
    assert torch.equal(torch.get_rng_state(), before)


def test_reentrant_checkpoints_come_back_whichever_thread_ends_last():
    """And those of another thread stay what they are meanwhile."""
    def node() -> str:
        x = torch.ones(2, requires_grad=True)
        return type(checkpoint.checkpoint(torch.sin, x, use_reentrant=True).grad_fn).__name__

    before = checkpoint.CheckpointFunction
    assert node() == "CheckpointFunctionBackward"
    one, other = without_checkpoints(), without_checkpoints()
    one.__enter__()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(other.__enter__).result()
        assert (node(), thread.submit(node).result()) == ("SinBackward0", "SinBackward0")
        one.__exit__(None, None, None)
        assert (node(), thread.submit(node).result()) == ("CheckpointFunctionBackward", "SinBackward0")
        thread.submit(other.__exit__, None, None, None).result()
    assert checkpoint.CheckpointFunction is before
    assert node() == "CheckpointFunctionBackward"


def test_prune_and_mask_beside_each_other():
    network = NETWORKS["mobile"]
    x = network.inputs(2)
    models = [network.model(seed) for seed in range(THREADS)]
    scores = [fastscore.score(model, [x], progress=False) for model in models]

    def shrink(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        result = fastscore.prune(models[i], scores[i], x, channels=0.6)
        fraction = 1 - result.report.channels[1] / result.report.channels[0]
        with torch.no_grad(), fastscore.mask(models[i], scores[i], fraction, x):
            return result.model(x), models[i](x)

    for pruned, masked in at_once([lambda i=i: shrink(i) for i in range(THREADS)]):
        torch.testing.assert_close(pruned, masked)
