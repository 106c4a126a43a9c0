"""What one pass asks of a GPU: how many kernels, and no wait for one of them. Counted on the path that a GPU takes."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision
from recorded import nobody_looks
from torch.utils._python_dispatch import TorchDispatchMode

import fastscore
from fastscore.scoring.batch_passes import BatchPasses

ALLOCATIONS = ("aten.empty", "aten.new_empty", "aten.empty_like", "aten.empty_strided")


class Launches(TorchDispatchMode):
    """Counts operations that run a kernel, while `on`: neither views nor memory alone."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.kernels = False, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.on and not func.is_view and not str(func).startswith(ALLOCATIONS):
            self.kernels[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def third_pass(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Counts in the third batch alone, when all is set up; the work of a batch may look at no number meanwhile."""
    monkeypatch.setenv("FASTSCORE_PORTABLE", "1")
    launches, batch, measure, work = Launches(), 0, BatchPasses.measure, BatchPasses._measure

    def counted(self: BatchPasses, *args: Any) -> int:
        nonlocal batch
        batch, launches.on = batch + 1, batch == 2
        try:
            return measure(self, *args)
        finally:
            launches.on = False

    def unseen(self: BatchPasses, *args: Any) -> Any:
        if batch < 3:
            return work(self, *args)
        with nobody_looks():
            return work(self, *args)

    monkeypatch.setattr(BatchPasses, "measure", counted)
    monkeypatch.setattr(BatchPasses, "_measure", unseen)
    with launches:
        yield launches


@pytest.mark.parametrize(("name", "most"), [("resnet50", 290), ("mobilenet_v2", 340)])
def test_kernels_of_a_pass(third_pass: Launches, name: str, most: int) -> None:
    model = torchvision.models.get_model(name).eval()
    fastscore.score(model, [torch.randn(2, 3, 64, 64) for _ in range(3)], progress=False)
    assert third_pass.kernels["aten.convolution_backward.default"] >= 50
    assert third_pass.kernels["aten._local_scalar_dense.default"] == 0
    assert third_pass.kernels.total() <= most, third_pass.kernels.most_common()
    print(f"\n{name}: {third_pass.kernels.total()} kernels")
