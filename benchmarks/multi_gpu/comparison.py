"""Runs of a suite beside the one on a single process, and how far apart they may be."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.parallel.layouts import weight_differences

from .suites import NOISE, ONE, THRESHOLD, Suite
from .thresholds import busy_experts, clipped_heads, expert_loads, logit_difference

NOISE_FACTOR = 3.0
"""A layout may be this many times as far away as the furthest run in another order of summation."""

LOADS, BIAS = "expert loads", "expert_bias"

Differences = dict[str, dict[str, float]]
"""By what is compared, and by its kind: a weight's name without layers, say."""


@dataclass(frozen=True)
class Verdict:
    """One comparison with one process.

    Attributes:
        runs: what was compared: dtype, optimizer, layout.
        what: losses, weights or logits; of the kind that is nearest to its tolerance, or over it.
        difference: relative; absolute for logits, and a number of heads.
        tolerance: of the difference.
        source: where it comes from.
    """

    runs: str
    what: str
    difference: float
    tolerance: float
    source: str

    @property
    def passes(self) -> bool:
        """Whether the difference is allowed; what is not a number is not."""
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        return (
            f"{'pass' if self.passes else 'FAIL'}  {self.runs}: {self.what} {self.difference:.2e},"
            f" tolerance {self.tolerance:.2e} ({self.source})"
        )


def differences(suite: Suite, run: str) -> Differences:
    """Largest differences of a run to the one on a single process."""
    ours, theirs = (_records(suite.run_folder(name)) for name in (run, ONE))
    steps = sorted(ours)
    assert steps and steps[-1] == suite.lengths.end
    found: Differences = {
        "losses": {
            name: max(_relative(ours[step][name], theirs[step][name]) for step in steps)
            for name in ("loss", "grad_norm")
        },
        "attention logits": {"of heads": logit_difference(*_head_logits(suite, run))},
        LOADS: {"tokens": largest_difference(*_loads(suite, run))},
        "weights": {},
    }
    for name, difference in _weights_at_the_end(suite, run).items():
        if name.endswith(BIAS):
            continue
        kind = re.sub(r"\.\d+\.", ".", name)
        found["weights"][kind] = max(difference, found["weights"].get(kind, 0.0))
    files = [suite.run_folder(name) / "logits.pt" for name in (run, ONE)]
    if files[0].exists():
        found["logits"] = {"largest": largest_difference(*map(torch.load, files))}
    return found


def _weights_at_the_end(suite: Suite, run: str) -> dict[str, float]:
    """Difference of each weight, relative."""
    return weight_differences(*(suite.saved(name, suite.lengths.end) for name in (run, ONE)))


def _head_logits(suite: Suite, run: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest attention logits of the steps that a run and the one on a single process share."""
    ours, theirs = (torch.load(suite.run_folder(name) / "heads.pt") for name in (run, ONE))
    return ours, theirs[-len(ours) :]


def _loads(suite: Suite, run: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of experts in the steps that a run and the one on a single process share."""
    ours, theirs = (_records(suite.run_folder(name)) for name in (run, ONE))
    return expert_loads(ours.values()), expert_loads(theirs[step] for step in ours)


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of two tensors, absolute."""
    return float((ours - theirs).abs().max())


def noise_of(suite: Suite) -> Differences:
    """The largest differences of the runs in another order of summation."""
    largest: Differences = {}
    for run in suite.references():
        if run.name.startswith(NOISE):
            for what, kinds in differences(suite, run.name).items():
                of_what = largest.setdefault(what, {})
                for kind, value in kinds.items():
                    of_what[kind] = max(value, of_what.get(kind, 0.0))
    return largest


def verdicts(suite: Suite, run: str, noise: Differences) -> list[Verdict]:
    """A verdict for all that is compared: that of the kind which is nearest to its tolerance."""
    found = []
    for what, kinds in differences(suite, run).items():
        if what == LOADS:
            continue
        of_kinds = []
        for kind, difference in kinds.items():
            tolerance, source = _tolerance(suite, what, noise[what][kind])
            title = f"{suite.title}, {run}"
            of_kinds.append(Verdict(title, f"{what} ({kind})", difference, tolerance, source))
        found.append(max(of_kinds, key=_nearness))
    if suite.optimizer == "MuonClip":
        found.append(_clipped_verdict(suite, run, noise["attention logits"]["of heads"]))
    found.append(_biases_verdict(suite, run, noise[LOADS]["tokens"]))
    return found


def _tolerance(suite: Suite, what: str, noise: float) -> tuple[float, str]:
    """Of a difference, and where it comes from."""
    of_tests = suite.tolerances.get(what, 0.0)
    of_noise = NOISE_FACTOR * noise
    if of_tests >= of_noise:
        return of_tests, "of the tests"
    return of_noise, f"{NOISE_FACTOR:.0f} x the noise of other orders of summation"


def _clipped_verdict(suite: Suite, run: str, noise: float) -> Verdict:
    """Whether QK-Clip scaled the same heads down, but for those whose logit is at the threshold.

    A head that is not at the threshold must not differ; how many QK-Clip counted may differ by the
    number of those that are.
    """
    tolerance, _ = _tolerance(suite, "attention logits", noise)
    ours, theirs = _head_logits(suite, run)
    heads = clipped_heads(ours, theirs, THRESHOLD, tolerance)
    steps = sorted(_records(suite.run_folder(run)))
    counts = [
        sum(records[step]["clipped_heads"] for step in steps)
        for records in (_records(suite.run_folder(name)) for name in (run, ONE))
    ]
    assert counts[1] > 0, "no head was scaled down"
    title = f"{suite.title}, {run}"
    if heads.otherwise:
        what = "heads clipped (otherwise, not at the threshold)"
        return Verdict(title, what, heads.otherwise, 0.0, "exact")
    source = f"of {counts[1]}, heads within {tolerance:.1e} of the threshold"
    difference = abs(counts[0] - counts[1])
    return Verdict(title, "heads clipped (number)", difference, int(heads.near.sum()), source)


def _biases_verdict(suite: Suite, run: str, noise: float) -> Verdict:
    """Whether experts' biases moved alike, but for those of experts whose load is at the mean.

    A bias moves up if its expert had fewer tokens than the mean. An expert that is not at the mean
    must not differ; as many layers may have other biases as have experts at the mean in some step.
    """
    tolerance = max(1.0, NOISE_FACTOR * noise)  # no load is known better than to a token
    loads = busy_experts(*_loads(suite, run), tolerance)
    title = f"{suite.title}, {run}"
    if loads.otherwise:
        what = "expert biases (moved otherwise, not at the mean load)"
        return Verdict(title, what, loads.otherwise, 0.0, "exact")
    biases = [
        difference
        for name, difference in _weights_at_the_end(suite, run).items()
        if name.endswith(BIAS)
    ]
    _, all_steps = _loads(suite, ONE)
    near = busy_experts(all_steps, all_steps, tolerance).near.any(0).any(-1)
    source = f"layers of {len(biases)} with a load within {tolerance:.0f} tokens of the mean"
    others = sum(difference > 0 for difference in biases)
    return Verdict(title, "expert biases (layers)", others, int(near.sum()), source)


def _nearness(verdict: Verdict) -> float:
    if not verdict.passes:
        return float("inf")
    return verdict.difference / verdict.tolerance if verdict.tolerance else 0.0


def _relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / max(abs(theirs), 1e-12)


def _records(folder: Path) -> dict[int, Mapping[str, Any]]:
    """Records of the steps of a run, by step."""
    lines: Sequence[str] = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: record for record in records if "loss" in record}
