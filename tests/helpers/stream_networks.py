"""Networks with a residual stream that normalisations over channels read."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2GRN

WIDTH, TOKENS, WORDS = 8, 4, 11


class Block(nn.Module):
    """Attention of one head and an MLP, in residual branches."""

    def __init__(self, norm: Callable[[int], nn.Module], after: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(WIDTH), norm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.after = after

    def attend(self, x: Tensor) -> Tensor:
        return self.o((self.q(x) @ self.k(x).mT / 3).softmax(-1) @ self.v(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.after:
            x = self.norm1(x + self.attend(x))
            return self.norm2(x + self.down(F.gelu(self.up(x))))
        x = x + self.attend(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Language(nn.Module):
    """Words in, logits of the next out, through a head that may be tied to the embedding."""

    def __init__(self, norm: Callable[[int], nn.Module], after: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.Sequential(Block(norm, after), Block(norm, after))
        self.norm, self.head = norm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.places(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class OffsetRMSNorm(nn.Module):
    """As Gemma's: the weight is kept as its difference from 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.zeros(width)), 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) ** -0.5 * (1 + self.weight)


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """A stem, a block around a depthwise convolution, and a step down."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, WIDTH, 2, 2), LayerNorm2d(WIDTH, eps=1e-3)
        self.depthwise, self.inner = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.LayerNorm(WIDTH, 1e-3)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.norm2, self.step = LayerNorm2d(WIDTH, eps=1e-3, bias=False), nn.Conv2d(WIDTH, 10, 2, 2)
        self.last, self.head = nn.LayerNorm(10, elementwise_affine=False), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        y = self.down(F.gelu(self.up(self.inner(self.depthwise(x).permute(0, 2, 3, 1)))))
        x = self.step(self.norm2(x + y.permute(0, 3, 1, 2)))
        return self.head(self.last(x.mean((2, 3))))


class Merged(nn.Module):
    """Neighbouring tokens side by side under one norm, as in Swin's patch merging: a channel lies there twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = nn.Linear(5, WIDTH), nn.LayerNorm(WIDTH)
        self.norm, self.reduce, self.head = nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.embed(x))
        x = torch.cat([x[:, ::2], x[:, 1::2]], -1)
        return self.head(self.reduce(self.norm(x)).tanh().mean(1))


class Places(nn.Embedding):
    """An embedding of positions that takes the length from a tensor, as BART's does, or from a shape, as Marian's."""

    def forward(self, x: Tensor | torch.Size) -> Tensor:
        return super().forward(torch.arange((x.shape if isinstance(x, Tensor) else x)[1]))


class SharedEmbeddings(nn.Module):
    """Two streams, of an encoder and a decoder, whose embeddings hold one weight, and so does a third that never runs,
    as in T5 and BART."""

    def __init__(self, by_shape: bool = False) -> None:
        super().__init__()
        self.by_shape = by_shape
        self.shared, self.embed, self.other = (nn.Embedding(WORDS, WIDTH) for _ in range(3))
        self.embed.weight = self.other.weight = self.shared.weight
        self.places = Places(TOKENS, WIDTH)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH, eps=1e-2) for _ in range(2))
        self.one, self.two, self.head = nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.embed(x), self.other(x.flip(1))
        y = self.one(self.norms[0](first + self.places(first.shape if self.by_shape else first))).tanh()
        return self.head(y * self.two(self.norms[1](second)).tanh()).mean(1)


class Responses(nn.Module):
    """A ConvNeXt V2's hidden channels, through a global response normalisation."""

    def __init__(self, norm: nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.stem, self.up, self.norm = nn.Conv2d(3, 5, 2, 2), nn.Linear(5, WIDTH), norm
        self.down, self.channels_last = nn.Linear(WIDTH, 3), channels_last

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.gelu(self.up(self.stem(x).movedim(1, -1)))
        x = self.norm(x) if self.channels_last else self.norm(x.movedim(-1, 1)).movedim(1, -1)
        return self.down(x).mean((1, 2))


def words(samples: int) -> Tensor:
    return torch.randint(0, WORDS, (samples, TOKENS), generator=torch.Generator().manual_seed(1))


def noise(*shape: int) -> Callable[[int], Tensor]:
    return lambda samples: torch.randn(samples, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# name -> (network, batch, the layer that names the stream, channels, norms it passes)
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], str, int, int]] = {
    "LayerNorm before": (lambda: Language(lambda n: nn.LayerNorm(n, eps=1e-2)), words, "embed", WIDTH, 5),
    "LayerNorm after": (lambda: Language(nn.LayerNorm, after=True), words, "embed", WIDTH, 5),
    "RMSNorm, tied": (lambda: Language(lambda n: nn.RMSNorm(n, eps=1e-2), tied=True), words, "embed", WIDTH, 5),
    "an RMSNorm of one's own": (lambda: Language(OffsetRMSNorm), words, "embed", WIDTH, 5),
    "ConvNeXt": (ConvNeXt, noise(3, 8, 8), "stem", WIDTH, 3),
    "ConvNeXt, last": (ConvNeXt, noise(3, 8, 8), "step", 10, 1),
    "shared embeddings": (SharedEmbeddings, words, "embed", WIDTH, 2),
    "places by shape": (lambda: SharedEmbeddings(by_shape=True), words, "embed", WIDTH, 2),
    "two in one": (Merged, noise(TOKENS, 5), "embed", WIDTH, 2),
    "global responses": (lambda: Responses(ConvNextV2GRN(WIDTH), True), noise(3, 8, 8), "up", WIDTH, 1),
    "global responses of images": (lambda: Responses(GlobalResponseNorm(WIDTH, channels_last=False), False),
                                   noise(3, 8, 8), "up", WIDTH, 1),
}
