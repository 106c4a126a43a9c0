"""Arguments that nobody means: every op ends in a result or a Python exception, never in a crash.

The ops are called as `torch.ops.fastscore.*`, past the checks of fastscore.ops, in processes that die of a crash.
FASTSCORE_NIGHTLY=1 makes it 30 times as many calls.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from started import environment

from fastscore import ops

SEEDS, CALLS = ((0, 1), 30_000) if os.environ.get("FASTSCORE_NIGHTLY") else ((0,), 2_000)
HERE = Path(__file__).resolve().parent

FUZZ = """
import random, sys, warnings
import torch
from fastscore import ops
from fastscore.ops import reference

warnings.simplefilter('ignore')
seed, calls = int(sys.argv[1]), int(sys.argv[2])
rng = random.Random(seed)
FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES = FLOATING * 4 + [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
                         torch.uint16]
INTEGERS = [0, 1, -1, 2, 3, -2, 63, 64, 65, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**34, 2**34 + 1, -2**31, 2**62,
            2**63 - 1, -2**63]
ENDS = [0.0, 6.0, -1.0, 1.0, float("inf"), -float("inf"), float("nan"), 5e-324, 1e308]
RAW = torch.ops.fastscore


def tensor(shape=None, dtype=None):
    dtype = dtype if dtype in DTYPES else rng.choice(DTYPES)
    shape = shape or [rng.choice([0, 1, 1, 2, 3, 5, 17]) for _ in range(rng.choice([0, 1, 2, 2, 3, 3, 4, 5, 7]))]
    kind = rng.choice(["plain"] * 6 + ["strided", "expanded", "huge", "overlap", "deep", "meta", "sparse", "quantized",
                                       "requires_grad", "negative"])
    if len(shape) > 8:  # of the other operand
        return torch.zeros(shape, dtype=dtype) if max(shape) == 1 else torch.zeros(1, dtype=dtype).expand(shape)
    if kind == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    x = torch.zeros(shape, dtype=dtype)
    if kind == "strided" and shape:
        big = torch.zeros([2 * size + 1 for size in shape], dtype=dtype)
        return big[tuple(slice(1, 2 * size + 1, 2) for size in shape)]
    if kind == "expanded" and shape:
        return torch.zeros([1] * len(shape), dtype=dtype).expand(shape)
    if kind == "huge":  # sizes that no memory holds, of stride 0
        sizes = [rng.choice([1, 2, 3])] + [rng.choice([1, 2, 2**20, 0]) for _ in shape[1:3]]
        if sizes.count(2**20) > 1:
            sizes[-1] = 0  # more sums than memory would be an error of the allocator; its turn comes below
        return torch.zeros(1, dtype=dtype).expand(sizes)
    if kind == "overlap" and shape:
        return torch.zeros(256, dtype=dtype).as_strided([min(size, 3) for size in shape], [1] * len(shape))
    if kind == "deep":
        return torch.zeros([1] * rng.choice([60, 63, 64]), dtype=dtype)
    if kind == "sparse" and dtype in FLOATING and shape:
        return x.to_sparse()
    if kind == "quantized" and shape:
        return torch.quantize_per_tensor(torch.zeros(shape), 0.1, 0, torch.quint8)
    if kind == "requires_grad" and dtype in FLOATING:
        return x.requires_grad_()
    if kind == "negative" and dtype == torch.float32:
        return torch.zeros(shape, dtype=torch.complex64).conj().imag
    return x


def call():
    op = rng.choice(["channel_sums", "channel_dot", "channel_powers", "random_gradient", "normalize_gradient",
                     "clamp_backward_"])
    if op.startswith("channel"):
        a = tensor()
        g = rng.choice([a, a.clone() if a.layout == torch.strided and a.numel() < 10**6 else a, tensor(),
                        tensor(list(a.shape), a.dtype)])
        args = [a, g, rng.choice([1, 1, 1, -1, 2, *INTEGERS])]
    elif op == "random_gradient":
        args = [rng.choice([torch.arange(3), tensor(), torch.arange(6)[::2], torch.zeros(1).long().expand(4)]),
                rng.choice([0, 1, 5, 130, -1, -2**63, 2**34 + 1]), rng.choice(INTEGERS), rng.choice(INTEGERS),
                rng.choice(["normal", "rademacher", "", "uniform", "x" * 10**5, chr(0)]), rng.choice([True, False])]
    elif op == "clamp_backward_":
        y = tensor()
        others = lambda: rng.choice([y, y.clone() if y.layout == torch.strided and y.numel() < 10**6 else y, tensor(),
                                     tensor(list(y.shape), y.dtype)])
        args = [y, others(), rng.choice([None, others()]), *rng.sample(ENDS, 2)]
    else:
        args = [tensor(), rng.choice([0.0, 1.0, -1.0, float("nan"), float("inf"), -float("inf"), 5e-324, 1e308])]
    if rng.random() < 0.05:
        args[rng.randrange(len(args))] = rng.choice([None, "1", 1.5, [1], torch.zeros(2), 2**70])
    try:
        space = rng.choice([RAW, RAW, ops])
        out = getattr(space, op if space is RAW else op.rstrip("_"))(*args)
    except Exception as error:
        assert str(error), op
        return "refused"
    for x in out if isinstance(out, tuple) else (out,):
        assert isinstance(x, torch.Tensor)
        if x.device.type == "cpu" and x.numel():
            float(x.reshape(-1)[-1])
    return "computed"


counts = {"computed": 0, "refused": 0}
for n in range(calls):
    print(n, end="\\r", file=sys.stderr, flush=True)
    counts[call()] += 1
print(counts)
assert min(counts.values()) > calls // 10
"""


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False, cwd=HERE.parents[1],
                          env=environment())


def test_no_memory_behind_no_positions():
    """Once read one element of an operand that has none."""
    a = torch.empty_strided((1, 0, 17), (17, 17, 1))
    g = torch.empty_strided((1, 0, 17), (1, 0, 0))
    for total in (*ops.channel_sums(a, g, 2), *ops.channel_powers(a, g, 2)):
        assert torch.equal(total, torch.zeros(1, 17))


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_crashes(seed):
    result = run("-c", FUZZ, str(seed), str(CALLS))
    assert result.returncode == 0, (result.returncode, result.stdout[-2000:], result.stderr[-3000:])
    assert "computed" in result.stdout
