"""Networks to distill, and what each of several processes does with them."""

import dataclasses
from datetime import timedelta
from typing import Any

import torch
from decisive import state
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fastscore.recovery.distillation import distill

WORKERS = 2


def seeded(seed: int, make: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


IMAGES: Tensor = seeded(7, lambda: torch.randn(96, 3, 4, 4) + 2 * torch.randn(96, 3, 1, 1))


def _network(norms: bool) -> nn.Sequential:
    """Dropout and BatchNorm draw and keep what a run that goes on must know."""
    norm = (lambda: nn.BatchNorm2d(8)) if norms else nn.Identity
    drop = nn.Dropout(0.2) if norms else nn.Identity()
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm(), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), norm(),
                          nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), drop, nn.Linear(8, 5))
    model[9].weight.data *= 10
    return model


def dense(norms: bool = True) -> nn.Sequential:
    """The network to learn from."""
    model: nn.Sequential = seeded(0, lambda: _network(norms))
    return model


def smaller(norms: bool = True) -> nn.Sequential:
    """One to train."""
    model: nn.Sequential = seeded(1, lambda: _network(norms))
    return model


def every_pair() -> list[Tensor]:
    """Batches of 16: what two processes see in one step."""
    return list(IMAGES[32:].split(16))


def work(rank: int, folder: str) -> None:
    """Learns in every way that several processes can."""
    distributed.init_process_group("gloo", timeout=timedelta(seconds=600))
    everyone = distributed.group.WORLD
    halves, judges = IMAGES[32:].split(8), IMAGES[:32].split(8)
    options: dict[str, Any] = {"steps": 12, "looks": 3, "progress": False}

    def save(name: str, model: nn.Module, report: Any) -> None:
        torch.save({"state": state(model), "report": dataclasses.asdict(report)}, f"{folder}/{name} {rank}")

    model = smaller(norms=False)
    save("group", model, distill(dense(norms=False), model, halves, held_out=judges, process_group=everyone, **options))

    class Stopped(Exception):
        pass

    def stopping(batches: Any, left: int) -> Any:
        class Batches:
            def __iter__(self) -> Any:
                nonlocal left
                for batch in batches:
                    left -= 1
                    if left < 0:
                        raise Stopped
                    yield batch

        return Batches()

    try:
        distill(dense(norms=False), smaller(norms=False), stopping(halves, 12), held_out=judges, resume=f"{folder}/run",
                process_group=everyone, **options)
    except Stopped:
        distributed.barrier()
    model = smaller(norms=False)
    save("resumed", model, distill(dense(norms=False), model, halves, held_out=judges, resume=f"{folder}/run",
                                   process_group=everyone, **options))
    model = smaller(norms=False)
    save("DDP", model, distill(dense(norms=False), DistributedDataParallel(model), halves[rank::WORKERS],
                               held_out=judges[rank::WORKERS], **options))
    model = smaller()
    save("norms", model, distill(dense(), model, IMAGES.split(8), process_group=everyone, **options))
    distributed.destroy_process_group()
