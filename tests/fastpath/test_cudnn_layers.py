"""Convolutions that cuDNN fuses with their ReLU, and which these are. A CPU has no such kernel: what stands in for it
here is the same by PyTorch's operations, and benchmarks/passes/test_gpu_pipeline.py runs the real one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastscore
from fastscore.fastpath import cudnn_layers, fusion


def fused(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
          groups: int) -> Tensor:
    return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))


@pytest.fixture
def _cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    aten = SimpleNamespace(cudnn_convolution_relu=fused, convolution_backward=torch.ops.aten.convolution_backward)
    monkeypatch.setattr(cudnn_layers.torch.ops, "aten", aten)


@pytest.mark.usefixtures("_cudnn")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"padding": 2, "dilation": 2}, {"groups": 2}],
                         ids=str)
def test_both_ways(options: dict[str, Any], bias: bool) -> None:
    module = nn.Conv2d(4, 6, 3, bias=bias, dtype=torch.float64, **options).requires_grad_(False)
    x = torch.randn(2, 4, 9, 10, dtype=torch.float64, requires_grad=True)
    want = module(x)
    g = torch.randn_like(want)
    layer = cudnn_layers.Convolution(module)
    torch.testing.assert_close(layer.forward(x), want.relu())
    torch.testing.assert_close(layer.backward(g, x.shape), torch.autograd.grad(want, x, g)[0])
    assert layer.channels(x) == 6


@pytest.mark.parametrize(("module", "clamp", "fits"), [
    (nn.Conv2d(4, 8, 3, padding=1), cudnn_layers.RELU, True),
    (nn.Conv2d(4, 8, 3, padding=1), (0.0, 6.0), False),
    (nn.Conv2d(4, 8, 3, padding=1), None, False),
    (nn.Conv2d(4, 8, 3, groups=2), cudnn_layers.RELU, True),
    (nn.Conv2d(4, 4, 3, groups=4), cudnn_layers.RELU, False),
    (nn.Conv2d(4, 8, 3, padding="same"), cudnn_layers.RELU, False),
    (nn.Conv2d(4, 8, 3, padding_mode="reflect"), cudnn_layers.RELU, False),
    (nn.Conv2d(4, 8, 3, dtype=torch.float64), cudnn_layers.RELU, False),
    (nn.Linear(4, 8), cudnn_layers.RELU, False)])
def test_which(module: nn.Module, clamp: Any, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not cudnn_layers.available(module, clamp)  # on a CPU
    monkeypatch.setattr(nn.Parameter, "device", torch.device("cuda"), raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert cudnn_layers.available(module, clamp) == fits


def test_a_pass_through_fused_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
                          nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 6 * 6, 5)).eval()
    batches = torch.randn(8, 3, 8, 8).split(4)
    monkeypatch.setenv("FASTSCORE_PORTABLE", "1")
    want = fastscore.score(model, batches, progress=False)
    monkeypatch.delenv("FASTSCORE_PORTABLE")
    monkeypatch.setattr(fusion.packed_layers, "available", lambda weight: False)
    monkeypatch.setattr(cudnn_layers, "available", lambda layer, clamp: clamp == cudnn_layers.RELU)
    monkeypatch.setattr(cudnn_layers.Convolution, "forward", lambda self, x: fused(
        x, self.weight, self.bias, *self.arguments, self.groups))
    found = fastscore.score(model, batches, progress=False)
    assert found.plan is not None
    assert set(found.plan.packed) == {"0", "3"}
    for layer in want:
        torch.testing.assert_close(found[layer], want[layer])
