"""What the arithmetic units of a device like: how many channels they take at once."""

import torch
from torch import nn

from fastscore.modules.inspection import device_of

# Bytes along the channels that one instruction of a matrix product takes: the depth of a tensor core's multiply (CUDA),
# a vector register elsewhere.
_CPU_BYTES = {"AVX512": 64}
_OTHER_BYTES = 32


def channel_multiple(model: nn.Module) -> int:
    """Channels that the widths of `model` should be multiples of: 8, 16 or 32, by its device and floating-point dtype.

    On CUDA 8 in float32 (TF32) and 16 in half precision; on a CPU with AVX-512 16 and 32; on others 8 and 16.
    """
    device = device_of(model)
    itemsize = next((p.dtype.itemsize for p in model.parameters() if p.is_floating_point()), 4)
    capability = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else ""
    return max(8, _CPU_BYTES.get(capability, _OTHER_BYTES) // itemsize)
