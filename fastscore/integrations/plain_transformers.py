"""A pruned model of transformers as an ordinary one: widths in its config, so that from_pretrained loads it."""

import copy
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastscore.modules.channel_norms import ChannelNorm, NarrowedNorm, norm_of
from fastscore.modules.experts import holds_experts
from fastscore.modules.wrappers import unwrapped

_WAY_OUT = "keep it with fastscore.save_pruned, and load it with fastscore.load_pruned"
# what a config calls a width -> the layers whose outputs have it, by the last part of their names
_WIDTHS: Mapping[str, tuple[str, ...]] = {
    "intermediate_size": ("up_proj", "fc1", "intermediate.dense", "dense_h_to_4h"),
    "num_attention_heads": ("q_proj", "self.query", "attention.query"),
    "num_key_value_heads": ("k_proj",),
}
_EXPERTS = ("num_experts", "num_local_experts")
_PER_HEAD = ("num_attention_heads", "num_key_value_heads")
_BIASES = ("attention_bias", "mlp_bias")  # what a config calls them, where they are optional


def save_pretrained(model: nn.Module, folder: str | PathLike[str]) -> PreTrainedModel:
    """Write a pruned model of transformers as transformers does, with a config.json that tells its widths.

    An RMSNorm that divides by the dense width becomes one that does not: its weight grows by the root of the widths'
    ratio, and the config's eps by the ratio. Nothing is pushed anywhere.

    Args:
        model: what fastscore.prune made of a transformers model.
        folder: where config.json and the weights go; `type(model).from_pretrained(folder)` loads them.

    Returns:
        The ordinary model that was written. It was run, and gives what the pruned one gives (to half the digits of
        its dtype, as eps is one number for all norms).

    Raises:
        TypeError: no model of transformers.
        ValueError: a model that its config has no words for, such as one whose layers differ in width (prune with
            scope="layer" for equal ones), with the way out; nothing is written then.
    """
    model = unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: {type(model).__name__} is no model of transformers: {_WAY_OUT}")
    state, config = dict(model.state_dict()), copy.deepcopy(model.config)
    for name, value in _settings(model, state):
        setattr(config, name, value)
    for bias in _BIASES:
        if getattr(config, bias, None) is False and any(
                layer is not None and layer.bias is not None for layer in _optional(model, bias)):
            setattr(config, bias, True)
    plain = _built(model, config)
    for name, own in plain.state_dict().items():
        if name not in state and name.endswith(".bias"):
            state[name] = torch.zeros_like(own, device="cpu")
    for name in {**state, **plain.state_dict()}:
        shapes = [list(tensors[name].shape) if name in tensors else "not there"
                  for tensors in (state, plain.state_dict())]
        if shapes[0] != shapes[1]:
            raise ValueError(f"model: {name} is {shapes[0]}, and by {type(config).__name__}, which has one width for "
                             f"all layers, {shapes[1]}: prune with scope=\"layer\" and compensate=False, or {_WAY_OUT}")
    plain.load_state_dict(state)
    plain = plain.to(next(model.parameters()).dtype).train(model.training)
    _check_same(model, plain)
    plain.save_pretrained(folder)
    return plain


def _settings(model: PreTrainedModel, state: dict[str, Tensor]) -> Iterator[tuple[str, Any]]:
    """What the config is to say, as far as layers tell; `state` gets the weights of ordinary norms."""
    config = model.config
    heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if hasattr(config, "head_dim"):
        yield "head_dim", heads
    yield "hidden_size", model.get_input_embeddings().weight.shape[1]
    for setting, endings in _WIDTHS.items():
        found = [layer.out_features for name, layer in model.named_modules()
                 if isinstance(layer, nn.Linear) and name.endswith(endings)]
        if found and hasattr(config, setting):
            yield setting, found[0] // (heads if setting in _PER_HEAD else 1)
    experts = next((len(module.down_proj) for module in model.modules() if holds_experts(module)), None)
    for setting in _EXPERTS:
        if experts is not None and hasattr(config, setting):
            yield setting, experts
    for name, module in model.named_modules():
        if not isinstance(module, NarrowedNorm):
            continue
        norm = norm_of(module)
        if not isinstance(norm, ChannelNorm) or norm.centered or module.weight is None:
            raise ValueError(f"model: {name} is a LayerNorm that divides by the dense width, which no config of "
                             f"transformers can say: {_WAY_OUT}")
        ratio = module.dense_width / module.width
        weight = module.weight.detach()
        state[f"{name}.weight"] = (weight.double() + norm.offset).mul(ratio ** 0.5).sub(norm.offset).to(weight.dtype)
        if norm.eps is not None and hasattr(config, "rms_norm_eps"):
            yield "rms_norm_eps", norm.eps * ratio


def _optional(model: PreTrainedModel, bias: str) -> Iterator[nn.Linear]:
    """The layers whose biases a config's setting is about."""
    part = "attn" if bias == "attention_bias" else "mlp"
    return (layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and f"{part}." in name)


def _built(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    try:
        if hasattr(config, "validate"):
            config.validate()  # of which some ask that heads divide the hidden size
        with torch.random.fork_rng(devices=[]):
            plain: PreTrainedModel = type(model)(config)
    except Exception as error:  # each configuration and model checks in its own words
        said = " ".join(str(error).split())
        raise ValueError(f"model: {type(model).__name__} cannot be built with the widths that are left ({said}): prune "
                         f"with round_to=8 or the like, or {_WAY_OUT}") from error
    return plain.eval()


def _check_same(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """Raise ValueError where the two give different outputs."""
    modes = model.training
    inputs = {name: value % model.config.vocab_size if name == "input_ids" else value
              for name, value in model.dummy_inputs.items()}
    with torch.no_grad():
        want, got = (each.eval().cpu()(**inputs)[0] for each in (copy.deepcopy(model), plain))
    plain.train(modes)
    close: float = torch.finfo(want.dtype).eps ** 0.5
    if not torch.allclose(got, want, rtol=0, atol=close * float(want.abs().max())):
        raise ValueError(f"model: as an ordinary {type(model).__name__} it gives other outputs: {_WAY_OUT}")
