"""Builds fastscore/_C, the native kernels: one abi3 library for every Python >= 3.10 and torch >= 2.13."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

MACROS = [("TORCH_TARGET_VERSION", "0x020d000000000000"), ("Py_LIMITED_API", "0x030a0000")]
CXX_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=fast", "-g0"]


def sources(*folders: str) -> list[str]:
    """Every source file in the folders under csrc/."""
    return sorted(str(path) for folder in folders for path in Path("csrc", folder).glob("*.cpp"))


setup(
    ext_modules=[CppExtension("fastscore._C", sources(".", "cpu"), define_macros=MACROS,
                              extra_compile_args={"cxx": CXX_FLAGS}, py_limited_api=True)],
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=False)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
