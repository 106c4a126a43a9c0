"""A smaller layer that holds the rest of a larger one needs no run; nor does one whose product is at hand."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.graph.trials.plain_layers import holds_rest, is_product
from fastscore.modules.weights.experts import ExpertLinear


def cut(layer: Any, ins: Tensor, outs: Tensor) -> Any:
    small = copy.deepcopy(layer)
    small.weight = nn.Parameter(layer.weight[outs][:, ins].clone())
    small.bias = nn.Parameter(layer.bias[outs].clone())
    names = ("in_features", "out_features") if isinstance(layer, nn.Linear) else ("in_channels", "out_channels")
    for name, kept in zip(names, (ins, outs), strict=True):
        setattr(small, name, len(kept))
    return small


@pytest.mark.parametrize("layer", [nn.Linear(5, 4), nn.Conv2d(5, 4, 2)])
def test_a_smaller_layer_holds_the_rest_or_is_run(layer: Any) -> None:
    gone_in, gone_out = torch.tensor([0, 3]), torch.tensor([2])
    ins, outs = torch.tensor([1, 2, 4]), torch.tensor([0, 1, 3])
    small = cut(layer, ins, outs)
    assert holds_rest(small, layer, gone_in, gone_out)
    assert not holds_rest(small, layer, torch.tensor([0, 2]), gone_out)
    assert not holds_rest(small, layer, gone_in, torch.tensor([1]))
    assert not holds_rest(small, layer, gone_in, None)
    small.bias.data += 1
    assert not holds_rest(small, layer, gone_in, gone_out)
    small = cut(layer, ins, outs)
    small.own = 1
    assert not holds_rest(small, layer, gone_in, gone_out)

    class Own(type(layer)):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    small, layer = cut(layer, ins, outs), copy.deepcopy(layer)
    small.__class__ = layer.__class__ = Own
    assert not holds_rest(small, layer, gone_in, gone_out)


def test_fewer_channels_of_experts_hold_the_rest() -> None:
    def experts(weight: Tensor, bias: Tensor) -> ExpertLinear:
        return ExpertLinear(nn.ParameterDict({"up": weight, "up_bias": bias}), "up", "up_bias")

    weight, bias = torch.randn(2, 4, 5), torch.randn(2, 4)
    gone_in, gone_out = torch.tensor([0, 3]), torch.tensor([2])
    ins, outs = torch.tensor([1, 2, 4]), torch.tensor([0, 1, 3])
    whole, small = experts(weight, bias), experts(weight[:, outs][:, :, ins], bias[:, outs])
    assert holds_rest(small, whole, gone_in, gone_out)
    assert not holds_rest(small, whole, torch.tensor([0, 2]), gone_out)
    assert not holds_rest(small, whole, gone_in, torch.tensor([1]))


@pytest.mark.parametrize("bias", [True, False])
def test_what_a_linear_makes_is_the_product_that_it_holds_or_more(bias: bool) -> None:
    layer, x = nn.Linear(24, 16, bias=bias), torch.randn(3, 5, 24)
    made = layer(x)
    assert is_product(layer, x, made)
    for row in ((0, 0, 0), (2, 4, 15)):
        other = made.clone()
        other[row] += 1e-3 * made.abs().max()
        assert not is_product(layer, x, other)
    assert not is_product(layer, x, made.roll(1, -1))
    assert not is_product(layer, x, made.half())
    assert not is_product(layer, x, made[:2])
    gone_in, gone_out, ins, outs = torch.tensor([0, 3]), torch.tensor([2]), [1, 2, *range(4, 24)], [0, 1, *range(3, 16)]
    narrow = x[..., ins]
    rest = F.linear(narrow, layer.weight[outs][:, ins], layer.bias[outs] if bias else None)
    assert is_product(layer, narrow, rest, gone_in, gone_out)
    assert not is_product(layer, narrow, 1.001 * rest, gone_in, gone_out)
