"""torch.set_default_device() to another device than the model's: the same numbers, as this library's own tensors lie on
the CPU, and a user's code goes on making its own where the user said ("meta" stands for a GPU)."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastscore
from fastscore.graph import cache

X = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(at)) for at in range(4)]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.num_heads, self.norm = 4, nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        heads = [layer(self.norm(x)).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                 for layer in (self.query, self.key, self.value)]
        x = x + self.out(nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x.mean(1)


def made() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8),
                         Attending(), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 3)).eval()


def scored(model: nn.Module, **options: Any) -> fastscore.Scores:
    return fastscore.score(model, X, progress=False, **options)


def in_a_loop(model: nn.Module) -> fastscore.Scores:
    scorer = fastscore.Scorer(model, X[0])
    with scorer:
        for x in X:
            model(x).square().sum().backward()
    return scorer.scores()


def masked(model: nn.Module, scores: fastscore.Scores) -> Tensor:
    with fastscore.mask(model, scores, 0.4, X[0]):
        return model(X[0]).detach()


def saved(model: nn.Module, scores: fastscore.Scores, folder: Any) -> Tensor:
    result = fastscore.prune(model, scores, X[0], channels=0.6, progress=False)
    fastscore.save_pruned(result, folder / "small.safetensors")
    return fastscore.load_pruned(copy.deepcopy(model), folder / "small.safetensors")(X[0]).detach()


# (model, its scores, a folder) -> what is compared
CALLS: dict[str, Callable[[nn.Module, fastscore.Scores, Any], Any]] = {
    "score": lambda model, scores, folder: dict(scored(model, probes=2, ablation="mean")),
    "head_dims": lambda model, scores, folder: dict(scored(model, units="head_dims")),
    "a run that is kept": lambda model, scores, folder: dict(scored(model, resume=folder / "run")),
    "scorer": lambda model, scores, folder: dict(in_a_loop(model)),
    "mask": lambda model, scores, folder: masked(model, scores),
    "prune": lambda model, scores, folder: dict(fastscore.prune(
        model, scores, X[0], macs=0.6, calibration=X, repair="linear", progress=False).model.state_dict()),
    "in steps": lambda model, scores, folder: dict(fastscore.prune_iteratively(
        model, X, channels=0.6, steps=2, progress=False).model.state_dict()),
    "curve": lambda model, scores, folder: str(fastscore.curve(model, scores, X, [0.7], progress=False)),
    "files": saved,
}


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("call", CALLS)
def test_the_same_numbers(call: str, tmp_path: Any) -> None:
    returned = []
    for device in ("cpu", "meta"):
        model, folder = made(), tmp_path / device
        folder.mkdir()
        scores = scored(model, ablation="mean")
        cache.forget(model)
        with default_device(device):
            returned.append(CALLS[call](model, scores, folder))
    if isinstance(returned[0], str):
        assert returned[0] == returned[1]
    else:
        torch.testing.assert_close(returned[0], returned[1], rtol=0, atol=0)


def test_code_of_a_user_makes_tensors_where_the_user_said() -> None:
    found = set()

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        found.add(torch.arange(len(batch)).device.type)
        return model(batch)

    class Noting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found.add(torch.zeros(3).device.type)
            return x.relu()

    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), Noting(), nn.Linear(8, 3)).eval()
    with default_device("meta"):
        scored(model, units="blocks")
        scores = fastscore.score(model, X, forward=forward, progress=False)
        fastscore.prune(model, scores, X[0], channels=0.6, forward=forward, progress=False)
        assert torch.zeros(1).device.type == "meta"
    assert found == {"meta"}


def test_a_warning_names_the_line_that_called(recwarn: pytest.WarningsRecorder) -> None:
    class Drawing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.randn_like(x[:, :1])

    fastscore.score(nn.Sequential(nn.Flatten(), Drawing(192, 8), nn.Linear(8, 3)).eval(), X, progress=False)
    assert [warning.filename for warning in recwarn] == [__file__]
