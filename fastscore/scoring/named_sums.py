"""Running sums under names, many of which are added up as one tensor."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class NamedSums:
    """name -> [..., C]: sums that come side by side, as one tensor [..., ΣC] for several names, and are kept like that.

    known: what they start with. However they come, each name's are added up in the order in which they came.
    """

    def __init__(self, known: Mapping[str, Tensor] | None = None) -> None:
        self._single = dict(known or {})
        self._joint: dict[tuple[str, ...], tuple[list[int], Tensor]] = {}  # names -> widths and sums; none twice
        self._order = dict.fromkeys(self._single)

    def __bool__(self) -> bool:
        return bool(self._order)

    def add(self, names: Sequence[str], widths: Sequence[int], values: Tensor) -> None:
        """Add `values`, [..., ΣC], to the sums of `names`."""
        key = tuple(names)
        if key not in self._joint:
            self._join(key, list(widths), values)
        else:
            self._joint[key] = self._joint[key][0], self._joint[key][1] + values

    def _join(self, key: tuple[str, ...], widths: list[int], values: Tensor) -> None:
        """Add `values`, of names that have not come side by side before."""
        for others in [others for others in self._joint if not set(others).isdisjoint(key)]:
            self._single.update(self._taken_apart(others))
            del self._joint[others]
        if any(name in self._single for name in key):
            parts = [self._single.pop(name) if name in self._single else torch.zeros_like(part)
                     for name, part in zip(key, values.split(widths, -1), strict=True)]
            values = torch.cat([part.to(values.device) for part in parts], -1) + values
        self._joint[key] = widths, values
        self._order.update(dict.fromkeys(key))

    def _taken_apart(self, key: tuple[str, ...]) -> dict[str, Tensor]:
        widths, values = self._joint[key]
        return dict(zip(key, values.split(widths, -1), strict=True))

    def by_name(self) -> dict[str, Tensor]:
        """The sums, in the order in which names came first; they do not change when more is added."""
        found = dict(self._single)
        for key in self._joint:
            found.update(self._taken_apart(key))
        return {name: found[name] for name in self._order}

    def nonfinite(self) -> str | None:
        """The first name whose sums hold NaN or infinity; None where all are finite."""
        sums = self.by_name()
        if not sums:
            return None
        finite = torch.stack([torch.isfinite(values).all() for values in sums.values()])  # one look at the device
        return None if finite.all() else list(sums)[int(finite.int().argmin())]
