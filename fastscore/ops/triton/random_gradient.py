# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""random_gradient: a random output gradient per sample, a pure function of (seed, sample id, probe, class).

Four classes share one Philox block. A gradient too long for one program is made twice, first for its length: cheaper
than writing it, reading it back and writing it again.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastscore.ops import checks
from fastscore.ops.triton.common import Launch, Step, keep, multiprocessors, register_limit
from fastscore.ops.triton.launch import RandomLaunch, plan_random_gradient


@triton.jit
def polynomial(x, coefficients):
    """Σ_i coefficients_i · x^i"""
    total = x * coefficients[len(coefficients) - 1]
    for i in tl.static_range(len(coefficients) - 2, 0, -1):
        total = (total + coefficients[i]) * x
    return total + coefficients[0]


@triton.jit
def box_muller_radius(word):
    """sqrt(-2 ln u) with u = m / 2²⁵, m = 2 (word >> 8) + 1.

    u = f · 2^exponent with f in [√½, √2). Near u = 1 the float nearest u loses what ln needs, while u - 1 is exact.
    """
    m = ((word >> 8) * 2 + 1).to(tl.int32)
    bits = (m.to(tl.float32) * 2**-25).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    f_minus_1 = tl.where(exponent == 0, (m - (1 << 25)).to(tl.float32) * 2**-25, f - 1.0)
    z = tl.div_rn(f_minus_1, f + 1.0)  # ln f = 2 artanh z, and |z| < 0.172
    log = exponent.to(tl.float32) * 0.6931471805599453 + z * polynomial(z * z, (2.0, 2 / 3, 2 / 5, 2 / 7, 2 / 9))
    return tl.sqrt_rn(-2.0 * log)


@triton.jit
def box_muller_angle(word):
    """cos and sin of 2π u, u as above; the rest of a quarter turn, in [-½, ½], is exact in float32."""
    m = ((word >> 8) * 2 + 1).to(tl.int32)
    quadrant = (m + (1 << 22)) >> 23
    x = (m - (quadrant << 23)).to(tl.float32) * (1.5707963267948966 * 2**-23)
    sine = x * polynomial(x * x, (1.0, -1 / 6, 1 / 120, -1 / 5040, 1 / 362880))
    cosine = polynomial(x * x, (1.0, -1 / 2, 1 / 24, -1 / 720, 1 / 40320, -1 / 3628800))
    swap = (quadrant & 1) != 0
    cosine, sine = tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
    return tl.where((quadrant + 1) & 2 != 0, -cosine, cosine), tl.where(quadrant & 2 != 0, -sine, sine)


@triton.jit
def random_words(ids, quad, seed, probe):
    """The words of classes 4·quad to 4·quad + 3 for the sample that `ids` points to, as four tensors."""
    sample = tl.load(ids)
    low, high = (sample & 0xFFFFFFFF).to(tl.uint32), ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    counter = quad.to(tl.uint32)
    return tl.philox(seed, counter, (counter * 0) + probe.to(tl.uint32), (counter * 0) + low, (counter * 0) + high)


@triton.jit
def interleave(v0, v1, v2, v3):
    """Four tensors [B] -> [4 B]: 0 0's, 1's, 2's and 3's first elements, then their second ones."""
    return tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), (4 * v0.shape[0],))


@triton.jit
def random_values(ids, first, classes, seed, probe, NORMAL: tl.constexpr, QUADS: tl.constexpr):
    """Values of classes 4·first to 4·(first + QUADS) - 1, float32 [4 QUADS]; 0 beyond `classes`."""
    quad = first + tl.arange(0, QUADS)
    w0, w1, w2, w3 = random_words(ids, quad, seed, probe)
    if NORMAL:
        radius0, radius2 = box_muller_radius(w0), box_muller_radius(w2)
        cosine1, sine1 = box_muller_angle(w1)
        cosine3, sine3 = box_muller_angle(w3)
        values = interleave(radius0 * cosine1, radius0 * sine1, radius2 * cosine3, radius2 * sine3)
    else:
        values = tl.where(interleave(w0, w1, w2, w3) >> 31 != 0, -1.0, 1.0)
    return tl.where(4 * first + tl.arange(0, 4 * QUADS) < classes, values, 0.0)


@triton.jit(do_not_specialize=["id_stride", "classes", "splits", "seed", "probe"])
def random_lengths_kernel(ids, partials, seed: tl.int64, probe: tl.int64, id_stride, classes, splits,
                          QUADS: tl.constexpr):
    """ids [N] -> squared lengths of the parts of each normal gradient, partials [N, splits]"""
    n, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    values = random_values(ids + n * id_stride, split.to(tl.int64) * QUADS, classes, seed, probe, True, QUADS)
    tl.store(partials + n * splits + split, tl.sum(values * values))


@triton.jit(do_not_specialize=["id_stride", "classes", "splits", "seed", "probe"])
def random_gradient_kernel(ids, partials, out, seed: tl.int64, probe: tl.int64, id_stride, classes, splits, scale,
                           NORMAL: tl.constexpr, LENGTH: tl.constexpr, ALIGN: tl.constexpr, QUADS: tl.constexpr,
                           BLOCK_SPLITS: tl.constexpr):
    """ids [N] -> out [N, K]

    Values are multiplied by `scale`, and divided by the length that LENGTH says where to find: "given" (it is in
    `scale`), "held" (this program holds the whole gradient) or "partials".
    """
    n, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    classes = classes // ALIGN * ALIGN
    first = split.to(tl.int64) * QUADS
    values = random_values(ids + n * id_stride, first, classes, seed, probe, NORMAL, QUADS)
    if LENGTH == "held":
        scale /= tl.sqrt_rn(tl.sum(values * values))
    elif LENGTH == "partials":
        squares = tl.zeros((BLOCK_SPLITS,), tl.float32)
        for part in range(0, splits, BLOCK_SPLITS):
            parts = part + tl.arange(0, BLOCK_SPLITS)
            squares += tl.load(partials + n * splits + parts, parts < splits, other=0.0)
        scale /= tl.sqrt_rn(tl.sum(squares))
    k = 4 * first + tl.arange(0, 4 * QUADS)
    tl.store(out + n * classes + k, (values * scale).to(out.dtype.element_ty), k < classes)


def launch(plan: RandomLaunch, device: torch.device, id_stride: int, normal: bool, normalize: bool) -> Launch:
    """Of the sample ids and out, [N, K]; numbers: seed and probe."""
    # Signs all have length √K.
    scale = 1 / math.sqrt(plan.classes) if normalize and not normal else 1.0
    length = "given" if not (normalize and normal) else "held" if plan.splits == 1 else "partials"
    constants, out, partials = {"QUADS": plan.quads, "num_warps": plan.warps, **register_limit()}, 1, 2
    sizes = (id_stride, plan.classes, plan.splits)
    draw = Step(random_gradient_kernel, plan.grid, (0, partials if length == "partials" else out, out),
                (*sizes, scale), {**constants, "NORMAL": normal, "LENGTH": length, "ALIGN": plan.align,
                                  "BLOCK_SPLITS": 128})
    if length != "partials":
        return Launch(device, (draw,))
    return Launch(device, (Step(random_lengths_kernel, plan.grid, (0, partials), sizes, constants), draw),
                  ((plan.samples, plan.splits), torch.float32))


_launches: dict[Any, Launch] = {}


def random_gradient(sample_ids: Tensor, classes: int, seed: int, probe: int = 0, distribution: str = "normal",
                    normalize: bool = True, dtype: torch.dtype | None = None) -> Tensor:
    """Random gradients, [N, K]."""
    checks.check_random(sample_ids, classes, seed, probe, distribution, dtype)
    out = sample_ids.new_empty((sample_ids.shape[0], classes), dtype=dtype or torch.float32)
    key = (classes, distribution, normalize, dtype, sample_ids.shape, sample_ids.stride(), sample_ids.device)
    known = _launches.get(key)
    if known is None:
        multiprocessors(sample_ids.device)
        if out.numel() == 0:
            return out
        plan = plan_random_gradient(sample_ids.shape[0], classes)
        known = keep(_launches, key, launch(plan, sample_ids.device, sample_ids.stride(0), distribution == "normal",
                                            normalize))
    known((sample_ids, out), (seed, probe))
    return out
