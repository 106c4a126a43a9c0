"""A device that PyTorch knows no kernel for, and that has no float64, as Apple's: "other". Its memory is the CPU's.

Once a process has imported this, it has the device; so a test runs it in a process of its own.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class Module(_DummyBackendModule):
    """What torch.other is."""

    def get_rng_state(self, device: object = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("other", Module())
torch.__future__.set_overwrite_module_params_on_conversion(True)  # another kind of tensor, for Module.to()
KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
OPS_OF_FASTSCORE: set[str] = set()  # that ran here


class OnOther(Tensor):
    """A tensor of the device: what `raw`, of the CPU, holds."""

    raw: Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], list):  # PyTorch makes no tensor of a list here
            args = args[0], torch.tensor(args[1])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @staticmethod
    def __new__(cls, raw: Tensor) -> "OnOther":
        if raw.dtype == torch.float64:
            raise TypeError("other has no float64")
        made = Tensor._make_wrapper_subclass(cls, raw.size(), raw.stride(), raw.storage_offset(), dtype=raw.dtype,
                                             device="other:0")
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, *args, **(kwargs or {}))

    def __repr__(self) -> str:
        return f"OnOther({self.raw})"


def run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """`func` on the CPU's memory; an op of fastscore as the dispatcher runs it on such a device."""
    if func.namespace == "fastscore":
        OPS_OF_FASTSCORE.add(func._opname)
        return func.redispatch(KERNEL, *args, **kwargs)
    written = {}

    def raw(x: Any) -> Any:
        if isinstance(x, OnOther):
            written[id(x.raw)] = x
            return x.raw
        return torch.device("cpu") if isinstance(x, torch.device) and x.type == "other" else x

    device = kwargs.get("device")
    args, own_kwargs = tree_map(raw, (args, kwargs))
    stays = written if device is None else torch.device(device).type == "other"
    if not stays and func is not torch.ops.aten._to_copy.default and not written:
        raise NotImplementedError(func)
    out = func(*args, **own_kwargs)

    def back(x: Any) -> Any:
        if not isinstance(x, Tensor) or not stays:
            return x
        return written[id(x)] if id(x) in written else OnOther(x)

    return tree_map(back, out)


_factories = torch.library.Library("_", "IMPL")
_factories.fallback(run, "PrivateUse1")
