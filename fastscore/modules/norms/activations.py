"""What a normalisation does with each number that it made, by modules that it holds: activations, as in timm's
LayerNormAct2d."""

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def may_be_activations(module: nn.Module) -> bool:
    """Whether all that a module holds has no parameters and no buffers; true of one that holds nothing."""
    return all(not (part._parameters or part._buffers) and not isinstance(part, torch.jit.ScriptModule)
               for child in module._modules.values() if child is not None for part in child.modules())


def made(module: nn.Module, y: Tensor) -> Tensor:
    """What the modules that it holds make of y, one after another."""
    for part in module._modules.values():
        y = y if part is None else part(y)
    return y


def work_on_each_number(module: nn.Module) -> bool:
    """Whether what it holds makes the same of a number wherever that lies, in training, too."""
    if not module._modules:
        return True
    alone = bare(module)
    x = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    try:
        with torch.no_grad():
            for training in (False, True):
                y = made(alone.train(training), x.clone())
                parts = (made(alone, x[:, 1:3, ::2].clone()), made(alone, x.flatten().clone()).view_as(x)[:, 1:3, ::2])
                if y.shape != x.shape or not all(torch.allclose(part, y[:, 1:3, ::2]) for part in parts):
                    return False
    except Exception:  # whatever code does with what it does not take
        return False
    return True


def gradient_before(module: nn.Module, y: Tensor, g: Tensor) -> Tensor:
    """The gradient of y, which the modules that it holds are given, from that of what they make."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        (found,) = torch.autograd.grad(made(bare(module), y.clone()), y, g)  # a copy: some work in place
    return found


def without(module: nn.Module) -> nn.Module:
    """A copy, with the same parameters, that hands on what it made instead of giving it to what it holds."""
    alone = copy.copy(module)
    alone._modules = {name: nn.Identity() for name, part in module._modules.items() if part is not None}
    return alone


def bare(module: nn.Module) -> nn.Module:
    """A copy of modules without parameters, or with the same, and without hooks: nobody is told of what it runs on."""
    alone = copy.copy(module)
    for name in _HOOKS:
        setattr(alone, name, OrderedDict())
    alone._modules = {name: None if part is None else bare(part) for name, part in module._modules.items()}
    return alone
