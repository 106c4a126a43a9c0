"""Widths at which a model's code does not run: the steps that would leave one go with those that follow, or stay.

First each group is taken to have such widths whatever the others have. Where no choice is left then, those of several
groups may depend on each other: steps go together with those after them, up to the next with which the model runs.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from fastscore.graph.groups import ChannelGroup
from fastscore.pruning.order.ranking import RemovalStep
from fastscore.pruning.refusal import FailsNarrowerError

_TRIES = 50  # of which each finds another width
_NEXT = 16  # steps that are tried after one with which the model does not run
_Result = TypeVar("_Result")
# so many channels may go of a group, so many the next time, if ever; what the model does in between, and whether that
# is so though nothing goes of other groups
_Widths: TypeAlias = tuple[int, int | None, str, bool]


class Widths:
    """What is found out about the widths of `groups` while a model is pruned."""

    def __init__(self, groups: Iterable[ChannelGroup]) -> None:
        self._channels = {group.name: group.channels for group in groups}
        self._between: dict[str, list[_Widths]] = defaultdict(list)
        self._together = list[_Together]()

    def __str__(self) -> str:
        """Which widths there are not, and why; empty where the model runs at each that was tried."""
        found = [self._said(group, *each) for group, widths in self._between.items() for each in _without_wider(widths)]
        return "; ".join([*found, *(each.why for each in self._together)])

    def pruned(self, attempt: Callable[[], _Result], order: Sequence[RemovalStep]) -> _Result:
        """What `attempt` gives, which prunes along an order that it asks `along` for, once there is none of the widths
        at which it fails. order: of the same steps.

        Raises ValueError, as it does, with those widths named.
        """
        try:
            return _tried(attempt, partial(self._learn, order=order))
        except (FailsNarrowerError, ValueError) as error:
            if not self._between:
                raise
            known, self._between = self._between, defaultdict(list)
            with suppress(FailsNarrowerError, ValueError):
                return _tried(attempt, partial(self._learn_together, order=order))
            self._between = known
            self._together.clear()
            if isinstance(error, ValueError):
                error.args = (f"{error}. {self}",)
            raise

    def along(self, order: Sequence[RemovalStep]) -> list[RemovalStep]:
        """The steps of an order; those that would leave a width at which the model does not run wait for the next ones
        of their groups, or stay."""
        if self._together:
            return _merged(order, self._together)
        if not self._between:
            return list(order)
        gone, found, waiting = Counter[str](), list[RemovalStep](), list[RemovalStep]()
        for step in order:
            before = [other for other in waiting if not set(other.groups).isdisjoint(step.groups)]
            waiting = [other for other in waiting if other not in before]
            taken = _joined([*before, step]) if before else step
            after = {group: gone[group] + len(channels) for group, channels in taken.parts}
            if any(self._is_left_out(group, count) for group, count in after.items()):
                waiting.append(taken)
            else:
                gone.update({group: len(channels) for group, channels in taken.parts})
                found.append(taken)
        return found

    def _is_left_out(self, group: str, gone: int) -> bool:
        return any(fewer < gone and (more is None or gone < more) for fewer, more, *_ in self._between.get(group, ()))

    def _learn(self, error: FailsNarrowerError, order: Sequence[RemovalStep]) -> bool:
        """Find the widths around that of each group by which the model fails; whether there is one."""
        others = {name: gone for name, gone in error.removed.items() if name not in error.groups}
        learned = False
        for name in error.groups:
            sets = _prefixes(name, order)

            def fails(count: int, name: str = name, sets: Sequence[Tensor] = sets) -> bool:
                return error.fails({**others, name: sets[count]} if count else others)

            now = sum(len(gone) <= len(error.removed[name]) for gone in sets) - 1
            if now < 1 or not fails(now):
                continue
            most = len(sets) - 1
            fewer = len(sets[_edge(fails, now, 0) - 1])
            more = None if fails(most) else len(sets[_edge(fails, now, most) + 1])
            alone = not others or error.fails({name: sets[now]})
            self._between[name].append((fewer, more, error.what, alone))
            learned = True
        return learned

    def _learn_together(self, error: FailsNarrowerError, order: Sequence[RemovalStep]) -> bool:
        """Find the next step of an order with which the model runs, those before it that came back gone, too; whether
        there is one."""
        gone = {name: {*channels.tolist()} for name, channels in error.removed.items()}
        removed = list(_along(order))
        end = next((count for count, sets in enumerate(removed)
                    if all(channels <= sets.get(name, set()) for name, channels in gone.items())), len(removed))
        back = (at for at, step in enumerate(order[:end])
                if not all({*channels} <= gone.get(name, set()) for name, channels in step.parts))
        begin = next(back, end - 1)
        for count in range(max(end, 1), min(end + _NEXT, len(removed))):
            if not error.fails({name: torch.tensor(sorted(channels)) for name, channels in removed[count].items()}):
                every = {name: self._channels[name] for name in error.groups}
                widths = (f"{name} keeps no {every[name] - len(gone[name])} of its {every[name]} channels"
                          for name in every)
                why = f"{', '.join(widths)} beside what others keep: with so many, the smaller model {error.what}"
                self._together.append(_Together(order, begin, count, why))
                return True
        return False

    def _said(self, group: str, fewer: int, more: int | None, what: str, alone: bool) -> str:
        then = f"{'' if alone else ' beside what other groups keep'}, the smaller model {what}"
        every = self._channels[group]
        if more is None:
            return f"{group} keeps {every - fewer} of its {every} channels: with fewer{then}"
        least, most = every - more + 1, every - fewer - 1
        return f"{group} keeps no {f'{least} to {most}' if least < most else most} of its {every} channels: with so " \
               f"many{then}"


def _tried(attempt: Callable[[], _Result], learn: Callable[[FailsNarrowerError], bool]) -> _Result:
    """What `attempt` gives, where something is learned of what it fails of."""
    for _ in range(_TRIES):
        try:
            return attempt()
        except FailsNarrowerError as error:
            if not learn(error):
                raise
    return attempt()


@dataclass(frozen=True)
class _Together:
    """Steps begin, ..., end - 1 of an order go at once. why: what the model does in between, in words."""

    order: Sequence[RemovalStep]
    begin: int
    end: int
    why: str


def _merged(order: Sequence[RemovalStep], together: Iterable[_Together]) -> list[RemovalStep]:
    """The steps of an order, those that go together as one."""
    spans = [(each.begin, each.end) for each in together if each.order is order]
    found, at = list[RemovalStep](), 0
    while at < len(order):
        end = at + 1
        while later := max((last for begin, last in spans if at <= begin < end < last), default=0):
            end = later
        found.append(order[at] if end == at + 1 else _joined(order[at:end]))
        at = end
    return found


def _along(order: Sequence[RemovalStep]) -> Iterator[dict[str, set[int]]]:
    """What is gone after 0, 1, 2, ... steps."""
    gone: dict[str, set[int]] = {}
    yield gone
    for step in order:
        gone = {**gone, **{name: gone.get(name, set()) | {*channels} for name, channels in step.parts}}
        yield gone


def _without_wider(widths: Sequence[_Widths]) -> list[_Widths]:
    """Of the widths that a group does not have, those between others; and the least of those that are the fewest."""
    least = min((fewer for fewer, more, *_ in widths if more is None), default=None)
    return [each for each in dict.fromkeys(widths) if least is None or each[0] == least or (
        each[1] is not None and each[1] <= least)]


def _prefixes(group: str, order: Sequence[RemovalStep]) -> list[Tensor]:
    """What is gone of a group after 0, 1, 2, ... of its steps: int64 [R], ascending."""
    gone, found = list[int](), [torch.zeros(0, dtype=torch.int64)]
    for channels in (channels for step in order for name, channels in step.parts if name == group):
        gone += channels
        found.append(torch.tensor(sorted(gone)))
    return found


def _edge(fails: Callable[[int], bool], failing: int, working: int) -> int:
    """Of counts that fail from `failing` on towards `working`, the last."""
    while abs(working - failing) > 1:
        middle = (failing + working) // 2
        failing, working = (middle, working) if fails(middle) else (failing, middle)
    return failing


def _joined(steps: Sequence[RemovalStep]) -> RemovalStep:
    """Steps as one, in the place of the last."""
    parts: Mapping[str, list[int]] = defaultdict(list)
    for group, channels in (part for step in steps for part in step.parts):
        parts[group] += channels
    own = steps[-1].group
    return replace(steps[-1], channels=tuple(parts[own]), whole=any(step.whole for step in steps),
                   beside=tuple((group, tuple(channels)) for group, channels in parts.items() if group != own))
