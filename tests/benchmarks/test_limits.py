"""What benchmarks.passes.roofline counts, by hand; no timing is asserted."""

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

from benchmarks.passes import roofline
from benchmarks.peers.contestants import BASELINE, fastscore_pass
from benchmarks.peers.task import Task

N = 2  # samples


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.b(self.a(x).relu())).relu()
        return self.head(x.mean((2, 3)))


def residual() -> Task:
    torch.manual_seed(0)
    return Task.of(Residual().eval(), torch.randn(N, 3, 6, 6), torch.arange(N))


def test_work_of_a_residual_network():
    needed = roofline.work(residual())
    macs = {"stem": 36 * 8 * 3 * 9, "a": 36 * 8 * 8 * 9, "b": 36 * 8 * 8, "head": 8 * 5}
    assert needed.flops == 2 * N * (2 * sum(macs.values()) - macs["stem"])  # nothing goes back to the images
    x = N * 8 * 36
    # at a, where the graph begins, no gradient goes on; at b and at the head one is written; the addition
    assert needed.elements == 2 * x + 3 * x + 3 * N * 8 + 2 * x


def test_work_of_attention():
    torch.manual_seed(0)
    model = VisionTransformer(image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32,
                              num_classes=4).eval()
    task = Task.of(model, torch.randn(N, 3, 16, 16), torch.arange(N))
    forward = {"patches": 4 * 16 * 3 * 64, "qkv": 5 * 16 * 48, "attention": 2 * 5 * 5 * 16}
    both = {"out": 5 * 16 * 16, "mlp": 2 * 5 * 16 * 32, "head": 16 * 4}
    assert roofline.work(task).flops == 2 * N * (sum(forward.values()) + 2 * sum(both.values()))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_products_of_a_pass_are_made_again(precision):
    called = roofline.Calls(roofline.PRODUCT)
    fastscore_pass(precision=precision)(residual())(called)
    assert len(called.calls) == 4 + 3  # forward, and for the gradients of all inputs but the images
    with roofline.Calls(roofline.PRODUCT) as again:
        called.again()
    assert [func for func, _, _ in again.calls] == [func for func, _, _ in called.calls]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_laid_out_weights_are_no_product_but_what_they_multiply_is():
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(6, 4, 3, 3)
    with roofline.Calls(roofline.PRODUCT) as called:
        laid_out = torch.ops.mkldnn._reorder_convolution_weight(weight, [0, 0], [1, 1], [1, 1], 1, [1, 4, 5, 5])
        torch.ops.mkldnn._convolution_pointwise(x, laid_out, None, [0, 0], [1, 1], [1, 1], 1, "relu", [], "")
        torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
        torch.baddbmm(x[0], x[0], x[0])
    assert [func.name().split(".")[0] for func, _, _ in called.calls] == ["mkldnn::_convolution_pointwise",
                                                                          "aten::baddbmm"]
    called.again()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates_are_of_so_many_flops(dtype):
    for flops, product in roofline.products(dtype, side=8, channels=4, size=6).values():
        result = product()
        assert result.dtype == dtype
        assert flops == 2 * result.numel() * (8 if result.dim() == 2 else 9 * 4)


def test_rows_of_the_table():
    task = residual()
    taken, rates = roofline.rounds(task, "float32", 2, roofline.work(task))
    assert all(len(figures) == 2 and min(figures) > 0 for figures in taken.values())
    assert "matrices, laid out" in rates
    limit = f"limit: {roofline.PRODUCTS}, elementwise"
    figures = {name: [4.0, 4.0] if name == BASELINE else [2.0, 2.0] if name == roofline.OURS else [1.0, 1.0]
               for name in taken}
    line = next(line for line in roofline.table(figures).splitlines() if line.startswith(limit))
    assert line.split() == [*limit.split(), "1.0000", "4.00", "(4.00", "to", "4.00)", "2.00"]
