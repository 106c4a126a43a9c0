"""csrc/math.h as functions over arrays: compiled here on its own, without torch, and called through ctypes."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HEADER = Path(__file__).resolve().parents[2] / "csrc" / "math.h"
SOURCE = """
#include "math.h"
using namespace fastscore;
extern "C" {
void philox_block(const uint32_t* c, const uint32_t* k, uint32_t* out) {
  const Words words = philox(c[0], c[1], c[2], c[3], k[0], k[1]);
  for (int i = 0; i < 4; ++i) out[i] = words.lane[i];
}
void words(int64_t id, int64_t blocks, uint32_t probe, int64_t seed, uint32_t* out) {
  for (int64_t b = 0; b < blocks; ++b) {
    const Words block = random_words(id, uint32_t(b), probe, seed);
    for (int i = 0; i < 4; ++i) out[4 * b + i] = block.lane[i];
  }
}
void box_muller(const uint32_t* word, int64_t count, float* radius, float* cosine, float* sine) {
  for (int64_t i = 0; i < count; ++i) {
    radius[i] = box_muller_radius(word[i]);
    box_muller_angle(word[i], cosine + i, sine + i);
  }
}
}
"""


@functools.cache
def library() -> ctypes.CDLL:
    compiler = shutil.which("c++")
    if compiler is None:
        raise RuntimeError("these tests compile csrc/math.h: install a C++ compiler (c++) and put it on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "math.cpp"), Path(folder, "math.so")
        source.write_text(SOURCE)
        subprocess.run([compiler, "-std=c++20", "-O2", "-shared", "-fPIC", f"-I{HEADER.parent}", source, "-o", target],
                       check=True)
        return ctypes.CDLL(str(target))


def _pointer(array: NDArray[np.generic]) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def philox(counter: list[int], key: list[int]) -> list[int]:
    out = np.empty(4, np.uint32)
    library().philox_block(_pointer(np.array(counter, np.uint32)), _pointer(np.array(key, np.uint32)), _pointer(out))
    return [int(word) for word in out]


def random_words(sample_id: int, classes: int, seed: int, probe: int) -> NDArray[np.uint32]:
    """The words of one sample, as in `reference.random_words`."""
    blocks = (classes + 3) // 4
    out = np.empty(4 * blocks, np.uint32)
    library().words(ctypes.c_int64(sample_id), ctypes.c_int64(blocks), ctypes.c_uint32(probe), ctypes.c_int64(seed),
                    _pointer(out))
    return out[:classes]


def box_muller(words: NDArray[np.uint32]) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """(radius, cosine, sine) of every word."""
    radius, cosine, sine = (np.empty(len(words), np.float32) for _ in range(3))
    library().box_muller(_pointer(words), ctypes.c_int64(len(words)), *map(_pointer, (radius, cosine, sine)))
    return radius, cosine, sine
