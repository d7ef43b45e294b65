"""What a disturbed run must share with the one that nobody disturbed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_kanana.training.records import read_records
from tests.checkpoints import saved_tensors

UNLIKE = ("tokens_per_second",)
"""Figures of a step that two runs need not share."""

Fed = dict[int, list[list[str]]]
"""Hashes of the samples of each microbatch of a rank, by step."""


class Outcome:
    """What a run left.

    Args:
        run_dir: folder of the run.
        observed: folder that `train_observed.py` wrote to.
        steps: of the whole run.
    """

    def __init__(self, run_dir: Path, observed: Path, steps: int) -> None:
        checkpoint = run_dir / "checkpoints" / f"step_{steps:08d}"
        self.tensors = saved_tensors(checkpoint)
        self.ledger: dict[str, Any] = json.loads((checkpoint / "ledger.json").read_text())
        self.records = read_records(run_dir / "metrics.jsonl")
        self.fed = {path.stem: list(_by_process(path)) for path in observed.glob("fed_*.jsonl")}
        self.checkpoints = sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def _by_process(path: Path) -> Iterator[Fed]:
    """What each process of a rank has fed, in order; a line that was cut short is left out."""
    processes: dict[int, Fed] = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        of_step = processes.setdefault(record["pid"], {}).setdefault(record["step"], [])
        of_step.append(record["hashes"])
    yield from processes.values()


def differences(ours: Outcome, undisturbed: Outcome) -> list[str]:
    """Everything in which a disturbed run differs from the undisturbed one."""
    found = [*different_tensors(ours.tensors, undisturbed.tensors)]
    if ours.ledger != undisturbed.ledger:
        found.append(f"ledger: {ours.ledger} instead of {undisturbed.ledger}")
    found += different_records(ours.records, undisturbed.records)
    found += _different_samples(ours.fed, undisturbed.fed)
    if ours.checkpoints != undisturbed.checkpoints:
        found.append(f"checkpoints: {ours.checkpoints} instead of {undisturbed.checkpoints}")
    return found


def different_tensors(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]
) -> Iterator[str]:
    if ours.keys() != theirs.keys():
        yield f"tensors: {sorted(ours.keys() ^ theirs.keys())} are in one of the checkpoints only"
    for name in ours.keys() & theirs.keys():
        # Not torch.equal: two NaN would differ, and 0 would equal -0.
        bits = [each[name].reshape(-1).view(torch.uint8) for each in (ours, theirs)]
        if not torch.equal(*bits):
            yield f"tensor {name} differs"


def different_records(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> Iterator[str]:
    told, expected = ([record["step"] for record in records] for records in (ours, theirs))
    if told != expected:
        yield f"metrics.jsonl tells of steps {told} instead of {expected}"
        return
    for one, other in zip(ours, theirs, strict=True):
        unlike = [name for name in one if name not in UNLIKE and one[name] != other.get(name)]
        if unlike:
            yield f"metrics of step {one['step']} differ in {', '.join(unlike)}"


def _different_samples(ours: dict[str, list[Fed]], theirs: dict[str, list[Fed]]) -> Iterator[str]:
    """Each execution of a step fed the step's own samples; the last of them all of these."""
    for rank, (expected,) in theirs.items():
        whole: set[int] = set()
        for fed in ours[rank]:
            for step, microbatches in fed.items():
                if microbatches != expected[step][: len(microbatches)]:
                    yield f"{rank}: step {step} fed other samples"
                elif len(microbatches) == len(expected[step]):
                    whole.add(step)
        if missing := sorted(expected.keys() - whole):
            yield f"{rank}: steps {missing} were never fed whole"
