"""Branches that no example runs, in code that runs: what they would do with channels, as the code says it.

A branch may view channels, cut them or average over them at numbers that stand there, and no trial shows it. So where a
function has run, and a part of it has not that does such a thing with a variable, what that variable held as the branch
was passed by says whether it is channels that the branch means.
"""

import ast
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fastscore.graph.groups import ChannelGraph, ChannelGroup, Member
from fastscore.graph.trials import branch_parameters
from fastscore.graph.trials.beside import Beside, Key, Places, places_of, replayed, touched
from fastscore.graph.trials.differences import close
from fastscore.graph.trials.recording import Recording
from fastscore.graph.trials.replaced_layers import unwrapped
from fastscore.modules.channel_uses import Dims, Use, may_mean, means
from fastscore.modules.frames import variables
from fastscore.modules.lines_run import traced
from fastscore.modules.reachable_code import ReachableCode
from fastscore.modules.settled_branches import may_be
from fastscore.modules.tensor_expressions import held_by, value_of
from fastscore.modules.uses_in_code import uses_in

_POSITIONS: Any = getattr(CodeType, "co_positions", None)  # Python 3.11
_MOST = 1.5  # times the share of a unit that a dimension may have of it
_WAY_OUT = "channels: a forward= that calls the model that way, too, shows whether they can go"
_Place = tuple[Use, int]  # what is made of a tensor; the line before it at which that is looked up


class PassedBy:
    """What the code of a model may do with channels where the run that is recorded does not come to.

    Runs that are made anyway are watched: the one in which nothing is changed shows what code is passed by, and what
    variables hold there; those in which channels are, along which dimensions of these some show.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._left: dict[CodeType, list[_Place]] = {}
        self._held: dict[_Place, list[list[Tensor]]] = {}
        self._suspects = set[Use]()
        self._names = _names(model)
        self._by = defaultdict[Use, set[str]](set)  # what may meet it: names of modules and tensors
        self._code: ReachableCode | None = None
        self._changes: Callable[[str], bool] = bool  # whether code may set what has such a name

    @contextmanager
    def watched(self, made: Mapping[str, Tensor] | None) -> Iterator[None]:
        """A block in which the model runs. made: layer -> where what it makes is changed; None for the run that shows
        what is passed by."""
        with self._first() if made is None else self._changed() if made and self._left else nullcontext():
            yield

    @contextmanager
    def _first(self) -> Iterator[None]:
        reachable = self._code = ReachableCode(self._model) if _POSITIONS else None
        found = {function.__code__: uses for function in (reachable.functions if reachable else ())
                 if (uses := uses_in(function, reachable.kind(function) if reachable else None))}
        self._changes = reachable.changes if reachable else bool
        ran, held = defaultdict[CodeType, set[int]](set), defaultdict[_Place, list[list[Tensor]]](list)

        def see(frame: FrameType, event: str) -> None:
            ran[frame.f_code].add(frame.f_lasti)
            for use in found[frame.f_code] if event == "line" else ():
                if frame.f_lineno in use.lines and (x := _looked_up(frame, use, self._changes)) is not None and \
                        may_mean(use, x) and _meets(frame, use, x.shape):
                    held[use, frame.f_lineno].append(_sums(x))
                    if use.by is not None:
                        self._by[use].add(_name_in(self._names, _by(frame, use)))

        with traced(found.__contains__, see, True) if found else nullcontext():
            yield
        for code, instructions in ran.items():
            positions = {each for at, each in enumerate(_POSITIONS(code)) if 2 * at in instructions}
            lines = {each[0] for each in positions}
            passed_by = [(use, [line for line in use.lines if line in lines][-1:])
                         for use in found[code] if use.position not in positions and positions.isdisjoint(use.alike)]
            if places := [(use, line) for use, last in passed_by for line in last if (use, line) in held]:
                self._left[code] = places
        self._held = {place: held[place] for places in self._left.values() for place in places}

    def _changed(self) -> AbstractContextManager[None]:
        calls = {place: iter(held) for place, held in self._held.items()}

        def see(frame: FrameType, event: str) -> None:
            for use, line in self._left[frame.f_code] if event == "line" else ():
                if frame.f_lineno == line and (x := _looked_up(frame, use, self._changes)) is not None and \
                        may_mean(use, x) and _meets(frame, use, x.shape):
                    before = next(calls[use, line], None)
                    if before is not None and use not in self._suspects and _means_some(use, x, before):
                        self._suspects.add(use)

        return traced(self._left.__contains__, see)

    def that_go(self, recording: Recording, graph: ChannelGraph) -> ChannelGraph:
        """The graph without groups of whose channels code says something that no example has run; those that meet a
        parameter there, number by number, have it as a member."""
        groups = graph.groups
        suspects = {use for use in self._suspects if use not in self._by or not all(
            any(_goes_with(name, group) for group in groups) for name in self._by[use])}
        left = {code: some for code, places in self._left.items()
                if (some := [place for place in places if place[0] in suspects])}
        if not left or not groups or self._code is None:
            return graph
        refused, met = _meant(recording, groups, left, self._changes)
        more = {group: Member(name, "tensor", every, every, dim) for (group, name), reason in met.items()
                if (dim := branch_parameters.dim_alone(recording, self._code, name)) is not None
                for every in [torch.arange(recording.model.get_parameter(name).numel())]
                if sum(other == name for _, other in met) == sum(other == group for other, _ in met) == 1}
        refused = {group: reason for (group, _), reason in met.items() if group not in more} | refused
        return replace(graph, groups=tuple(
            replace(group, members=(*group.members, more[group.name])) if group.name in more else group
            for group in groups)).less(refused)


def _names(model: nn.Module) -> dict[int, str]:
    """By id, what modules and tensors of a model are called."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {id(each): name for name, each in (*model.named_modules(), *tensors)}


def _name_in(names: Mapping[int, str], thing: Any) -> str:
    """What a module or tensor is called, or the tensor that it is a view of; empty of any other."""
    return names.get(id(thing)) or names.get(id(getattr(thing, "_base", None)), "")


def _by(frame: FrameType, use: Use) -> Any:
    """What meets a tensor there."""
    met = use.met(frame.f_lineno)
    return None if met is None else value_of(met, variables(frame), frame.f_globals)


def _meets(frame: FrameType, use: Use, sizes: Sequence[int]) -> bool:
    """Whether a tensor of such sizes may meet one as wide in `use.by`, if there is one."""
    return use.by is None or _is_as_wide(_by(frame, use), sizes)


def _goes_with(name: str, group: ChannelGroup) -> bool:
    """Whether a module has, or is, a layer of a group, or a tensor is one of such a layer's."""
    layers = {member.layer for member in group.members}
    return bool(name) and (name.rpartition(".")[0] in layers or any(
        f"{layer}.".startswith(f"{name}.") for layer in layers))


def _is_as_wide(by: object, sizes: Sequence[int]) -> bool:
    """Whether a module holds something, or a tensor is, as wide as one of some sizes, or several times."""
    if isinstance(by, nn.Module):
        own = {size for each in (*by.parameters(), *by.buffers()) for size in each.shape}
        return any(size % width == 0 for size in own for width in sizes if width > 1)
    return isinstance(by, Tensor) and bool(set(sizes) & set(by.shape) - {1})


def _looked_up(frame: FrameType, use: Use, changes: Callable[[str], bool]) -> Tensor | None:
    """What variables hold there, if it is an ordinary tensor."""
    names = variables(frame)
    x = value_of(use.tensors[frame.f_lineno], names, frame.f_globals)
    if not isinstance(x, Tensor) or x.is_nested or x.is_meta:
        return None
    return x if all(may_be(*each, names, frame.f_globals, changes) for each in use.asked) else None


def _sums(x: Tensor) -> list[Tensor]:
    """Along each dimension, a number for each place, which tells whether anything differs there."""
    with torch._C.DisableTorchFunction(), torch.no_grad():
        x = unwrapped(x.detach())
        x = x.abs() if x.is_complex() else x
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x * x.abs()  # softmax has rows that sum up to one, and normalize those whose squares do
        return [x.sum([other for other in range(x.dim()) if other != dim]) if x.dim() > 1 else x
                for dim in range(x.dim())]


def _means_some(use: Use, x: Tensor, before: Sequence[Tensor]) -> bool:
    """Whether what is made of a variable may mean what lies along a dimension where some of x is not as before."""
    with _disable_current_modes():  # which see what the model's code does
        sums = _sums(x)
        if [len(each) for each in sums] != [len(each) for each in before]:
            return False
        rounding = 16 * torch.finfo(x.dtype).eps if x.is_floating_point() or x.is_complex() else None
        same = [close(now, then, rounding=rounding) for now, then in zip(sums, before, strict=True)]
        return any(bool(each.any()) and not bool(each.all()) and may_mean(use, x, (dim,))
                   for dim, each in enumerate(same))


def _meant(recording: Recording, groups: Sequence[ChannelGroup], left: Mapping[CodeType, Sequence[_Place]],
           changes: Callable[[str], bool]) -> tuple[dict[str, str], dict[tuple[str, str], str]]:
    """(group -> what is said of it, where these uses mean channels of it; the same of (group, parameter) where its
    channels meet one, number by number)."""
    made: dict[Key, Places] = {}
    of = {group.name: group for group in groups}
    units = {group.name: int(group.unit.max()) + 1 for group in groups}
    for group in groups:
        for number, unit in enumerate(_tried(units[group.name])):
            made[group.name, number] = places_of(recording, group, group.unit == unit)
    mode, found, met = Beside(), dict[str, str](), dict[tuple[str, str], str]()
    names = _names(recording.model)

    def look(frame: FrameType, event: str) -> None:
        for use, line in left[frame.f_code] if event == "line" else ():
            if frame.f_lineno != line or (x := _looked_up(frame, use, changes)) is None:
                continue
            for key, other in _others(mode, frame, use.tensors[frame.f_lineno]).items():
                with torch._C.DisableTorchFunction():
                    dims = {dim: at for dim, at in enumerate(touched(other, x))
                            if 0 < float(at.double().mean()) <= _MOST / units[key[0]] < 1}
                if dims and means(use, dims, x.dim()) and _meets(frame, use, [x.shape[dim] for dim in dims]) and \
                        not _goes_with(_name_in(names, _by(frame, use)), of[key[0]]) and \
                        _meets_others(mode, frame, use, key, dims, x.dim()):
                    group, by = of[key[0]], _by(frame, use)
                    name = _name_in(names, by)
                    at = group.unit == _tried(units[group.name])[key[1]]
                    if branch_parameters.meets_one_by_one(use, recording.model, name, by, dims, x.dim(), group, at):
                        met.setdefault((group.name, name), _reason(use.innermost))
                    else:
                        found.setdefault(group.name, _reason(use.innermost))

    with suppress(Exception), traced(left.__contains__, look):
        replayed(recording, mode, made)
    return found, met


def _tried(units: int) -> tuple[int, ...]:
    """The units that are changed to see where channels lie: of two, an order that is another one shows."""
    return (units // 2, 0) if units > 2 else (units // 2,)


def _others(mode: Beside, frame: FrameType, tensor: ast.expr) -> dict[Key, Tensor]:
    """What a tensor that is looked up would be, by the changes that come to it."""
    names = variables(frame)
    known = {name: mode.others_of(x) for name in held_by(tensor) if isinstance(x := names.get(name), Tensor)}
    found = {}
    for key in dict.fromkeys(key for others in known.values() for key in others):
        instead = {name: others[key] for name, others in known.items() if key in others}
        if isinstance(other := value_of(tensor, {**names, **instead}, frame.f_globals), Tensor):
            found[key] = other
    return found


def _meets_others(mode: Beside, frame: FrameType, use: Use, key: Key, dims: Dims, count: int) -> bool:
    """Whether what a variable holds that meets a tensor there has channels of other groups where the tensor, of `count`
    dimensions, has these; True where it is no variable that meets it."""
    by = use.met(frame.f_lineno)
    if by is None or not held_by(by):
        return True
    met, others = value_of(by, variables(frame), frame.f_globals), _others(mode, frame, by)
    with torch._C.DisableTorchFunction():
        places = {each: dict(enumerate(touched(other, met), count - met.dim())) for each, other in others.items()}
    if key in places:
        return any(not torch.equal(at, places[key].get(dim, at)) for dim, at in dims.items())
    return any(0 < float(each[dim].double().mean()) < 1 for each in places.values() for dim in dims if dim in each)


def _reason(use: Use) -> str:
    """What code says that no example runs."""
    code = use.function.__code__
    at = f"{use.function.__qualname__} (line {use.position[0]} of {Path(code.co_filename).name})"
    what = f", which {at} reads where" if use.is_before else f" in {at}, which"
    return f"{ast.unparse(use.node)}{what} example_inputs do not come to, " \
           f"{'would be something else of fewer' if use.by is None else 'takes all its'} {_WAY_OUT}"
