"""What all guards together cost a training step: blocks of steps with and without them, in turn.

torchrun --nproc-per-node 2 -m benchmarks.guard_overhead --name guard_overhead_cpu

With them: the checks of loss and gradients, the trace of every layer, the watchdog's thread, and a
comparison of the processes' own times at the end of each block, ten times as often as by default.
Both kinds of blocks belong to one run, go on from each other and are measured side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_kanana import device
from megatron_kanana.config import Settings, detect_environment, load_settings

from .card import RESULTS_DIR, Row, write_card

STEPS_OF_A_BLOCK = 10
GUARDS_OFF: dict[str, Any] = {
    "on_nonfinite": "ignore",
    "on_spike": "ignore",
    "trace_layers": False,
    "recheck_interval": 0,
}


def main() -> None:
    """Measure, and write the card on the first process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="name of the card")
    parser.add_argument("--blocks", type=int, default=40, help="blocks of each kind")
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR)
    parser.add_argument("overrides", nargs="*", help="settings of the run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options.blocks, [*options.overrides, f"output_dir={folder}"])
    if dist.get_rank() == 0:
        for row in rows:
            print(f"{row.name}: {row.ours:.4g} {row.unit}")
        write_card(options.name, rows, options.results_dir)
    device.destroy_process_groups()


def measure(blocks: int, overrides: list[str]) -> list[Row]:
    """Time both kinds of blocks."""
    environment = detect_environment()
    steps = (2 * blocks + 2) * STEPS_OF_A_BLOCK
    words = [f"schedule.steps={steps}", "schedule.warmup_steps=10", "schedule.decay_steps=0"]
    settings = load_settings([*words, *overrides], environment)
    where = device.prepare_device(settings, environment)
    device.initialize_process_groups(settings, where)

    from megatron_kanana.training.guards import Guards
    from megatron_kanana.training.run import build_run, training_data

    run = build_run(settings, where)
    off = Guards(run.chunks, dataclasses.replace(settings.guards, **GUARDS_OFF))
    kinds = {True: (run.guards, layer_hooks(run)), False: (off, {})}
    iterators, _ = training_data(run)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for block in range(2 * blocks + 2):
        # On, off, off, on, ...: a drift of the machine hits both alike.
        guarded = block % 4 in (0, 3)
        run.guards, hooks = kinds[guarded]
        put_hooks(run, hooks)
        with watched(settings, run) if guarded else contextlib.nullcontext(Nothing()) as of_block:
            dist.barrier()
            start = time.perf_counter()
            train_block(run, iterators, of_block)
            if where.is_cuda:
                torch.cuda.synchronize()
            if block >= 2:  # the first of each kind warms up
                seconds[guarded].append((time.perf_counter() - start) / STEPS_OF_A_BLOCK)
    on, without = (statistics.median(seconds[guarded]) for guarded in (True, False))
    pairs = [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]
    overhead = 100 * (statistics.median(pairs) - 1)
    quartiles = statistics.quantiles(pairs, n=4)
    spread = 100 * (quartiles[2] - quartiles[0])
    return [
        Row("step with guards", "s", on, "without", without, without / on, blocks),
        Row("overhead of the guards, median of pairs of blocks", "%", overhead, runs=blocks),
        Row("the pairs' interquartile range", "%", spread, runs=blocks),
    ]


class Nothing:
    """Stands for watchdog and comparison where there are none."""

    def enter_step(self, step: int) -> None:
        """As the watchdog's."""

    def step_done(self, step: int, recorder: None) -> None:
        """As the comparison's."""


@dataclasses.dataclass
class Watched:
    """Watchdog and comparison of a block."""

    watchdog: Any
    stragglers: Any

    def enter_step(self, step: int) -> None:
        """Tell the watchdog."""
        self.watchdog.enter_step(step)

    def step_done(self, step: int, recorder: None) -> None:
        """Compare, where it is time."""
        self.stragglers.step_done(step, recorder)


@contextlib.contextmanager
def watched(settings: Settings, run: Any) -> Iterator[Watched]:
    """A watchdog for one block."""
    from megatron_kanana.training.stragglers import Stragglers
    from megatron_kanana.training.watchdog import Watchdog

    often = dataclasses.replace(settings.watchdog, straggler_interval=STEPS_OF_A_BLOCK)
    with Watchdog(settings, detect_environment()) as watchdog:
        yield Watched(watchdog, Stragglers(often, watchdog.own_time, run.device.torch_device))


def train_block(run: Any, iterators: Any, of_block: Any) -> None:
    """The steps of one block."""
    from megatron_kanana.training.step import train_step

    for _ in range(STEPS_OF_A_BLOCK):
        of_block.enter_step(run.step + 1)
        result = train_step(run, iterators)
        assert not result.troubles
        of_block.step_done(run.step, None)


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
