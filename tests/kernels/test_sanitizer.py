"""compute-sanitizer finds no wrong access and no race in csrc's kernels on a Hopper GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kernels", ["attention", "moe", "loss", "quantization"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_small_shapes_are_clean(tool: str, kernels: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m"]
    result = subprocess.run(
        [*command, f"tests.kernels.sanitized_{kernels}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    summary = "ERROR SUMMARY: 0 errors" if tool == "memcheck" else "RACECHECK SUMMARY: 0 hazards"
    assert summary in result.stdout
