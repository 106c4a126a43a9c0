"""The CUDA kernels of csrc/cuda on host memory: builds driver.cpp with the host compiler and calls it."""

import ctypes
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[2] / "csrc" / "cuda"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SUMS_OF = {"channel_dot": 1, "channel_powers": 2, "channel_sums": 3}
LAYOUTS = ("rows", "columns", "strided")
MARGIN = 64  # elements before and after a tensor's own, a multiple of what one 16-byte load brings


def compile_driver(output: Path, *flags: str, source: str = "driver.cpp", kernels: Path = KERNELS) -> Path:
    """Compiles a shim source with the kernels of a folder; the compiler's words if it fails."""
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas",
               "-pthread", *flags, f"-I{HERE}", f"-I{kernels}", str(HERE / source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return output


class Strides(ctypes.Structure):
    _fields_ = [("a", ctypes.c_int64), ("g", ctypes.c_int64)]


class Split(ctypes.Structure):
    _fields_ = [("segment", ctypes.c_int64), ("splits", ctypes.c_int64)]


class Geometry(ctypes.Structure):
    """csrc/cuda/plan_channel_sums.cuh, struct Geometry."""

    _fields_ = [("layout", ctypes.c_int), ("wide", ctypes.c_bool), ("even", ctypes.c_bool), ("samples", ctypes.c_int64),
                ("channels", ctypes.c_int64), ("positions", ctypes.c_int64), ("sample", Strides), ("channel", Strides),
                ("position", Strides), ("lanes", ctypes.c_int), ("channel_lanes", ctypes.c_int), ("split", Split),
                ("blocks", ctypes.c_int64)]


def modelled_reads(geometry: Geometry, element_size: int) -> int:
    """Bytes that a launch reads from a and g, from its geometry alone."""
    covered = sum(min(geometry.split.segment, geometry.positions - split * geometry.split.segment)
                  for split in range(geometry.split.splits))
    return 2 * element_size * geometry.samples * geometry.channels * covered


def rows_of_block(geometry: Geometry, element_size: int) -> int:
    """Sums that one block of 256 threads makes."""
    channels_of_thread = 16 // element_size if LAYOUTS[geometry.layout] == "columns" and geometry.wide else 1
    return 256 // geometry.lanes * channels_of_thread


class Pair(ctypes.Structure):
    """Two tensors of one shape, as driver.cpp takes them."""

    _fields_ = [("a", ctypes.c_void_p), ("g", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("dims", ctypes.c_int32),
                ("sizes", ctypes.POINTER(ctypes.c_int64)), ("strides_a", ctypes.POINTER(ctypes.c_int64)),
                ("strides_g", ctypes.POINTER(ctypes.c_int64))]

    @classmethod
    def of(cls, a: Tensor, g: Tensor) -> "Pair":
        def integers(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
            return (ctypes.c_int64 * len(values))(*values)

        return cls(a.data_ptr(), g.data_ptr(), DTYPES.index(a.dtype), a.dim(), integers(a.shape), integers(a.stride()),
                   integers(g.stride()))


class Padded:
    """A tensor of NaN within a margin of NaN: everything inside must be written, nothing outside."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self._all = torch.full((torch.Size(shape).numel() + 2 * MARGIN,), torch.nan, dtype=dtype)
        self.tensor = self._all[MARGIN:-MARGIN].view(shape)

    def checked(self) -> Tensor:
        """The tensor, once its margin is seen to be whole."""
        assert self._all[:MARGIN].isnan().all(), "written before the output"
        assert self._all[-MARGIN:].isnan().all(), "written after the output"
        return self.tensor


@dataclass
class Reads:
    """What a kernel read through __ldg: 16 bytes at a time, and in single elements."""

    packed_bytes: int
    single_bytes: int


class Shim:
    """The driver, every call watched: accesses stay aligned and inside, and read each element as often as told."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.strays.restype = ctypes.c_int64
        self.library.packed_bytes.restype = self.library.single_bytes.restype = ctypes.c_int64
        self.reads = Reads(0, 0)

    def _watch(self, *tensors: Tensor) -> None:
        self.library.reset()
        for tensor in tensors:
            storage, size = tensor.untyped_storage(), tensor.element_size()
            self.library.watch(ctypes.c_void_p(storage.data_ptr()), ctypes.c_int64(storage.nbytes() // size),
                               ctypes.c_int64(size))

    def _check(self, *tensors: Tensor, times: int = 1) -> None:
        strays = self.library.strays()
        assert strays == 0, f"{strays} accesses out of bounds or out of alignment"
        for index, tensor in enumerate(tensors):
            count = tensor.untyped_storage().nbytes() // tensor.element_size()
            reads = torch.zeros(count, dtype=torch.int16)
            self.library.reads_of(index, ctypes.c_void_p(reads.data_ptr()))
            elements = torch.arange(count).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            expected = times * torch.bincount(elements.flatten(), minlength=count)
            assert torch.equal(reads.to(expected.dtype), expected), "elements read too often or never"
        self.reads = Reads(self.library.packed_bytes(), self.library.single_bytes())
        self.library.reset()

    def geometry(self, a: Tensor, g: Tensor, channel_dim: int = 1, units: int = 1) -> Geometry:
        """How channel_sums would be launched on a device of `units` multiprocessors."""
        result = Geometry()
        self.library.channel_geometry(ctypes.byref(Pair.of(a, g)), channel_dim % a.dim(), units, ctypes.byref(result))
        return result

    def channel(self, op: str, a: Tensor, g: Tensor, channel_dim: int = 1, units: int = 1, watched: bool = True,
                first_split: int = 0, mean: bool = False) -> tuple[Tensor, ...]:
        """channel_dot, channel_powers or channel_sums; every element of a and g must be read exactly once."""
        channel_dim %= a.dim()
        dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
        sums = Padded((SUMS_OF[op], a.shape[0], a.shape[channel_dim]), dtype)
        tensors = (a, g) if watched else ()
        self._watch(*tensors)
        self.library.start_at_split(ctypes.c_int64(first_split))
        self.library.channel_sums(ctypes.byref(Pair.of(a, g)), channel_dim, units, SUMS_OF[op], mean,
                                  ctypes.c_void_p(sums.tensor.data_ptr()))
        self._check(*tensors)
        return sums.checked().unbind()

    def clamp_backward(self, y: Tensor, g: Tensor, rest: Tensor | None, low: float, high: float, units: int = 1,
                       mean: bool = False) -> tuple[Tensor, ...]:
        """The three sums; g is written to. Every element of y, g and rest must be read exactly once."""
        sums = Padded((3, *y.shape[:2]), torch.float64 if y.dtype == torch.float64 else torch.float32)
        tensors = (y, g) if rest is None else (y, g, rest)
        self._watch(*tensors)
        self.library.start_at_split(ctypes.c_int64(0))
        self.library.clamp_backward(ctypes.byref(Pair.of(y, g)), ctypes.c_void_p(None if rest is None
                                                                                 else rest.data_ptr()),
                                    ctypes.c_double(low), ctypes.c_double(high), units, mean,
                                    ctypes.c_void_p(sums.tensor.data_ptr()))
        self._check(*tensors)
        return sums.checked().unbind()

    def normalize_gradient(self, g: Tensor, eps: float = 0.0, units: int = 1) -> tuple[Tensor, Tensor, int]:
        """The scaled gradient, the lengths and the number of times that g was read."""
        whole = Padded((g.numel(),), g.dtype)
        like = torch.empty_like(g)  # its strides are those of the op's result
        unit = whole.tensor.as_strided(like.shape, like.stride(), whole.tensor.storage_offset())
        norm = Padded((g.shape[0],), torch.float64 if g.dtype == torch.float64 else torch.float32)
        self._watch(g)
        passes = self.library.normalize_gradient(ctypes.byref(Pair.of(g, unit)), units, ctypes.c_double(eps),
                                                 ctypes.c_void_p(norm.tensor.data_ptr()))
        self._check(g, times=passes)
        whole.checked()
        return unit, norm.checked(), passes

    def random_gradient(self, ids: Tensor, classes: int, seed: int, probe: int = 0, distribution: str = "normal",
                        normalize: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K]."""
        out = Padded((ids.shape[0], classes), dtype)
        self._watch()
        self.library.random_gradient(
            ctypes.c_void_p(ids.data_ptr()), ctypes.c_int64(ids.shape[0]), ctypes.c_int64(ids.stride(0)),
            ctypes.c_int64(classes), ctypes.c_int64(seed), ctypes.c_uint32(probe), distribution == "normal", normalize,
            DTYPES.index(dtype), ctypes.c_void_p(out.tensor.data_ptr()))
        self._check()
        return out.checked()

    def philox(self, *counter_and_key: int) -> tuple[int, ...]:
        """Four words from four counters and two keys."""
        counter, key, words = ((ctypes.c_uint32 * 4)(*counter_and_key[:4]), (ctypes.c_uint32 * 2)(*counter_and_key[4:]),
                               (ctypes.c_uint32 * 4)())
        self.library.philox(counter, key, words)
        return tuple(words)

    def random_words(self, ids: Tensor, blocks: int, seed: int, probe: int = 0) -> Tensor:
        """The words that the kernel turns into values: int64 [N, 4·blocks]."""
        words = torch.zeros(ids.shape[0], 4 * blocks, dtype=torch.uint32)
        self.library.random_words(ctypes.c_void_p(ids.data_ptr()), ctypes.c_int64(ids.shape[0]),
                                  ctypes.c_int64(blocks), ctypes.c_int64(seed), ctypes.c_uint32(probe),
                                  ctypes.c_void_p(words.data_ptr()))
        return words.to(torch.int64)
