"""CUDA sources compile for Hopper on a machine without a GPU, to the machine code they are for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "kernels").glob("*.cu"))
# Of PyPI's packages, which the tests need beside the ones of the package itself.
TOOLS = Path(sys.prefix) / "lib" / f"python3.{sys.version_info.minor}" / "site-packages/nvidia/cu13"
FLAGS = [
    *("-gencode=arch=compute_90a,code=sm_90a", "-std=c++20", "-O3", "-DNDEBUG"),
    *("--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-Wall", "-Werror=all-warnings"),
]
# A few scalars of the backward; accumulators in memory would take thousands.
ALLOWED_SPILL_BYTES = 256


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Object file and the assembler's report of each source."""
    folder = tmp_path_factory.mktemp("cuda")

    def compile_source(source: Path) -> tuple[Path, str]:
        target = folder / f"{source.stem}.o"
        command = [str(TOOLS / "bin/nvcc"), *FLAGS, "-Xptxas=-v", "-c", str(source)]
        result = subprocess.run(
            [*command, "-o", str(target)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "CUDA_HOME": str(TOOLS)},
        )
        assert result.returncode == 0, result.stderr
        return target, result.stderr

    with ThreadPoolExecutor(2) as pool:
        results = pool.map(compile_source, SOURCES)
        return {source.stem: result for source, result in zip(SOURCES, results, strict=True)}


def test_matrix_products_do_not_wait_for_each_other(
    compiled: dict[str, tuple[Path, str]],
) -> None:
    # C75xx are the assembler's remarks that it serialises them: right results, at half the speed.
    for name, (_, report) in compiled.items():
        assert "C75" not in report, f"{name}: {report}"


def test_accumulators_stay_in_registers(compiled: dict[str, tuple[Path, str]]) -> None:
    report = "".join(report for _, report in compiled.values())
    stores = [int(n) for n in re.findall(r"(\d+) bytes spill stores", report)]
    assert len(stores) >= 6
    assert max(stores) <= ALLOWED_SPILL_BYTES


@pytest.mark.parametrize(
    "kernel",
    [
        "flash_attention_forward",
        "flash_attention_backward",
        "experts_up_forward",
        "experts_products",
        "experts_down_backward",
        "experts_weight_gradient",
    ],
)
def test_kernels_multiply_on_hoppers_own_units(
    compiled: dict[str, tuple[Path, str]], kernel: str
) -> None:
    target, _ = compiled[f"sm90_{kernel}"]
    code = subprocess.run(
        [str(TOOLS / "bin/cuobjdump"), "-sass", str(target)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": f"{TOOLS / 'bin'}:{os.environ['PATH']}"},
    ).stdout
    assert "HGMMA" in code  # warpgroups' products
    assert "UTMALDG" in code  # the bulk copy engine
    assert "HMMA." not in code.replace("HGMMA.", "")  # the slow path of older chips
