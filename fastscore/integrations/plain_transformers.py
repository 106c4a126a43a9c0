"""A pruned model of transformers as an ordinary one: widths in its config, so that from_pretrained loads it."""

import copy
import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastscore.graph.cutting import heads
from fastscore.modules.attention import handed
from fastscore.modules.norms.channel_norm import ChannelNorm
from fastscore.modules.norms.channel_norms import NarrowedNorm, norm_of
from fastscore.modules.weights.experts import holds_experts
from fastscore.modules.weights.transposed_linear import is_linear, widths
from fastscore.modules.wrappers import unwrapped
from fastscore.pruning.result import PruneResult

_WAY_OUT = "keep it with fastscore.save_pruned, and load it with fastscore.load_pruned"
# what a config calls a width -> the layers whose outputs have it, or mixtures whose experts do, by their names. A layer
# is of the first that a config has: one of encoders and decoders may have a width for each, mixtures one for experts
_WIDTHS: Mapping[str, tuple[str, ...]] = {
    "encoder_ffn_dim": ("*encoder.layers.*.fc1",), "decoder_ffn_dim": ("*decoder.layers.*.fc1",),
    "ffn_dim": ("*.fc1",), "d_ff": ("*.wi", "*.wi_0"), "n_inner": ("*.c_fc", "*.fc_in"), "hidden_dim": ("*.ffn.lin1",),
    "moe_intermediate_size": ("*.experts",), "shared_expert_intermediate_size": ("*.shared_expert.up_proj",),
    "ffn_hidden_size": ("*.dense_h_to_4h",),
    "intermediate_size": ("*.up_proj", "*.gate_up_proj", "*.fc1", "*.intermediate.dense", "*.dense_h_to_4h", "*.c_fc",
                          "*.intermediate_dense", "*.experts"),
    "conv_dim": ("*feature_extractor.conv_layers.*.conv",), "num_attention_heads_per_layer": ("*.q_proj",),
    "num_attention_heads": ("*.q_proj", "*.self.query", "*.attention.query", "*Attention.q"),
    "num_key_value_heads": ("*.k_proj",),
}
_EPS = ("rms_norm_eps", "layer_norm_epsilon")
_EXPERTS = ("num_experts", "num_local_experts")
_PER_HEAD = ("num_attention_heads_per_layer", "num_attention_heads", "num_key_value_heads")
_TWICE = "gate_up_proj"  # a layer that makes gates, too
_QUERIES, _SCALE = ("q_proj", "query"), "scaling"  # what makes queries, and what an attention multiplies products by
_BIASES = ("attention_bias", "mlp_bias")  # what a config calls them, where they are optional


class _DenseNormError(Exception):
    """The name of a LayerNorm that no config can say."""


def save_pretrained(pruned: nn.Module | PruneResult, folder: str | PathLike[str]) -> PreTrainedModel:
    """Write a pruned model of transformers as transformers does, with a config.json that tells its widths.

    Most configs have one number for all blocks, and seldom a word for biases. So prune with scope="layer", which takes
    the same share of every block, unless it lists a width for each (Gemma 3n's MLPs); and, where layers have no bias
    (Llama), with compensate=False and without calibration=, as what channels gave on average, and what repairs, goes
    into biases. Models whose layers have biases (ViT) may be compensated and repaired.

    An RMSNorm that divides by the dense width becomes one that does not: its weight grows by the root of the widths'
    ratio, and the config's eps by the ratio. So do queries of narrower heads, which were scaled by the dense width.
    Nothing is pushed anywhere.

    Args:
        pruned: what fastscore.prune made of a transformers model: the smaller model, or the result that holds it.
        folder: where config.json and the weights go; `type(model).from_pretrained(folder)` loads them.

    Returns:
        The ordinary model that was written, in the dtype of the pruned one. Both were run in float32, or as they are in
        float64, and give the same (to half the digits of float32, as eps is one number for all norms).

    Raises:
        TypeError: no model of transformers.
        ValueError: a model that its config has no words for, such as one whose layers differ in width, with the way
            out; nothing is written then.
    """
    model = unwrapped(pruned.model if isinstance(pruned, PruneResult) else pruned)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"pruned: {type(model).__name__} is no model of transformers: {_WAY_OUT}")
    dtype = next(model.parameters()).dtype
    with torch.device("cpu"):  # whatever default device a user has set for tensors
        # in float32 at least: fewer digits do not tell what widths change from rounding
        plain = _ordinary(copy.deepcopy(model).cpu().to(torch.promote_types(dtype, torch.float32)), dtype)
    plain = plain.to(dtype).train(model.training)
    plain.save_pretrained(folder)
    return plain


def _ordinary(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The ordinary model, run beside the pruned one, whose numbers were of that dtype; see save_pretrained for what it
    raises."""
    state, config = dict(model.state_dict()), copy.deepcopy(model.config)
    try:
        for name, value in _settings(model, state):
            setattr(config, name, value)
    except _DenseNormError as error:
        config.hidden_size = model.config.hidden_size
        raise ValueError(f"pruned: {error} is a LayerNorm that divides by the dense width, which no config of "
                         f"transformers can say: {_ways(model, _built(model, config))}") from None
    for bias in _BIASES:
        if getattr(config, bias, None) is False and any(
                layer is not None and layer.bias is not None for layer in _optional(model, bias)):
            setattr(config, bias, True)
    plain = _built(model, config).to(next(model.parameters()).dtype)
    for name, own in plain.state_dict().items():
        if name not in state and name.endswith(".bias"):
            state[name] = torch.zeros_like(own, device="cpu")
    for name in {**state, **plain.state_dict()}:
        shapes = [list(tensors[name].shape) if name in tensors else "not there"
                  for tensors in (state, plain.state_dict())]
        if shapes[0] != shapes[1]:
            wide = name not in state or name in plain.state_dict()  # else a bias that cuts gave a layer
            raise ValueError(f"{_mismatch(name, shapes, state, type(config).__name__)}: "
                             f"{_ways(model, plain, name, wide)}")
    _scale_queries(model, plain, state)
    plain.load_state_dict(state)
    buffers = dict(model.named_buffers())
    for name, made in plain.named_buffers():  # rotary tables, which were rounded with the model
        if (own := buffers.get(name)) is not None and torch.equal(own, made.to(dtype).to(own.dtype)):
            made.copy_(own)
    _check_same(model, plain)
    return plain


def _mismatch(name: str, shapes: Sequence[object], state: Mapping[str, Tensor], config: str) -> str:
    """What is said of a tensor that the model has otherwise than a model of its config."""
    alike = re.compile(re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)))
    others = {each: list(tensor.shape) for each, tensor in state.items() if alike.fullmatch(each)}
    other = next((each for each, shape in others.items() if shape != shapes[0]), "")
    why = f"which has one width for all layers ({other} is {others[other]})" if other else \
        f"which has no word for {'a bias' if name.endswith('.bias') and name in state else 'another width'} there"
    return f"pruned: {name} is {shapes[0]}, and {shapes[1]} by {config}, {why}"


def _ways(model: PreTrainedModel, plain: PreTrainedModel, first: str = "", wide: bool = True) -> str:
    """The ways out of what the config of `plain` cannot say, of all layers at once: those that are alike in all blocks
    are to stay; where nothing else of the model is narrower than it was, none of its configs says what went.

    first: a tensor that cannot be said; none where the hidden width cannot, which `plain` has as it was. wide: whether
    the width of its layer may be why.
    """
    own, said, dense = dict(_widths(model)), dict(_widths(plain)), _dense(model)
    hidden = _hidden(model), getattr(model.config, "hidden_size", None)
    on_stream = {name for name in own if not first and (own[name], dense.get(name)) == hidden}
    alike: dict[str, set[int]] = {}
    for name in own:
        alike.setdefault(_pattern(name), set()).add(own[name])
    stay = [_pattern(name) for name in own if name not in on_stream and own[name] != said.get(name, own[name])]
    layer = _pattern(first.removesuffix(".weight").removesuffix(".bias"))
    stay = [layer, *stay] if first and wide and not {_pattern(first), layer} & {*stay} else stay
    stay = [pattern for pattern in dict.fromkeys(stay) if len(alike.get(pattern, ())) < 2]
    if not first:
        embedded = _embeddings(model)[0]
        stay[:0] = [f"{embedded}*"] if embedded else _normalized(model, own, dense)
    if dense and not any(own[name] != dense.get(name, own[name]) and _pattern(name) not in stay for name in own
                         if name not in on_stream):
        return f"{type(model.config).__name__} has words for nothing that went: {_WAY_OUT}"
    named = ", ".join(f'"{each}"' for each in dict.fromkeys(stay))
    ignored = f" and, beside what is there, ignore=[{named}]" if stay else ""
    return f'prune with scope="layer", compensate=False (and no calibration=){ignored}, or {_WAY_OUT}'


def _normalized(model: PreTrainedModel, own: Mapping[str, int], dense: Mapping[str, int]) -> list[str]:
    """The layers that have lost as many outputs as a norm has that no config can say."""
    norms = {(norm.width, norm.width + norm.lost) for norm in model.modules()
             if isinstance(norm, NarrowedNorm) and norm.width is not None}
    made: dict[str, list[str]] = {}
    for name in own:
        if (own[name], dense.get(name)) in norms:
            made.setdefault(_pattern(name), []).append(name)
    return [names[0] if len(names) == 1 else pattern for pattern, names in made.items()]


def _pattern(name: str) -> str:
    """A layer's name, as ignore= takes it for those of all blocks."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _dense(model: PreTrainedModel) -> dict[str, int]:
    """The `_widths` of a model of the config that the pruned one still has; none where that is not built."""
    try:
        with torch.device("meta"):
            return dict(_widths(type(model)(copy.deepcopy(model.config))))
    except Exception:  # each model has its own code
        return {}


def _hidden(model: PreTrainedModel) -> int | None:
    _, layer = _embeddings(model)
    return None if layer is None else layer.weight.shape[1 if isinstance(layer, nn.Embedding) else 0]


def _settings(model: PreTrainedModel, state: dict[str, Tensor]) -> Iterator[tuple[str, Any]]:
    """What the config is to say, as far as layers tell; `state` gets the weights of ordinary norms."""
    config = model.config
    hidden, count = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
    if not isinstance(hidden, int) or not isinstance(count, int):
        return  # a width for each stage, or configs of parts: what it says stays, and shapes tell whether it fits
    if turned := next((name for name, module in model.named_modules() if handed.reads_part(module)), ""):
        raise ValueError(f"pruned: {turned} has lost pairs of dimensions that rotary tables turn, and a config tells "
                         f"how many there are, not which: prune whole heads (units=\"groups\"), or {_WAY_OUT}")
    width = next((own for module in model.modules() if (own := heads.width(module)) and heads.count(module)),
                 getattr(config, "head_dim", None) or hidden // count)
    hidden = _hidden(model) or hidden  # where what is embedded is no token and no patch, it stays
    yield "hidden_size", hidden
    left = dict(_widths(model))
    for setting, patterns in _WIDTHS.items():
        names = [name for name in left if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        if names and hasattr(config, setting):
            found = [left.pop(name) for name in names]
            counted = width if setting in _PER_HEAD else 2 if names[0].endswith(_TWICE) else 1
            each, said = [wide // counted for wide in found], getattr(config, setting)
            yield setting, type(said)(each) if isinstance(said, list | tuple) and len(said) == len(each) else each[0]
            if setting == "num_attention_heads" and (hasattr(config, "head_dim") or found[0] != hidden):
                yield "head_dim", width  # without it, some divide the hidden size by the number of heads
    experts = next((len(module.down_proj) for module in model.modules() if holds_experts(module)), None)
    for setting in _EXPERTS:
        if experts is not None and hasattr(config, setting):
            yield setting, experts
    for name, module in model.named_modules():
        if not isinstance(module, NarrowedNorm):
            continue
        norm = norm_of(module)
        if not isinstance(norm, ChannelNorm) or norm.centered or norm.spread or norm.place != "inside" or \
                norm.fewer != 0 or module.width is None or module._parameters.get(norm.gain) is None:
            raise _DenseNormError(name)
        ratio = 1 + module.lost / module.width
        weight = module.get_parameter(norm.gain).detach()
        grown = (weight.double() + norm.offset).mul(ratio ** 0.5).sub(norm.offset)
        state[f"{name}.{norm.gain}"] = grown.to(weight.dtype)
        setting = next((setting for setting in _EPS if hasattr(config, setting)), "")
        if norm.eps is not None and setting:
            yield setting, norm.eps * ratio


def _same_width(model: PreTrainedModel) -> str:
    """The way out where the hidden width is to stay."""
    first, _ = _embeddings(model)
    return f'keep that width: prune with ignore=["{first}*"], or ' if first else ""


def _widths(model: nn.Module) -> Iterator[tuple[str, int]]:
    """(a linear layer, or a convolution of sounds, how many outputs it has), and (the experts of a mixture, how wide
    each is inside)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d):
            yield name, module.out_channels
        elif is_linear(module):
            yield name, module.out_features if isinstance(module, nn.Linear) else widths(module)[1]
        elif holds_experts(module):
            yield name, module.down_proj.shape[-1]


def _scale_queries(model: PreTrainedModel, plain: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Have the queries in `state` make up for products that the ordinary model scales by the width that its heads have,
    and the pruned one by that which they had."""
    for name, module in model.named_modules():
        own, other = (vars(each).get(_SCALE) for each in (module, plain.get_submodule(name)))
        if isinstance(own, float) and isinstance(other, float) and own != other:
            for key in (f"{name}.{layer}.{part}" for layer in _QUERIES for part in ("weight", "bias")):
                if key in state:
                    state[key] = state[key] * (own / other)


def _embeddings(model: PreTrainedModel) -> tuple[str, nn.Embedding | nn.Linear | nn.Conv2d | None]:
    """(the name of what makes the hidden states of tokens, or of patches; the layer in it that has their width)."""
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:
        return "", None
    name = next((name for name, module in model.named_modules() if module is found), "")
    layers = () if found is None else found.modules()
    return name, next((each for each in layers if isinstance(each, nn.Embedding | nn.Linear | nn.Conv2d)), None)


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
        raise ValueError(f"pruned: {type(model).__name__} cannot be built with the widths that are left ({said}): "
                         f"prune with round_to=8 or the like, or {_WAY_OUT}") from error
    return plain.eval()


def _check_same(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """Raise ValueError where the two give different outputs."""
    try:
        with torch.no_grad():
            want, got = (each.eval()(**_inputs(model))[0] for each in (model, plain))
    except Exception as error:  # inputs that transformers holds ready are not made for every model
        said = " ".join(str(error).split())
        raise ValueError(f"pruned: {type(model).__name__} cannot be run to compare it with the ordinary one "
                         f"({type(error).__name__}: {said}): {_WAY_OUT}") from error
    close: float = torch.finfo(torch.float32).eps ** 0.5  # in which norms compute, whatever they are given
    if not torch.allclose(got, want, rtol=0, atol=close * float(want.abs().max())):
        narrowed = getattr(plain.config, "hidden_size", None) != getattr(model.config, "hidden_size", None)
        why = f", as its code computes with the hidden width: {_same_width(model)}" if narrowed else ": "
        raise ValueError(f"pruned: as an ordinary {type(model).__name__} it gives other outputs{why}{_WAY_OUT}")


def _inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two small images for a model of images, two spectrograms or sounds for one of speech, for another what
    transformers holds ready."""
    config = model.config
    drawn = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 64
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(2, config.num_channels, height, width, generator=drawn).to(model.dtype)}
    if model.main_input_name == "input_values" and (step := getattr(config, "inputs_to_logits_ratio", 0)):
        return {"input_values": torch.randn(2, 20 * step, generator=drawn).to(model.dtype)}
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        spectrogram = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, generator=drawn)
        return {"input_features": spectrogram.to(model.dtype),
                "decoder_input_ids": torch.arange(10).reshape(2, 5) % config.vocab_size}
    return {name: value % config.vocab_size if name == "input_ids" else value
            for name, value in model.dummy_inputs.items()}
