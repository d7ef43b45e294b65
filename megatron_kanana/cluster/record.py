"""What a run was started with, written beside it.

    python -m megatron_kanana.cluster.record runs/NAME/cluster/environment.json

Of the environment only the variables that steer the run are kept; others may hold secrets.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent.parent
"""Folder that `megatron_kanana` lies in, under version control where it is a checkout."""

VARIABLES = (
    *("SLURM_", "NCCL_", "CUDA_", "NVIDIA_VISIBLE", "NVTE_", "TORCH_", "PYTORCH_", "OMP_", "MKL_"),
    *("UCX_", "FI_", "GLOO_", "MASTER_", "HYDRA_", "PYTHONPATH", "LD_LIBRARY_PATH"),
)
"""Beginnings of the names of environment variables that are kept."""

_TIMEOUT_SECONDS = 60


def environment() -> dict[str, Any]:
    """Commit, versions, host, variables, and `nvidia-smi`'s words where there is one."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "machine": platform.platform(),
        "python": sys.version,
        "commit": output("git", "-C", str(PROJECT), "rev-parse", "HEAD"),
        "changed_files": (
            output("git", "-C", str(PROJECT), "status", "--short") or ""
        ).splitlines(),
        "packages": {
            each.metadata["Name"]: each.version for each in importlib.metadata.distributions()
        },
        "variables": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)
        },
        "nvidia_smi": output("nvidia-smi"),
    }


def output(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        finished = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return finished.stdout.strip()


def main(path: Path) -> None:
    """Write the environment of this process as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(environment(), indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
