"""Random configurations and damaged inputs, many of them: tests/fuzz at length.

    python -m benchmarks.fuzz configurations --name fuzz_configurations_cpu
    python -m benchmarks.fuzz inputs --name fuzz_inputs_cpu

Writes how many ended how into the card; prints each defect, and ends with 1 if there is one. The
examples follow from the seed and the number of processes.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.card import Row, write_card
from megatron_kanana.data.builtin import builtin_data, prepare_builtin_data
from tests.conftest import TEST_VOCAB_SIZE
from tests.fuzz.campaign import Outcome, fuzz_configurations, fuzz_inputs
from tests.fuzz.inputs import make_special_files, write_good_files


def main() -> int:
    """Run a campaign; 1 if it shows a defect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("configurations", "inputs"))
    parser.add_argument("--name", required=True, help="of the card")
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1, help="of the first process")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    share = -(-options.examples // options.processes)
    seeds = range(options.seed, options.seed + options.processes)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        parts = pool.map(functools.partial(campaign, options.what, share), seeds, chunksize=1)
    outcome = functools.reduce(Outcome.__add__, parts)
    print(write_card(options.name, rows(options.what, outcome)))
    for place, defect in outcome.defects.items():
        print(f"{place}\n{defect}\n", file=sys.stderr)
    return 1 if outcome.defects else 0


def campaign(what: str, examples: int, seed: int) -> Outcome:
    """One process's examples, in a folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        files = Path(name) / "files"
        files.mkdir()
        data = builtin_data(Path(name) / "data", TEST_VOCAB_SIZE)
        prepare_builtin_data(data, TEST_VOCAB_SIZE)
        write_good_files(files, data.tokenizer)
        back = Path.cwd()
        os.chdir(files)
        try:
            if what == "inputs":
                return fuzz_inputs(examples, seed, files)
            make_special_files(files)
            (Path(name) / "saved").mkdir()
            return fuzz_configurations(examples, seed, Path(name) / "saved")
        finally:
            os.chdir(back)


def rows(what: str, outcome: Outcome) -> list[Row]:
    """What became of the examples, and what kinds there were."""
    counts = {**dict.fromkeys(("accepted", "read", "refused", "defect"), 0), **outcome.results}
    return [
        Row(f"random {what}", "examples", outcome.examples),
        *(Row(f"{what}: {result}", "examples", n) for result, n in counts.items() if n),
        Row(f"{what}: kinds of defects", "places in the code", len(outcome.defects)),
        *(Row(f"{what}: {kind}", "examples", n) for kind, n in sorted(outcome.kinds.items())),
        Row(f"{what}: the slowest example", "s", round(outcome.slowest, 2)),
        Row(f"{what}: all", "CPU s", round(outcome.cpu_seconds, 1)),
    ]


if __name__ == "__main__":
    sys.exit(main())
