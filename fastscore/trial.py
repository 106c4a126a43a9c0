"""Traced groups, tried on the model itself.

The tracer takes every operation it does not know for elementwise. So some channels are changed where they are made,
whatever else a Conv or Linear makes is held at what it was, and the change may show nowhere but at the positions that
the groups claim for those channels.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.groups import ChannelGroup

Positions = Mapping[str, Tensor]  # layer -> int64 positions of its input or output
_PAIRS = 2  # of a random half of the channels and the other half: 4 passes, which miss one slip in 4, and 32 in 10^4


def strays(model: nn.Module, groups: Sequence[ChannelGroup], layers: Collection[str],
           run: Callable[[nn.Module], Tensor]) -> dict[str, str]:
    """Group -> where its channels show that it does not claim: a layer, or "the output".

    model: an evaluation copy. layers: its Conv and Linear layers, but for depthwise convolutions.
    """
    recording = _Recording(model, layers, run)
    where = _try(recording, groups)
    if where is None:
        return {}
    found = {group.name: alone for group in groups if (alone := _try(recording, [group])) is not None}
    return found or {group.name: where for group in groups}


def _try(recording: "_Recording", groups: Sequence[ChannelGroup]) -> str | None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(_PAIRS):
        half = {group.name: torch.rand(len(group.unit), generator=generator)[group.unit] < 0.5 for group in groups}
        for side in (half, {name: ~chosen for name, chosen in half.items()}):
            made: dict[str, list[Tensor]] = defaultdict(list)
            read: dict[str, list[Tensor]] = defaultdict(list)
            for group in groups:
                for member in group.members:
                    if member.role != "channelwise":
                        places = made if member.role == "producer" else read
                        places[member.layer].append(member.index[side[group.name][member.channel]])
            where = recording.stray({layer: torch.cat(index) for layer, index in made.items()},
                                    {layer: torch.cat(index) for layer, index in read.items()})
            if where is not None:
                return where
    return None


class _Recording:
    """What every layer took and gave in one pass, and passes that differ from it by what is asked for."""

    def __init__(self, model: nn.Module, layers: Collection[str], run: Callable[[nn.Module], Tensor]) -> None:
        self._model, self._layers, self._run_model = model, layers, run
        self._calls: dict[str, list[tuple[Tensor | None, Tensor]]] = {layer: [] for layer in layers}
        self._output = self._run_with({layer: self._record(layer) for layer in layers})

    def stray(self, made: Positions, read: Positions) -> str | None:
        """Run with the outputs at `made` changed and all others held; where an input differs that is not in `read`."""
        found: list[str] = []
        # no layer computes anything: it only says what it said before
        output = self._run_with({layer: self._replay(layer, made.get(layer), read.get(layer), found)
                                 for layer in self._layers})
        if not found and not _close(output, self._output).all():
            return "the output"
        return found[0] if found else None

    def _run_with(self, forwards: Mapping[str, Callable[..., Tensor]]) -> Tensor:
        """Run with the layers' own forwards replaced; whatever hooks they have run as they would."""
        for layer, forward in forwards.items():
            vars(self._model.get_submodule(layer))["forward"] = forward
        try:
            return self._run()
        finally:
            for layer in forwards:
                del vars(self._model.get_submodule(layer))["forward"]

    def _record(self, layer: str) -> Callable[..., Tensor]:
        module = self._model.get_submodule(layer)

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            output: Tensor = type(module).forward(module, *args, **kwargs)
            self._calls[layer].append((args[0].clone() if args else None, output.clone()))
            return output

        return forward

    def _replay(self, layer: str, made: Tensor | None, read: Tensor | None, found: list[str]) -> Callable[..., Tensor]:
        calls = iter(self._calls[layer])
        module = self._model.get_submodule(layer)
        dim = -1 if isinstance(module, nn.Linear) else 1

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            x, output = next(calls, (None, None))
            if output is None:  # one call more than before
                computed: Tensor = type(module).forward(module, *args, **kwargs)
                return computed
            if x is not None:
                differs = (~_close(args[0], x)).movedim(dim, 0).flatten(1).any(1)
                if read is not None:
                    differs[read.to(differs.device)] = False
                if differs.any():
                    found.append(layer)
            held = output.clone()
            if made is not None:
                index = made.to(held.device)
                held.index_copy_(dim, index, held.index_select(dim, index) * -1.5 + 1)  # in place: keeps the strides
            return held

        return forward

    @torch.no_grad()
    def _run(self) -> Tensor:
        def skip(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
            return args[0]  # the statistics of a GroupNorm depend on all its channels, its positions do not

        handles = [module.register_forward_hook(skip) for module in self._model.modules()
                   if isinstance(module, nn.GroupNorm)]
        torch.manual_seed(0)
        try:
            return self._run_model(self._model).clone()
        finally:
            for handle in handles:
                handle.remove()


def _close(x: Tensor, before: Tensor) -> Tensor:
    """Element by element, to the rounding of sums in another order; NaN is close to NaN."""
    largest = float(before.abs().nan_to_num(0, 0, 0).max()) if before.numel() else 0.0
    rounding = 16 * torch.finfo(before.dtype).eps
    return torch.isclose(x, before, rtol=rounding, atol=rounding * largest, equal_nan=True)
