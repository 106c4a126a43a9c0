"""Training and evaluation mode, by the module's own train() and eval(), which some write anew: LoRA layers merge their
weights there, timm's attention forgets what it kept of its biases."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from fastscore.modules import written_state


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """In the block, `model` is in evaluation mode; then each module is in the mode that it was in, and what its code
    wrote to buffers and attributes is undone, but for what its own train() and eval() write."""
    with modes_kept(model):
        model.eval()  # which some models have written anew, without returning themselves
        with written_state.undone(model):
            yield model


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Whatever mode the block puts modules in, each comes back to its own, by its own train()."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:  # what holds others comes first, and takes them along
            if module.training != mode:
                module.train(mode)
        for module, mode in modes:  # a train() that keeps a BatchNorm in evaluation mode, say
            module.training = mode


def enter_evaluation(model: nn.Module) -> None:
    """Put a model whose parameters share their memory with another's in evaluation mode. What its own train() writes
    to them, as where LoRA merges its weights, is its own from then on."""
    writing = {id(parameter): parameter for module in model.modules() if module.training and _has_its_own(module)
               for parameter in module.parameters()}
    shared: dict[int, Tensor] = {key: parameter.data for key, parameter in writing.items()}
    for parameter in writing.values():
        parameter.data = parameter.data.clone()
    model.eval()
    for key, parameter in writing.items():
        if parameter.shape == shared[key].shape and parameter.data.equal(shared[key]):
            parameter.data = shared[key]


def _has_its_own(module: nn.Module) -> bool:
    """Whether its class, or the module itself, writes train() or eval() anew."""
    return any(getattr(type(module), name) is not getattr(nn.Module, name) or name in vars(module)
               for name in ("train", "eval"))
