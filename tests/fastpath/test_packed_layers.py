"""Packed layers: oneDNN's two directions are PyTorch's layer and its gradient, computed in float64."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from thinned import NIGHTLY
from torch import Tensor, nn

from fastscore.fastpath import packed_layers

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # of the largest value: sums of few hundred terms
INFINITE = (0.0, float("inf"))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both_ways(module: nn.Module, layer: packed_layers.Layer, x: Tensor,
              clamp: packed_layers.ClampBounds | None) -> None:
    """Hold both directions of `layer` against the module in float64 and autograd. x: as the layer takes it."""
    wide = copy.deepcopy(module).double()
    given = x.detach().double().requires_grad_()
    y = wide(given)
    g = random(*y.shape, seed=7).to(x.dtype)
    (back,) = torch.autograd.grad(y, given, g.double())
    found = layer.forward(x)
    assert found.dtype == x.dtype
    assert layer.channels(x) == found.shape[1]
    assert_near(found, y.detach() if clamp is None else y.detach().clamp(*clamp))
    arranged = g.contiguous(memory_format=torch.channels_last) if g.dim() == 4 else g
    assert_near(layer.backward(arranged, x.shape), back)


def assert_near(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    bound = BOUNDS[found.dtype] * max(float(wanted.abs().max()), 1.0) if wanted.numel() else 0.0
    assert bool(((found.double() - wanted).abs() <= bound).all())


sizes = st.integers(1, 3)


@settings(max_examples=150 if NIGHTLY else 60, deadline=None)
@given(groups=st.sampled_from([1, 2, 6]), kernel=st.tuples(sizes, sizes), stride=st.tuples(sizes, sizes),
       padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
       dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
       size=st.tuples(st.integers(5, 9), st.integers(5, 9)), wider=st.integers(1, 3), bias=st.booleans(),
       samples=st.integers(1, 3), clamp=st.sampled_from([None, INFINITE, (0.0, 6.0), (-0.3, 0.2)]),
       dtype=st.sampled_from(list(BOUNDS)), last=st.booleans())
def test_a_convolution_both_ways(groups: int, kernel: tuple[int, int], stride: tuple[int, int],
                                 padding: tuple[int, int], dilation: tuple[int, int], size: tuple[int, int],
                                 wider: int, bias: bool, samples: int, clamp: packed_layers.ClampBounds | None,
                                 dtype: torch.dtype, last: bool) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(6, 6 * wider, kernel, stride, padding, dilation, groups, bias).to(dtype)
    x = random(samples, 6, *size).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    with torch.no_grad():
        layer = packed_layers.Convolution(module, size, clamp)
        assume(not multiplies_what_is_not_there(module, layer.forward(x)))
    both_ways(module, layer, x, clamp)


def multiplies_what_is_not_there(module: nn.Conv2d, made: Tensor) -> bool:
    """Whether PyTorch's own layer may be wrong: its bfloat16 convolutions on AMX (oneDNN's) are, where a kernel of some
    width goes in steps of more than one, and makes one column."""
    strided = module.stride[1] > 1 and module.kernel_size[1] > 1
    return module.weight.dtype == torch.bfloat16 and made.shape[-1] == 1 and strided


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("module", [partial(nn.Conv2d, 6, 8, 3, padding=1), partial(nn.Conv2d, 6, 8, 3, 2, 1),
                                    partial(nn.Conv2d, 6, 6, 3, 2, 1, groups=6), partial(nn.Conv2d, 6, 12, 1, 2),
                                    partial(nn.Conv2d, 6, 8, 3, padding=4, groups=2)],
                         ids=["3x3", "strided", "depthwise, strided", "1x1, strided", "wide padding"])
def test_an_image_of_another_size_has_the_weight_laid_out_anew(module: Callable[[], nn.Conv2d],
                                                               dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = module().to(dtype)
    with torch.no_grad():
        layer = packed_layers.Convolution(module, (8, 8))
    for size in ((8, 8), (11, 7), (32, 33), (8, 8)):
        both_ways(module, layer, random(2, 6, *size).to(dtype), None)


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=0, max_size=3), inputs=st.integers(1, 40),
       outputs=st.integers(1, 40), bias=st.booleans(), clamp=st.sampled_from([None, INFINITE, (-0.5, 0.5)]),
       dtype=st.sampled_from(list(BOUNDS)), turned=st.booleans())
def test_a_linear_both_ways(shape: list[int], inputs: int, outputs: int, bias: bool,
                            clamp: packed_layers.ClampBounds | None, dtype: torch.dtype, turned: bool) -> None:
    torch.manual_seed(0)
    module = nn.Linear(inputs, outputs, bias).to(dtype)
    x = random(2, *shape, inputs).to(dtype)
    x = x.transpose(0, 1).contiguous().transpose(0, 1) if turned and shape else x
    both_ways(module, packed_layers.Linear(module.weight, module.bias, clamp), x, clamp)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("clamp", [None, INFINITE])
def test_a_batchnorm_both_ways(affine: bool, clamp: packed_layers.ClampBounds | None) -> None:
    module = nn.BatchNorm2d(5, affine=affine).eval()
    nn.init.normal_(module.running_mean)
    nn.init.uniform_(module.running_var, 0.5, 2)
    if affine:
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
    with torch.no_grad():
        layer = packed_layers.BatchNorm(module, clamp)
        both_ways_of_norm = layer.forward(random(3, 5, 4, 4).float())
    wanted = copy.deepcopy(module).double()(random(3, 5, 4, 4))
    assert_near(both_ways_of_norm, (wanted if clamp is None else wanted.clamp(*clamp)).detach())
    with torch.enable_grad():
        both_ways(module, packed_layers.BatchNorm(module), random(3, 5, 4, 4).float(), None)


def test_only_a_cpu_and_two_dtypes_are_packed() -> None:
    assert packed_layers.available(torch.zeros(1))
    assert packed_layers.available(torch.zeros(1, dtype=torch.bfloat16))
    assert not packed_layers.available(torch.zeros(1, dtype=torch.float64))
    assert not packed_layers.available(torch.zeros(1, device="meta"))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not packed_layers.available(torch.zeros(1))


def test_a_clamp_in_place_and_not() -> None:
    for in_place in (True, False):
        x = random(3, 4)
        y = packed_layers.Clamp((-1.0, 1.0), in_place).forward(x)
        assert (y is x) == in_place
        torch.testing.assert_close(y, F.hardtanh(random(3, 4)))
