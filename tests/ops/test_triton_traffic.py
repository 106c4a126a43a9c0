"""Bytes that the Triton kernels move at the activations of real networks: the minimum.

`triton_traffic` counts them from the launch geometry; the interpreter's tests hold it against the loads of real runs.
The minimum is every input once and every output once; partial sums, where a reduction is split, are written once and
read once. Shapes are those of the inputs of every convolution and linear layer, where taps sit.
"""

import functools

import pytest
import torch
import torchvision
import triton_traffic
from torch import nn

from fastscore.ops.triton.channel_sums import SUMS
from fastscore.ops.triton.launch import plan_channel_sums, plan_normalize_gradient, plan_random_gradient

SMS = {"A100": 108, "H100": 132, "B200": 148}
NETWORKS = ("resnet50", "vgg19", "vit_b_16")
CLASSES = 1000


@functools.cache
def activations(network: str, batch: int) -> set[tuple[int, ...]]:
    """Shapes of what the network's convolutions and linear layers are given."""
    with torch.device("meta"):
        model = torchvision.models.get_model(network)
        images = torch.empty(batch, 3, 224, 224)
    shapes: set[tuple[int, ...]] = set()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(lambda module, args: shapes.add(tuple(args[0].shape)))
    model(images)
    return shapes


def test_the_networks_are_seen():
    assert (8, 64, 112, 112) not in activations("resnet50", 8)  # pooled before the next convolution
    assert {(8, 64, 56, 56), (8, 2048, 7, 7), (8, 2048)} <= activations("resnet50", 8)
    assert {(8, 64, 224, 224), (8, 25088)} <= activations("vgg19", 8)
    assert {(8, 197, 768), (8, 197, 3072), (8, 768)} <= activations("vit_b_16", 8)


@pytest.mark.parametrize("sms", SMS.values(), ids=SMS.keys())
@pytest.mark.parametrize("batch", [1, 32, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("network", NETWORKS)
def test_channel_sums_moves_the_minimum(network, last, dtype, batch, sms):
    for shape in activations(network, batch):
        x = torch.empty(shape, dtype=dtype, device="meta")
        if last and len(shape) == 4:
            x = x.to(memory_format=torch.channels_last)
        channel_dim = -1 if len(shape) == 3 else 1
        plan = plan_channel_sums(shape, x.stride(), x.stride(), channel_dim, dtype.itemsize, sms)
        results = shape[0] * shape[channel_dim] * 4
        for reducer, sums in SUMS.items():
            moved = triton_traffic.channel_sums(plan, sums, dtype.itemsize, 4)
            assert moved.inputs == 2 * x.nbytes, (shape, reducer)
            assert moved.outputs == sums * results
            assert moved.partials == (2 * plan.splits * moved.outputs if plan.splits > 1 else 0)
            assert moved.partials <= 0.1 * moved.inputs


@pytest.mark.parametrize("batch", [1, 32, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_gradients_move_the_minimum(dtype, batch):
    drawn = triton_traffic.random_gradient(plan_random_gradient(batch, CLASSES), partials=False)
    assert drawn == (8 * batch, 0, 4 * batch * CLASSES)

    plan = plan_normalize_gradient((batch, CLASSES), (CLASSES, 1), (CLASSES, 1), dtype.itemsize)
    gradient = batch * CLASSES * dtype.itemsize
    assert triton_traffic.normalize_gradient(plan, dtype.itemsize, 4) == (gradient, 0, gradient + 4 * batch)


def test_a_longer_output_is_read_twice_or_made_twice():
    """50257 classes: 13 programs draw a sample's gradient, 7 normalise one."""
    drawn = triton_traffic.random_gradient(plan_random_gradient(2, 50257), partials=True)
    assert drawn == (2 * 2 * 13 * 8, 2 * 13 * 4 * (1 + 13), 2 * 50257 * 4)
    plan = plan_normalize_gradient((2, 50257), (50257, 1), (50257, 1), 4)
    moved = triton_traffic.normalize_gradient(plan, 4, 4)
    assert moved == (2 * 2 * 50257 * 4, 2 * 7 * 8 * (1 + 7), 2 * 50257 * 4 + 2 * 4)
