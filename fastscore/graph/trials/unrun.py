"""Branches that no example runs, in code that runs: what they would do with channels, as the code says it.

A branch may view channels, cut them or average over them at numbers that stand there, and no trial shows it. So where a
function has run, and a part of it has not that does such a thing with a variable, what that variable held as the branch
was passed by says whether it is channels that the branch means.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.graph.groups import ChannelGroup
from fastscore.graph.trials.beside import Beside, Key, Places, places_of, replayed, touched
from fastscore.graph.trials.differences import close
from fastscore.graph.trials.recording import Recording, unwrapped
from fastscore.modules.channel_uses import Use, may_mean, means, uses_in
from fastscore.modules.reachable_code import ReachableCode

_POSITIONS: Any = getattr(CodeType, "co_positions", None)  # Python 3.11
_MOST = 1.5  # times the share of a unit that a dimension may have of it
_WAY_OUT = "channels: a forward= that calls the model that way, too, shows whether they can go"
_Place = tuple[ast.AST, int]  # what is made of a variable; a line before it


class PassedBy:
    """What the code of a model may do with channels where the run that is recorded does not come to.

    Runs that are made anyway are watched: the one in which nothing is changed shows what code is passed by, and what
    variables hold there; those in which channels are, along which dimensions of these some show.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._left: dict[CodeType, tuple[FunctionType, list[Use]]] = {}
        self._held: dict[_Place, list[list[Tensor]]] = {}
        self._suspects = set[ast.AST]()

    @contextmanager
    def watched(self, made: Mapping[str, Tensor] | None) -> Iterator[None]:
        """A block in which the model runs. made: layer -> where what it makes is changed; None for the run that shows
        what is passed by."""
        with self._first() if made is None else self._changed() if made and self._left else nullcontext():
            yield

    @contextmanager
    def _first(self) -> Iterator[None]:
        functions = ReachableCode(self._model).functions if _POSITIONS else ()
        found = {function.__code__: function for function in functions if uses_in(function)}
        ran, held = defaultdict[CodeType, set[int]](set), defaultdict[_Place, list[list[Tensor]]](list)

        def see(frame: FrameType, event: str) -> None:
            ran[frame.f_code].add(frame.f_lasti)
            for use in uses_in(found[frame.f_code]) if event == "line" else ():
                if frame.f_lineno in use.lines and (x := _looked_up(frame, use)) is not None and may_mean(use, x):
                    held[use.node, frame.f_lineno].append(_sums(x))

        with _traced(found, see, True) if found else nullcontext():
            yield
        for code, instructions in ran.items():
            positions = {each for at, each in enumerate(_POSITIONS(code)) if 2 * at in instructions}
            lines = {each[0] for each in positions}
            passed_by = [replace(use, lines=tuple(line for line in use.lines if line in lines)[-1:])
                         for use in uses_in(found[code]) if use.position not in positions]
            passed_by = [use for use in passed_by if any((use.node, line) in held for line in use.lines)]
            if passed_by:
                self._left[code] = found[code], passed_by
        self._held = {(use.node, line): held[use.node, line] for _, uses in self._left.values()
                      for use in uses for line in use.lines}

    def _changed(self) -> AbstractContextManager[None]:
        calls = {place: iter(held) for place, held in self._held.items()}

        def see(frame: FrameType, event: str) -> None:
            for use in self._left[frame.f_code][1] if event == "line" else ():
                if frame.f_lineno in use.lines and (x := _looked_up(frame, use)) is not None and may_mean(use, x):
                    before = next(calls[use.node, frame.f_lineno], None)
                    if before is not None and use.node not in self._suspects and _means_some(use, x, before):
                        self._suspects.add(use.node)

        return _traced(self._left, see, False)

    def refusals(self, recording: Recording, groups: Sequence[ChannelGroup]) -> dict[str, str]:
        """Group -> why it stays: what code that no example has run says of its channels."""
        left = {code: (function, suspects) for code, (function, uses) in self._left.items()
                if (suspects := [use for use in uses if use.node in self._suspects])}
        return _meant(recording, groups, left) if left and groups else {}


def _looked_up(frame: FrameType, use: Use) -> Tensor | None:
    """What a variable holds, if it is an ordinary tensor."""
    x = frame.f_locals.get(use.name)
    return x if isinstance(x, Tensor) and not x.is_nested and not x.is_meta else None


def _sums(x: Tensor) -> list[Tensor]:
    """Along each dimension, a number for each place, which tells whether anything differs there."""
    with torch._C.DisableTorchFunction(), torch.no_grad():
        x = unwrapped(x.detach())
        x = x.abs() if x.is_complex() else x
        whole = torch.promote_types(x.dtype, torch.float32)
        return [x.sum([other for other in range(x.dim()) if other != dim], dtype=whole) if x.dim() > 1 else x.to(whole)
                for dim in range(x.dim())]


def _means_some(use: Use, x: Tensor, before: Sequence[Tensor]) -> bool:
    """Whether what is made of a variable may mean what lies along a dimension where some of x is not as before."""
    sums = _sums(x)
    if [len(each) for each in sums] != [len(each) for each in before]:
        return False
    rounding = 16 * torch.finfo(x.dtype).eps if x.is_floating_point() or x.is_complex() else None
    same = [close(now, then, rounding=rounding) for now, then in zip(sums, before, strict=True)]
    return any(bool(each.any()) and not bool(each.all()) and may_mean(use, x, (dim,))
               for dim, each in enumerate(same))


def _meant(recording: Recording, groups: Sequence[ChannelGroup],
           left: Mapping[CodeType, tuple[FunctionType, list[Use]]]) -> dict[str, str]:
    """Group -> what is said of it, where these uses mean channels of it."""
    made: dict[Key, Places] = {}
    units = {}
    for group in groups:
        units[group.name] = int(group.unit.max()) + 1
        made[group.name, 0] = places_of(recording, group, group.unit == units[group.name] // 2)
    mode, found = Beside(), dict[str, str]()

    def look(frame: FrameType, event: str) -> None:
        function, uses = left[frame.f_code]
        for use in uses if event == "line" else ():
            x = frame.f_locals.get(use.name) if frame.f_lineno in use.lines else None
            if not isinstance(x, Tensor):
                continue
            for (name, _), other in mode.others_of(x).items():
                with torch._C.DisableTorchFunction():
                    dims = {dim: at for dim, at in enumerate(touched(other, x))
                            if 0 < float(at.double().mean()) <= _MOST / units[name] < 1}
                if dims and means(use, dims, x.dim()):
                    found.setdefault(name, f"{ast.unparse(use.node)} in {function.__qualname__} (line "
                                     f"{use.position[0]} of {Path(function.__code__.co_filename).name}), which "
                                     f"example_inputs do not come to, would be something else of fewer {_WAY_OUT}")

    with suppress(Exception), _traced(left, look, False):
        replayed(recording, mode, made)
    return found


@contextmanager
def _traced(codes: Mapping[CodeType, object], see: Callable[[FrameType, str], None], instructions: bool
            ) -> Iterator[None]:
    """A block in which each line, or instruction, of some code is seen before it runs, in this thread."""
    def called(frame: FrameType, event: str, value: Any) -> Any:
        if frame.f_code not in codes:
            return None
        frame.f_trace_opcodes = instructions
        return noted

    def noted(frame: FrameType, event: str, value: Any) -> Any:
        with suppress(Exception):  # which would be the code's that runs
            see(frame, event)
        return noted

    before = sys.gettrace()  # a debugger's
    sys.settrace(called)
    try:
        yield
    finally:
        sys.settrace(before)
