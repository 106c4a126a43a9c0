"""Residual streams through PyTorch's own attention, whose projections are parameters that it multiplies by itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from whole_way import check, noisy

import fastscore
from fastscore import Scorer
from fastscore.graph.cutting.surgery import remove_channels, smaller_copy
from fastscore.graph.tracing import trace
from fastscore.modules.attention.multihead_attention import replace_attention
from fastscore.modules.attention.projections import ProjectionLinear
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.macs.counting import count
from fastscore.modules.weights import held_weights

WIDTH = 12


class Block(nn.Module):
    """Attention, to itself or to a memory, in a residual branch."""

    def __init__(self, memory: bool = False, first: bool = True, **options: object) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 3, batch_first=first, **options)
        self.memory, self.first = memory, first

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        query = self.norm(x)
        read = memory if self.memory else query
        if not self.first:
            query, read = query.transpose(0, 1), (read.transpose(0, 1) if self.memory else query.transpose(0, 1))
        if not self.memory:
            read = query
        y = self.attn(query, read, read, need_weights=False)[0]
        return x + (y if self.first else y.transpose(0, 1))


class Model(nn.Module):
    """A stream through a block, and a memory beside it."""

    def __init__(self, block: Callable[[], nn.Module], memory: int = WIDTH) -> None:
        super().__init__()
        self.embed, self.beside = nn.Linear(5, WIDTH), nn.Linear(5, memory)
        self.block, self.norm, self.head = block(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.embed(x), self.beside(x[:, ::2]).tanh())).mean(1))


class Encoder(nn.Module):
    """PyTorch's own layer."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 3, 8, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.layers(x)


class EncoderAndDecoder(nn.Module):
    """PyTorch's own, whose code asks for its width."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Transformer(WIDTH, 3, 1, 1, 8, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.both(x[:, :4], x)


class Probe(nn.Module):
    """SigLIP's head: a learned token asks all others."""

    def __init__(self) -> None:
        super().__init__()
        self.probe, self.attn = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.MultiheadAttention(WIDTH, 3,
                                                                                              batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.attn(self.probe.repeat(len(x), 1, 1), x, x)[0]


KINDS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "to itself": (lambda: Model(Block), ["embed", "block.attn"]),
    "sequence first, no bias": (lambda: Model(lambda: Block(first=False, bias=False)), ["embed", "block.attn"]),
    "a memory as wide": (lambda: Model(lambda: Block(memory=True)), ["embed", "block.attn"]),
    "a memory of another width": (lambda: Model(lambda: Block(memory=True, kdim=8, vdim=8), 8),
                                  ["embed", "beside", "block.attn"]),
    "PyTorch's layer": (lambda: Model(Encoder), ["embed", "block.layers.layers.0.self_attn",
                                                 "block.layers.layers.0.linear1"]),
    "an encoder and a decoder": (lambda: Model(EncoderAndDecoder), ["embed", *(
        f"block.both.{part}" for part in (
            "encoder.layers.0.self_attn", "encoder.layers.0.linear1", "decoder.layers.0.self_attn",
            "decoder.layers.0.multihead_attn", "decoder.layers.0.linear1"))]),
    "a probe": (lambda: Model(Probe), ["embed", "block.attn", "block.attn.out_proj"]),
}


def _x() -> Tensor:
    return torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_stream_goes(kind: str, tmp_path: Path) -> None:
    """Heads and the stream, by brute force, from data to a file; names of parameters stay."""
    build, groups = KINDS[kind]
    small = check(build, _x(), groups, tmp_path, only=False).model
    assert set(small.state_dict()) == set(build().state_dict())
    assert small.embed.out_features < WIDTH


def test_vision_transformer_of_torchvision(tmp_path: Path) -> None:
    """Class token, embedding of positions, and a width that the model keeps."""
    result = check(lambda: VisionTransformer(8, 4, 1, 3, WIDTH, 8, num_classes=4),
                   torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double(),
                   ["conv_proj", "encoder.layers.encoder_layer_0.self_attention",
                    "encoder.layers.encoder_layer_0.mlp.0"], tmp_path)
    assert result.model.hidden_dim == result.model.conv_proj.out_channels < WIDTH


def test_what_an_attention_reads_goes_alone() -> None:
    """And the smaller model runs as it is, whose heads and output stay."""
    model, x = noisy(KINDS["a probe"][0]), _x()
    group = next(group for group in trace(model, x).groups if group.name == "embed")
    gone = torch.tensor([1, 4, 5])
    small = smaller_copy(model, lambda whole: remove_channels(whole, [group], {"embed": gone}))
    model.block.attn.in_proj_weight.data[:, gone] = 0
    torch.testing.assert_close(small(x), model(x))


def test_a_layer_for_a_projection_computes_the_same_and_is_taken_back() -> None:
    """To the bit; a state dict has the parameters' own names meanwhile, and is loaded by them."""
    model, x = noisy(KINDS["to itself"][0]), _x()
    handles = [*replace_attention(model)]
    expected, names = model(x), dict(model.state_dict())
    handles += held_weights.replace(model)
    assert isinstance(model.block.attn.in_proj_weight, ProjectionLinear)
    assert torch.equal(model(x), expected)
    assert set(model.state_dict()) == set(names)
    model.load_state_dict({name: value + 1 for name, value in names.items()})
    for handle in reversed(handles):
        handle.remove()
    assert isinstance(model.block.attn.in_proj_weight, nn.Parameter)
    assert list(dict(model.named_parameters())) == list(dict(KINDS["to itself"][0]().named_parameters()))
    assert type(model.block.attn) is nn.MultiheadAttention


class ReadElsewhere(nn.Module):
    """Code that runs the weights of an attention by itself, and a part of them once more."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attn = nn.Linear(5, WIDTH), nn.MultiheadAttention(WIDTH, 3)
        self.inner, self.head = nn.Linear(WIDTH, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, attn = self.embed(x).transpose(0, 1), self.attn
        y, _ = F.multi_head_attention_forward(x, x, x, WIDTH, 3, attn.in_proj_weight, attn.in_proj_bias, None, None,
                                              False, 0.0, attn.out_proj.weight, attn.out_proj.bias, self.training)
        y = y + x @ attn.in_proj_weight[:WIDTH].t() * attn.in_proj_weight.shape[1]
        return self.head(self.inner(y).tanh()).mean(0)


def test_code_that_reads_projections_itself_reads_them_still() -> None:
    """Its own channels stay, and all else is scored and goes."""
    model, x = noisy(ReadElsewhere), _x()
    scores = fastscore.score(model, [x], progress=False)
    assert list(scores) == ["inner"]
    small = fastscore.prune(model, scores, x, channels=0.5, compensate=False).model
    with torch.no_grad(), fastscore.mask(model, scores, 0.5, x, compensate=False):
        torch.testing.assert_close(small(x), model(x))


@pytest.mark.parametrize("kind", ["to itself", "a memory as wide"])
def test_layers_for_projections_cost_what_the_attention_does(kind: str) -> None:
    """Queries of a memory are products with a third of the weight each, and so are their gradients."""
    model, x = noisy(KINDS[kind][0]), _x()
    assert count(evaluation_copy(model), x).macs == count(model, x).macs
    model(x).square().sum().backward()
    weight, bias = model.block.attn.in_proj_weight, model.block.attn.in_proj_bias
    expected = weight.grad, bias.grad
    weight.grad = bias.grad = None
    with Scorer(model, x):
        model(x).square().sum().backward()
    torch.testing.assert_close((weight.grad, bias.grad), expected)


def test_a_training_loop_and_magnitudes_see_projections() -> None:
    """A Scorer on the user's own model says what score() says; weights count once."""
    model, x = noisy(KINDS["to itself"][0]), _x()
    scores = fastscore.score(model, [x], gradient="loss", normalize=False, progress=False,
                             loss=lambda output, batch: output.square().sum())
    with Scorer(model, x, gradient="loss", normalize=False) as scorer:
        model(x).square().sum().backward()
    for name, values in scorer.scores().items():
        torch.testing.assert_close(values, scores[name], rtol=1e-4, atol=1e-6)
    norms = fastscore.score(model, [x], importance="magnitude-l2", progress=False)["block.attn"]
    by_head = model.block.attn.in_proj_weight.detach().view(3, 3, 4, WIDTH).square().sum((0, 2, 3)).sqrt()
    torch.testing.assert_close(norms[::4].double(), by_head, rtol=1e-5, atol=0)
