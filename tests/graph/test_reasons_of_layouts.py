"""What the tracer finds where channels may not be is no reason to keep them; what is there is."""

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from timm.models.efficientvit_mit import LiteMLA
from torch import Tensor, nn

from fastscore.graph.tracing import trace


class Net(nn.Module):
    """Four layers, which a case makes and calls in its own way."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in {"e": nn.Linear(4, 6), "f": nn.Linear(6, 5), "last": nn.Linear(6, 3), **layers}.items():
            self.add_module(name, layer)


class Sampled(Net):
    """One convolution says where another's output is read."""

    def __init__(self) -> None:
        super().__init__(e=nn.Conv2d(3, 6, 3, padding=1), f=nn.Conv2d(3, 2, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.grid_sample(self.e(x).relu(), self.f(x).tanh().permute(0, 2, 3, 1), align_corners=False)
        return self.last(x.mean((2, 3)))


class Mixer(Net):
    """Linears work on tokens, too."""

    def __init__(self) -> None:
        super().__init__(f=nn.Linear(5, 9), g=nn.Linear(9, 5))

    def mixed(self, x: Tensor) -> Tensor:
        return self.g(self.f(x.transpose(1, 2)).relu()).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.e(x)
        return self.last((x + self.mixed(x)).mean(1))


class ConvMixer(Mixer):
    """Or convolutions do."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Conv1d(5, 9, 1), nn.Conv1d(9, 5, 1)

    def mixed(self, x: Tensor) -> Tensor:
        return self.g(self.f(x).relu())


class NormOfTokens(Net):
    """A BatchNorm takes tokens for channels."""

    def __init__(self) -> None:
        super().__init__(norm=nn.BatchNorm1d(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.e(x)).relu().mean(1))


class Pairs(Net):
    """A Bilinear reads two layers."""

    def __init__(self, kind: type[nn.Module] = nn.Embedding) -> None:
        super().__init__(e=kind(9, 6), f=nn.Embedding(9, 5), both=nn.Bilinear(6, 5, 6))

    def forward(self, i: Tensor) -> Tensor:
        e = self.e(i) if isinstance(self.e, nn.EmbeddingBag) else self.e(i).mean(1)
        return self.last(self.both(e, self.f(i).mean(1)).relu())


class PairsOfBags(Pairs):
    """And one of the two is an EmbeddingBag."""

    def __init__(self) -> None:
        super().__init__(nn.EmbeddingBag)


class Hypernetwork(Net):
    """The weight that reads e's channels is what f makes."""

    def __init__(self) -> None:
        super().__init__(f=nn.Linear(5, 36))
        self.code = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(self.e(x[:, 0]).relu(), self.f(self.code).view(6, 6)).relu())


class Modulated(Net):
    """What e makes is added to a convolution by a kernel that is normalised, not over e's channels."""

    def __init__(self) -> None:
        super().__init__(f=nn.Linear(4, 3))
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel[None] * self.f(x[:, 0])[:, None, :, None, None]
        kernel = kernel * (kernel.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        image = x.new_ones(1, 3 * len(x), 4, 4)
        image = F.conv2d(image, kernel.flatten(0, 1), padding=1, groups=len(x)).view(len(x), -1, 4, 4)
        return self.last((image + self.e(x[:, 0])[:, :, None, None]).relu().mean((2, 3)))


class Weighted(Net):
    """Experts on rows that a router picks, weighted by what it makes of them."""

    def __init__(self) -> None:
        super().__init__(router=nn.Linear(6, 3), a=nn.Linear(6, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.e(x).flatten(0, 1)
        weight, chosen = self.router(flat).softmax(-1).topk(2, -1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate((self.a, self.b, self.c)):
            rows, slot = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, rows, expert(flat[rows]) * weight[rows, slot, None])
        return self.last((flat + out).view(*x.shape[:2], -1).mean(1))


class Deformed(Net):
    """The code of a module takes channels together with its weight, to which it adds a bias."""

    class Own(nn.Module):
        """Reads as a Linear does, and makes twice that."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight, alpha=2)

    def __init__(self) -> None:
        super().__init__(own=self.Own())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.own(self.e(x[:, 0]).relu()).relu())


class Uncalled(Net):
    """Attention by the weights of layers that are not called, and biases of others; layers before and behind it."""

    def __init__(self) -> None:
        super().__init__(q=nn.Linear(6, 6), k=nn.Linear(6, 6), v=nn.Linear(6, 6), out=nn.Linear(6, 6),
                         up=nn.Linear(6, 5), f=nn.Linear(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.e(x)
        x = x + F.multi_head_attention_forward(
            x, x, x, 6, 2, None, torch.cat([self.k.bias, self.q.bias, self.v.bias]), None, None, False, 0.0,
            self.out.weight, self.out.bias, use_separate_proj_weight=True, need_weights=False,
            q_proj_weight=self.q.weight, k_proj_weight=self.k.weight, v_proj_weight=self.v.weight)[0]
        return self.last(x + self.f(self.up(x).relu()))


class OneByOne(Net):
    """One sample at a time, without a dimension that counts them."""

    def __init__(self) -> None:
        super().__init__(e=nn.Conv2d(3, 6, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.last(self.e(image).relu().mean((1, 2))) for image in x])


_MEET = "the tracer cannot follow its channels past where they meet others ({0}Backward0)"
_SUMMED = "a product with other activations ({0}Backward0) sums over its channels, where nothing can be measured"
_PRODUCT = "a product with other activations ({0}Backward0) takes them where they cannot be followed"
_TOKENS, _IMAGES, _ROWS = torch.randn(3, 5, 4), torch.randn(3, 3, 6, 6), torch.randint(0, 9, (3, 5))


@pytest.mark.parametrize(("build", "x", "reasons"), [
    (Sampled, _IMAGES, dict.fromkeys("ef", _MEET.format("GridSampler2D"))),
    *((mixer, _TOKENS, {"g": "an operation runs over all its channels (MeanBackward1)"})
      for mixer in (Mixer, ConvMixer)),
    (NormOfTokens, _TOKENS, {}),
    (Pairs, _ROWS, dict.fromkeys("ef", _PRODUCT.format("Trilinear"))),
    (PairsOfBags, _ROWS, {"f": "the tracer cannot follow its channels to last: bilinear in the code of both (Bilinear) "
                               "mixes or moves them",
                          "e": "an embedding makes its channels by looking them up, and cannot lose any yet"}),
    (Hypernetwork, _TOKENS, {"e": _SUMMED.format("Mm"),
                             "f": "a view divides its channels over several dimensions (ViewBackward0)"}),
    (Modulated, _TOKENS, {"e": _PRODUCT.format("Convolution")}),
    (Weighted, _TOKENS, {}),
    (Deformed, _TOKENS, {"e": "the code of own (Own) takes its channels together with its weight, which cannot lose "
                              "channels yet"}),
    (Uncalled, _TOKENS, {layer: f"the model's code takes its channels together with {read}.weight, which cannot lose "
                                "channels yet" for layer, read in {"e": "q", "f": "out"}.items()}),
    (OneByOne, _IMAGES[:1], {}),
])
def test_what_is_found_where_channels_may_not_be_is_no_reason(build: type[Net], x: Tensor, reasons: Mapping[str, str]
                                                              ) -> None:
    torch.manual_seed(0)
    graph = trace(build().eval(), x)
    assert {layer: graph.skipped.get(layer) for layer in reasons} == reasons
    assert [group.name for group in graph.groups if group.name == "e"] == ([] if "e" in reasons else ["e"])


def test_what_is_known_of_layers_whose_heads_are_guessed_and_do_not_go() -> None:
    """As of linear attention at several scales: the reason is that of before the guess."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), LiteMLA(16, 16, dim=8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(16, 3)).double().eval()
    graph = trace(model, torch.randn(2, 3, 8, 8).double())
    assert [group.name for group in graph.groups] == ["0", "1.proj.conv"]
    for layer in ("1.qkv.conv", "1.aggreg.0.1"):
        assert graph.skipped[layer] == "a view divides its channels over several dimensions (ViewBackward0)"
