"""Models that people use, each taken from scores to a step of training.

`python tests/helpers/architectures.py` writes the table of docs/models.md (some 20 minutes on one core), with NAME ...
the lines of these models alone.
"""

import functools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from networks import UNet, randomize
from torch import Tensor, nn

import fastscore
from fastscore.batches import Forward, call_model, output_tensors
from fastscore.cli import models
from fastscore.graph.groups import ChannelGraph
from fastscore.graph.tracing import trace
from fastscore.pruning.masking import at_consumers
from fastscore.recovery.compensation import removed_positions

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
SHARE = 0.7  # of the MACs that remains


@dataclass(frozen=True)
class Case:
    """make: the model. image: its height and width. forward: how it is called, where not on the images alone.
    small: in the ordinary run of the tests."""

    name: str
    make: Callable[[], nn.Module]
    image: int = 64
    forward: Forward = call_model
    small: bool = False


@dataclass(frozen=True)
class Row:
    """A line of the table. channels: (scored, all that Conv and Linear layers make)."""

    name: str
    image: int
    channels: tuple[int, int]
    pruned: str
    exported: str
    trained: str
    left_alone: str

    def __str__(self) -> str:
        scored = f"{self.channels[0]:,} of {self.channels[1]:,}"
        return f"| {self.name} | {self.image} | {scored} | {self.pruned} | {self.exported} | {self.trained} | " \
               f"{self.left_alone} |"


def torchvision_model(name: str, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # GoogLeNet's and Inception's initialisation
        return models.torchvision_models().get_model(name, weights=None, **options)


def retinanet(model: nn.Module, images: Tensor) -> Tensor:
    features = list(model.backbone(images).values())
    return torch.cat([part.flatten(1) for part in model.head(features).values()], 1)


def faster_rcnn(model: nn.Module, images: Tensor) -> Tensor:
    """Of every anchor the objectness and offset, of one box the classes and offsets."""
    features = model.backbone(images)
    size = images.shape[-1]
    boxes = [torch.tensor([[0.0, 0.0, size / 2, size / 2]])] * len(images)
    pooled = model.roi_heads.box_roi_pool(features, boxes, [(size, size)] * len(images))
    proposed = [level for levels in model.rpn.head(list(features.values())) for level in levels]
    return torch.cat([part.flatten(1) for part in
                      (*proposed, *model.roi_heads.box_predictor(model.roi_heads.box_head(pooled)))], 1)


_SMALL = ["resnet18", "resnext50_32x4d", "vgg11", "densenet121", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5",
          "efficientnet_b0", "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_1", "googlenet", "convnext_tiny"]
_LARGE = ["alexnet", "resnet34", "resnet50", "resnet101", "resnet152", "resnext101_32x8d", "resnext101_64x4d",
          "wide_resnet50_2", "wide_resnet101_2", "vgg11_bn", "vgg13", "vgg16", "vgg16_bn", "vgg19_bn", "densenet161",
          "densenet169", "densenet201", "mobilenet_v3_large", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3",
          "efficientnet_b1", "efficientnet_b3", "efficientnet_v2_s", "efficientnet_v2_m", "regnet_x_400mf",
          "regnet_x_3_2gf", "regnet_y_8gf", "shufflenet_v2_x1_0", "shufflenet_v2_x2_0", "squeezenet1_0",
          "convnext_small", "convnext_base"]
_SIZES = {"inception_v3": 299, "vit_b_16": 224, "vit_b_32": 224, "swin_t": 64, "swin_v2_t": 64, "maxvit_t": 224}
_TIMM = ["resnet50d", "resnet50", "resnetv2_50", "efficientnet_lite0", "tf_efficientnetv2_b0", "mobilenetv3_large_100",
         "mobilenetv4_conv_small", "regnetx_002", "convnext_atto", "repvgg_a0", "ghostnet_100", "hrnet_w18_small",
         "cspresnet50", "dla34", "res2net50_26w_4s", "resnest14d", "seresnet50", "mixnet_s", "hardcorenas_a",
         "vgg11_bn", "densenet121", "xception41", "nfnet_f0", "fbnetc_100",
         "vit_tiny_patch16_224", "deit_tiny_patch16_224", "beit_base_patch16_224"]

CASES = [
    *(Case(name, functools.partial(torchvision_model, name, num_classes=10), _SIZES.get(name, 64), small=name in _SMALL)
      for name in [*_SMALL, *_LARGE, *_SIZES]),
    Case("fcn_resnet50", functools.partial(torchvision_model, "fcn_resnet50", num_classes=5, weights_backbone=None)),
    Case("deeplabv3_mobilenet_v3_large", functools.partial(
        torchvision_model, "deeplabv3_mobilenet_v3_large", num_classes=5, weights_backbone=None)),
    Case("lraspp_mobilenet_v3_large", functools.partial(
        torchvision_model, "lraspp_mobilenet_v3_large", num_classes=5, weights_backbone=None), small=True),
    Case("retinanet_resnet50_fpn", functools.partial(
        torchvision_model, "retinanet_resnet50_fpn", num_classes=5, weights_backbone=None), 64, retinanet),
    Case("fasterrcnn_mobilenet_v3_large_fpn", functools.partial(
        torchvision_model, "fasterrcnn_mobilenet_v3_large_fpn", num_classes=5, weights_backbone=None), 64, faster_rcnn),
    Case("U-Net with transposed convolutions", UNet, 32, small=True),
    *(Case(f"timm:{name}", functools.partial(models.load, f"timm:{name}", classes=10), 224 if "_224" in name else 64,
           small=name == "ghostnet_100") for name in _TIMM),
]


def prepared(case: Case) -> tuple[nn.Module, Tensor]:
    """The model in evaluation mode with statistics that keep the signal alive down to its last layer, and 2 images."""
    torch.manual_seed(0)
    model = case.make().float()
    for name, parameter in randomize(model).named_parameters():
        if name.endswith(("layer_scale", "gamma")):  # which start near zero, and so would all that is behind them
            nn.init.uniform_(parameter, 0.5, 1.5)
        if not parameter.any():  # a head that starts at zero says nothing of what is before it
            nn.init.normal_(parameter, 0, 0.1)
        if name.endswith("bias"):  # or ReLUs at the output are dead
            nn.init.uniform_(parameter, 0.0, 0.1)
    batchnorms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [module.momentum for module in batchnorms]
    x = torch.randn(2, 3, case.image, case.image)
    model.eval()
    for module in batchnorms:
        module.train()
        module.momentum = 1.0
    with torch.no_grad():
        case.forward(model, torch.randn(4, 3, case.image, case.image))
    for module, momentum in zip(batchnorms, momenta, strict=True):
        module.momentum = momentum
    return model.eval(), x


def check(case: Case) -> Row:
    """Take a model from scores to a step of fine-tuning, with an assertion for each thing that the row says."""
    model, x = prepared(case)
    scores = fastscore.score(model, [x], forward=case.forward, progress=False)
    assert all(values.isfinite().all() for values in scores.values())
    result = fastscore.prune(model, scores, x[:1], macs=SHARE, forward=case.forward, compensate=False)
    before, after = result.report.macs
    assert SHARE - 0.1 < after / before <= SHARE
    check_mask(model, result.model, result.removed, x, case.forward)
    made = sum(_width(layer) for layer in _layers(model))
    scored = sum(_width(model.get_submodule(name)) for name in {
        member.layer for group in trace(model, x[:1], case.forward).groups if group.name in scores
        for member in group.role("producer")})
    return Row(case.name, case.image, (scored, made), "yes", exported(result.model, x, case.forward),
               trained(result.model, x, case.forward), reasons(scores.skipped, model))


def check_mask(model: nn.Module, pruned: nn.Module, removed: dict[str, Tensor], x: Tensor, forward: Forward) -> None:
    """The larger model, where consumers read the removed channels as zero, computes what the smaller one does."""
    def run(model: nn.Module) -> Tensor:
        (output,) = output_tensors(forward(model, x), "model")
        return output

    graph: ChannelGraph = trace(model, x[:1], forward)
    skip = any(isinstance(module, nn.GroupNorm) for module in model.modules())  # its statistics are of all channels
    with torch.no_grad():
        dense = run(model)
        handles = list(at_consumers(model, removed_positions(graph.groups, removed), {}))
        masked = run(model)
        for handle in handles:
            handle.remove()
        smaller = run(pruned)
    assert smaller.shape == dense.shape
    assert (dense - masked).abs().max() > 1e-3 * masked.abs().max()
    if not skip:
        torch.testing.assert_close(smaller, masked, rtol=1e-3, atol=1e-4 * float(masked.abs().max()))


def exported(model: nn.Module, x: Tensor, forward: Forward) -> str:
    """Through torch.export, and the same after it."""
    if forward is not call_model:
        return "–"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(model.eval(), (x,)).module()
        except Exception as error:
            return f"no: {type(error).__name__}"
        (here,), (there,) = output_tensors(model(x), "model"), output_tensors(program(x), "model")
        torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-4 * float(here.abs().max()))
    return "yes"


def trained(model: nn.Module, x: Tensor, forward: Forward) -> str:
    """A step of SGD in training mode, auxiliary outputs and all, after which every weight that was reached differs."""
    model = model.train()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loss = sum((output.float().square().mean() for output in _tensors(forward(model, x))), torch.zeros(()))
    loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    optimizer.step()
    assert reached
    assert loss.isfinite()
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, weights[name])]
    assert len(moved) > 0.5 * len(reached)
    return "yes"


def reasons(skipped: dict[str, str], model: nn.Module) -> str:
    """What is kept and why, in short; the layers that make the output are not worth a word."""
    kinds = {type(module).__name__ for module in model.modules()}
    words: Counter[str] = Counter()
    for reason in skipped.values():
        if reason != "its channels are the model's output":
            kind = next((kind for kind in sorted(kinds, key=len, reverse=True) if f"({kind})" in reason), None)
            words[f"channels that pass through {kind}" if kind and "pass through" in reason else
                  "channels that meet a parameter of the model's own" if "(Parameter)" in reason else
                  "channels that a view divides" if "a view divides" in reason else
                  "channels that the code cuts at fixed places" if "cut at places" in reason else
                  "channels that are mixed or moved" if "tracer cannot follow" in reason else
                  "channels all tied together" if "removed together" in reason else
                  "layers that share a weight" if "shares its weight" in reason else
                  "computed weights" if "parametrization" in reason else
                  "layers that the images do not reach" if "does not run on" in reason else
                  "layers of auxiliary heads" if "training alone" in reason else
                  "channels that auxiliary heads read" if "no backward pass" in reason else
                  "grouped or merging convolutions" if "grouped" in reason or "fixed sets" in reason else reason] += 1
    return "; ".join(f"{count} × {word}" for word, count in sorted(words.items())) or "nothing"


def _layers(model: nn.Module) -> Iterable[nn.Module]:
    return (module for module in model.modules() if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
            and not (isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.out_channels > 1))


def _width(layer: nn.Module) -> int:
    return int(layer.weight.shape[1 if getattr(layer, "transposed", False) else 0])


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output or ()
    return [tensor for value in values for tensor in _tensors(value)] if not isinstance(output, str) else []


def row(case: Case) -> Row:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return check(case)


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    head, _, table = PAGE.read_text().partition("| model |")
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()[2:]}
    for case in CASES:
        if not names or case.name in names:
            try:
                rows[case.name] = str(row(case))
            except Exception as error:  # its line, if there is one, stays as it was: false
                print(f"{case.name}: {type(error).__name__}: {str(error)[:600]}", file=sys.stderr, flush=True)
                continue
            print(rows[case.name], flush=True)
    PAGE.write_text(head + "\n".join([
        "| model | image | channels scored | pruned | exported | a step of training | kept (reason) |",
        "|---|---|---|---|---|---|---|", *(rows[case.name] for case in CASES if case.name in rows)]) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
