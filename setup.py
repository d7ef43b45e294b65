"""Builds the native operations of csrc/; everything else is in pyproject.toml."""

from glob import glob

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

CPU_SOURCES = [path for path in sorted(glob("csrc/*/*.cpp")) if not path.endswith("_cuda.cpp")]

setup(
    ext_modules=[
        CppExtension(
            name="megatron_kanana._native",
            sources=CPU_SOURCES,
            depends=glob("csrc/*/*.h"),
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
