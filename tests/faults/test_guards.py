"""Numbers that go wrong are named, and what follows leaves the run as good as one without them."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import saved_tensors
from tests.launch import free_ports, run_python, train_in_turn

BATCH = 4
STEPS = 16
SETTINGS = (
    f"schedule.steps={STEPS}",
    f"schedule.global_batch_size={BATCH}",
    f"schedule.evaluation_interval={STEPS}",
    "schedule.evaluation_batches=8",
    "checkpoint.keep_last=9",
    "guards.spike_window=12",
)
WITH_CHECKPOINTS = "checkpoint.save_interval=5"
SHORT = ("schedule.steps=8", "schedule.decay_steps=2", "schedule.evaluation_interval=0")
LAYOUTS = {
    "DP2": (),
    "TP2": ("parallel.tensor_parallel_size=2",),
    "PP2": ("parallel.pipeline_parallel_size=2",),
    "EP2": ("parallel.expert_parallel_size=2",),
}
BAD_STEP = 8
EXPERTS = "mlp.experts"


def samples_before(step: int) -> int:
    return (step - 1) * BATCH


def fault(
    where: str, rank: int, module: str, step: int = BAD_STEP, times: int = 99
) -> dict[str, Any]:
    sample = samples_before(step)
    return {"where": where, "rank": rank, "module": module, "sample": sample, "times": times}


LOCATED = [
    # layout; kind, rank, module and step of the fault; layer and tensor that are to be named
    (
        "DP2",
        ("output", 1, f"layers.1.{EXPERTS}", 3),
        (2, f"output of decoder.layers.1.{EXPERTS}"),
    ),
    (
        "DP2",
        ("weight_gradient", 1, "layers.3.self_attention.linear_proj", 5),
        (4, "gradient of decoder.layers.3.self_attention.linear_proj.weight"),
    ),
    (
        "TP2",
        ("output", 0, "layers.0.self_attention.core_attention", 3),
        (1, "output of decoder.layers.0.self_attention.core_attention"),
    ),
    (
        "TP2",
        ("gradient", 1, "layers.2.self_attention.linear_q_up_proj", 5),
        (3, "gradient of the output of decoder.layers.2.self_attention.linear_q_up_proj"),
    ),
    (
        "PP2",  # names count the layers of a stage
        ("gradient", 1, "layers.0.self_attention.linear_proj", 4),
        (3, "gradient of the output of decoder.layers.0.self_attention.linear_proj"),
    ),
    (
        "EP2",
        ("weight_gradient", 0, f"layers.2.{EXPERTS}", 3),
        (3, f"gradient of decoder.layers.2.{EXPERTS}.down[1]"),
    ),
    (
        "EP2",
        ("output", 1, f"layers.1.{EXPERTS}", 5),
        (2, f"output of decoder.layers.1.{EXPERTS}"),
    ),
]
ONCE = [
    # kind, rank, module and step of a fault that comes once; what is to be named
    (("output", 0, f"layers.1.{EXPERTS}", 4), "output of layer 2"),
    (
        ("gradient", 1, "layers.2.self_attention.core_attention", 6),
        "gradient of the output of layer 2",
    ),
]
SEEDS = (1234, 1, 2)


def run_all(
    folder: Path, cache_dir: Path, runs: dict[str, tuple[str, ...]], faults: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    return train_in_turn(
        folder,
        cache_dir,
        {name: (*SETTINGS, *overrides) for name, overrides in runs.items()},
        processes=2,
        script=("-m", "tests.faults.train_with_faults", json.dumps(faults)),
    )


def events(folder: Path, run: str) -> list[dict[str, Any]]:
    path = folder / run / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def final(folder: Path, run: str, step: int = STEPS) -> Path:
    return folder / run / "checkpoints" / f"step_{step:08d}"


def evaluation(records: list[dict[str, Any]]) -> float:
    return float(next(line["evaluation_loss"] for line in records if "evaluation_loss" in line))


@dataclass(frozen=True)
class Found:
    """All runs' records, and their folder."""

    folder: Path
    records: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Found:
    folder = tmp_path_factory.mktemp("guards")
    runs: dict[str, tuple[str, ...]] = {
        layout: (*SHORT, *overrides) for layout, overrides in LAYOUTS.items()
    }
    faults: dict[str, list[dict[str, Any]]] = {
        layout: [fault(*of_run) for name, of_run, _ in LOCATED if name == layout]
        for layout in LAYOUTS
    }
    runs["once"] = ("guards.recheck_interval=5",)
    faults["once"] = [fault(*of_run, times=1) for of_run, _ in ONCE]
    everywhere = fault("output", 1, f"layers.1.{EXPERTS}")
    again = fault("output", 1, f"layers.1.{EXPERTS}", BAD_STEP + 3)
    runs["skipped"] = ()
    runs["rolled back"] = ("guards.on_nonfinite=rollback", WITH_CHECKPOINTS)
    runs["stopped"] = ("guards.on_nonfinite=stop",)
    runs["too often"] = ("guards.max_interventions=1",)
    faults |= {name: [everywhere] for name in ("skipped", "rolled back", "stopped")}
    faults["too often"] = [everywhere, again]
    spike = [fault("factor", rank, "output_layer") for rank in (0, 1)]
    runs["spike reported"] = SHORT
    runs["spike rolled back"] = (
        "guards.on_spike=rollback",
        "guards.rollback_steps=3",
        "checkpoint.save_interval=2",
    )
    faults |= {name: spike for name in runs if name.startswith("spike")}
    runs["corrupt"] = (*SHORT, f"guards.recheck_interval={BAD_STEP}")
    faults["corrupt"] = [fault("flipped_bit", 1, "layers.1.self_attention.linear_proj", times=1)]
    runs |= {f"clean {seed}": (f"seed={seed}",) for seed in SEEDS}
    return Found(folder, run_all(folder, cache_dir, runs, faults))


@pytest.mark.parametrize(("layout", "of_run", "named"), LOCATED)
def test_what_is_not_finite_is_named_by_rank_layer_and_tensor(
    found: Found, layout: str, of_run: tuple[str, int, str, int], named: tuple[int, str]
) -> None:
    (_, rank, _, step), (layer, tensor) = of_run, named
    (event,) = [event for event in events(found.folder, layout) if event["step"] == step]
    assert (event["kind"], event["action"]) == ("not finite", "skip")
    assert event["details"].startswith(f"rank {rank} on ")
    assert event["details"].endswith(f", layer {layer}, {tensor}")
    assert event["samples"] == [samples_before(step), samples_before(step + 1)]


def test_a_fault_that_does_not_come_again_is_named_and_costs_nothing(found: Found) -> None:
    for event, (of_run, tensor) in zip(events(found.folder, "once"), ONCE, strict=True):
        _, rank, _, step = of_run
        assert (event["step"], event["action"]) == (step, "report")
        assert event["details"].startswith(f"rank {rank} on ")
        assert event["details"].endswith(f"{tensor}; it did not come again")
    assert_same_tensors(final(found.folder, "once"), final(found.folder, "clean 1234"))


@pytest.mark.parametrize("name", ["skipped", "rolled back", "spike rolled back"])
def test_a_run_ends_as_well_as_without_the_step_that_it_left_out(found: Found, name: str) -> None:
    clean = [evaluation(found.records[f"clean {seed}"]) for seed in SEEDS]
    noise = statistics.stdev(clean)
    assert noise > 0.0
    assert abs(evaluation(found.records[name]) - statistics.mean(clean)) < 3 * noise


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        ("skipped", samples_before(BAD_STEP)),
        ("rolled back", 5 * BATCH),
        ("spike rolled back", 4 * BATCH),
    ],
)
def test_the_ledger_tells_what_was_passed_over_and_counts_it_nowhere(
    found: Found, name: str, begin: int
) -> None:
    ledger = json.loads((final(found.folder, name) / "ledger.json").read_text())
    end = samples_before(BAD_STEP + 1)
    assert ledger["skipped_samples"] == [[begin, end]]
    trained_on = ledger["consumed_samples"] - (end - begin)
    assert sum(ledger["tokens"].values()) == trained_on * ledger["sequence_length"]
    assert trained_on == BATCH * (STEPS - 1 if name == "skipped" else STEPS)


def test_a_run_that_went_back_writes_one_straight_story(found: Found) -> None:
    steps = [line["step"] for line in found.records["rolled back"] if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
    skipped = [line["step"] for line in found.records["skipped"] if "loss" in line]
    assert skipped == [step for step in range(1, STEPS + 1) if step != BAD_STEP]


@pytest.mark.parametrize(("name", "last"), [("stopped", BAD_STEP - 1), ("too often", BAD_STEP + 2)])
def test_a_run_that_stops_is_saved_as_it_was_before_the_step(
    found: Found, name: str, last: int
) -> None:
    assert (found.folder / name / "status").read_text() == "87"
    saved = sorted(path.name for path in (found.folder / name / "checkpoints").glob("step_*"))
    assert saved[-1] == final(found.folder, name, last).name
    assert events(found.folder, name)[-1]["action"] == "stop"
    tensors = saved_tensors(final(found.folder, name, last))
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_a_rollback_by_some_steps_puts_later_checkpoints_aside(found: Found) -> None:
    folders = {path.name for path in (found.folder / "spike rolled back" / "checkpoints").iterdir()}
    assert "step_00000006.abandoned" in folders
    assert {"step_00000004", "step_00000006", "step_00000008"} <= folders


def test_a_spike_is_told_and_otherwise_left_alone_by_default(found: Found) -> None:
    (event,) = events(found.folder, "spike reported")
    assert (event["step"], event["kind"], event["action"]) == (BAD_STEP, "loss spike", "report")
    assert len(found.records["spike reported"]) == BAD_STEP


def test_a_process_that_computes_other_gradients_the_second_time_is_named(found: Found) -> None:
    (event,) = events(found.folder, "corrupt")
    assert (event["kind"], event["action"]) == ("silent corruption", "stop")
    assert event["details"] == "rank 1 computed other gradients the second time"
    assert (found.folder / "corrupt" / "status").read_text() == "87"


def test_a_start_after_a_rollback_passes_over_the_same_samples(
    tmp_path: Path, cache_dir: Path, found: Found
) -> None:
    """Ended in the second step after it went back, before another checkpoint."""
    bad = fault("output", 1, f"layers.1.{EXPERTS}")
    leave = fault("exit", 0, "output_layer", BAD_STEP + 2)
    overrides = [*SETTINGS, "guards.on_nonfinite=rollback", WITH_CHECKPOINTS]
    arguments = [
        *("--config-dir", "tests/configs", "experiment=small", f"output_dir={tmp_path}"),
        *(f"data.cache_dir={cache_dir}", "run_name=broken", *overrides),
    ]
    script = ("-m", "tests.faults.train_with_faults")
    jobs = json.dumps([[free_ports(1)[0], arguments]])
    ended = run_python(*script, json.dumps({"broken": [bad, leave]}), jobs, processes=2)
    assert ended.returncode != 0
    assert (tmp_path / "broken" / "rollback.json").exists()
    train_in_turn(
        *(tmp_path, cache_dir, {"broken": overrides}),
        processes=2,
        script=(*script, json.dumps({"broken": [bad]})),
    )
    assert_same_tensors(final(tmp_path, "broken"), final(found.folder, "rolled back"))
    assert len(events(tmp_path, "broken")) == 1


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = saved_tensors(one), saved_tensors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
