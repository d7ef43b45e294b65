"""The runs that are compared: layouts of the tests, trained with AdamW and with MuonClip."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.parallel.layouts import (
    ADAMW_WEIGHTS_TOLERANCE,
    CONTEXT,
    EXPERT,
    EXPERT_TENSOR,
    LAYOUTS,
    MUON,
    MUON_LAYOUTS,
    PIPELINE,
    TENSOR,
    TOLERANCE,
    VIRTUAL,
    Layouts,
    checkpoint,
)

ONE = "one process"
NOISE = "another order of summation"
NOISE_MICRO_BATCHES = (1, 2, 4, 1)
"""Sequences of a microbatch in each of the noise runs, whose gradients so have another order."""

THRESHOLD = next(
    float(word.rpartition("=")[2])
    for word in MUON
    if word.startswith("optimizer.qk_clip_threshold")
)
"""Logit above which QK-Clip scales a head down."""
CUDA_BF16_MODEL = (
    "model.hidden_size=128",
    "model.qk_nope_head_dim=128",
    "model.qk_rope_head_dim=64",
    "model.v_head_dim=128",
    "model.moe_ffn_hidden_size=128",
)
"""Sizes that the kernels for Hopper take, also where an expert is split in two."""


@dataclass(frozen=True)
class Lengths:
    """Steps after which runs save, resume and end."""

    start: int = 2
    middle: int = 4
    end: int = 6


@dataclass(frozen=True)
class Run:
    """One training of a suite.

    Attributes:
        name: of the layout.
        processes: it takes.
        overrides: the layout in settings.
        resumes: name of the run from whose middle it goes on; None begins where all do.
        seed: of the order of summation; None leaves it.
    """

    name: str
    processes: int
    overrides: tuple[str, ...] = ()
    resumes: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Suite:
    """Runs that must come out alike.

    Attributes:
        optimizer: 'AdamW' or 'MuonClip'.
        dtype: 'fp32' or 'bf16'.
        folder: of everything the runs write.
        on_cuda: on GPUs, whose kernels have other sizes.
        processes: that are there.
        counts: numbers of processes of the layouts.
        names: layouts to take; without any, all.
        lengths: of the runs.
    """

    optimizer: str
    dtype: str
    folder: Path
    on_cuda: bool
    processes: int
    counts: tuple[int, ...]
    names: tuple[str, ...] = ()
    lengths: Lengths = field(default_factory=Lengths)

    @property
    def title(self) -> str:
        """Dtype and optimizer."""
        return f"{self.dtype}, {self.optimizer}"

    @property
    def tolerances(self) -> dict[str, float]:
        """Relative, as in the tests of layouts; there are none in bf16."""
        if self.dtype != "fp32":
            return {}
        weights = TOLERANCE if self.optimizer == "MuonClip" else ADAMW_WEIGHTS_TOLERANCE
        return {"losses": TOLERANCE, "attention logits": 1e-4, "weights": weights, "logits": 1e-4}

    @property
    def overrides(self) -> list[str]:
        """Settings that all runs share."""
        words = ["precision.compute=" + self.dtype, "schedule.micro_batch_size=1"]
        words.append(f"checkpoint.save_interval={self.lengths.middle}")
        if self.on_cuda and self.dtype == "bf16":
            words += CUDA_BF16_MODEL
        if self.optimizer == "MuonClip":
            words += MUON
        return words

    def single_runs(self) -> Iterator[Run]:
        """On one process: what all others are compared with, and layouts."""
        yield from self.references()
        if 1 in self.counts:
            yield from self.split_runs(1)

    def references(self) -> Iterator[Run]:
        """On one process: what all are compared with, and noise."""
        yield Run(ONE, 1)
        for seed, size in enumerate(NOISE_MICRO_BATCHES):
            words = (f"schedule.micro_batch_size={size}", "kernels.linear_backend=torch")
            yield Run(f"{NOISE}, {seed}", 1, words, seed=seed)

    def split_runs(self, *counts: int) -> Iterator[Run]:
        """In every layout for these numbers of processes, and from one layout to another."""
        found: dict[frozenset[str], Run] = {}
        for name, (processes, words) in layouts(self.processes).items():
            if processes in counts:
                found.setdefault(frozenset((*words, str(processes))), Run(name, processes, words))
        runs = [run for run in found.values() if not self.names or run.name in self.names]
        yield from runs
        for source, target in (("TP2 x EP2", "PP2"), (f"EP{self.processes}", "TP2 x PP2")):
            by_name = {run.name: run for run in runs}
            if source in by_name and target in by_name and source != target:
                run = by_name[target]
                yield Run(f"{source}, resumed as {target}", run.processes, run.overrides, source)

    def run_folder(self, run: str) -> Path:
        """Folder of a run."""
        return self.folder / folder_name(run)

    def saved(self, run: str, step: int) -> Path:
        """A run's checkpoint."""
        return checkpoint(self.folder, folder_name(run), step)


def layouts(processes: int) -> Layouts:
    """Experts over all processes, further products, and those of the tests."""
    more: Layouts = {
        f"EP{processes}": (processes, (f"parallel.expert_parallel_size={processes}",)),
        "TP4": (4, ("parallel.tensor_parallel_size=4",)),
        "CP4": (4, ("parallel.context_parallel_size=4",)),
        "CP2 x PP2": (4, (CONTEXT, PIPELINE)),
        "CP2 x EP4": (4, (CONTEXT, "parallel.expert_parallel_size=4")),
        "PP2 with 2 virtual stages x DP2": (4, (PIPELINE, VIRTUAL)),
        "EP2 x expert-TP2": (4, (EXPERT, EXPERT_TENSOR)),
        "TP2 x EP2 x DP2": (4, (TENSOR, EXPERT)),
    }
    return {**more, **LAYOUTS, **MUON_LAYOUTS}


def folder_name(run: str) -> str:
    """A name without spaces."""
    return re.sub(r"[^A-Za-z0-9]+", "_", run)
