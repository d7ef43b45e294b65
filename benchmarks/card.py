"""Cards: the measured numbers behind a claim, with what produced them."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

RESULTS_DIR = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "megatron-core", "transformer-engine", "numpy")
PEER_PACKAGES = (  # told where present
    "flash-attn-4",
    "nvidia-cudnn-frontend",
    "nvidia-cudnn-cu13",
    "nvidia-cutlass-dsl",
    "quack-kernels",
    "sonic-moe",
)


@dataclasses.dataclass
class Row:
    """One measurement beside its peer's.

    Attributes:
        ratio: above 1 means ours is better; None where there is no peer.
        runs: how many runs the numbers are the median of.
    """

    name: str
    unit: str
    ours: float
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None
    runs: int = 1


def write_card(
    name: str,
    rows: Sequence[Row],
    results_dir: Path = RESULTS_DIR,
    notes: Sequence[str] = (),
) -> Path:
    """Write `name`.json with the rows and where, when and how they were measured.

    Args:
        notes: sentences about the measurement that the rows do not hold.
    """
    card: dict[str, object] = {
        "command": shlex.join(["python", "-m", *_module_and_arguments()]),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "machine": _machine(),
        "versions": {"python": platform.python_version(), **_versions()},
        "notes": list(notes),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    results_dir.mkdir(parents=True, exist_ok=True)
    path = results_dir / f"{name}.json"
    path.write_text(json.dumps(card, indent=2) + "\n")
    return path


def reason(error: Exception, letters: int = 400) -> str:
    """Why something was not run, on one line: an error's class and what it says.

    Args:
        letters: at most.
    """
    return " ".join(f"{type(error).__name__}: {error}".split())[:letters]


def _module_and_arguments() -> list[str]:
    main = sys.modules["__main__"].__spec__
    return [main.name if main else sys.argv[0], *sys.argv[1:]]


def _commit() -> str:
    """Commit of the checkout, or of the environment variable COMMIT where there is no git."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{len(os.sched_getaffinity(0))} CPU cores, {platform.machine()}"


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    for package in PEER_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
