"""What stands around a model is looked through, everywhere, and put back as it was."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import NETWORKS
from oracles import untouched
from torch import Tensor, nn
from torch.utils import checkpoint

import fastscore
from fastscore.modules.wrappers import uncompiled, unwrapped, without_checkpoints

RESIDUAL = NETWORKS["residual"]
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "torch.compile of DataParallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("name", list(WRAPPERS))
def test_a_wrapped_model_is_the_model_inside(name: str) -> None:
    """In score, Scorer, prune, mask and prune_iteratively, with the names that layers have inside."""
    model, x = RESIDUAL.model(), RESIDUAL.inputs(3)
    scores = fastscore.score(model, [x], progress=False)
    wrapped = WRAPPERS[name](model)
    wrapped(x)  # what was compiled has run before anything is set
    assert unwrapped(wrapped) is model
    with untouched(model):
        again = fastscore.score(wrapped, [x], progress=False)
        assert list(again) == list(scores)
        assert all(torch.equal(again[layer], scores[layer]) for layer in scores)
        pruned = fastscore.prune(wrapped, scores, x, channels=0.6, compensate=False)
        steps = fastscore.prune_iteratively(wrapped, [x], steps=1, channels=0.6, progress=False)
        with torch.no_grad(), fastscore.mask(wrapped, scores, 0.4, x, compensate=False):
            masked, inside = wrapped(x), model(x)
        scorer = fastscore.Scorer(wrapped, x, gradient="random")
        with scorer:
            scorer.probe(model(x))
        assert list(scorer.scores()) == list(scores)
    assert type(pruned.model) is type(steps.model) is type(model)
    torch.testing.assert_close(pruned.model(x), inside)
    torch.testing.assert_close(masked, inside)
    assert (masked - wrapped(x)).abs().max() > 0.01 * masked.abs().max()


def test_what_was_compiled_comes_back() -> None:
    """Also after an exception."""
    compiled = torch.compile(RESIDUAL.model(), backend="eager")
    forward = compiled.forward
    with pytest.raises(KeyError, match="True"), uncompiled(compiled):
        raise KeyError(compiled.forward is unwrapped(compiled))
    assert compiled.forward is forward


@pytest.mark.parametrize("part", ["", "1"])
@pytest.mark.parametrize("has_run", [True, False])
def test_a_mask_of_what_compiled_itself(part: str, has_run: bool) -> None:
    """By module.compile(), which hooks inside do not take part in; whole, or in part."""
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(3, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 2))
    x = torch.randn(4, 3)
    model.get_submodule(part).compile(backend="eager")
    dense = model(x) if has_run else None
    scores = fastscore.score(model, [x], progress=False)
    result = fastscore.prune(model, scores, x, channels=0.5, compensate=False)
    with fastscore.mask(model, scores, result, x, compensate=False):
        torch.testing.assert_close(model(x), result.model(x))
    assert model.get_submodule(part)._compiled_call_impl is not None
    assert dense is None or torch.equal(model(x), dense)


@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, RESIDUAL.inputs())])
def test_what_torch_jit_made_is_refused(make: Callable[[nn.Module], nn.Module]) -> None:
    """With the way out."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) if make is torch.jit.script else \
        RESIDUAL.model()
    with pytest.raises(TypeError, match=r"torch\.jit made.*pass the nn\.Module"):
        fastscore.score(make(model), [RESIDUAL.inputs()], progress=False)


class Checkpointed(nn.Module):
    """A network in parts that are run again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Sequential(nn.Linear(4, 6), nn.GELU()),
                                    nn.Sequential(nn.Linear(6, 6), nn.GELU()), nn.Linear(6, 3)])
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        """[N, 4] -> [N, 3]."""
        for part in self.parts:
            x = checkpoint.checkpoint(part, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_change_no_score(reentrant: bool) -> None:
    """Nor what is pruned."""
    torch.manual_seed(0)
    model, x = Checkpointed(reentrant).double(), torch.randn(5, 4, dtype=torch.float64)
    plain = nn.Sequential(*model.parts)
    expected, scores = (fastscore.score(each, [x], progress=False) for each in (plain, model))
    assert [name.removeprefix("parts.") for name in scores] == list(expected)
    for name in scores:
        torch.testing.assert_close(scores[name], expected[name.removeprefix("parts.")])
    before, after = fastscore.prune(model, scores, x, channels=0.5).report.channels
    assert (before, after) == (12, 6)


def test_checkpoints_of_other_threads_stay() -> None:
    """In a block, a thread outside of it saves memory as it would."""
    runs = list[str]()

    def part(x: Tensor) -> Tensor:
        runs.append(threading.current_thread().name)
        return x * x

    def step() -> None:
        x = torch.ones(2, requires_grad=True)
        for reentrant in (True, False):
            checkpoint.checkpoint(part, x, use_reentrant=reentrant).sum().backward()

    with without_checkpoints():
        other = threading.Thread(target=step, name="other")
        other.start()
        other.join()
        assert runs == ["other"] * 4
        step()
        assert runs[4:] == ["MainThread"] * 2
    step()
    assert runs[6:] == ["MainThread"] * 4


def test_a_compiled_part_is_refused_with_the_way_out() -> None:
    """Its layers are not seen."""
    part = nn.Sequential(nn.Linear(5, 6), nn.ReLU())
    compiled, x = torch.compile(part, backend="eager"), torch.randn(2, 3)
    model = nn.Sequential(nn.Linear(3, 5), compiled, nn.Linear(6, 4), nn.Linear(4, 2))
    for call in (lambda: fastscore.score(model, [x], progress=False), lambda: fastscore.Scorer(model, x)):
        with untouched(model), pytest.raises(
                ValueError, match=r"^model: 1 is what torch\.compile made of a part"):
            call()
    model[1] = part
    assert list(fastscore.score(model, [x], progress=False)) == ["0", "1.0", "2"]


def test_a_part_in_distributed_data_parallel_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """No copy can be made of it. DataParallel's can."""
    part, x = nn.Sequential(nn.Linear(5, 6), nn.ReLU()), torch.randn(2, 3)
    model = nn.Sequential(nn.Linear(3, 5), nn.DataParallel(part), nn.Linear(6, 4), nn.Linear(4, 2))
    assert list(fastscore.score(model, [x], progress=False)) == ["0", "1.module.0", "2"]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model[1] = nn.parallel.DistributedDataParallel(part)
        with untouched(model), pytest.raises(ValueError, match=r"^model: 1 is a part in DistributedDataParallel, .*"
                                                               r"put 1\.module in its place, and wrap the whole model"):
            fastscore.score(model, [x], progress=False)
        model[1] = model[1].module
        whole = nn.parallel.DistributedDataParallel(model)
        assert list(fastscore.score(whole, [x], progress=False)) == ["0", "1.0", "2"]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(6), lambda: nn.LazyBatchNorm1d(affine=False)])
def test_a_layer_without_a_shape_is_named_with_the_way_out(make: Callable[[], nn.Module]) -> None:
    """Parameter or buffer."""
    model, x = nn.Sequential(nn.Linear(3, 5), make(), nn.ReLU(), nn.LazyLinear(4), nn.Linear(4, 2)), torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"^model: 1\.(weight|running_mean) \(Lazy\w+\) has no shape before the model "
                                         r"has run: call it once, model\(batch\), first"):
        fastscore.score(model, [x], progress=False)
    model(x)
    assert {"0", "3"} <= set(fastscore.score(model, [x], progress=False))
