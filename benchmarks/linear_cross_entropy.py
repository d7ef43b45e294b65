"""Output layer and loss, forward and backward, beside other implementations: time and memory.

python -m benchmarks.linear_cross_entropy --name linear_cross_entropy_h100      # on a Hopper GPU
python -m benchmarks.linear_cross_entropy --name linear_cross_entropy_cpu --cpu

Gradients of the weight end in an fp32 sum, as under megatron-core's data parallelism. Contenders
take turns; those that cannot run are noted with the reason. On a GPU in bf16 and with Kanana-2
30B's sizes, on a CPU small ones in fp32. The card is written after each case.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from .card import RESULTS_DIR, Row, reason, write_card
from .interleaved import interleaved_ms
from .interleaved_cpu import rows_in_turns
from .linear_cross_entropy_peers import OURS, Case, Head, Inputs, contenders, random_inputs
from .step_bench import release_memory

GPU_CASES = (Case(8192, 2048, 128256), Case(32768, 2048, 128256))
CPU_CASES = (Case(1024, 128, 4096), Case(512, 256, 32064))
REPEATS = 3


def start_megatron_core(device: str) -> None:
    """One process of megatron-core, which its losses ask for."""
    from megatron_kanana.device.patches import apply_patches

    apply_patches(device)
    from megatron.core import parallel_state

    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, rank=0, world_size=1, store=HashStore())
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)


def heads(inputs: Inputs) -> tuple[dict[str, Head], list[str]]:
    """Contenders that run, each after one step; and why others do not."""
    found, notes = {}, []
    for name, losses_of in contenders():
        start = time.perf_counter()
        try:
            head = Head(inputs, losses_of())
            head.step(inputs)
            found[name] = head
            told = "first step"
        except Exception as error:
            told = f"not run: {reason(error, 300)}"
            notes.append(f"{name}: {told}")
        print(f"{name}: {told}, {time.perf_counter() - start:.1f} s", flush=True)
    return found, notes


def peak_bytes(head: Head, inputs: Inputs) -> int:
    """Most GPU memory of a step above what was there before, the gradient's sum included there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    head.step(inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def rows_of(case: str, unit: str, values: Mapping[str, float], runs: int) -> list[Row]:
    """One row a peer."""
    own = values[OURS]
    return [
        Row(f"{case}: forward + backward", unit, own, peer, value, value / own, runs)
        for peer, value in values.items()
        if peer != OURS
    ]


def on_gpu(case: Case, rounds: int) -> tuple[list[Row], list[str]]:
    """Times and peaks of a case."""
    release_memory()
    inputs = random_inputs(case, "cuda", torch.bfloat16)
    found, notes = heads(inputs)
    if OURS not in found:
        return [], notes
    steps = {name: lambda head=head: head.step(inputs) for name, head in found.items()}
    times = interleaved_ms(steps, rounds, REPEATS)
    medians = {name: statistics.median(of_rounds) for name, of_rounds in times.items()}
    peaks = {name: peak_bytes(head, inputs) / 2**30 for name, head in found.items()}
    flops = 6.0 * case.tokens * case.hidden_size * case.words
    notes.append(f"{case}: {flops / medians[OURS] / 1e9:.0f} TFLOP/s of three products")
    rows = rows_of(str(case), "ms", medians, rounds)
    return [*rows, *rows_of(str(case), "GiB at most", peaks, 1)], notes


def on_cpu(case: Case, rounds: int) -> tuple[list[Row], list[str]]:
    """Times of a case."""
    inputs = random_inputs(case, "cpu", torch.float32)
    found, notes = heads(inputs)
    if OURS not in found:
        return [], notes
    steps: dict[str, dict[str, Any]] = {
        name: {"forward + backward": lambda head=head: head.step(inputs)}
        for name, head in found.items()
    }
    return rows_in_turns(str(case), OURS, steps, rounds), notes


def main() -> None:
    """Measure, print and write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True, help="name of the card")
    parser.add_argument("--cpu", action="store_true", help="small sizes on a CPU")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--results-dir", type=Path, default=RESULTS_DIR)
    options: Any = parser.parse_args()
    torch.set_num_threads(options.threads)
    start_megatron_core("cpu" if options.cpu else "cuda")
    rows: list[Row] = []
    notes: list[str] = [f"{options.threads} threads"] if options.cpu else []
    for case in CPU_CASES if options.cpu else GPU_CASES:
        print(case, flush=True)
        of_case, told = (on_cpu if options.cpu else on_gpu)(case, options.rounds)
        rows += of_case
        notes += [note for note in told if note not in notes]
        for row in of_case:
            print(
                f"{row.name}: {row.ours:.4g} {row.unit}, {row.peer} {row.peer_value:.4g}, "
                f"ratio {row.ratio:.2f}"
            )
        print(write_card(options.name, rows, options.results_dir, notes=notes), flush=True)
    print(*notes, sep="\n")


if __name__ == "__main__":
    main()
