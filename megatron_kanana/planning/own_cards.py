"""Figures of this version on one GPU, read from its cards, so that a new card is compared at once.

Of `benchmarks.planner_calibration` every setting that a card has is compared; of the other cards
what is listed here. Without the repository's `benchmarks/results` nothing is measured.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from .architecture import ALL_FP8, EXPERT_GRADIENTS, EXPERTS, OUTPUT_LAYER
from .calibration import CSRC, KANANA, SDPA
from .layer_times import Job
from .observation import Observation, slice_of_30b

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"

RATES = "rates of megatron_kanana"
HOST = "host of megatron_kanana"
OPTIMIZER = "optimizer_memory"
"""What figures of this version are fitted by, in `calibration`."""

PRECISIONS = {
    "bf16": frozenset[str](),
    "fp8_blockwise": ALL_FP8 - {"key_value_down", "key_value_up", EXPERTS},
    "fp8_blockwise_experts": ALL_FP8 - {"key_value_down", "key_value_up"},
    "fp8_blockwise_output_layer": ALL_FP8 - {"key_value_down", "key_value_up"} | {OUTPUT_LAYER},
}
"""What the groups of `precision` have in fp8, or had in cards with experts' gradients in bf16."""
GRADIENTS = frozenset({EXPERT_GRADIENTS})
PARTS = ("norms", "up_projections")
RECOMPUTE: dict[str, Sequence[str]] = {"none": (), "parts": PARTS, "full": ("full",)}
ATTENTION = {"csrc": CSRC, "sdpa": SDPA}
MICROBATCHES = 4
ALWAYS_SHOWN = [(form, again) for form in ("bf16", "fp8_blockwise") for again in ("none", "full")]
"""Settings on an H200 that the table has measured or not."""


@functools.cache
def card_rows(card: str) -> dict[str, float]:
    """Figures by the name of their row, nothing where there is no such card."""
    path = RESULTS / f"{card}.json"
    if not path.is_file():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {row["name"]: row["ours"] for row in rows}


def of_calibration(machine: str) -> Iterator[Observation]:
    """Steps of 4 layers with their update, in all settings of a card or those always shown."""
    card = f"planner_calibration_{machine}"
    rows = card_rows(card)
    for attention, computed in ATTENTION.items():
        for precision, fp8 in PRECISIONS.items():
            for again, recompute in RECOMPUTE.items():
                setting = f"{precision}, attention {attention}, recompute {again}"
                shown = machine == "h200" and (precision, again) in ALWAYS_SHOWN
                job = slice_of_30b(
                    *(4, 2),
                    machine=machine,
                    implementation=dataclasses.replace(KANANA, attention=computed),
                    fp8=fp8,
                    microbatches=MICROBATCHES,
                    recompute=recompute,
                )
                for quantity in ("step", "passes", "peak memory", "memory between steps"):
                    measured = rows.get(f"{setting}: {quantity}")
                    must = quantity in ("step", "peak memory") and attention == "csrc"
                    if measured is None and not (shown and must):
                        continue
                    fitted = quantity in ("step", "passes") and measured is not None
                    yield Observation(
                        f"ours, 4 layers, 4 x 2 x 4096, {setting}, MuonClip, {machine.upper()}",
                        quantity,
                        measured,
                        _source(card),
                        job,
                        "muon",
                        calibrated=(RATES, HOST) if fitted else (),
                    )


def _of_step(
    card: str,
    machine: str,
    layers: int,
    sequences: int,
    precision: str,
    again: str,
    more_fp8: frozenset[str] = frozenset(),
) -> tuple[Observation, ...]:
    """Passes of one microbatch, and memory of their activations.

    Args:
        more_fp8: what is in fp8 beside what `PRECISIONS` has.
    """
    rows = card_rows(card)
    job = slice_of_30b(
        *(layers, sequences),
        machine=machine,
        implementation=KANANA,
        fp8=PRECISIONS[precision] | more_fp8,
        recompute=RECOMPUTE[again],
    )
    setting = f"{sequences} x 4096, ours, {precision}"
    size = f"{layers} layers, {sequences} x 4096"
    name = f"ours, {size}, {precision}, recompute {again}, {machine.upper()}"
    seconds, memory = rows.get(f"{setting}: step"), rows.get(f"{setting}: activation memory")
    if seconds is None or memory is None:
        return ()
    return (
        Observation(name, "passes", seconds * 1e-3, _source(card), job, calibrated=(RATES, HOST)),
        Observation(name, "activations", memory, _source(card), job),
    )


def _of_update(optimizer: str) -> Iterator[Observation]:
    """Updates of 4 layers."""
    card = "optimizer_step_h100"
    measured = card_rows(card).get(f"{optimizer}: update")
    if measured is not None:
        word = "MuonClip" if optimizer == "muon" else "AdamW"
        yield Observation(
            f"ours, 4 layers, {word}, H100",
            "update",
            measured,
            _source(card),
            _slice(),
            optimizer,
            calibrated=(OPTIMIZER,) if optimizer == "adamw" else (),
        )


def _slice() -> Job:
    return slice_of_30b(4, 2, machine="h100", implementation=KANANA)


def _source(card: str) -> str:
    return f"benchmarks/results/{card}.json"


OURS: Sequence[Observation] = (
    *of_calibration("h200"),
    *of_calibration("h100"),
    # Memory of the first was measured with two chunks of logits where there is one now.
    *_of_step("step_2x4096_h100", "h100", 10, 2, "bf16", "none")[:1],
    *_of_step("step_10_layers_2x4096_h200", "h200", 10, 2, "bf16", "none"),
    *_of_step("step_10_layers_recompute_h200", "h200", 10, 2, "bf16", "parts"),
    *_of_step("step_10_layers_8x4096_h200", "h200", 10, 8, "bf16", "none"),
    *_of_step(
        *("step_10_layers_8x4096_h200", "h200", 10, 8, "fp8_blockwise_experts", "none"),
        more_fp8=GRADIENTS,
    ),
    *_of_step(
        *("step_10_layers_8x4096_h200", "h200", 10, 8, "fp8_blockwise_output_layer", "none"),
        more_fp8=GRADIENTS,
    ),
    *_of_step("step_8_layers_fp8_h100", "h100", 8, 8, "fp8_blockwise_experts", "none"),
    *_of_step("step_8_layers_h100", "h100", 8, 2, "bf16", "none"),
    *_of_step("step_8_layers_h100", "h100", 8, 8, "bf16", "none"),
    *_of_step("step_8_layers_recompute_h100", "h100", 8, 2, "bf16", "parts"),
    *_of_step("step_8_layers_recompute_h100", "h100", 8, 8, "bf16", "parts"),
    *_of_update("muon"),
    *_of_update("adamw"),
)
