"""Runs on a real SLURM cluster whose nodes are on this machine: interrupted, requeued, chained."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch import CONFIG_DIR, ROOT, train
from tests.slurm_cluster import Cluster, cluster, wait_until, why_not

STEPS = 30

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes: n1, n2, n3."""
    if reason := why_not():
        pytest.skip(reason)
    variables = {"OMP_NUM_THREADS": "1"}
    with cluster(tmp_path_factory.mktemp("slurm") / "cluster", 3, variables) as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the runs."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(folder: Path, cache_dir: Path) -> list[dict[str, Any]]:
    """Records of the run on two processes under torchrun alone."""
    return train(folder, cache_dir, "undisturbed", f"schedule.steps={STEPS}", processes=2)


def command(folder: Path, cache_dir: Path, run_name: str) -> list[str]:
    """What a user types for a run on two nodes."""
    return [
        *(sys.executable, str(ROOT / "tools" / "submit.py"), "--config-dir", str(CONFIG_DIR)),
        *("experiment=small", "device=cpu", f"schedule.steps={STEPS}"),
        *(f"output_dir={folder}", f"data.cache_dir={cache_dir}", f"run_name={run_name}"),
        *("cluster=slurm", "nodes=2", "cluster.gpus_per_node=0", "time_limit='0:10:00'"),
        *("cluster.signal_seconds=60", "cluster.preflight.bandwidth_size=4"),
    ]


class Submitted:
    """A run on two nodes, submitted as a user does."""

    def __init__(
        self, slurm: Cluster, folder: Path, cache_dir: Path, run_name: str, *words: str
    ) -> None:
        self.slurm = slurm
        self.run_dir = folder / run_name
        self.records_dir = self.run_dir / "cluster"
        self.said = slurm.run(*command(folder, cache_dir, run_name), *words)
        self.jobs = [int(number) for number in re.findall(r"^submitted job (\d+)", self.said, re.M)]

    def log(self, job: int) -> str:
        """What a job has printed."""
        path = self.records_dir / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def records(self) -> list[dict[str, Any]]:
        """Records of the run so far."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def wait_for_training(self) -> None:
        """Wait until some steps are done."""
        wait_until(lambda: len(self.records()) > 3, 120, lambda: "".join(map(self.log, self.jobs)))

    def saved_steps(self) -> list[str]:
        """Names of the whole checkpoints."""
        return sorted(path.name for path in (self.run_dir / "checkpoints").glob("step_????????"))

    def good_nodes(self, job: int, start: int = 0) -> list[str]:
        """What the pre-flight before a start found."""
        return (self.records_dir / f"preflight-{job}.{start}.good").read_text().split()

    def assert_undisturbed(self, undisturbed: list[dict[str, Any]]) -> None:
        """Every step is there once, with the losses of the run that nobody disturbed."""
        records = self.records()
        assert [record["step"] for record in records] == list(range(1, STEPS + 1))
        for ours, theirs in zip(records, undisturbed, strict=True):
            assert ours["loss"] == theirs["loss"]
            assert ours["grad_norm"] == theirs["grad_norm"]


def test_signalled_run_saves_is_requeued_and_ends_as_if_undisturbed_without_the_drained_node(
    slurm: Cluster, folder: Path, cache_dir: Path, undisturbed: list[dict[str, Any]]
) -> None:
    slurm.run("scontrol", "update", "NodeName=n1", "State=DRAIN", "Reason=bad memory")
    run = Submitted(slurm, folder, cache_dir, "requeued")
    assert "left out: n1: drain, bad memory" in run.said
    (job,) = run.jobs
    run.wait_for_training()
    slurm.run("scancel", "--signal=USR1", str(job))
    slurm.wait_for_job(job, "PENDING")
    (saved,) = run.saved_steps()
    assert 3 < int(saved[-8:]) < STEPS, "the signal came too late to show anything"
    assert len(run.records()) == int(saved[-8:])
    record = slurm.wait_for_job(job, "COMPLETED", "FAILED")
    assert (record["JobState"], record["Restarts"], record["NodeList"]) == (
        *("COMPLETED", "1", "n[2-3]"),
    ), run.log(job)
    run.assert_undisturbed(undisturbed)
    assert f"{saved}: step {int(saved[-8:])}" in run.log(job)
    for start in (0, 1):
        assert run.good_nodes(job, start) == ["n2", "n3"]
        environment = json.loads((run.records_dir / f"environment-{job}.{start}.json").read_text())
        assert environment["packages"]["megatron-core"]
        assert environment["variables"]["SLURM_JOB_ID"] == str(job)
    slurm.run("scontrol", "update", "NodeName=n1", "State=RESUME")


@pytest.fixture
def full_disk_on_n1(slurm: Cluster, folder: Path) -> Iterator[Path]:
    """A folder for checkpoints that has no room on one of the nodes."""
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    slurm.run_on("n1", *("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(checkpoints)))
    yield checkpoints
    slurm.run_on("n1", "umount", str(checkpoints))


def test_node_that_fails_its_preflight_is_named_and_excluded_and_a_cancelled_run_has_saved(
    slurm: Cluster, folder: Path, cache_dir: Path, full_disk_on_n1: Path
) -> None:
    run = Submitted(
        *(slurm, folder, cache_dir, "excluding", f"checkpoint.directory={full_disk_on_n1}/run"),
        "cluster.preflight.minimum_free_disk=0.5",
    )
    (job,) = run.jobs
    slurm.wait_for_job(job, "FAILED")
    assert f"n1 is BAD: has 0.0 GiB free in {full_disk_on_n1}/run, less than 0.5" in run.log(job)
    assert "n2 is good" in run.log(job)
    assert "1 good nodes of 2: submitting again without n1" in run.log(job)
    run.wait_for_training()
    assert slurm.job(job + 1)["NodeList"] == "n[2-3]"
    slurm.run("scancel", str(job + 1))
    slurm.wait_for_job(job + 1, "CANCELLED")
    (saved,) = sorted((full_disk_on_n1 / "run").iterdir())
    assert saved.name == f"step_{len(run.records()):08d}"


def test_chained_job_goes_on_after_the_first_and_a_spare_node_takes_a_bad_ones_place(
    slurm: Cluster,
    folder: Path,
    cache_dir: Path,
    full_disk_on_n1: Path,
    undisturbed: list[dict[str, Any]],
) -> None:
    """With one task a process; the signal reaches the batch script, as before its time limit."""
    run = Submitted(
        *(slurm, folder, cache_dir, "chained", f"checkpoint.directory={full_disk_on_n1}/chained"),
        *("cluster.preflight.minimum_free_disk=0.5", "spare_nodes=1", "--chain", "3"),
        *("cluster.requeue=false", "cluster.launcher=srun"),
    )
    first, second, third = run.jobs
    run.wait_for_training()
    assert run.good_nodes(first) == ["n2", "n3"]
    assert [slurm.job(job)["JobState"] for job in run.jobs] == ["RUNNING", "PENDING", "PENDING"]
    slurm.run("scancel", "--batch", "--signal=USR1", str(first))
    assert slurm.wait_for_job(first, "FAILED")["ExitCode"] == "85:0"
    assert 3 < len(run.records()) < STEPS, "the signal came too late to show anything"
    slurm.wait_for_job(second, "COMPLETED")
    run.assert_undisturbed(undisturbed)
    assert slurm.wait_for_job(third, "CANCELLED")["RunTime"] == "00:00:00"


def test_batch_script_of_ones_own_hands_signals_on_and_is_requeued(
    slurm: Cluster, folder: Path, cache_dir: Path
) -> None:
    """As those of examples/kanana_2_155b_a17b: the script becomes the one that submit.py writes."""
    run_dir, script = folder / "own", folder / "own.sbatch"
    words = shlex.join([*command(folder, cache_dir, "own"), "--in-job"])
    script.write_text(
        "#!/usr/bin/env bash\n#SBATCH --nodes=2 --ntasks-per-node=1 --requeue --open-mode=append\n"
        f"#SBATCH --output={folder}/own.log\nexec {words}\n"
    )
    job = int(slurm.run("sbatch", "--parsable", str(script)))
    metrics, log = run_dir / "metrics.jsonl", folder / "own.log"
    wait_until(
        lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3, 120, log.read_text
    )
    slurm.run("scancel", "--batch", "--signal=USR1", str(job))
    slurm.wait_for_job(job, "PENDING")
    (saved,) = (run_dir / "checkpoints").glob("step_????????")
    assert 3 < int(saved.name[-8:]) < STEPS
    slurm.run("scancel", str(job))
