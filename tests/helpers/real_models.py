"""Models that people use, with random weights: how each is made, and a batch that it takes.

Transformers and diffusion models are built from tiny configurations, whose code is that of the large ones.
"""

import functools
import os
import warnings
from typing import Any

import diffusers_models
import torch
import transformers_models
from model_case import Case
from network_modules import UNet
from super_resolution import EDSR
from torch import Tensor, nn

from fastscore.batches.outputs import concat_outputs, floating_tensors
from fastscore.cli import models

# torchvision

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


def ssd(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([part.flatten(1) for part in model.head(list(model.backbone(images).values())).values()], 1)


def last_flow(model: nn.Module, pair: Tensor) -> Tensor:
    return model(pair[:, :3], pair[:, 3:], num_flow_updates=2)[-1]


def _torchvision() -> list[Case]:
    small = ["resnet18", "resnext50_32x4d", "vgg11", "densenet121", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5",
             "efficientnet_b0", "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_1", "googlenet", "convnext_tiny"]
    # of which tests/pruning/test_prune.py prunes thin members; what GoogLeNet concatenates, SqueezeNet does too
    heavy = {"resnext50_32x4d", "vgg11", "densenet121", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5",
             "efficientnet_b0", "regnet_y_400mf", "convnext_tiny", "googlenet"}
    others = ["alexnet", "resnet34", "resnet50", "wide_resnet50_2", "vgg11_bn", "vgg16_bn", "densenet169",
              "mobilenet_v3_large", "mnasnet1_0", "efficientnet_b1", "efficientnet_v2_s", "regnet_x_400mf",
              "regnet_y_1_6gf", "shufflenet_v2_x1_0", "squeezenet1_0"]
    sizes = {"inception_v3": 299, "vit_b_16": 224, "vit_b_32": 224, "swin_t": 64, "swin_v2_t": 64, "maxvit_t": 224}
    detector = {"num_classes": 5, "weights_backbone": None}
    clip = functools.partial(_random, 3, 8, 64, 64)
    return [
        *(Case(name, functools.partial(torchvision_model, name, num_classes=10), sizes.get(name, 64),
               small=name in small and name not in heavy) for name in [*small, *others, *sizes]),
        *(Case(name, functools.partial(torchvision_model, name, **detector))
          for name in ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")),
        Case("retinanet_resnet50_fpn", functools.partial(torchvision_model, "retinanet_resnet50_fpn", **detector), 64,
             retinanet),
        Case("fasterrcnn_mobilenet_v3_large_fpn", functools.partial(
            torchvision_model, "fasterrcnn_mobilenet_v3_large_fpn", **detector), 64, faster_rcnn),
        Case("ssdlite320_mobilenet_v3_large", functools.partial(
            torchvision_model, "ssdlite320_mobilenet_v3_large", **detector), 320, ssd),
        *(Case(name, functools.partial(torchvision_model, name, num_classes=10), batch=clip)
          for name in ("r3d_18", "mc3_18", "r2plus1d_18")),
        Case("swin3d_t", functools.partial(torchvision_model, "swin3d_t", num_classes=10), batch=clip),
        Case("raft_small", functools.partial(torchvision_model, "raft_small"), forward=last_flow,
             batch=functools.partial(_random, 6, 128, 128)),
        Case("U-Net with transposed convolutions", UNet, 32, small=True),
        Case("EDSR", EDSR, 32, small=True),
    ]


def _random(*shape_and_samples: int) -> Tensor:
    *shape, samples = shape_and_samples
    return torch.randn(samples, *shape)


# timm: (names, image, options)

_VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 64}
_TIMM: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("resnet50d resnet50 resnetv2_50 efficientnet_lite0 tf_efficientnetv2_b0 mobilenetv3_large_100 "
     "mobilenetv4_conv_small mobilenetv4_hybrid_medium regnetx_002 regnetz_c16 convnext_atto convnextv2_atto repvgg_a0 "
     "convnext_zepto_rms ghostnet_100 ghostnetv2_100 hrnet_w18_small cspresnet50 cspresnext50 cs3darknet_s dla34 "
     "dla60_res2net "
     "res2net50_26w_4s resnest14d seresnet50 mixnet_s hardcorenas_a vgg11_bn densenet121 densenetblur121d xception41 "
     "nfnet_f0 eca_nfnet_l0 fbnetc_100 dpn48b edgenext_xx_small fasternet_t0 hgnet_tiny hgnetv2_b0 inception_next_atto "
     "inception_v4 lcnet_050 mobileone_s0 gcresnext26ts lambda_resnet26t eca_resnext26ts rdnet_tiny repghostnet_050 "
     "repvit_m0_9 resnetblur18 resnetv2_50d_gn resnetv2_50x1_bit resnetv2_50d_evos resnetv2_50d_frn rexnet_100 "
     "selecsls42b skresnet18 starnet_s050 tresnet_m ese_vovnet19b_slim ecaresnet26t resnetaa50 "
     "legacy_seresnet18 test_mambaout efficientvit_b0 poolformer_s12 caformer_s18 convformer_s18 pvt_v2_b0 "
     "pvt_v2_b2_li tf_efficientnet_cc_b0_4e tinynet_e", 64, {}),
    ("vit_tiny_patch16_224 deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224 "
     "vit_relpos_small_patch16_224 vit_srelpos_small_patch16_224 vit_base_patch16_siglip_224 "
     "vit_small_patch14_dinov2 vit_base_patch16_clip_224 vit_small_patch14_reg4_dinov2 convit_tiny", 64, _VIT),
    ("beit_base_patch16_224 beitv2_base_patch16_224", 64, {"depth": 2, "embed_dim": 48, "num_heads": 3,
                                                           "img_size": 64}),
    ("eva02_tiny_patch14_224", 56, {"depth": 2, "img_size": 56}),  # narrower, its blocks add next to nothing
    ("cait_xxs24_224", 64, {**_VIT, "depth_token_only": 1}),
    ("xcit_nano_12_p16_224", 64, _VIT),
    ("mixer_s16_224 gmlp_ti16_224 resmlp_12_224", 64, {"img_size": 64}),
    ("efficientvit_m0 swiftformer_xs mobilevit_xxs mobilevitv2_050 fastvit_t8 shvit_s1 nextvit_small convmixer_768_32",
     128, {}),
    ("efficientformer_l1 efficientformerv2_s0 levit_128s levit_conv_128s coat_lite_tiny crossvit_9_240 davit_tiny "
     "visformer_tiny gcvit_xxtiny hiera_tiny_224 mvitv2_tiny nest_tiny tiny_vit_5m_224 twins_pcpvt_small "
     "twins_svt_small volo_d1_224 "
     "pit_ti_224 coatnet_nano_rw_224 maxvit_pico_rw_256 tnt_s_patch16_224 swin_tiny_patch4_window7_224 "
     "swinv2_cr_tiny_224 vit_tiny_r_s16_p8_224 sequencer2d_s focalnet_tiny_srf vitamin_small_224", 224, {}),
    ("swinv2_tiny_window8_256 botnet26t_256 halonet26t maxvit_tiny_rw_256", 256, {}),
    ("samvit_base_patch16_224", 224, {"depth": 2, "embed_dim": 48, "num_heads": 3, "global_attn_indexes": (1,)}),
)


def timm_model(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=10, **options)


def _timm() -> list[Case]:
    sizes = {"maxvit_pico_rw_256": 256, "crossvit_9_240": 240, "inception_v4": 128}
    return [Case(f"timm:{name}", functools.partial(timm_model, name, **options), sizes.get(name, image),
                 small=name == "vit_tiny_patch16_224") for names, image, options in _TIMM for name in names.split()]


# segmentation-models-pytorch and ultralytics

def segmentation_model(name: str, encoder: str) -> nn.Module:
    import segmentation_models_pytorch

    return getattr(segmentation_models_pytorch, name)(encoder, encoder_weights=None, classes=3)


def yolo(config: str, **options: Any) -> nn.Module:
    """From a configuration of the smallest scale, as a trainer builds it."""
    os.environ.setdefault("YOLO_VERBOSE", "False")
    from ultralytics import YOLO

    return YOLO(config, verbose=False).model


def yolo_output(model: nn.Module, images: Tensor) -> Tensor:
    """What the heads say of every anchor, before boxes are chosen, and the prototypes of masks: what is decoded, and of
    two heads, as v10 and 26 train them, what the other one says too."""
    returned = model(images)
    decoded = floating_tensors(returned[0] if isinstance(returned, tuple) else returned)
    heads = returned[1] if isinstance(returned, tuple) and isinstance(returned[1], dict) else {}
    if "one2one" in heads:
        decoded += [heads["one2one"][name] for name in ("boxes", "scores", "mask_coefficient")
                    if name in heads["one2one"]]
    return concat_outputs(decoded)


def _segmentation() -> list[Case]:
    names = ["Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus",
             "UPerNet", "Segformer"]
    return [*(Case(f"smp:{name}-resnet18", functools.partial(segmentation_model, name, "resnet18"),
                   128 if name == "PAN" else 64) for name in names),
            Case("smp:Unet-mobilenet_v2", functools.partial(segmentation_model, "Unet", "mobilenet_v2")),
            Case("smp:Unet-mit_b0", functools.partial(segmentation_model, "Unet", "mit_b0"))]


def _ultralytics() -> list[Case]:
    names = ["yolov3-tiny", "yolov5n", "yolov6n", "yolov8n", "yolov8n-cls", "yolov8n-seg", "yolov8n-pose",
             "yolov8n-obb", "yolov9t", "yolov10n", "yolo11n", "yolo11n-seg", "yolo12n", "yolo26n"]
    return [Case(f"ultralytics:{name}", functools.partial(yolo, f"{name}.yaml"), forward=yolo_output)
            for name in names]


CASES = [*_torchvision(), *_timm(), *transformers_models.cases(), *diffusers_models.cases(), *_segmentation(),
         *_ultralytics()]
