"""What would go past taps unseen, and be missing in what they measure: said where it happens."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn


def check_in_place(model: nn.Module, owners: Mapping[str, nn.Module]) -> None:
    """Raises RuntimeError where another module stands in the place of one that is tapped, or around it, by its name,
    which a name that no module goes by is not."""
    for name, owner in owners.items():
        found: nn.Module | None = model
        for part in name.split("."):
            found = found._modules.get(part) if found is not None else None
        if found is not None and found is not owner:
            happened = "it was replaced since the scorer was attached, and nothing is measured of what stands there now"
            if any(module is owner for module in found.modules()):
                happened = f"a {type(found).__name__} was put around it since the scorer was attached, and whatever " \
                    "that does beside calling it, as with what it reads, is not measured"
            raise RuntimeError(f"{name}: {happened}: detach() the scorer, and make one of the model as it is")


def never_seen(layer: str) -> Callable[[Tensor], None]:
    """For the weight of a layer whose tap has not run."""
    def check(gradient: Tensor) -> None:
        raise RuntimeError(f"{layer}: a backward pass reached its weight, but the forward pass went past its tap. "
                           "Attach the scorer before the forward pass, and to a model that torch.compile has made "
                           "before that, or another of its class, first runs (afterwards, torch.compiler.reset() makes "
                           "it look for hooks again); and call the model itself, not its parts")

    return check
