"""What a network decides, or estimates: its outputs, each by itself."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from fastscore.arguments import check_callable
from fastscore.batches.calls import Forward, is_call_model
from fastscore.batches.devices import wide
from fastscore.batches.outputs import named_outputs
from fastscore.batches.parts import Batch, valid_tokens
from fastscore.recovery.last_operations import LastOperations
from fastscore.wording import counted

Judging = Literal["decision", "error"]
JudgedOutputs: TypeAlias = Sequence[str | int] | Mapping[str | int, Judging] | None


class UnknownOutputError(ValueError):
    """An output is named that the model does not return."""


class Decisions:
    """The outputs of networks that decide, or estimate, by name, each to be judged by itself.

    A network of one output returns it under the name "". One that is made by `torch.cat` along the dimension over which
    it decides, of parts of which one at least is wider than one, is taken apart again: the largest of several outputs
    together says nothing of any. Probabilities come as logits that give them: a softmax of them again would be nearly
    flat, and one that a sigmoid made is never negative.

    Args:
        forward: how a network is called; a user's own may return a tuple, list, dict or dataclass of outputs.
        outputs: the places, keys or fields of those that are judged, None for all. As a dict, how each is: "decision",
            by its largest value (of a single column: by its sign), or "error", by its squared error as a share of the
            dense output's variance; {"": ...} where there is one output. What is not said: "error" for outputs of a
            single column, and for those that tanh, sigmoid or normalize made last; "decision" for others.

    Attributes:
        errors: the names of those judged by error, known after the first call.

    Raises:
        ValueError: another way to judge.
    """

    def __init__(self, forward: Forward, outputs: JudgedOutputs = None) -> None:
        check_callable("forward", forward, "forward(model, batch)")
        if isinstance(outputs, (str, int)):
            outputs = [outputs]
        self._how: Mapping[str | int, Judging] = outputs if isinstance(outputs, Mapping) else {}
        for key, how in self._how.items():
            if how not in get_args(Judging):
                raise ValueError(f"outputs: {how!r} for {key!r} is none of {', '.join(map(repr, get_args(Judging)))}")
        self._forward = self.checks = forward
        self._chosen = None if outputs is None else list(outputs)
        self.errors: set[str] = set()
        self._widths: dict[str, list[int]] | None = None  # of the parts of each output, known after the first call
        self._ends: dict[str, str] = {}  # output -> the function that leaves no logits and made it; empty elsewhere
        self._logits: dict[str, Callable[[Tensor], Tensor]] = {}  # name of probabilities -> what makes logits of them
        self._said = ""

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Name -> output; of tokens, those that are no padding.

        Raises OutputError where there is none, ValueError where `outputs` names what is not there.
        """
        made = LastOperations()
        if self._widths is None:
            with made:
                returned = self._forward(model, batch)
        else:
            returned = self._forward(model, batch)
        found = self._decisive(named_outputs(returned, self._forward, type(model).__name__))
        if self._widths is None:
            self._widths = {name: made.widths(output, dimension(output)) for name, output in found.items()}
            self._ends = {name: made.no_logits(output) for name, output in found.items()}
            parts = [(whole, *part) for whole, output in found.items()
                     for part in _parts(whole, output, self._widths[whole])]
            self.errors.update(name for whole, name, part in parts if self._by_error(whole, part))
            self._logits = {name: of for whole, name, part in parts
                            if name not in self.errors and (of := _logits_of(part, self._ends[whole])) is not None}
            self._said = self._described({name: part for _, name, part in parts})
        return without_padding({name: self._logits[name](part) if name in self._logits else part
                                for whole, output in found.items()
                                for name, part in _parts(whole, output, self._widths.get(whole, []))}, batch)

    def __str__(self) -> str:
        """What is taken for decisions; empty before the first call."""
        return self._said

    def _decisive(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._chosen is None:
            return found
        for key in self._chosen:
            if not any(_is_named(name, key) for name in found):
                there = ", ".join(name for name in found if name) or "one tensor alone, whose name is \"\""
                raise UnknownOutputError(f"outputs: {key!r} is not among what forward= returns: {there}; name its "
                                         "places, keys or fields")
        return {name: output for name, output in found.items() if any(_is_named(name, key) for key in self._chosen)}

    def _by_error(self, whole: str, part: Tensor) -> bool:
        said = [how for key, how in self._how.items() if _is_named(whole, key)]
        return said[0] == "error" if said else _columns(part) == 1 or bool(self._ends[whole])

    def _described(self, parts: Mapping[str, Tensor]) -> str:
        of = dict.fromkeys(self._logits, ", of probabilities")
        said = [f"{name} {_judged(part, name in self.errors)}{of.get(name, '')}{self._since(name, part)}".strip()
                for name, part in parts.items()]
        if len(parts) > 1:
            ways = ("R²: the least, error: the sum" if self.errors >= parts.keys() else
                    "agreement or R²: the least, KL and error: the sum" if self.errors else
                    "agreement: the least, KL: the sum")
            return f"{counted(len(parts), 'output')}, each by itself ({ways}): " + "; ".join(said) + \
                ("" if self._how else '; outputs= names those to judge by "error", or by "decision"')
        (name, part), = parts.items()
        own = not is_call_model(self._forward) and not name
        return said[0] + ("; where that is several outputs side by side, let forward= return a tuple of them"
                          if own and name not in self.errors else "") + (
            "" if self._how else _other_way(name, name in self.errors, _columns(part)))

    def _since(self, name: str, part: Tensor) -> str:
        """Why an output is judged by its error, where nobody said so and it has several columns."""
        end = self._ends.get(name)
        return f", which {end} made last" if end and not self._how and _columns(part) > 1 else ""


def without_padding(outputs: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Of outputs [N, T, K] the tokens that are no padding, [n, K], where the batch's attention_mask tells; all else as
    it is."""
    real = valid_tokens(batch)
    return {name: output if real is None or output.dim() != 3 or output.shape[:2] != real.shape else
            output[real.to(output.device)] for name, output in outputs.items()}


def _is_named(name: str, key: str | int) -> bool:
    """Whether an output, or what it lies in, has this place, key or field."""
    ways = (f"[{key!r}]", f".{key}")
    return not name if key == "" else name in ways or name.startswith(tuple(way + end for way in ways for end in "[."))


def dimension(output: Tensor) -> int:
    """Over which it decides: the last of [N, T, K], else the second."""
    return 2 if output.dim() == 3 else 1


def _parts(name: str, output: Tensor, widths: Sequence[int]) -> list[tuple[str, Tensor]]:
    if not widths:
        return [(name, output)]
    dim, found, start = dimension(output), [], 0
    for part in output.split(list(widths), dim):
        found.append((f"{name}[{':, ' * dim}{start}:{start + part.shape[dim]}]", part))
        start += part.shape[dim]
    return found


def _logits_of(output: Tensor, end: str) -> Callable[[Tensor], Tensor] | None:
    """What makes logits of probabilities: of columns of which none is negative and each row sums to 1, or of what a
    sigmoid made last; None of all else."""
    if end == "sigmoid":
        return lambda x: torch.logit(wide(x), torch.finfo(x.dtype).eps)
    if _columns(output) < 2 or not output.numel():
        return None
    x, rounding = wide(output.detach()), torch.finfo(output.dtype).eps ** 0.5
    holds = (x >= 0).all() and ((x.sum(dimension(output)) - 1).abs() <= rounding).all()
    return _log if holds else None


def _log(probabilities: Tensor) -> Tensor:
    """Finite also of 0."""
    x = wide(probabilities)
    return x.clamp_min(torch.finfo(x.dtype).tiny).log()


def _columns(output: Tensor) -> int:
    return 1 if output.dim() < 2 else output.shape[dimension(output)]


def _other_way(name: str, by_error: bool, columns: int) -> str:
    """What to say where a single output is not what it was taken for."""
    other, where = ("decision", "its sign decides" if columns == 1 else "the largest decides") if by_error else \
        ("error", "those are values")
    option = f" (--outputs {other})" if not name else ""
    return f'; where {where}, say so: outputs={{{_key(name)}: "{other}"}}{option}'


def _key(name: str) -> str:
    """What names an output, or what it lies in, in `outputs`: its key, place or field."""
    found = re.match(r"\[(.*?)\]|\.(\w+)", name)
    return '""' if found is None else found[1] or repr(found[2])


def _judged(output: Tensor, by_error: bool) -> str:
    if by_error:
        return "by squared error, as a share of the dense output's variance (R²: 1 - that)"
    if _columns(output) == 1:
        return "by its sign"
    return f"by the largest of {output.shape[dimension(output)]} over dimension {dimension(output)}"
