"""What all guards together cost a training step: blocks of steps with and without them, in turn.

torchrun --nproc-per-node 2 -m benchmarks.guard_overhead --name guard_overhead_cpu
python -m benchmarks.guard_overhead --name guard_overhead_h100 --steps 2 --seconds 40 \
    model=kanana_2_30b_a3b model.num_layers=4 model.vocab_size=8192 optimizer=muon \
    data.sequence_length=4096 schedule.micro_batch_size=2 schedule.global_batch_size=8

With them: the checks of loss and gradients, the trace of every layer, and the watchdog's thread.
The comparison of the processes' own times, which comes once in `watchdog.straggler_interval` steps,
is timed by itself after each block, and its share is added to each step. The loss over all
processes is computed with and without guards, as it is logged. Both kinds of blocks belong to one
run and go on from each other. A block with guards is compared with its neighbour without, by the
time on the clock and by the CPU time of all processes with all their threads, which other work on
the machine moves less. Blocks are short, as a machine's pace changes within seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_kanana import device
from megatron_kanana.config import Settings, detect_environment, load_settings

from .card import RESULTS_DIR, Row, write_card

WARM_UP = 4
"""Blocks that are not measured; in the first one the watchdog finds torch's store."""

GUARDS_OFF: dict[str, Any] = {
    "on_nonfinite": "ignore",
    "on_spike": "ignore",
    "trace_layers": False,
    "recheck_interval": 0,
}


def main() -> None:
    """Measure, and write the card on the first process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="name of the card")
    parser.add_argument("--blocks", type=int, default=150, help="blocks of each kind, at most")
    parser.add_argument("--steps", type=int, default=5, help="steps of a block")
    parser.add_argument("--seconds", type=float, default=math.inf, help="for the blocks, at most")
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR)
    parser.add_argument("overrides", nargs="*", help="settings of the run")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        words = [*options.overrides, f"output_dir={folder}"]
        rows = measure(options.blocks, options.steps, options.seconds, words)
    if dist.get_rank() == 0:
        for row in rows:
            print(f"{row.name}: {row.ours:.4g} {row.unit}")
        write_card(options.name, rows, options.results_dir)
    device.destroy_process_groups()


def measure(blocks: int, steps: int, limit: float, overrides: list[str]) -> list[Row]:
    """Time both kinds of blocks.

    Args:
        blocks: of each kind, at most.
        steps: of a block.
        limit: seconds after which no pair of blocks begins.
        overrides: settings of the run.
    """
    environment = detect_environment()
    total = (2 * blocks + WARM_UP) * steps
    words = [f"schedule.steps={total}", "schedule.warmup_steps=10", "schedule.decay_steps=0"]
    settings = load_settings([*words, *overrides], environment)
    where = device.prepare_device(settings, environment)
    device.initialize_process_groups(settings, where)

    from megatron_kanana.training.guards import Guards
    from megatron_kanana.training.run import build_run, training_data

    run = build_run(settings, where)
    off = Guards(run.chunks, dataclasses.replace(settings.guards, **GUARDS_OFF))
    kinds = {True: (run.guards, layer_hooks(run)), False: (off, {})}
    iterators, _ = training_data(run)
    seconds: dict[bool, list[list[float]]] = {True: [], False: []}
    end = math.inf
    with watched(settings, run) as watching:
        for block in range(2 * blocks + WARM_UP):
            if block == WARM_UP:
                end = time.monotonic() + limit
            elif block > WARM_UP and block % 2 == 0 and over(end, where):
                break
            # On, off, off, on, ...: a drift of the machine hits both alike.
            guarded = block % 4 in (0, 3)
            run.guards, hooks = kinds[guarded]
            put_hooks(run, hooks)
            step = partial(train_block, run, iterators, steps, watching if guarded else None)
            time_of_step = timed(step, where) / steps
            if guarded:
                compare = partial(watching.stragglers.step_done, run.step, None)
                time_of_step += timed(compare, where) / settings.watchdog.straggler_interval
            if block >= WARM_UP:
                seconds[guarded].append(time_of_step.tolist())
    rows = []
    for index, name in enumerate(("step", "CPU time of a step, all processes")):
        rows += rows_of(name, *([each[index] for each in seconds[kind]] for kind in (True, False)))
    return rows


def over(end: float, where: Any) -> bool:
    """Whether the first process finds that it is later; all processes ask at the same time."""
    late = torch.tensor([int(time.monotonic() > end)], device=where.torch_device)
    dist.broadcast(late, 0)
    return bool(late)


def timed(function: Callable[[], None], where: Any) -> torch.Tensor:
    """Seconds of a call that all processes make: on the clock, and CPU time of all of them."""
    dist.barrier()
    clock, cpu = time.perf_counter(), time.process_time()
    function()
    if where.is_cuda:
        torch.cuda.synchronize()
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    of_all = torch.tensor([clock / dist.get_world_size(), cpu], device=where.torch_device)
    dist.all_reduce(of_all)
    return of_all


def rows_of(name: str, guarded: list[float], free: list[float]) -> list[Row]:
    """Rows of one kind of time, by pairs of neighbouring blocks."""
    blocks = len(guarded)
    on, without = statistics.median(guarded), statistics.median(free)
    overheads = [100 * (a / b - 1) for a, b in zip(guarded, free, strict=True)]
    quartiles = statistics.quantiles(overheads, n=4)
    low, high = median_interval(overheads)
    values = {
        "overhead of the guards, median of pairs of blocks": statistics.median(overheads),
        "lower end of the median's 95 % confidence interval": low,
        "upper end of the median's 95 % confidence interval": high,
        "the pairs' interquartile range": quartiles[2] - quartiles[0],
    }
    return [
        Row(f"{name}, with guards", "s", on, "without", without, without / on, blocks),
        *(Row(f"{name}: {what}", "%", value, runs=blocks) for what, value in values.items()),
    ]


def median_interval(values: list[float]) -> tuple[float, float]:
    """A 95 % confidence interval of the median: the sign test's, whatever the distribution."""
    count, outside = len(values), 0
    probability = 0.5**count
    while probability <= 0.025:
        outside += 1
        probability += math.comb(count, outside) * 0.5**count
    ordered = sorted(values)
    first = max(outside - 1, 0)
    return ordered[first], ordered[count - 1 - first]


class Pause(threading.Event):
    """Stands for the event that ends the watchdog's thread, and holds the thread between blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.watching = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        """As the event's, but False only while the watchdog is to look."""
        while not self.is_set():
            self.watching.wait()
            if super().wait(timeout) or self.watching.is_set():
                break
        return self.is_set()


@dataclasses.dataclass
class Watched:
    """Watchdog and comparison of the blocks with guards."""

    watchdog: Any
    stragglers: Any
    pause: Pause


@contextlib.contextmanager
def watched(settings: Settings, run: Any) -> Iterator[Watched]:
    """The watchdog, at rest."""
    from megatron_kanana.training.stragglers import Stragglers
    from megatron_kanana.training.watchdog import Watchdog

    watchdog = Watchdog(settings, detect_environment())
    pause = Pause()
    vars(watchdog)["_stopped"] = pause
    # Own times count the pauses here: nobody is to be named by them.
    always = dataclasses.replace(settings.watchdog, straggler_interval=1, straggler_factor=math.inf)
    with watchdog:
        yield Watched(
            watchdog, Stragglers(always, watchdog.own_time, run.device.torch_device), pause
        )
        pause.watching.set()


def train_block(run: Any, iterators: Any, steps: int, watching: Watched | None) -> None:
    """The steps of one block."""
    from megatron_kanana.training.step import train_step

    if watching is not None:
        watching.pause.watching.set()
    for _ in range(steps):
        if watching is not None:
            watching.watchdog.enter_step(run.step + 1)
        result = train_step(run, iterators)
        assert result.applied
    if watching is not None:
        watching.pause.watching.clear()


def layers(run: Any) -> Iterator[torch.nn.Module]:
    """The transformer layers of this process."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    for chunk in run.chunks:
        yield from (each for each in chunk.modules() if isinstance(each, TransformerLayer))


def layer_hooks(run: Any) -> dict[torch.nn.Module, dict[int, Any]]:
    """The hooks by which the trace follows the layers."""
    return {layer: dict(layer._forward_hooks) for layer in layers(run)}


def put_hooks(run: Any, hooks: dict[torch.nn.Module, dict[int, Any]]) -> None:
    """Give every layer these hooks alone."""
    for layer in layers(run):
        layer._forward_hooks.clear()
        layer._forward_hooks.update(hooks.get(layer, {}))


if __name__ == "__main__":
    main()
