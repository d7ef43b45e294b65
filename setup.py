"""Builds the native operations of csrc/; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

CSRC = Path("csrc")
CPU_SOURCES = [path for path in sorted(CSRC.glob("*/*.cpp")) if not path.stem.endswith("_cuda")]

setup(
    ext_modules=[
        CppExtension(
            name="megatron_kanana._native",
            sources=[str(path) for path in CPU_SOURCES],
            depends=[str(path) for path in CSRC.glob("*/*.h")],
            extra_compile_args=[
                *("-O3", "-std=c++20", "-fopenmp", "-Wall", "-Wextra", "-Werror"),
                "-Wno-unused-parameter",  # torch's own headers have some
            ],
            extra_link_args=["-fopenmp"],
        )
    ],
    # torch.ops.load_library opens the result, so it needs no Python module inside.
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
)
