"""A layer of experts beside its peers on one GPU: forward and backward, in interleaved rounds.

python -m benchmarks.moe --judged --name moe_h100
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from .card import Row, reason, write_card
from .interleaved import interleaved_ms
from .moe_cases import CASES, LOADS, Case, of_experts, random_inputs, random_weights
from .moe_kernels import data_movement
from .moe_memory import launches
from .moe_peers import (
    CONTENDERS,
    MEGATRON,
    OURS,
    OURS_ROUTED,
    PLAIN,
    SHORT_NAMES,
    built,
    drop_gradients,
    step,
)
from .moe_rows import Bench, launch_rows, memory_rows, time_rows, verdicts

WARM_UP = 3
JUDGED = (OURS, OURS_ROUTED, MEGATRON, PLAIN)
JUDGED_TOKENS = (16384, 65536)
NUMBERS_OF_EXPERTS = (32, 64, 128, 256)
TOKENS_OF_LAUNCHES = 2048


def prepare(case: Case, names: Iterable[str]) -> Bench:
    """Build and warm up; a contender that fails leaves the reason."""
    torch._dynamo.reset()  # each size is compiled for itself
    weights = random_weights(case)
    bench = Bench(case, weights, random_inputs(case, weights), {}, [])
    for name in names:
        contender = CONTENDERS[name]
        try:
            layer = built(contender, case, weights, bench.inputs)
            for _ in range(WARM_UP):
                step(contender, layer, bench.inputs)
            torch.cuda.synchronize()
        except Exception as error:  # whatever a peer raises, the others run
            bench.not_run.append(f"not run: {name}, {case.label}: {reason(error)}")
            print(bench.not_run[-1], flush=True)
            drop_gradients(bench.inputs)
            continue
        bench.layers[name] = layer
        print(f"{name}: ready", flush=True)
    return bench


def measure(bench: Bench, rounds: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each contender's forward and backward pass in each round."""
    functions: dict[str, Callable[[], object]] = {
        name: partial(step, CONTENDERS[name], layer, bench.inputs)
        for name, layer in bench.layers.items()
    }
    return interleaved_ms(functions, rounds, repeats)


def launches_by_experts() -> tuple[list[Row], str]:
    """Our launches with several numbers of experts, which are to be the same."""
    rows: list[Row] = []
    counts: dict[int, int] = {}
    for experts in NUMBERS_OF_EXPERTS:
        case = of_experts(dataclasses.replace(CASES["30b"], tokens=TOKENS_OF_LAUNCHES), experts)
        bench = prepare(case, [OURS])
        if OURS not in bench.layers:
            return rows, f"launches by number of experts: {bench.not_run[-1]}"
        launches(bench.layers[OURS], bench.inputs)
        counts[experts] = len(launches(bench.layers[OURS], bench.inputs))
        rows.append(Row(f"launches of a layer with {experts} experts", "launches", counts[experts]))
    verdict = "constant" if len(set(counts.values())) == 1 else "NOT constant"
    return rows, f"launches, forward and backward, by number of experts: {counts}: {verdict}"


def selected(arguments: argparse.Namespace) -> list[Case]:
    """The cases that were asked for."""
    names = ["30b"] if arguments.judged else arguments.case or list(CASES)
    cases = []
    for name in names:
        case = dataclasses.replace(CASES[name], loads=arguments.loads)
        sizes = arguments.tokens or (JUDGED_TOKENS if name == "30b" else [case.tokens])
        cases += [dataclasses.replace(case, tokens=tokens) for tokens in sizes]
    return cases


def results(
    case: Case, names: Iterable[str], arguments: argparse.Namespace
) -> tuple[list[Row], list[str]]:
    """Everything that is measured of one case, and notes on it."""
    bench = prepare(case, names)
    times = measure(bench, arguments.rounds, arguments.repeats)
    rows = time_rows(bench, times)
    memory = memory_rows(bench)
    rows += memory.rows + launch_rows(bench, with_tables=arguments.profile)
    notes = verdicts(bench, times, memory.found)
    print("\n".join(notes), flush=True)
    notes += bench.not_run
    bench.layers.clear()
    gc.collect()
    new_rows, new_notes = data_movement(
        case, bench.weights, bench.inputs, rounds=arguments.rounds, repeats=arguments.repeats
    )
    del bench
    gc.collect()
    torch.cuda.empty_cache()
    return rows + new_rows, notes + new_notes


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", help="write benchmarks/results/NAME.json")
    parser.add_argument("--output", type=Path, help="folder of the card instead")
    parser.add_argument("--case", nargs="+", choices=CASES, help="by default all")
    parser.add_argument("--tokens", nargs="+", type=int, help="of each process")
    parser.add_argument("--loads", choices=LOADS, default="zipf")
    parser.add_argument("--contenders", nargs="+", choices=SHORT_NAMES, help="by default all")
    parser.add_argument("--judged", action="store_true", help="what the goals need, no more")
    parser.add_argument("--profile", action="store_true", help="print our kernels and their times")
    parser.add_argument("--rounds", type=int, default=12, help="how often all take their turn")
    parser.add_argument("--repeats", type=int, default=4, help="calls a turn")
    arguments = parser.parse_args()
    names = JUDGED if arguments.judged else tuple(CONTENDERS)
    if arguments.contenders:
        names = tuple(SHORT_NAMES[name] for name in arguments.contenders)
    rows: list[Row] = []
    notes = [
        "FLOPs are 6 times the matmul parameters of each row and token: 18 d (n rows + shared width"
        f" tokens); the router's are left out. A turn is the median of {arguments.repeats} calls,"
        " cache flushed before each; a ratio is the median over rounds.",
        "Peaks include the layer's input and the gradient of its output; weights and their fp32"
        " gradients are left out.",
    ]
    for case in selected(arguments):
        new_rows, new_notes = results(case, names, arguments)
        rows += new_rows
        notes += new_notes
    if OURS in names:
        new_rows, verdict = launches_by_experts()
        rows += new_rows
        notes.append(verdict)
        print(verdict, flush=True)
    if arguments.name:
        folder = {"results_dir": arguments.output} if arguments.output else {}
        print(write_card(arguments.name, rows, notes=notes, **folder))


if __name__ == "__main__":
    main()
