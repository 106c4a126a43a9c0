"""What a model returns: the tensors in it that a gradient can start from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastscore.batches.calls import Forward, is_call_model
from fastscore.batches.parts import Batch, fields_of

Output: TypeAlias = Callable[[Any], Any]  # what a model returns -> a tensor of it, or several
Outputs: TypeAlias = Callable[[Any, str], Sequence[Tensor]]  # (what a model returns, its name) -> its output


class OutputError(TypeError):
    """What a model returns is no output that a gradient can start from."""


def output_tensors(returned: Any, model: str) -> list[Tensor]:
    """The tensor that the output gradient of `model` (its name) starts from: what it returned, or the only one in that.

    Integers and scalars, such as a loss, do not count. Raises TypeError, naming them, where there is another number of
    tensors than one.
    """
    found = dict(_named_tensors(returned, ""))
    if len(found) != 1:
        shown = type(returned).__name__ if not isinstance(returned, Tensor) else \
            f"a {returned.dtype} tensor of shape {tuple(returned.shape)}"
        held = ", ".join(f"{name or 'it'} {list(tensor.shape)}" for name, tensor in found.items())
        said = f"{model} returns {shown}{f' with {held}' if held else ''}"
        if len(found) > 1:
            raise OutputError(f"{said}; which of them count is not said: pass forward=lambda model, batch: <the "
                              "tensor, or a tuple of those that count>, where model(batch) as it is takes all (to a "
                              "Scorer: output=lambda returned: <the tensor, or a list of them>)")
        raise OutputError(f"{said}; a floating-point tensor [N, ...] is needed: pass forward=lambda model, batch: <it> "
                          "(to a Scorer: output=lambda returned: <it>)")
    return list(found.values())


def named_outputs(returned: Any, run: Forward, model: str) -> dict[str, Tensor]:
    """The outputs of `model` (its name) in what `run` returned, by how they are reached: all that hold values where
    `run` is the user's own, who says by what it returns which count; else the only one.

    Raises OutputError where there are none, or several that no one has chosen.
    """
    found = dict(_named_tensors(returned, ""))
    if len(found) > 1 and not is_call_model(run):
        return found
    return {"": output_tensors(returned, model)[0]}


def floating_tensors(returned: Any) -> list[Tensor]:
    """All floating-point tensors but scalars in what a model returned."""
    return [tensor for _, tensor in _named_tensors(returned, "")]


def _named_tensors(returned: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(returned, Tensor):
        if returned.is_floating_point() and returned.dim() > 0:
            yield name, returned
    elif isinstance(returned, Mapping):
        for key, value in returned.items():
            yield from _named_tensors(value, f"{name}[{key!r}]")
    elif isinstance(returned, (tuple, list)):
        for place, value in enumerate(returned):
            yield from _named_tensors(value, f"{name}[{place}]")
    else:
        for key, value in fields_of(returned).items():
            yield from _named_tensors(value, f"{name}.{key}")


def output_selector(output: Output | None) -> Outputs:
    """What finds the tensors in what a model returned: `output`, where the model does not return a tensor as it is."""

    def outputs(returned: Any, model: str) -> list[Tensor]:
        if output is None or isinstance(returned, Tensor):
            return output_tensors(returned, model)
        found = output(returned)
        return [tensor for each in (found if isinstance(found, (tuple, list)) else [found])
                for tensor in output_tensors(each, model)]

    return outputs


def check_same_rows(tensors: Sequence[Tensor]) -> None:
    """Raise ValueError where the tensors of an output differ in their number of rows."""
    if len({len(tensor) for tensor in tensors}) != 1:
        raise ValueError(f"output: its tensors have {', '.join(str(len(tensor)) for tensor in tensors)} rows, not one "
                         "for each sample in all of them: choose those that have, by forward= (of a Scorer: output=)")


def concat_outputs(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors [N, ...] as one, [N, K] where there are several: K values in all for each sample."""
    if len(tensors) == 1:
        return tensors[0]
    check_same_rows(tensors)
    return torch.cat([tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None] for tensor in tensors], 1)


def checked_forward(run: Forward, outputs: Outputs | None = None) -> Callable[[nn.Module, Batch], Tensor]:
    """`run`, with its output found and checked to be floating-point, [N, ...]: what a gradient can start from; several
    that a `run` of the user's own returns are one. outputs: finds them otherwise."""

    def run_and_check(model: nn.Module, batch: Batch) -> Tensor:
        returned, name = run(model, batch), type(model).__name__
        return concat_outputs(list(named_outputs(returned, run, name).values()) if outputs is None
                              else outputs(returned, name))

    run_and_check.checks = run  # type: ignore[attr-defined]
    return run_and_check


class OneTensor(nn.Module):
    """A model as `run` calls it, of one input, which returns its output alone."""

    def __init__(self, model: nn.Module, run: Forward) -> None:
        super().__init__()
        self.model, self._run = model, checked_forward(run)

    def forward(self, x: Tensor) -> Tensor:
        """x: what the model is called on."""
        return self._run(self.model, x)
