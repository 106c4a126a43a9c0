"""What prune() returns is an ordinary model: it is trained, saved, copied and exported as the one it came from."""

import copy
import io
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from networks import NETWORKS
from oracles import untouched
from torch import Tensor, nn

import fastscore

RESIDUAL = NETWORKS["residual"]


@pytest.fixture(scope="module")
def pruned() -> tuple[nn.Module, Tensor]:
    """In float32 and evaluation mode, with half its MACs."""
    model, x = RESIDUAL.traced(dtype=torch.float32), RESIDUAL.inputs(4).float()
    return fastscore.prune(model, fastscore.score(model, [x], progress=False), x, macs=0.5).model, x


def test_modes_flags_dtype_and_memory_are_kept() -> None:
    model, x = RESIDUAL.model().to(torch.bfloat16), RESIDUAL.inputs(3).to(torch.bfloat16)
    model.train()
    model.block1.bn1.eval()
    model.block1.requires_grad_(False)
    model.block2.conv2.weight.requires_grad_(False)
    scores = fastscore.score(model, [x], importance="magnitude-l1", progress=False)
    result = fastscore.prune(model, scores, x, channels=0.6).model
    assert {name: module.training for name, module in result.named_modules()} == \
        {name: module.training for name, module in model.named_modules()}
    assert {name: p.requires_grad for name, p in result.named_parameters()} == \
        {name: p.requires_grad for name, p in model.named_parameters()}
    assert {tensor.dtype for tensor in result.state_dict().values()} == {torch.bfloat16, torch.int64}
    addresses = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert addresses.isdisjoint(tensor.data_ptr() for tensor in result.state_dict().values())
    assert all(type(a) is type(b) for a, b in zip(model.modules(), result.modules(), strict=True))
    with untouched(model), torch.no_grad():
        for parameter in result.parameters():
            parameter.zero_()


def test_pruning_inside_a_scorers_block_gives_an_ordinary_model() -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(3)
    scorer = fastscore.Scorer(model, x)
    with scorer:
        model(x).square().sum().backward()
        result = fastscore.prune(model, scorer.scores(), x, macs=0.5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in result.model.modules())
    assert torch.equal(pickle.loads(pickle.dumps(result.model))(x), result.model(x))


def test_pruning_inside_a_mask_leaves_the_mask_behind() -> None:
    model, x = RESIDUAL.traced(), RESIDUAL.inputs(3)
    scores = fastscore.score(model, [x], progress=False)
    with fastscore.mask(model, scores, 0.3, x):
        result = fastscore.prune(model, scores, x, channels=0.9)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in result.model.modules())
    assert torch.equal(result.model(x), fastscore.prune(model, scores, x, channels=0.9).model(x))


def test_saved_copied_and_pickled(pruned: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    model, x = pruned
    with torch.no_grad():
        expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        nn.init.zeros_(parameter)
    copied.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    assert torch.equal(copied(x), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)


def test_trains(pruned: tuple[nn.Module, Tensor]) -> None:
    model, x = copy.deepcopy(pruned[0]).train(), pruned[1]
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(x), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (4, 3, 12, 10)])
def test_runs_on_images_of_other_sizes(shape: tuple[int, ...], pruned: tuple[nn.Module, Tensor]) -> None:
    assert pruned[0](torch.randn(shape)).isfinite().all()


def test_exported(pruned: tuple[nn.Module, Tensor]) -> None:
    model, x = pruned
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


def test_in_onnx(pruned: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = pruned
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), str(tmp_path / "m.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x).detach(), rtol=1e-4, atol=1e-5)


class LastCall:
    """A plain object with what a call left behind, as RAFT's block of correlations."""

    pyramid: list[Tensor]


class Keeping(nn.Module):
    """Holds tensors with a history, which copy.deepcopy() refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
        self.normed = nn.utils.weight_norm(nn.Conv2d(2, 2, 1))
        self.kept = LastCall()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        self.kept.pyramid = [x, x.mean((2, 3))]
        return self.normed(self.last(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_model_that_holds_what_a_step_of_training_made() -> None:
    torch.manual_seed(0)
    model, x = Keeping().eval(), torch.randn(2, 3, 4, 4)
    scores = fastscore.score(model, [x], progress=False)
    with torch.no_grad(), fastscore.mask(model, scores, 0.5, x, compensate=False):
        masked = model(x)
    model(x).sum().backward()
    pruned = fastscore.prune(model, scores, x, channels=0.5, compensate=False).model
    assert pruned.first.out_channels == 3
    torch.testing.assert_close(pruned(x), masked)
    pruned(x).sum().backward()
