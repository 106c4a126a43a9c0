"""Networks with residual branches: images, tokens, a decoder with a cache."""

from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn
from torchvision.models import convnext, efficientnet, mobilenetv2, resnet, swin_transformer

from fastscore.integrations.transformers import forward

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 20,
         "max_position_embeddings": 16}


class Steps(nn.Module):
    """Branches that add, under a scale of their own, or two in one sum; one that multiplies; and one whose input is
    another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.one, self.two, self.times, self.other, self.beside = (
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8)) for _ in range(5))
        self.scale = nn.Parameter(torch.full((8,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.embed(x), self.embed(x.flip(1))
        x = x + self.one(x) + 0.5 * self.beside(x)
        x = x + self.scale * self.two(x)
        x = x * self.times(x)
        return self.head((x + self.other(y)).tanh())


def of_images(*blocks: nn.Module, width: int = 8, last: bool = False) -> nn.Module:
    """Blocks of images of 8 channels between a stem and a head; last: on [N, H, W, C]."""
    turn = [Turn()] if last else []
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *turn, *blocks, *turn,
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


class Beside(nn.Module):
    """A branch that is a module of its own, of any kernels, beside a shortcut that is one, too."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.body = nn.Sequential(nn.Conv2d(inputs, 6, 3, padding=2), nn.BatchNorm2d(6), nn.ReLU(),
                                  nn.Sequential(nn.Conv2d(6, 6, 5, stride, padding=1, groups=6), nn.BatchNorm2d(6)),
                                  timm.layers.SqueezeExcite(6), nn.Conv2d(6, outputs, 1), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return (self.shortcut(x) + self.body(x)).tanh()


class Turn(nn.Module):
    """[N, C, H, W] -> [N, H, W, C], and back."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1) if x.shape[1] == 8 else x.movedim(-1, 1)


def _resnet() -> tuple[nn.Module, list[str]]:
    down = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
    return of_images(resnet.BasicBlock(8, 8), resnet.BasicBlock(8, 12, 2, down), resnet.Bottleneck(12, 3),
                   timm.models.resnet.Bottleneck(12, 3), width=12), ["3", "4", "5", "6"]


def _mobile() -> tuple[nn.Module, list[str]]:
    config = efficientnet.MBConvConfig(2, 3, 1, 8, 8, 1)
    se = timm.layers.SqueezeExcite
    return of_images(mobilenetv2.InvertedResidual(8, 8, 1, 2), mobilenetv2.InvertedResidual(8, 8, 2, 2),
                   efficientnet.MBConv(config, 0.0, nn.BatchNorm2d),
                   timm.models._efficientnet_blocks.InvertedResidual(8, 8, exp_ratio=2.0, se_layer=se),
                   convnext.CNBlock(8, 0.5, 0.0), timm.models.convnext.ConvNeXtBlock(8),
                   transformers.models.convnext.modeling_convnext.ConvNextLayer(transformers.ConvNextConfig(), 8)
                   ), ["3.conv", "5.block", "6", "7.block", "8", "9"]


def _swin() -> tuple[nn.Module, list[str]]:
    sizes: dict[str, Any] = {"dim": 8, "num_heads": 2, "window_size": [4, 4], "shift_size": [2, 2], "mlp_ratio": 2.0}
    return of_images(swin_transformer.SwinTransformerBlock(**sizes), swin_transformer.SwinTransformerBlockV2(**sizes),
                   last=True), [f"{i}.{part}" for i in (4, 5) for part in ("attn", "mlp")]


IMAGES = {"ResNet": _resnet, "MobileNet, ConvNeXt": _mobile, "Swin": _swin}


def run(model: nn.Module, batch: Any) -> Tensor:
    return forward(model, batch) if isinstance(batch, dict) else model(batch)


def case(name: str) -> tuple[nn.Module, Any, list[str]]:
    """(model in float64, batch, its branches)"""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "steps":
            model, batch, found = Steps(), torch.randn(3, 4, 5, generator=generator).double(), ["one", "two", "beside"]
        elif name == "ViT":
            model = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2,
                                                  num_classes=3, mlp_ratio=2, init_values=0.5)
            batch = torch.randn(3, 3, 16, 16, generator=generator).double()
            found = [f"blocks.{i}.{part}" for i in range(2) for part in ("attn", "mlp")]
        elif name in IMAGES:
            model, found = IMAGES[name]()
            batch = torch.randn(3, 3, 8, 8, generator=generator).double()
        elif name == "BERT":
            model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES | {
                "num_hidden_layers": 2}))
            batch = {"input_ids": torch.randint(0, 20, (3, 5), generator=generator)}
            found = ["bert.encoder.layer.0", "bert.encoder.layer.1.attention", "bert.encoder.layer.1"]
        else:
            model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=8))
            batch = {"input_ids": torch.randint(0, 20, (3, 5), generator=generator)}
            # the cache of a decoder is as long as the keys of its first layer
            found = [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn", "mlp")][1:]
        model = model.double().eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model, batch, found


CASES = ("steps", "ViT", "Qwen3", "BERT", *IMAGES)


class Residual(nn.Sequential):
    """Its modules run one by one."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)
