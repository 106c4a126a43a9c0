"""What the page about scaling counts and simulates, against what is really sent, and against simulating every batch."""

import statistics
from typing import Any

import pytest
import torch
from networks import NETWORKS
from torch import Tensor, distributed

import fastscore
from benchmarks.passes import scaling, tracing
from benchmarks.passes.scaling import Cluster
from fastscore.integrations.transformers import forward

NETWORK = NETWORKS["residual"]


@pytest.mark.parametrize("fixed_order", [False, True])
def test_bytes_are_those_that_are_sent(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, fixed_order: bool) -> None:
    sent = []
    original = distributed.all_reduce

    def all_reduce(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return original(tensor, *arguments, **options)

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        monkeypatch.setattr(distributed, "all_reduce", all_reduce)
        scores = fastscore.score(NETWORK.traced(), NETWORK.inputs(128).split(2), process_group=distributed.group.WORLD,
                                 fixed_order=fixed_order, progress=False)
    finally:
        distributed.destroy_process_group()
    assert sum(sent) == scaling.exchanged(scores) * (64 if fixed_order else 1)


def test_a_ring_of_two_and_of_many() -> None:
    cluster = Cluster(bandwidth=1e6, latency=0.5)
    assert scaling.reduction(10**6, 1, cluster) == 0
    assert scaling.reduction(10**6, 2, cluster) == pytest.approx(1 + 2 * 0.5)
    assert scaling.reduction(10**6, 1000, cluster) == pytest.approx(1.998 + 1998 * 0.5)


def test_without_chance_it_is_arithmetic() -> None:
    cluster = Cluster(rate=10, spread=0, jitter=0, start=7)
    for simulate in (scaling.exact, scaling.drawn, scaling.taken_when_free):
        assert simulate(4, 10, 20, cluster) == pytest.approx(7 + 3 * 2)  # the first two do three of ten
    for workers in (1, 8):
        found = scaling.row(workers, 8_000_000, 10, 0, Cluster(1000, 0, 0, 0, lifetime=float("inf"), latency=0))
        assert found["hours"] == pytest.approx(8000 / workers * 1.02 / 3600)
        assert found["efficiency"] == pytest.approx(1 / 1.02)
        assert found["deaths"] == 0


def test_shares_drawn_at_once_are_like_batches_drawn_each() -> None:
    cluster = Cluster(rate=32, spread=0.02, jitter=0.3, start=0)
    each, at_once = ([simulate(16, 1600, 32, cluster, seed) for seed in range(40)]
                     for simulate in (scaling.exact, scaling.drawn))
    error = (statistics.variance(each) / 40 + statistics.variance(at_once) / 40) ** 0.5
    assert abs(statistics.mean(each) - statistics.mean(at_once)) < 4 * error
    queue = [scaling.taken_when_free(16, 1600, 32, cluster, seed) for seed in range(40)]
    assert statistics.mean(queue) < statistics.mean(each) < 1.2 * statistics.mean(queue)


def test_each_trace_is_of_a_fresh_model() -> None:
    """And not found in the cache; what is over ten passes is that."""
    once, twice = (tracing.measure(lambda: tracing.decoder(1), {"input_ids": torch.arange(4)[None]}, forward,
                                   repeats=repeats) for repeats in (1, 2))
    assert once["calls"] == twice["calls"] > 5
    assert once["over ten"] == once["trace"] - 10 * once["forward"]
