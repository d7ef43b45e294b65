"""Two processes that train as fast as one another, but one computes longer; prints who is slow."""

from __future__ import annotations

import sys
import threading
import time

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_kanana.config.watchdog_settings import WatchdogSettings
from megatron_kanana.training.stragglers import OwnTime, Stragglers

STEPS = 40
SECONDS = (0.02, 0.06)
"""Own time of a step on each rank."""


class Told:
    """In place of a Recorder: keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.own: list[float] = []

    def say(self, message: str) -> None:
        """A line for the log."""
        self.said.append(message)

    def record_own_times(self, step: int, seconds: list[float], *_: object) -> None:
        """Figures for metrics.jsonl."""
        self.own = [step, *seconds]


def main() -> None:
    """Compute and meet, step by step, beside a thread that looks on."""
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    own_time, told, done = OwnTime(), Told(), threading.Event()
    main_thread = threading.get_ident()

    def look() -> None:
        last = time.monotonic()
        while not done.wait(0.01):
            now = time.monotonic()
            own_time.sample(sys._current_frames()[main_thread], now - last)
            last = now

    threading.Thread(target=look, daemon=True).start()
    stragglers = Stragglers(
        WatchdogSettings(straggler_interval=STEPS), own_time, torch.device("cpu")
    )
    for step in range(1, STEPS + 1):
        time.sleep(SECONDS[dist.get_rank()])
        dist.all_reduce(torch.ones(8))
        stragglers.step_done(step, told if dist.get_rank() == 0 else None)  # type: ignore[arg-type]
    done.set()
    if dist.get_rank() == 0:
        print("\n".join(told.said))
        print("own", *told.own)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
