"""Scorers in real processes: each sees a share of the samples, all end with the scores of the whole."""

from pathlib import Path

import torch
from networks import NETWORKS
from torch import Tensor, distributed, multiprocessing

import fastscore

RESIDUAL = NETWORKS["residual"]
WORKERS = 2


def images() -> Tensor:
    return RESIDUAL.inputs(7)


def score(x: Tensor) -> fastscore.Scorer:
    model = RESIDUAL.model()
    scorer = fastscore.Scorer(model, images(), gradient="random", seed=3)
    with scorer:
        for batch in x.split(2):
            scorer.probe(model(batch))
    return scorer


def work(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORKERS)
    scorer = score(images()[rank::WORKERS])  # 4 samples for one, 3 for the other
    scorer.all_reduce()
    scorer.scores().save(f"{folder}/{rank}.safetensors")
    distributed.destroy_process_group()


def test_workers_share_the_samples(tmp_path: Path) -> None:
    multiprocessing.spawn(work, (str(tmp_path),), nprocs=WORKERS)
    whole = score(images()).scores()
    for rank in range(WORKERS):
        shared = fastscore.Scores.load(tmp_path / f"{rank}.safetensors")
        assert (shared.samples, shared.passes, shared.origin) == (7, 7, whole.origin)
        for layer in whole:
            torch.testing.assert_close(shared.totals[layer], whole.totals[layer], rtol=1e-12, atol=0)
