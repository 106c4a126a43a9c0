"""torch.compile for an evaluation copy with taps."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastscore.modules.sample_axis import SampleAxis
from fastscore.taps.taps import Taps


def compile_tapped(eval_model: nn.Module, taps: Taps, shapes: Mapping[str, list[tuple[int, ...]]], samples: int,
                   dtype: torch.dtype) -> None:
    """Let torch.compile make the pass, taps included, for batches of the size of the first; others run as they are.

    eval_model: an evaluation copy. shapes: tapped layer -> the shape of what its tap reads of `samples` samples, in
    each call. dtype: of that. Gates are made outside, since a compiled pass can make none. Raises ValueError for a
    layer that is called twice.
    """
    for layer, calls in shapes.items():
        if len(calls) > 1:
            raise ValueError(f"compile: {layer} runs {len(calls)} times in a pass, which taps in a compiled one cannot "
                             "tell apart: use compile=False")
    rows, widths = dict[str, int](), dict[str, int]()  # rows: for each sample
    for layer, (shape,) in shapes.items():
        axis = known if isinstance(known := taps.axes.of(layer), SampleAxis) else SampleAxis()
        rows[layer], widths[layer] = shape[axis.dim] // samples, shape[taps.points[layer].channel_dim]
    plain = eval_model.forward
    fast = torch.compile(plain, dynamic=False)
    size: int | None = None

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal size
        tensor = taps.axes.first_input((args, kwargs))
        if tensor is None or taps.current is None or not torch.is_grad_enabled() or size not in (None, len(tensor)):
            return plain(*args, **kwargs)
        size = len(tensor)
        like = tensor.new_empty((), dtype=dtype)
        gates = {layer: taps.rows.gate(size * rows[layer], widths[layer], like) for layer in rows}
        with taps.preallocated_gates(gates):
            return fast(*args, **kwargs)

    vars(eval_model)["forward"] = forward
