"""The bytes that channel_sums moves at the activations of real networks, from its launch geometry alone.

That the model counts what the kernels do is shown case by case in test_cuda_channel_sums.
"""

import functools
import itertools

import pytest
import torch
import torchvision
from shim import LAYOUTS, SUMS_OF, Shim, modelled_reads, rows_of_block
from torch import Tensor, nn

BATCH = 32
UNITS = 132  # multiprocessors of an H100


@functools.cache
def activations(network: str) -> tuple[tuple[int, ...], ...]:
    """Shapes of everything that a Conv2d or Linear of the network reads, for one sample."""
    shapes = set()

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shapes.add(tuple(inputs[0].shape[1:]))

    with torch.device("meta"):
        model = torchvision.models.get_model(network).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_pre_hook(note)
        model(torch.empty(1, 3, 224, 224))
    return tuple(sorted(shapes))


@pytest.mark.parametrize("op", SUMS_OF)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "last"])
@pytest.mark.parametrize("network", ["resnet50", "vgg19", "vit_b_16"])
def test_inputs_are_read_once_and_partial_sums_are_few(shim: Shim, network: str, memory_format: torch.memory_format,
                                                       dtype: torch.dtype, op: str) -> None:
    for shape in activations(network):
        # Without storage: only sizes, strides and an aligned address count.
        x = torch.empty(BATCH, *shape, dtype=dtype, device="meta")
        channel_dim = 1
        if x.dim() == 4:
            x = x.contiguous(memory_format=memory_format)
        else:
            channel_dim = x.dim() - 1
        geometry = shim.geometry(x, x, channel_dim, UNITS)
        assert modelled_reads(geometry, x.element_size()) == 2 * x.nbytes

        layout = "rows" if x.dim() == 4 and memory_format == torch.contiguous_format else "columns"
        assert LAYOUTS[geometry.layout] == layout
        packed = layout == "rows" or x.shape[channel_dim] % (16 // x.element_size()) == 0
        assert packed == (geometry.wide or layout == "rows")

        rows = geometry.samples * geometry.channels
        assert rows == BATCH * x.shape[channel_dim]
        assert geometry.blocks * rows_of_block(geometry, x.element_size()) >= rows
        partials = 2 * 4 * SUMS_OF[op] * rows * geometry.split.splits if geometry.split.splits > 1 else 0
        assert partials <= 0.025 * 2 * x.nbytes


@pytest.mark.parametrize("network", ["resnet50", "vgg19", "vit_b_16"])
def test_one_sample_is_spread_over_the_device(shim: Shim, network: str) -> None:
    """Where there are enough bytes to go round, that is: 64 KiB to a block."""
    for shape in activations(network):
        x = torch.empty(1, *shape, device="meta")
        geometry = shim.geometry(x, x, 1 if x.dim() == 4 else x.dim() - 1, UNITS)
        blocks = geometry.blocks * geometry.split.splits
        assert blocks >= min(UNITS, 2 * x.nbytes // 2**16), shape


@pytest.mark.parametrize("network", ["resnet50", "mobilenet_v2", "vit_b_16"])
def test_waves_of_blocks_are_filled(shim: Shim, network: str) -> None:
    """Where more blocks come than run at once, few places stay empty: at N = 8 to 256, on an H100 and an A100."""
    fills = []
    for units, batch, dtype, shape in itertools.product((132, 108), (8, 16, 32, 64, 128, 256),
                                                        (torch.float32, torch.bfloat16), activations(network)):
        x = torch.empty(batch, *shape, dtype=dtype, device="meta")
        for each in (x, x.to(memory_format=torch.channels_last)) if x.dim() == 4 else (x,):
            geometry = shim.geometry(each, each, 1 if x.dim() == 4 else x.dim() - 1, units)
            places = units * 4  # as the launch bounds promise
            waves = -(-geometry.blocks * geometry.split.splits // places)
            if waves > 1 and len(shape) > 1:
                fills.append(geometry.blocks * geometry.split.splits / (waves * places))
    assert min(fills) >= 0.72
    assert sum(fill >= 0.85 for fill in fills) >= 0.95 * len(fills)
