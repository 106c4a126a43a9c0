"""Forward passes that halt at a layer, those of all batches together, so that it can be changed before they go on.

Each pass runs in a thread of its own, and of all threads one at a time: they are there to be halted, not to be fast.
What a pass holds while it halts is what its model's code holds at that place.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastscore.batches.calls import Forward
from fastscore.batches.parts import Batch
from fastscore.modules.hooks import input_of
from fastscore.modules.inspection import device_of

Side = Literal["input", "output"]


class Lockstep:
    """Passes of one model that halt at layers: before them (side "input") or after ("output").

    model: in evaluation mode. layers: where passes may halt. watched: (module, side) -> the names under which a pass
    keeps in `seen` what it finds there when it comes by. Use as a context; leaving it ends all passes.
    """

    def __init__(self, model: nn.Module, forward: Forward, side: Side, layers: Iterable[str],
                 watched: Mapping[tuple[str, Side], Sequence[str]]) -> None:
        self.model, self.forward, self._passes = model, forward, list[Pass]()
        self._side, self._layers, self._watched = side, list(layers), watched
        self._handles: list[Any] = []
        self.running: Pass | None = None

    def __enter__(self) -> "Lockstep":
        for (module, side), names in self._watched.items():
            self._hook(module, side, partial(_keep, names))
        for name in self._layers:
            self._hook(name, self._side, lambda each, name, x: each.halt(name, x))
        return self

    def __exit__(self, *exception: object) -> None:
        for each in self._passes:
            each.end()
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str, side: Side, act: Callable[["Pass", str, Tensor], None]) -> None:
        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.running is not None:
                act(self.running, name, input_of(args, kwargs))

        def after(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self.running is not None:
                act(self.running, name, output)

        layer = self.model.get_submodule(name)
        self._handles.append(layer.register_forward_pre_hook(before, with_kwargs=True) if side == "input"
                             else layer.register_forward_hook(after))

    def begin(self, batch: Batch) -> "Pass":
        """A pass over `batch`, which has not begun to run."""
        self._passes.append(Pass(self, batch))
        return self._passes[-1]


class Pass:
    """One forward pass. seen: name -> what it has found where it was to look."""

    def __init__(self, passes: Lockstep, batch: Batch) -> None:
        self._passes, self._batch = passes, batch
        self.seen: dict[str, Tensor] = {}
        self._go, self._halted = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._target: str | None = None
        self._found: Tensor | None = None
        self._error: BaseException | None = None
        self._over = self._ending = False

    def to(self, name: str) -> Tensor | None:
        """Go on until `name`; what it reads (or returns) there, None where the pass does not come by any more."""
        if self._over:
            return None
        self._target, self._found = name, None
        self._resume()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        found, self._found = self._found, None
        return found

    def end(self) -> None:
        """Leave the pass where it is: halted, or, where Ctrl-C came in between, running, or about to start."""
        self._ending = True
        self._go.release()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()

    def halt(self, name: str, x: Tensor) -> None:
        """In the pass's own thread: wait here, where it is to go no further."""
        if name == self._target and not self._ending:
            self._target, self._found = None, x
            self._halted.release()
            self._go.acquire()
        if self._ending:
            raise _End

    def _resume(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, args=(_surroundings(device_of(self._passes.model)),),
                                            daemon=True)
            self._thread.start()
        self._passes.running = self
        try:
            self._go.release()
            self._halted.acquire()
        finally:
            self._passes.running = None

    def _run(self, surroundings: Callable[[], Any]) -> None:
        self._go.acquire()
        try:
            if self._ending:
                return
            with surroundings():
                self._passes.forward(self._passes.model, self._batch)
        except _End:
            pass
        except BaseException as error:  # it is raised where the pass was told to go on
            self._error = error
        finally:
            self._batch = None
            self._over = True
            self._halted.release()


def _keep(names: Sequence[str], each: Pass, module: str, x: Tensor) -> None:
    each.seen.update(dict.fromkeys(names, x))


class _End(BaseException):
    """Unwinds a pass; no model's code catches it."""


def _surroundings(device: torch.device) -> Callable[[], Any]:
    """What of the caller's settings torch keeps for each thread."""
    kind = device.type
    autocast, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    stream = torch.cuda.current_stream(device) if kind == "cuda" else None

    @contextmanager
    def settings() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.autocast(kind, dtype, enabled=autocast))
            if stream is not None:
                stack.enter_context(torch.cuda.device(device))
                stack.enter_context(torch.cuda.stream(stream))
            yield

    return settings
