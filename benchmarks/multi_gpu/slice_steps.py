"""The processes of `speed`: steps of a slice with experts over all of them, timed in turns.

Arguments: those of `speed`, --output FILE, to which the first process writes what it measured, and
--turn FILE, which is there once it may begin.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.card import reason
from benchmarks.multi_gpu import collectives, memory, slices
from benchmarks.multi_gpu.slices import OURS, PEER, PEER_MICROBATCHES, PEER_SHARED, Slice
from benchmarks.multi_gpu.speed import slice_settings, step_options
from megatron_kanana import device
from megatron_kanana.config import detect_environment

WARM_UP = 3
STEP, LOCAL, ALONE = "step", "all-to-all as local copies", "besides, gradients not reduced"
SIZES_MIB = (1, 4, 16, 64, 256)


class Steps:
    """Contenders on this process, and what was measured.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        environment = detect_environment()
        self.settings = slice_settings(options, environment)
        self.device = device.prepare_device(self.settings, environment)
        import megatron_kanana.training.run  # noqa: F401  before the turn, as it takes long

        while not options.turn.exists():
            time.sleep(0.1)
        device.initialize_process_groups(self.settings, self.device)

        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(self.settings.seed)
        self.found: dict[str, Any] = {"seconds": {}, "not run": [], "bandwidth": {}, "peak GiB": {}}
        self.slices: dict[str, Slice] = {}

    def measure(self) -> None:
        """Everything, in the order of its weight; what is known is written after each part."""
        peers = [PEER, PEER_SHARED] if dist.get_world_size() > 1 else [PEER]
        names = [OURS] if self.options.ours_alone else [OURS, *peers[-1:]]
        together = memory.fits(self.options, self.settings, len(names), self.device)
        self.found["interleaved"] = together
        for group in [names] if together else [[name] for name in names]:
            for name in group:
                self.build(name)
            self.time_steps()
            if OURS in self.slices and dist.get_world_size() > 1:
                self.measure_exchanges(self.slices[OURS])
            self.write()
            slices.free(self.slices)
        self.time_update()
        self.write()
        if self.options.all_peers and dist.get_world_size() > 1 and self.device.is_cuda:
            for name in (PEER, PEER_MICROBATCHES):  # the last may hang; all else is written
                self.build(name)
                self.time_steps()
                self.write()
                slices.free(self.slices)

    def build(self, name: str) -> None:
        """Build a contender and warm it up; one that fails leaves the reason."""
        microbatches = self.options.microbatches
        if name == PEER_MICROBATCHES:
            microbatches = max(2, microbatches)
        try:
            built = slices.build_slice(name, self.settings, self.device, microbatches)
            for _ in range(WARM_UP):
                loss = built.step()
            self.found.setdefault("loss", {})[name] = float(loss)
            self.slices[name] = built
        except Exception as error:
            self.leave_out(name, error)

    def leave_out(self, name: str, error: Exception) -> None:
        """Whatever a peer raises, the others run."""
        self.found["not run"].append(f"{name}: {reason(error, 300)}")
        if name.startswith(OURS):
            raise error

    def time_steps(self) -> None:
        """Seconds of a step of each contender, with and without communication, in turns."""
        functions: dict[str, Callable[[], Any]] = {}
        for name, each in self.slices.items():
            functions[f"{name}: {STEP}"] = each.step
            if dist.get_world_size() > 1:
                functions[f"{name}: {LOCAL}"] = partial(_locally, each, reduce_gradients=True)
                functions[f"{name}: {ALONE}"] = partial(_locally, each, reduce_gradients=False)
        for name, function in list(functions.items()):
            try:
                function()
            except Exception as error:
                self.leave_out(name, error)
                del functions[name]
        names = list(functions)
        for turn in range(self.options.rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                repeated = [functions[name]] * self.options.repeats
                seconds = collectives.seconds_of_all(repeated, self.device.torch_device)
                microbatches = self.slices[name.rpartition(": ")[0]].microbatches
                self.found["seconds"].setdefault(name, []).append(
                    seconds / self.options.repeats / microbatches
                )
        if self.device.is_cuda:
            peak = torch.cuda.max_memory_allocated() / 2**30
            self.found["peak GiB"][", ".join(self.slices)] = peak
            torch.cuda.reset_peak_memory_stats()

    def measure_exchanges(self, ours: Slice) -> None:
        """Bandwidth of a step's all-to-alls by themselves, and of even ones."""
        exchanges: list[collectives.Exchange] = []
        with collectives.recorded(exchanges):
            ours.step()
        largest = max(each.row_bytes for each in exchanges)
        of_tokens = [each for each in exchanges if each.row_bytes == largest]
        where, repeats = self.device.torch_device, self.options.rounds
        rate = partial(collectives.gigabytes_a_second, device=where, repeats=repeats)
        bandwidth = self.found["bandwidth"]
        bandwidth["as the step sends them"] = rate(of_tokens, even=False)
        bandwidth["the same bytes, even"] = rate(of_tokens, even=True)
        sent = [sum(each.sent) * each.row_bytes / 2**20 for each in of_tokens]
        self.found["exchanges"] = {"number": len(of_tokens), "MiB": sum(sent) / len(sent)}
        sizes = SIZES_MIB if self.device.is_cuda else SIZES_MIB[:2]
        for size in sizes:
            rows = size * 2**20 // 4096 // dist.get_world_size()
            even = (rows,) * dist.get_world_size()
            raw = rate([collectives.Exchange(4096, even, even)], even=True)
            bandwidth[f"raw, {size} MiB a process"] = raw

    def time_update(self) -> None:
        """The optimizer's step, after the gradients of one sequence."""
        if not memory.fits_update(self.options, self.settings, self.device):
            self.found["not run"].append("update: weights and optimizer do not fit")
            return
        self.settings.schedule.micro_batch_size = 1
        self.build(OURS)
        update = slices.update_of(self.slices[OURS])
        seconds = []
        for _ in range(1 + self.options.rounds):
            self.slices[OURS].step()
            seconds.append(collectives.seconds_of_all([update], self.device.torch_device))
        self.found["seconds"][f"{OURS}: update"] = seconds[1:]
        self.settings.schedule.micro_batch_size = self.options.sequences
        slices.free(self.slices)

    def write(self) -> None:
        """Leave what is known so far."""
        if dist.get_rank() == 0:
            self.options.output.write_text(json.dumps(self.found, indent=1))


def _locally(each: Slice, *, reduce_gradients: bool) -> None:
    with collectives.local_copies():
        each.step(reduce_gradients=reduce_gradients)


def main() -> None:
    """Measure on this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    step_options(parser)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--turn", type=Path, required=True)
    parser.add_argument("--ours-alone", action="store_true")
    parser.add_argument("--all-peers", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    steps = Steps(options)
    steps.measure()
    dist.barrier()
    device.destroy_process_groups()


if __name__ == "__main__":
    main()
