"""What a submission writes, and what makes a node bad."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_kanana.cluster import record
from megatron_kanana.cluster.measure import Place
from megatron_kanana.cluster.nodes import (
    Measured,
    Node,
    Wanted,
    faults_of_answers,
    faults_of_measurements,
    rounds,
)
from megatron_kanana.cluster.submit import Submission, launch_environment, prepare
from megatron_kanana.config import ConfigurationError, Environment, load_settings
from megatron_kanana.config.cluster_settings import ClusterSettings
from megatron_kanana.config.exit_status import SAVED_FOR_ANOTHER_START
from tests.launch import run_python

SLURM = ("cluster=slurm", "nodes=2", "spare_nodes=1", "partition=gpu", "cluster.gpus_per_node=0")


def prepared(folder: Path, *words: str, chain: int = 1) -> Submission:
    """A submission that is only looked at."""
    overrides = [f"output_dir='{folder}'", *words]
    return prepare(overrides, None, "python tools/submit.py …", chain=chain, starts=False)


def directives(script: str) -> list[str]:
    """Options of sbatch that a script names."""
    return [line[8:] for line in script.splitlines() if line.startswith("#SBATCH ")]


VARIANTS = {
    "torchrun": (),
    "srun": ("cluster.launcher=srun",),
    "pyxis": ("cluster.container=pyxis", "cluster.container_image='registry.example.com#kanana:1'"),
    "apptainer": (
        "cluster.container=apptainer",
        "cluster.container_image=docker://kakao/kanana",
    ),
    "no pre-flight": ("cluster.preflight.enabled=false", "cluster.requeue=false"),
    "excluding": ("cluster.exclude=[n8,n9]", "cluster.variables={NCCL_DEBUG:INFO}"),
    "set up": ("cluster.setup=['module load cuda/13.0','ulimit -n 65536']",),
}


@pytest.mark.parametrize("chain", [1, 3])
def test_scripts_are_clean_shell(tmp_path: Path, chain: int) -> None:
    """Every variant at once: a check takes longer to start than to read."""
    scripts = []
    for name, words in {**VARIANTS, "local": ("cluster=local",)}.items():
        if name == "local" and chain > 1:
            continue
        of_cluster = () if name == "local" else SLURM
        submission = prepared(tmp_path / "with space", *of_cluster, *words, chain=chain)
        scripts.append(tmp_path / f"{name}.sh")
        scripts[-1].write_text(submission.script)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_script_asks_slurm_for_what_the_settings_say(tmp_path: Path) -> None:
    submission = prepared(
        *(tmp_path, *SLURM, "cluster.processes_per_node=2", "schedule.global_batch_size=32"),
        *(
            "account=kanana",
            "time_limit='1-12:00:00'",
            "cluster.signal_seconds=900",
            "cluster.exclude=[n9]",
        ),
        *("cluster.sbatch_options=['--qos=high']", "run_name=asked"),
        chain=2,
    )
    assert submission.path == tmp_path / "asked" / "cluster" / "train.sbatch"
    assert set(directives(submission.script)) == {
        *("--job-name=asked", "--nodes=3", "--ntasks-per-node=2", "--partition=gpu"),
        *("--account=kanana", "--time=1-12:00:00", "--signal=B:USR1@900", "--exclude=n9"),
        *("--dependency=singleton", "--open-mode=append", "--requeue", "--qos=high"),
        f"--output={tmp_path}/asked/cluster/%j.log",
    }
    for name, words in {
        "GPUs": ("cluster=slurm", "cluster.gpus_per_node=4", "schedule.global_batch_size=64"),
        "once": ("cluster=slurm", "cluster.gpus_per_node=0", "cluster.requeue=false"),
    }.items():
        options = directives(prepared(tmp_path, *words).script)
        assert ("--gres=gpu:4" in options) == (name == "GPUs")
        assert ("--no-requeue" in options) == (name == "once")
        assert not any(option.startswith(("--dependency", "--exclude")) for option in options)


def test_nodes_that_a_preflight_found_bad_are_excluded_from_the_next_submission(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "kanana_2_tiny" / "cluster"
    folder.mkdir(parents=True)
    (folder / "excluded_nodes").write_text("n7\nn3\nn7\n")
    script = prepared(tmp_path, *SLURM, "cluster.exclude=[n9]").script
    assert "--exclude=n3,n7,n9" in directives(script)


def test_words_reach_the_run_as_they_were_given(tmp_path: Path) -> None:
    """The array that the script starts the run with, read by the shell itself."""
    words = ("logging.sample_prompt='it\\'s $HOME'", "data.blend=[]", "schedule.steps=500")
    script = prepared(tmp_path, "cluster=local", *words).script
    begin = script.index("run=(")
    array = script[begin : script.index("\n)\n", begin) + 2]
    shown = subprocess.run(
        ["bash", "-c", f"{array}\nprintf '%s\\n' \"${{run[@]}}\""],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.splitlines()[2:] == [f"output_dir='{tmp_path}'", "cluster=local", *words]


def test_the_configuration_is_checked_for_the_processes_the_nodes_will_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All problems together: of the model's layout, of the cluster, and of submitting from here."""
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch
    words = ("cluster=slurm", "nodes=3", "time_limit='soon'", "schedule.global_batch_size=16")
    image = ("cluster.container=apptainer", f"cluster.container_image={tmp_path}/none.sif")
    with pytest.raises(ConfigurationError) as caught:
        prepare([*words, *image, "device=cpu"], None, "submit", chain=0)
    told = {problem.setting: problem.value for problem in caught.value.problems}
    assert told == {
        "schedule.global_batch_size": 16,  # 24 processes
        "cluster.time_limit": "soon",
        "cluster.kind": "slurm",
        "cluster.container_image": f"{tmp_path}/none.sif",
        "cluster.gpus_per_node": 8,
        "--chain": 0,
    }


@pytest.mark.parametrize(
    ("cluster", "world_size", "gpus"),
    [
        (ClusterSettings(), 2, 2),
        (ClusterSettings(gpus_per_node=0), 1, 2),
        (ClusterSettings(processes_per_node=4), 4, 2),
        (ClusterSettings(kind="slurm", nodes=64, gpus_per_node=8), 512, 8),
        (ClusterSettings(kind="slurm", nodes=3, gpus_per_node=0, processes_per_node=2), 6, 0),
    ],
)
def test_processes_of_a_launch(cluster: ClusterSettings, world_size: int, gpus: int) -> None:
    launch = launch_environment(cluster, Environment(cuda_device_count=2))
    assert (launch.world_size, launch.cuda_device_count) == (world_size, gpus)
    assert launch.local_world_size * cluster.nodes == world_size


def test_fp8_is_submitted_from_where_neither_its_gpu_nor_its_software_is() -> None:
    """Two nodes in a container are asked for on a login node of another GPU, nothing installed."""
    login = Environment(
        cuda_device_count=1,
        gpu_name="NVIDIA A100",
        compute_capability=(8, 0),
        transformer_engine_version=None,
    )
    in_image = ClusterSettings(kind="slurm", nodes=2, gpus_per_node=8, container_image="any.sqsh")
    words = ["precision=fp8_blockwise", "schedule.global_batch_size=128"]
    load_settings(words, launch_environment(in_image, login), with_files=False)

    without_image = dataclasses.replace(in_image, container_image=None)
    with pytest.raises(ConfigurationError) as refused:
        load_settings(words, launch_environment(without_image, login), with_files=False)
    assert {problem.setting for problem in refused.value.problems} == {"precision.fp8"}
    assert "transformer-engine" in str(refused.value)  # and not the GPU here

    looked_at = launch_environment(without_image, login, starts=False)
    load_settings(words, looked_at, with_files=False)


def test_a_script_is_looked_at_without_loading_torch() -> None:
    """Which takes seconds, and a login node may not have."""
    look = "prepare(['cluster=slurm', 'schedule.global_batch_size=64'], None, '', starts=False)"
    program = f"import sys; from {prepare.__module__} import prepare; {look}; print(*sys.modules)"
    finished = run_python("-c", program, anew=True)
    assert finished.returncode == 0, finished.stderr
    loaded = set(finished.stdout.split())
    assert "hydra" in loaded and not loaded & {"torch", "megatron.core", "transformers"}


def test_local_script_runs_the_job_and_passes_its_status_on(tmp_path: Path) -> None:
    """With a stand-in for Python that tells what it was started with."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n[ "$2" != {LAUNCH} ] || exit 85\n')
    python.chmod(0o755)
    words = ("cluster=local", f"cluster.python={python}", "cluster.variables={COLOUR:red blue}")
    script = prepared(tmp_path, *words, "cluster.processes_per_node=2").script
    finished = subprocess.run(["bash", "-c", script], check=False)
    assert finished.returncode == SAVED_FOR_ANOTHER_START
    recorded, launched = (tmp_path / "told").read_text().splitlines()
    assert recorded.startswith("-m megatron_kanana.cluster.record")
    options = "--standalone --nproc-per-node=2 --max-restarts=3"
    assert launched.startswith(f"-m {LAUNCH} {options} -m megatron_kanana")


LAUNCH = "megatron_kanana.cluster.launch"


WANTED = Wanted(
    gpus=8, minimum_free_disk=100.0, maximum_clock_difference=1.0, minimum_bandwidth=150.0
)
GOOD = Node(8, {"driver": "580.1", "NCCL": "2.27.3"}, {"/runs": 500.0})


def test_a_node_is_bad_by_what_it_says_and_by_what_it_does_not_say() -> None:
    answers: dict[str, Node | None] = {
        "good": GOOD,
        "also good": GOOD,
        "without a GPU": dataclasses.replace(GOOD, gpus=7),
        "with another driver": dataclasses.replace(GOOD, versions={**GOOD.versions, "driver": "1"}),
        "without NCCL": dataclasses.replace(GOOD, versions={"driver": "580.1"}),
        "full": dataclasses.replace(GOOD, free_disk={"/runs": 3.0}),
        "read-only": dataclasses.replace(GOOD, unwritable={"/runs": "read-only file system"}),
        "silent": None,
    }
    faults = faults_of_answers(answers, WANTED)
    assert faults == {
        "good": [],
        "also good": [],
        "without a GPU": ["has 7 GPUs instead of 8"],
        "with another driver": ["has 1 as its version of driver, most nodes have 580.1"],
        "without NCCL": ["has None as its version of NCCL, most nodes have 2.27.3"],
        "full": ["has 3.0 GiB free in /runs, less than 100"],
        "read-only": ["cannot write to /runs: read-only file system"],
        "silent": ["gave no answer"],
    }


@pytest.mark.parametrize("count", range(3, 8))
def test_only_the_slow_node_of_a_ring_is_named(count: int) -> None:
    """Whichever it is: its neighbours are fast with their other ones."""
    for slow in range(count):
        speeds: dict[int, dict[str, float]] = {node: {} for node in range(count)}
        for first, second in itertools.chain(*rounds(count)):
            speed = 20.0 if slow in (first, second) else 300.0
            speeds[first][f"n{second}"] = speeds[second][f"n{first}"] = speed
        assert all(len(of_node) == 2 for of_node in speeds.values())
        measured = {f"n{node}": Measured(0.0, 400.0, speeds[node]) for node in range(count)}
        faults = faults_of_measurements(measured, WANTED)
        assert [name for name in faults if faults[name]] == [f"n{slow}"]
        assert "less than 150" in faults[f"n{slow}"][0]


def test_no_node_measures_with_two_others_at_once() -> None:
    for count in range(1, 20):
        for pairs in rounds(count):
            nodes = list(itertools.chain(*pairs))
            assert len(nodes) == len(set(nodes))


def test_clocks_are_compared_with_the_middle_of_all() -> None:
    """The first node's own may be the wrong one."""
    offsets = {"n1": 0.0, "n2": 42.0, "n3": 42.0, "n4": 42.5}
    measured = {name: Measured(clock) for name, clock in offsets.items()}
    faults = faults_of_measurements({**measured, "n5": None}, WANTED)
    assert faults["n1"] == ["its clock is 42.00 s behind the middle of all"]
    assert faults["n5"] == ["did not finish the all-reduce"]
    assert not faults["n2"] + faults["n3"] + faults["n4"]


def test_a_node_is_bad_by_its_own_links() -> None:
    faults = faults_of_measurements({"n1": Measured(inside=30.0), "n2": Measured()}, WANTED)
    assert faults == {
        "n1": ["reduces 30.00 GB/s over its own processes, less than 150"],
        "n2": [],
    }


def test_processes_of_two_nodes_are_counted_node_by_node() -> None:
    place = Place(("n1", "n3", "n4"), node=2, local_rank=1, processes=2)
    assert place.rank == 5
    assert place.ranks(2, 0) == [0, 1, 4, 5]


def test_recorded_environment_tells_what_ran_and_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    path = tmp_path / "new" / "environment.json"
    record.main(path)
    recorded = json.loads(path.read_text())
    assert recorded["packages"]["torch"] and recorded["host"]
    assert recorded["variables"]["NCCL_DEBUG"] == "INFO"
    assert "abc" not in path.read_text()
    assert record.output("no-such-program") is None
