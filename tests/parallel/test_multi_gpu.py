"""The scripts for several GPUs run over gloo, and compare what they say they compare."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.multi_gpu import comparison, correctness, speed
from benchmarks.multi_gpu.chains import Chain, Task, run_chains
from benchmarks.multi_gpu.due import Comparisons, Due
from benchmarks.multi_gpu.jobs import DONE
from benchmarks.multi_gpu.slices import PEER_SHARED, free
from benchmarks.multi_gpu.starts import ROOT, Place
from benchmarks.multi_gpu.thresholds import Sides, busy_experts, clipped_heads


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Rows of the card, by name."""
    rows = json.loads((folder / "card.json").read_text())["rows"]
    return {row["name"]: row for row in rows}


def notes_of(folder: Path) -> list[str]:
    """Notes of the card."""
    notes: list[str] = json.loads((folder / "card.json").read_text())["notes"]
    return notes


def card(folder: Path) -> list[str]:
    """Options for a card in a folder, from tiny runs of a CPU."""
    return ["--name=card", f"--results-dir={folder}", "--device=cpu", "--tiny"]


def test_layouts_are_compared_with_one_process(tmp_path: Path, cache_dir: Path) -> None:
    options = ["--processes=2", "--dtypes", "bf16", "--optimizers", "MuonClip"]
    options += ["--layouts", "EP2", "--without-transformers", f"--cache-dir={cache_dir}"]
    assert correctness.main([*card(tmp_path), *options]) == 0
    rows = rows_of(tmp_path)
    title = "bf16, MuonClip, EP2: "
    assert {name.removeprefix(title).split(" (")[0] for name in rows} == {
        *("losses", "attention logits", "weights", "heads clipped", "logits", "expert biases")
    }
    assert all(0 <= row["ours"] <= row["peer_value"] for row in rows.values())
    # bf16 has no tolerance but that of the noise; somewhere both are there.
    assert any(0 < row["ours"] < 0.1 and row["peer_value"] < 0.1 for row in rows.values())


def test_a_time_too_short_leaves_a_card_of_what_was_not_run(
    tmp_path: Path, cache_dir: Path
) -> None:
    options = ["--processes=2", "--dtypes", "fp32", "--optimizers", "AdamW", "--layouts", "EP2"]
    options += ["--without-transformers", f"--cache-dir={cache_dir}", "--seconds=8"]
    began = time.monotonic()
    assert correctness.main([*card(tmp_path), *options]) == 1
    assert time.monotonic() - began < 8
    (missing,) = [note for note in notes_of(tmp_path) if note.startswith("fp32, AdamW, EP2: ")]
    assert "not run: " in missing
    assert not rows_of(tmp_path)


def test_a_script_that_is_ended_ends_what_it_started(tmp_path: Path) -> None:
    words = f"""
from pathlib import Path
from benchmarks.multi_gpu import starts
starts.end_all_with_me()
log = Path({str(tmp_path / "log")!r})
with starts.started(["sleep", "60"], starts.Place(on_cuda=False), log) as it:
    print(it.pid, flush=True)
    it.wait()
"""
    script = subprocess.Popen([sys.executable, "-c", words], cwd=ROOT, stdout=subprocess.PIPE)
    assert script.stdout is not None
    started = int(script.stdout.readline())
    os.kill(started, 0)
    script.terminate()
    assert script.wait(10) == 128 + signal.SIGTERM
    state = Path(f"/proc/{started}/stat")
    end = time.monotonic() + 10
    # One that nobody waits for any more is a zombie.
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < end
        time.sleep(0.01)


def test_comparisons_are_made_as_soon_as_their_runs_have_ended(tmp_path: Path) -> None:
    verdict = comparison.Verdict("PP2", "losses", 1e-6, 1e-5, "of the tests")
    folders = {name: tmp_path / name for name in ("one process", "PP2", "TP2")}
    due = [
        Due(name, [folders["one process"], folders[name]], lambda: [verdict])
        for name in ("PP2", "TP2")
    ]
    comparisons = Comparisons(due)
    later = time.monotonic() + 60
    for name in ("one process", "PP2"):
        assert comparisons.look(later) == []
        folders[name].mkdir()
        (folders[name] / DONE).touch()
    assert comparisons.look(time.monotonic() - 1) == []
    assert "no time was left" in str(comparisons.results({})[0])
    assert comparisons.look(later) == [verdict]
    assert comparisons.look(later) == []
    failures = {folders["TP2"]: "no end after 9 s"}
    assert comparisons.results(failures) == [verdict, "TP2: not run: no end after 9 s"]


@pytest.mark.parametrize("difference", [2e-5, float("nan")])
def test_a_difference_above_its_tolerance_fails(difference: float) -> None:
    verdict = comparison.Verdict("fp32, AdamW, TP2", "losses", difference, 1e-5, "of the tests")
    assert not verdict.passes
    assert str(verdict).startswith("FAIL")


def test_only_heads_at_the_threshold_may_be_clipped_otherwise() -> None:
    theirs = torch.tensor([[[1.001, 0.5, 2.0], [0.999, 0.5, 0.2]]])
    at_the_threshold, another = theirs.clone(), theirs.clone()
    at_the_threshold[0, 0, 0] = 0.999
    another[0, 1, 1] = 1.2
    # A layer's tolerance is of its largest logit: 0.002 and 0.001.
    assert numbers(clipped_heads(at_the_threshold, theirs, 1.0, 1.01e-3)) == (2, 0)
    assert numbers(clipped_heads(another, theirs, 1.0, 1.01e-3)) == (2, 1)
    assert numbers(clipped_heads(at_the_threshold, theirs, 1.0, 1e-4)) == (0, 1)


def test_only_biases_of_experts_at_the_mean_load_may_move_otherwise() -> None:
    theirs = torch.tensor([[[33.0, 31.0, 20.0, 44.0]]])
    assert numbers(busy_experts(theirs, theirs, 1.0)) == (2, 0)
    assert numbers(busy_experts(torch.tensor([[[31.0, 33, 20, 44]]]), theirs, 1.0)) == (2, 0)
    assert numbers(busy_experts(torch.tensor([[[32.0, 31, 35, 30]]]), theirs, 1.0)) == (2, 2)


def numbers(sides: Sides) -> tuple[int, int]:
    """How many are near, and how many on the other side."""
    return int(sides.near.sum()), sides.otherwise


def test_what_a_failed_job_would_have_written_is_not_waited_for(tmp_path: Path) -> None:
    def task(name: str, after: str | None = None) -> Task:
        wrong = ("no_such_setting=1",)
        return Task(tmp_path / name, wrong, after=None if after is None else tmp_path / after)

    chains = [
        Chain(tmp_path / "first.log", [task("start")], 1, Place(on_cuda=False)),
        Chain(
            tmp_path / "second.log", [task("a", "start"), task("b", "a")], 1, Place(on_cuda=False)
        ),
    ]
    failures = run_chains(chains, 2, time.monotonic() + 60)
    assert "no_such_setting" in (tmp_path / "first.log").read_text()
    assert failures[tmp_path / "b"] == "a was not done"
    assert set(failures) == {tmp_path / name for name in ("start", "a", "b")}


def test_a_slice_is_timed_beside_its_peer(tmp_path: Path) -> None:
    assert speed.main([*card(tmp_path), "--processes", "2"]) == 0
    rows = rows_of(tmp_path)
    ours = rows["2 processes: forward and backward"]
    assert ours["ratio"] == pytest.approx(ours["ours"] / ours["peer_value"])
    for contender in ("ours", PEER_SHARED):
        for what in ("all-to-all", "gradient reduction"):
            assert f"2 processes, {contender}: {what} that is not hidden" in rows
    assert not any("not run" in note for note in notes_of(tmp_path))
    assert rows["2 processes: all-to-all, as the step sends them"]["ours"] > 0


def test_a_freed_slice_takes_no_memory_though_something_keeps_its_weights() -> None:
    module = torch.nn.BatchNorm1d(4)
    gradients = SimpleNamespace(grad_data=torch.zeros(8), param_data=None)
    chunk = SimpleNamespace(module=module, buffers=[gradients], expert_parallel_buffers=[])
    slices: Any = {"peer": SimpleNamespace(chunks=[chunk])}
    free(slices)
    kept = [*module.parameters(), *module.buffers(), gradients.grad_data]
    assert len(kept) == 6
    assert all(each.untyped_storage().nbytes() == 0 for each in kept)
