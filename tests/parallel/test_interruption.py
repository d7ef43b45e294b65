"""A signalled run saves, leaves, and goes on as the run that nobody disturbed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from tests.launch import free_ports, run_python, train_in_turn


def test_a_signal_to_one_process_makes_all_save_after_the_same_step_and_go_on_bit_by_bit(
    tmp_path: Path, cache_dir: Path
) -> None:
    short = ("schedule.steps=7", "schedule.global_batch_size=4", "checkpoint.keep_last=9")
    ports = free_ports(2)
    signals = {
        "requeued": (3, signal.SIGUSR1, 85, ports[0]),
        "ended": (6, signal.SIGTERM, 143, ports[1]),
    }
    records = train_in_turn(
        tmp_path,
        cache_dir,
        dict.fromkeys(("undisturbed", *signals), short),
        processes=2,
        script=("-m", "tests.parallel.train_with_signals", json.dumps(signals)),
    )
    for name, (step, *_) in signals.items():
        saved = sorted(folder.name for folder in (tmp_path / name / "checkpoints").iterdir())
        assert saved == [f"step_{step:08d}", "step_00000007"]
        assert [record["step"] for record in records[name]] == list(range(1, 8))
        for ours, theirs in zip(records[name], records["undisturbed"], strict=True):
            assert ours["loss"] == theirs["loss"]
            assert ours["grad_norm"] == theirs["grad_norm"]


def test_the_launcher_outlives_a_schedulers_signal_and_passes_the_status_on(tmp_path: Path) -> None:
    """Its process signals it, as SLURM does, and leaves with the status that asks for a requeue."""
    script = tmp_path / "leave.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN\n"
        "os.kill(os.getppid(), signal.SIGUSR1)\n"
        "time.sleep(0.5)\n"
        "sys.exit(85)\n"
    )
    finished = run_python(
        "-m", "megatron_kanana.cluster.launch", "--standalone", "--nproc-per-node=1", str(script)
    )
    assert finished.returncode == 85, finished.stderr
