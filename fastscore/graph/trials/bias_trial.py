"""Biases that do more than be added to what their layer makes: nothing may be put into them.

What removed channels gave on average goes into the bias of the layer that read them, and mask() adds it to the layer's
output. These are the same where a layer's own forward adds its bias as it is, once, with the parameters that it is
called with (torch.func.functional_call may put in others), and where no other code reads the bias. So the biases are
changed, all at once, in runs where layers give what they gave before: the layers that are not PyTorch's own must make
that much more, and nothing else may change.
"""

import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.graph.trials.differences import all_close
from fastscore.graph.trials.recording import Recording
from fastscore.modules.attention import by_function
from fastscore.modules.attention.windowed_attention import LinearWithoutKeyBias
from fastscore.modules.inspection import LAYERS, channel_dim, fits_width, runs_own_code
from fastscore.modules.weights import called_layers
from fastscore.modules.weights.held_weights import HAVE_PLACES
from fastscore.modules.weights.parameter_layers import ParameterLayer

_OWN = (LinearWithoutKeyBias, *HAVE_PLACES)  # classes here, which add their biases


@contextmanager
def all_grown(recording: Recording) -> Iterator[Collection[str]]:
    """In the block, all biases hold other numbers that `kept_biases` asks about; their layers. Where nothing that was
    not to change does so in a trial, no other code reads them either."""
    names = _asked_about(recording)[1]
    with _grown(recording, names):
        yield names


def kept_biases(recording: Recording, unread: Collection[str] = ()) -> dict[str, str]:
    """Linears and convolutions whose biases are to stay as they are -> what is done with one, or would be, but adding
    it; or why nobody can tell. unread: layers whose biases no other code reads, all at once, as was tried before."""
    found, names = _asked_about(recording)
    if not set(names) <= set(unread):
        found |= dict.fromkeys(_read_elsewhere(recording, names), "has a bias that other code reads as well")
    swapped, layers = {layer for layer, _ in recording.swapped}, recording.layers
    odd = [name for name in names if name not in found
           and (name in swapped or (runs_own_code(layers[name]) and not isinstance(layers[name], _OWN)))]
    if odd:
        found |= dict.fromkeys(_not_added(recording, odd), "does more with a bias than add it")
    return found


def _asked_about(recording: Recording) -> tuple[dict[str, str], list[str]]:
    """(layers whose biases stay, as can be seen -> why; layers of which it is to be tried)."""
    layers = {name: layer for name, layer in recording.layers.items()
              if isinstance(layer, LAYERS) and (not isinstance(layer, ParameterLayer) or (
                  isinstance(layer, HAVE_PLACES) and layer.bias is not None))
              and recording.outputs[name] and layer.weight.is_floating_point()}
    found = {name: "has no bias among its parameters" for name, layer in layers.items()
             if "bias" not in layer._parameters}
    found |= {name: "does not add all of its bias to what it makes" for name, layer in layers.items()
              if (bias := layer._parameters.get("bias")) is not None
              and len(bias) != recording.outputs[name][0].shape[channel_dim(layer)]}
    found |= {name: "has no bias, and the model's code, which does not call it, adds none"
              for of in (called_layers, by_function) for name in of.without_bias(recording.model) if name in layers}
    found |= dict.fromkeys(layers.keys() & recording.transformed,
                           "runs under torch.func (vmap, say), where nobody can tell")
    found |= {name: "reads its input and more that its own code puts there, or a part of it" for name in layers
              if name not in found and _reads_another_width(recording, name)}
    assert recording.inputs is not None  # of the model as it is, before anything is changed
    return found, [name for name in layers if name not in found]


def _reads_another_width(recording: Recording, name: str) -> bool:
    """Whether a layer's own code makes what its weight reads of an input of another width, as one does that puts
    coordinates beside it: means and moments are those of the input."""
    layer = recording.layers[name]
    if not runs_own_code(layer) or isinstance(layer, (ParameterLayer, *_OWN)):
        return False
    return any(x is not None and not fits_width(layer, x) for x in recording.inputs[name])


def _read_elsewhere(recording: Recording, names: Sequence[str]) -> list[str]:
    """Those of `names` with whose biases something changes though all layers give what they gave before."""
    with _grown(recording, names):
        if recording.leak({}, {}) is None:
            return []
    if len(names) == 1:
        return list(names)
    half = len(names) // 2
    return [*_read_elsewhere(recording, names[:half]), *_read_elsewhere(recording, names[half:])] or list(names)


def _not_added(recording: Recording, names: Sequence[str]) -> list[str]:
    """Those of `names` that do not make more by what their biases grow by; and what runs inside of them, whose biases
    the code of theirs may read."""
    wrong = set[str]()

    def given(name: str) -> Callable[..., Tensor]:
        calls, layer, dim = iter(recording.outputs[name]), recording.layers[name], channel_dim(recording.layers[name])

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            before = next(calls, None)
            if before is None or name in grown:
                made: Tensor = type(layer).forward(layer, *args, **kwargs)
                if before is None:  # one call more than before
                    return made
                if not _is_more(made, before, dim, grown[name]):
                    wrong.add(name)
            return before.clone()

        return forward

    with _grown(recording, names) as grown:
        try:
            recording.replay({name: given(name) for name in recording.outputs}, recording.model)
        except Exception:  # whatever a layer's code does with a bias that it does not expect
            return list(names)
    return [name for name in recording.layers
            if any(name == outer or name.startswith(f"{outer}.") for outer in wrong)]


def _is_more(made: Any, before: Tensor, dim: int, added: Tensor) -> bool:
    """Whether a layer makes `added` more than before, to the rounding of another algorithm."""
    expected = (before.movedim(dim, -1) + added.to(before)).movedim(-1, dim)
    return all_close(made, expected, rounding=torch.finfo(before.dtype).eps ** (1 / 3))


@contextmanager
def _grown(recording: Recording, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """In the block, the biases of layers are larger, or smaller, by what is given: at least by as much as their outputs
    are large. Those without a bias have one, as where means go into it."""
    added, before = dict[str, Tensor](), dict[str, nn.Parameter | None]()
    try:
        for name in names:
            layer, output = recording.layers[name], recording.outputs[name][0]
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            drawn = torch.rand(output.shape[channel_dim(layer)], generator=generator, dtype=torch.float64)
            drawn = (1 + drawn) * (1 - 2 * (torch.arange(len(drawn)) % 2))  # a rectifier passes half of them
            largest = float(output.abs().nan_to_num(0, 0, 0).max()) if output.numel() else 0.0
            before[name] = old = layer._parameters.get("bias")
            like: Tensor = layer.weight if old is None else old
            added[name] = (drawn * (largest or 1.0)).to(like)
            layer._parameters["bias"] = nn.Parameter(added[name] if old is None else old.detach() + added[name],
                                                     like.requires_grad)
        yield added
    finally:
        for name, old in before.items():
            recording.layers[name]._parameters["bias"] = old
