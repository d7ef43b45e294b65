"""Builds the native operations of csrc/; everything else is in pyproject.toml."""

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

setup(
    ext_modules=[
        CppExtension(
            name="megatron_kanana._native",
            sources=["csrc/cpu/causal_softmax.cpp", "csrc/ops/causal_softmax.cpp"],
            depends=["csrc/cpu/causal_softmax.h"],
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
