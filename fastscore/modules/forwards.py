"""What stands in the place of a module's forward for a time."""

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import update_wrapper
from typing import Any, TypeVar, cast

from torch import nn
from torch.overrides import TorchFunctionMode

from fastscore.modules import frames
from fastscore.modules.handles import Handle
from fastscore.modules.wrappers import without_checkpoints

F = TypeVar("F", bound="Forward")


class Forward:
    """What a module has in the place of its forward as long as it has users, of which several may come and go by turns.
    A copy of the module has one, too, as it has its hooks; one that is pickled does without.

    before: what was there.
    """

    def __init__(self, module: nn.Module, before: Callable[..., Any] | None) -> None:
        update_wrapper(cast(Any, self), module.forward if before is None else before)  # its signature, say
        self.module, self.before, self.users = module, before, 0

    @classmethod
    def put(cls: type[F], module: nn.Module) -> F:
        """The one of this class that stands there then, with a user more."""
        own = vars(module).get("forward")
        if not isinstance(own, cls):
            own = vars(module)["forward"] = cls(module, own)
        own.users += 1
        return own

    def leave(self) -> None:
        """One user less."""
        self.users -= 1
        _tidy(self.module)

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What runs without it."""
        return type(module).forward(module, *args, **kwargs) if self.before is None else self.before(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Forward":
        copied = type(self)(copy.deepcopy(self.module, memo), copy.deepcopy(self.before, memo))
        vars(copied).update({name: value for name, value in vars(self).items() if name not in vars(copied)},
                            users=self.users)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (getattr, (self.module, "forward")) if self.before is None else (_itself, (self.before,))


class ForwardWithin(Forward, Handle):
    """Of a module whose code runs in a block of its own. permanent: whether it stays there for good."""

    permanent = False

    def block(self, module: nn.Module) -> AbstractContextManager[object]:
        """That block, for one call of the module, or of the copy of it that DataParallel has made."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        called = frames.innermost(frames.outwards())  # which DataParallel may have made of the module
        module = called if called is not None and vars(called).get("forward") is self else self.module
        if not self.users:
            return self.run(module, *args, **kwargs)
        with self.block(module), without_checkpoints():  # which would run a part of this code again, outside
            return self.run(module, *args, **kwargs)

    def remove(self) -> None:
        self.leave()

    def make_permanent(self) -> None:
        self.permanent = True


class InThePlaceOfForwards(TorchFunctionMode):
    """In the block, functions of torch are seen, and what `stand_ins` puts is in the place of modules' forwards."""

    def __init__(self) -> None:
        super().__init__()
        self._put = list[Forward]()

    def stand_ins(self) -> Iterable[Forward]:
        """Put them."""
        raise NotImplementedError

    def __enter__(self) -> "InThePlaceOfForwards":
        self._put += self.stand_ins()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        while self._put:
            self._put.pop().leave()


def put_back(module: nn.Module) -> None:
    """Give a module, a copy, back the forward that it had, whoever uses what stands there; nothing of any other."""
    own = vars(module).get("forward")
    while isinstance(own, Forward):
        own.users, own = 0, own.before
    _tidy(module)


def _tidy(module: nn.Module) -> None:
    """Take away what nobody uses."""
    own = first = vars(module).get("forward")
    while isinstance(own, Forward) and not own.users:
        own = own.before
    if own is None:
        vars(module).pop("forward", None)
    elif own is not first:
        vars(module)["forward"] = own


def _itself(value: Any) -> Any:
    return value
