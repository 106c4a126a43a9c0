"""How batches [N, ...] reach a model that takes its samples second, [T, N, ...]: told as code, for the batch given."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass

from torch import Tensor

from fastscore.batches.calls import Forward, is_call_model
from fastscore.batches.parts import Batch, first_tensor

_Second = Callable[[Tensor], bool]


def transposing(forward: Forward, batch: Batch) -> str:
    """A `forward` that transposes what the model takes [T, N, ...], of batches like this one but [N, T, ...].

    What has as many dimensions as its first tensor, and as many places along the second, is transposed. In Python,
    "forward=lambda model, batch: ..."; empty where the first tensor has no second dimension.
    """
    first = first_tensor(batch)
    if first is None or first.dim() < 2:
        return ""

    def second(tensor: Tensor) -> bool:
        return tensor.dim() == first.dim() and tensor.shape[1] == first.shape[1]

    if not is_call_model(forward):
        call = f"own(model, {_transposed('batch', batch, second)}), own being the one given"
    elif isinstance(batch, Mapping):
        call = f"model(**{_transposed('batch', batch, second)})"
    elif isinstance(batch, (tuple, list)):
        call = f"model({_transposed('batch[0]', batch[0], second)})"
    else:
        call = f"model({_transposed('batch', batch, second)})"
    return f"forward=lambda model, batch: {call}"


def _transposed(code: str, value: Batch, second: _Second) -> str:
    """Code for the value that `code` stands for, with the tensors in it transposed that have their samples second."""
    if isinstance(value, Tensor):
        return f"{code}.transpose(0, 1)" if second(value) else code
    if isinstance(value, Mapping):
        parts = _parts({key: (f"{code}[{key!r}]", each) for key, each in value.items()}, second)
        if not parts:
            return code
        return "{" + ", ".join([f"**{code}", *(f"{key!r}: {part}" for key, part in parts.items())]) + "}"
    if isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", ())
        parts = _parts({i: (f"{code}.{names[i]}" if names else f"{code}[{i}]", each) for i, each in enumerate(value)},
                       second)
        if not parts:
            return code
        if names:
            return f"{code}._replace({', '.join(f'{names[i]}={part}' for i, part in parts.items())})"
        whole = ", ".join(parts.get(i, f"{code}[{i}]") for i in range(len(value)))
        return f"[{whole}]" if isinstance(value, list) else f"({whole},)"
    if is_dataclass(value) and not isinstance(value, type):
        parts = _parts({field.name: (f"{code}.{field.name}", getattr(value, field.name, None))
                        for field in fields(value)}, second)
        return f"dataclasses.replace({', '.join([code, *(f'{key}={part}' for key, part in parts.items())])})" \
            if parts else code
    return code


def _parts(held: "Mapping[object, tuple[str, Batch]]", second: _Second) -> dict[object, str]:
    """Of (code, value) pairs by key, the code of those that are changed."""
    made = {key: (code, _transposed(code, value, second)) for key, (code, value) in held.items()}
    return {key: new for key, (code, new) in made.items() if new != code}
