"""A signalled run saves, leaves, and goes on as the run that nobody disturbed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_kanana.config.exit_status import START
from megatron_kanana.training.interruption import Interruption
from tests.launch import CONFIG_DIR, free_ports, run_python, train_in_turn


def test_a_signal_to_one_process_makes_all_save_after_the_same_step_and_go_on_bit_by_bit(
    tmp_path: Path, cache_dir: Path
) -> None:
    short = ("schedule.steps=7", "schedule.global_batch_size=4", "checkpoint.keep_last=9")
    signals = {"signalled": (3, signal.SIGUSR1, 85, *free_ports(1))}
    records = train_in_turn(
        tmp_path,
        cache_dir,
        dict.fromkeys(("undisturbed", "signalled"), short),
        processes=2,
        script=("-m", "tests.parallel.train_with_signals", json.dumps(signals)),
    )
    saved = sorted(folder.name for folder in (tmp_path / "signalled" / "checkpoints").iterdir())
    assert saved == ["step_00000003", "step_00000007"]
    assert [record["step"] for record in records["signalled"]] == list(range(1, 8))
    for ours, theirs in zip(records["signalled"], records["undisturbed"], strict=True):
        assert ours["loss"] == theirs["loss"]
        assert ours["grad_norm"] == theirs["grad_norm"]


@pytest.mark.parametrize(
    ("sent", "noted_elsewhere", "status"),
    [
        ([], 0, 0),
        ([signal.SIGUSR1, signal.SIGUSR1], 0, 85),
        ([signal.SIGTERM], 0, 143),
        ([signal.SIGUSR1], signal.SIGTERM, 143),
        ([], signal.SIGUSR1, 85),
    ],
)
def test_all_leave_with_the_status_of_the_signal_that_any_process_got(
    sent: list[int], noted_elsewhere: int, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM has the last word: a cancelled run must not come back."""

    def with_another_process(note: torch.Tensor, operation: object) -> None:
        assert operation == dist.ReduceOp.MAX
        note.clamp_(min=noted_elsewhere)

    monkeypatch.setattr(dist, "all_reduce", with_another_process)
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
    with Interruption() as interruption:
        interruption.listen(torch.device("cpu"))
        for number in sent:
            os.kill(os.getpid(), number)
        assert interruption.agreed() == (status != 0)
    assert interruption.exit_status == status
    assert before == [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]


def test_the_launcher_outlives_a_signal_restarts_what_died_and_passes_the_last_status_on(
    tmp_path: Path,
) -> None:
    """Its process dies once, then signals it, as SLURM does, and leaves with the status for it."""
    script, starts = tmp_path / "leave.py", tmp_path / "starts"
    script.write_text(
        "import os, signal, sys, time\n"
        f"with open({str(starts)!r}, 'a') as file: print(os.environ[{START!r}], file=file)\n"
        f"if open({str(starts)!r}).read().count('\\n') == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN\n"
        "os.kill(os.getppid(), signal.SIGUSR1)\n"
        "time.sleep(0.5)\n"
        "sys.exit(85)\n"
    )
    finished = run_python(
        *("-m", "megatron_kanana.cluster.launch", "--standalone", "--nproc-per-node=1"),
        *("--max-restarts=5", str(script)),
        anew=True,
    )
    assert finished.returncode == 85, finished.stderr
    assert "rank 0 ended with SIGKILL; all start again" in finished.stderr
    names = starts.read_text().split()
    assert len(names) == 2  # what left on purpose is not started again
    assert names[0] != names[1]


def test_a_run_leaves_before_its_time_limit_to_be_started_again(
    tmp_path: Path, cache_dir: Path
) -> None:
    """A minute is kept free for the first checkpoint: of the two there is none."""
    overrides = [
        *("--config-dir", str(CONFIG_DIR), "experiment=small", "watchdog.time_limit='0:00:02'"),
        *(f"output_dir={tmp_path}", f"data.cache_dir={cache_dir}", "run_name=limited"),
    ]
    finished = run_python("-m", "megatron_kanana.train", *overrides)
    assert finished.returncode == 85, finished.stdout + finished.stderr
    assert "the time limit is near: saving" in finished.stderr
    saved = [folder.name for folder in (tmp_path / "limited" / "checkpoints").iterdir()]
    assert saved == ["step_00000001"]
