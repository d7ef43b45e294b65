"""A training step beside megatron-core's: forward and backward of a slice of a model on one GPU.

python -m benchmarks.step --judged --name step_h200

Ours and megatron-core's own modules with Transformer Engine, every fusion switched on, take turns
on the same random tokens with the same weights; gradients are summed in fp32 `main_grad`. The
optimizer's step is not in it. A turn is several steps without a wait between them, by the clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

from .card import RESULTS_DIR, Row, write_card
from .megatron_model import CUTLASS
from .step_bench import Bench, add_sizes
from .step_profile import StepProfile, plot_components
from .step_rows import component_rows, loss_rows, time_rows, verdicts

JUDGED = ((2, 4096), (8, 4096))  # sequences of a step, and their length


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure, and write the card."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", help="write benchmarks/results/NAME.json and a plot beside it")
    parser.add_argument("--output", type=Path, default=RESULTS_DIR, help="folder of the card")
    parser.add_argument("--judged", action="store_true", help="the sizes that goals are set for")
    add_sizes(parser)
    parser.add_argument(
        "--precisions",
        nargs="+",
        default=["bf16"],
        help="of ours: groups of `precision`, each perhaps with more settings, 'GROUP NAME=VALUE'",
    )
    parser.add_argument("--peer-precisions", nargs="*", default=["bf16"], help="megatron-core's")
    parser.add_argument("--rounds", type=int, default=8, help="how often all take their turn")
    parser.add_argument("--repeats", type=int, default=3, help="steps of a turn")
    parser.add_argument(
        "--compare-gradients", action="store_true", help="needs their size once more in memory"
    )
    parser.add_argument("--profile", type=Path, help="write traces to this folder")
    parser.add_argument("--kernels", action="store_true", help="print each kernel's time")
    options = parser.parse_args(arguments)
    os.environ.setdefault(CUTLASS, "1")
    sizes = JUDGED if options.judged else [(options.sequences, options.sequence_length)]
    bench = Bench(options)
    bench.build()
    rows: list[Row] = []
    notes = [
        "FLOPs are 6 times the matmul parameters of each token, and those of causal attention; "
        "nothing that is computed again counts. Times are by the clock, over"
        f" {options.repeats} steps in a row; a ratio is the median over rounds.",
        "Activation memory is the peak of a step less what is allocated before it.",
        *bench.notes,
    ]
    for sequences, length in sizes:
        rows_of_size, notes_of_size = measure(bench, sequences, length, options)
        rows += rows_of_size
        notes += notes_of_size
    if options.name:
        print(write_card(options.name, rows, options.output, notes))


def measure(
    bench: Bench, sequences: int, length: int, options: argparse.Namespace
) -> tuple[list[Row], list[str]]:
    """Everything about steps of one size, and notes on it."""
    first_notes = len(bench.notes)
    bench.set_size(sequences, length)
    if not bench.contenders:
        return [], bench.notes[first_notes:]
    size = label = f"{sequences} x {length}"
    if options.microbatches > 1:
        label = f"{options.microbatches} microbatches of {size}"
    losses = bench.losses()
    memory = bench.activation_memory()
    times = bench.times(options.rounds, options.repeats)
    rows = time_rows(label, times, memory, bench.flops(), bench.tokens())
    profiles: dict[str, StepProfile] = bench.profiles(label, options.profile, options.kernels)
    rows += component_rows(label, profiles)
    rows += loss_rows(label, losses)
    notes = []
    if options.compare_gradients:
        for name, (parameter, difference) in bench.gradient_differences().items():
            rows.append(Row(f"{label}, {name}: largest difference of a gradient", "", difference))
            notes.append(f"{label}, {name}: gradients differ by {difference:.2e} ({parameter})")
    notes += verdicts(size, label, times, memory, profiles)
    host = {name: statistics.median(seconds) for name, seconds in bench.host_times().items()}
    for name, seconds in host.items():
        rows.append(Row(f"{label}, {name}: host's part of a step", "ms", 1000 * seconds))
    print("\n".join(notes), flush=True)
    if options.name and profiles:
        plot_components(profiles, options.output / f"{options.name}_{sequences}x{length}.png")
    return rows, notes + bench.notes[first_notes:]


if __name__ == "__main__":
    main()
