"""Widths at which a model's code does not run: the steps that would leave one go with those that follow, or stay."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from fastscore.graph.groups import ChannelGroup
from fastscore.pruning.order.ranking import RemovalStep
from fastscore.pruning.refusal import FailsNarrowerError

_TRIES = 50  # of which each finds another width
_Result = TypeVar("_Result")


class Widths:
    """What is found out about the widths of `groups` while a model is pruned."""

    def __init__(self, groups: Iterable[ChannelGroup]) -> None:
        self._channels = {group.name: group.channels for group in groups}
        # group -> (so many channels may go, so many the next time, if ever; what the model does in between)
        self._between: dict[str, list[tuple[int, int | None, str]]] = defaultdict(list)

    def __str__(self) -> str:
        """Which widths there are not, and why; empty where the model runs at each that was tried."""
        return "; ".join(self._said(group, *each) for group, found in self._between.items() for each in found)

    def pruned(self, attempt: Callable[[], _Result], order: Sequence[RemovalStep]) -> _Result:
        """What `attempt` gives, which prunes along an order that it asks `along` for, once there is none of the widths
        at which it fails. order: of the same steps.

        Raises ValueError, as it does, with those widths named.
        """
        for _ in range(_TRIES):
            try:
                return attempt()
            except FailsNarrowerError as error:
                if not self._learn(error, order):
                    raise
            except ValueError as error:
                error.args = (f"{error}. {self}",) if self._between else error.args
                raise
        return attempt()

    def along(self, order: Sequence[RemovalStep]) -> list[RemovalStep]:
        """The steps of an order; those that would leave a width at which the model does not run wait for the next ones
        of their groups, or stay."""
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
        return any(fewer < gone and (more is None or gone < more) for fewer, more, _ in self._between.get(group, ()))

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
            self._between[name].append((fewer, more, error.what))
            learned = True
        return learned

    def _said(self, group: str, fewer: int, more: int | None, what: str) -> str:
        every = self._channels[group]
        if more is None:
            return f"{group} keeps {every - fewer} of its {every} channels: with fewer, the smaller model {what}"
        least, most = every - more + 1, every - fewer - 1
        return f"{group} keeps no {f'{least} to {most}' if least < most else most} of its {every} channels: with so " \
               f"many, the smaller model {what}"


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
