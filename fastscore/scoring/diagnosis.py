"""Where NaN or infinity first appears in a model."""

import torch
from torch import Tensor, nn

from fastscore.batches.calls import Forward
from fastscore.batches.parts import Batch, first_input
from fastscore.modules.evaluation_copy import evaluation_copy


def first_nonfinite(model: nn.Module, batch: Batch, forward: Forward) -> str | None:
    """The first layer, in the order they run, that turns finite input into NaN or infinity; None if none does."""
    found: list[str] = []
    model = evaluation_copy(model)

    def look(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                weights = any(not torch.isfinite(parameter).all() for parameter in module.parameters())
                found.append(f"{name}: NaN or infinity in its {'weights' if weights else 'output'}")

        module.register_forward_hook(hook)

    tensor = first_input(batch)
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        return "batches: NaN or infinity in the input"
    for name, module in model.named_modules():
        if not any(module.children()):
            look(name, module)
    with torch.no_grad():
        forward(model, batch)
    return found[0] if found else None
