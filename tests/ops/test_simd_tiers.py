"""The kernels of every SIMD tier that this processor has: the same tests again, in a process of their own.

But for what is the same code in every tier (how threads share the work), what takes seconds over every uniform number,
two of three examples where a test has a dozen, and the tiers above the narrowest: those with FASTSCORE_NIGHTLY=1. The
widest is that of all other tests.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from started import environment

from fastscore.ops import library

HERE = Path(__file__).resolve().parent
TIERS = {"DEFAULT": ["baseline"], "AVX2": ["baseline", "x86-64-v3"],
         "AVX512": ["baseline", "x86-64-v3", "x86-64-v4"]}.get(torch.backends.cpu.get_cpu_capability(), ["baseline"])
RUN = """
import sys
from fastscore.ops.library import simd_tier
print(simd_tier(), flush=True)
if sys.argv[-1].endswith(".py"):
    import itertools
    import pytest

    class Thinned:  # as the number of a test goes round in threes, each value of each axis is among a third
        def pytest_collection_modifyitems(self, items):
            from thinned import NIGHTLY
            examples = [list(group) for _, group in itertools.groupby(items, lambda item: item.function)]
            items[:] = [item for group in examples for i, item in enumerate(group)
                        if NIGHTLY or len(group) < 12 or i % 3 == i // 3 % 3]

    sys.exit(pytest.main(sys.argv[1:], plugins=[Thinned()]))
"""


def python(*args: str, tier: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], env=environment(FASTSCORE_SIMD=tier), cwd=HERE.parents[1],
                          capture_output=True, text=True, check=False)


def test_the_widest_tier_is_the_default():
    if "FASTSCORE_SIMD" not in os.environ:
        assert library.simd_tier() == TIERS[-1]


@pytest.mark.parametrize("tier", TIERS if "FASTSCORE_NIGHTLY" in os.environ else TIERS[:1])
def test_tier(tier):
    kernels = [str(HERE / f"test_{op}.py") for op in ("channel_sums", "random_gradient", "normalize_gradient",
                                                     "clamp_backward", "winograd")]
    if tier == library.simd_tier():
        kernels = []  # the tests of this very process
    left_out = () if "FASTSCORE_NIGHTLY" in os.environ else ("-k", "not threads_change and not over_every_uniform")
    run = python("-c", RUN, "-q", "-x", "-p", "no:cacheprovider", *left_out, *kernels, tier=tier)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert run.stdout.splitlines()[0] == tier


def test_an_unknown_tier_is_an_error():
    code = f"import torch; torch.ops.load_library({str(library.LIBRARY)!r}); torch.ops.fastscore.simd_tier()"
    run = python("-c", code, tier="avx9")
    assert run.returncode == 1
    assert "FASTSCORE_SIMD is avx9" in run.stderr
    assert "use baseline, x86-64-v3 or x86-64-v4" in run.stderr
