"""How much of each family of models can shrink: what was asked for, what could before, and what the page says now.

`python tests/helpers/models_page.py` writes the table into docs/models.md with its rows; nothing here runs a model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

HEADINGS = ("family", "before", "now", "wanted", "rows")


@dataclass(frozen=True)
class Family:
    """rows: of the page. wanted: percent of the MACs in layers that shrink; 0 where nothing was asked for. before: the
    shares whose outputs could go, and that shrank, before any of this was done, where they were measured."""

    name: str
    wanted: int
    rows: tuple[str, ...]
    before: str = "–"


def _hugging_face(*names: str) -> tuple[str, ...]:
    return tuple(f"transformers:{name}" for name in names)


FAMILIES = (
    Family("Llama, Qwen 3, Gemma 3, Mistral", 100,
           _hugging_face(*(f"{name}ForCausalLM" for name in ("Llama", "Qwen3", "Gemma3", "Mistral"))), "66 / 83%"),
    Family("Mixtral, Qwen 3 MoE", 95, _hugging_face("MixtralForCausalLM", "Qwen3MoeForCausalLM"), "no expert"),
    Family("ViT", 97, (*_hugging_face("ViTForImageClassification"), "timm:vit_tiny_patch16_224", "vit_b_16"),
           "56 / 71%"),
    Family("DINOv2", 97, _hugging_face("Dinov2ForImageClassification"), "55 / 74%"),
    Family("CLIP, SigLIP", 97, _hugging_face("CLIPModel", "CLIPVisionModelWithProjection",
                                             "SiglipForImageClassification"), "62 / 79%"),
    Family("Whisper", 97, _hugging_face("WhisperForConditionalGeneration")),
    Family("Swin", 90, (*_hugging_face("SwinForImageClassification", "Swinv2ForImageClassification"), "swin_t",
                        "swin_v2_t"), "32 / 63%"),
    Family("SegFormer", 90, _hugging_face("SegformerForSemanticSegmentation")),
    Family("ConvNeXt", 90, (*_hugging_face("ConvNextForImageClassification"), "convnext_tiny", "timm:convnext_atto"),
           "25 / 49%"),
    Family("ConvNeXt V2", 90, (*_hugging_face("ConvNextV2ForImageClassification"), "timm:convnextv2_atto"), "nothing"),
    Family("T5, BART", 95, _hugging_face("T5ForConditionalGeneration", "BartForConditionalGeneration"), "16 / 31%"),
    Family("GPT-2", 95, _hugging_face("GPT2LMHeadModel"), "nothing"),
    Family("DiT", 95, ("diffusers:DiTTransformer2DModel",), "64 / 93%"),
    Family("Stable Diffusion's UNet, AutoencoderKL", 95, ("diffusers:UNet2DConditionModel", "diffusers:AutoencoderKL")),
    Family("ultralytics v8 to 26", 97, tuple(f"ultralytics:yolo{name}" for name in (
        "v8n", "v8n-seg", "v8n-pose", "v8n-obb", "v9t", "v10n", "11n", "11n-seg", "12n", "26n"))),
    Family("EDSR", 95, ("EDSR",), "55%"),
    *(Family(f"timm: {name.split('_')[0]}", 80, tuple(f"timm:{row}" for row in name.split())) for name in (
        "efficientvit_b0", "fastvit_t8", "edgenext_xx_small", "hiera_tiny_224", "xcit_nano_12_p16_224", "davit_tiny",
        "cait_xxs24_224")),
    Family("timm: EfficientViT (MSRA)", 0, ("timm:efficientvit_m0",)),
    Family("PVT", 0, ("timm:pvt_v2_b0", *_hugging_face("PvtForImageClassification")), "42 / 76%"),
    Family("OLMo 2", 0, _hugging_face("Olmo2ForCausalLM")),
    Family("BLOOM", 0, _hugging_face("BloomForCausalLM")),
    Family("MPNet", 0, _hugging_face("MPNetForSequenceClassification")),
    Family("Mamba", 0, _hugging_face("MambaForCausalLM"), "nothing"),
    Family("RAFT", 0, ("raft_small",)),
)


def shares(lines: Mapping[str, str], row: str) -> tuple[float, float]:
    """Percent of the MACs in layers whose outputs can go, and that shrink, in that row of the page; NaN where it says
    nothing."""
    cells = lines[row].split(" | ")[3:5] if row in lines else ["", ""]
    outputs, shrink = (float(cell.rstrip("%")) if cell.endswith("%") else math.nan for cell in cells)
    return outputs, shrink


def table(lines: Mapping[str, str]) -> list[str]:
    """A line for each family, the least of its rows; lines: name of a row -> that line of the page."""
    found = ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    for family in FAMILIES:
        rows = ", ".join(row.partition(":")[2] or row for row in family.rows)
        outputs, shrink = (sorted(of, key=lambda share: -1 if math.isnan(share) else share)[0]
                           for of in zip(*(shares(lines, row) for row in family.rows), strict=True))
        now = "not run" if math.isnan(outputs + shrink) else f"{outputs:.0f} / {shrink:.0f}%"
        wanted = f"{family.wanted}%" if family.wanted else "–"
        found.append(f"| {family.name} | {family.before} | {now} | {wanted} | {rows} |")
    return found
