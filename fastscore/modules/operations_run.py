"""What sees each operation of PyTorch as it runs."""

import sys
from typing import Any

from torch._compile import _disable_dynamo
from torch.utils._python_dispatch import TorchDispatchMode


class OperationsRun(TorchDispatchMode):
    """In the block, `operation` runs in the place of each operation.

    torch.compile is kept off its code. PyTorch does that for every such mode, and imports torch._dynamo for it, which
    takes seconds; where nobody else has imported that, nothing compiles.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if decorators := sys.modules.get("torch._dynamo.decorators"):
            decorators.skip(OperationsRun.__torch_dispatch__)  # as such; what it runs, below

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether PyTorch is to keep it off."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = _not_compiled if "torch._dynamo" in sys.modules else _run
        return run(self, func, args, kwargs or {})

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What func(*args, **kwargs) is to return."""
        raise NotImplementedError


def _run(mode: OperationsRun, func: Any, args: Any, kwargs: Any) -> Any:
    return mode.operation(func, args, kwargs)


_not_compiled = _disable_dynamo(_run)
