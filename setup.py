"""Builds the native operations of csrc/; everything else is in pyproject.toml.

Where CUDA's compiler is found (CUDA_HOME, else nvcc on the PATH), the kernels for Hopper are built
too: a library free of torch, megatron_kanana/_kernels.so, which the operations are linked with.
"""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

CSRC = Path("csrc")
CUDA_BINDINGS = sorted(str(path) for path in CSRC.glob("ops/*_cuda.cpp"))
SOURCES = sorted({str(path) for path in CSRC.glob("*/*.cpp")} - set(CUDA_BINDINGS))
NVCC_FLAGS = (
    *("-gencode=arch=compute_90a,code=sm_90a", "-std=c++20", "-O3"),
    "-DNDEBUG",  # without it ptxas makes the products wait for each other
    *("--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-Wall", "-Werror=all-warnings"),
)


def find_nvcc() -> str | None:
    """CUDA's compiler, or None."""
    if (home := os.environ.get("CUDA_HOME")) is not None:
        return shutil.which("nvcc", path=Path(home) / "bin")
    return shutil.which("nvcc")


class BuildNative(BuildExtension):
    """Adds the CUDA kernels and their bindings where they can be built."""

    def build_extension(self, extension):
        if (nvcc := find_nvcc()) is not None:
            kernels = Path(self.get_ext_fullpath(extension.name)).with_name("_kernels.so")
            kernels.parent.mkdir(parents=True, exist_ok=True)
            sources = sorted(str(path) for path in CSRC.glob("kernels/*.cu"))
            command = [nvcc, *NVCC_FLAGS, "--threads=0", "-shared", "-cudart=static"]
            command += ["-Xlinker=-soname=_kernels.so", "-o", str(kernels), *sources]
            subprocess.run(command, check=True)
            extension.sources += CUDA_BINDINGS
            extension.extra_objects.append(str(kernels.resolve()))
            extension.extra_link_args.append("-Wl,-rpath,$ORIGIN")
        super().build_extension(extension)

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        package = self.get_finalized_command("build_py").get_package_dir("megatron_kanana")
        for kernels in Path(self.build_lib).glob("megatron_kanana/_kernels.so"):
            shutil.copy(kernels, package)


setup(
    ext_modules=[
        CppExtension(
            name="megatron_kanana._native",
            sources=SOURCES,
            depends=[str(path) for path in CSRC.glob("*/*") if path.suffix not in (".cpp", ".md")],
            extra_compile_args=[
                *("-O3", "-std=c++20", "-fopenmp", "-Wall", "-Wextra", "-Werror"),
                "-Wno-unused-parameter",  # torch's own headers have some
            ],
            extra_link_args=["-fopenmp"],
        )
    ],
    # torch.ops.load_library opens the result, so it needs no Python module inside.
    cmdclass={"build_ext": BuildNative.with_options(no_python_abi_suffix=True)},
)
