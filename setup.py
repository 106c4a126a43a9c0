"""Builds fastscore/_C, the native kernels: one abi3 library for every Python >= 3.10 and torch >= 2.13."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

MACROS = [("TORCH_TARGET_VERSION", "0x020d000000000000")]  # torch 2.13
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno",
             "-fno-trapping-math", "-Wall", "-Wno-psabi", "-Wno-ignored-attributes"]


def files(*patterns: str) -> list[str]:
    """Every file under csrc/ that matches one of the patterns."""
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


setup(
    ext_modules=[CppExtension("fastscore._C", files("*.cpp", "cpu/*.cpp"), depends=files("**/*.h"),
                              define_macros=MACROS, extra_compile_args={"cxx": CXX_FLAGS},
                              py_limited_api=True)],
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=False)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
