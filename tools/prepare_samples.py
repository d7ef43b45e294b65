"""Write the order of a run's samples ahead of it, in several processes.

    python tools/prepare_samples.py data=my_mixture schedule=my_schedule --workers 16

Takes the words of the main job: groups, settings, --config-dir. The main job writes what is missing
itself, on one of its processes while the others wait; for trillions of tokens that takes long.
Nothing is written twice, so the command may be repeated and interrupted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from megatron_kanana.config import (
    ConfigurationError,
    checkpoint_to_start_from,
    detect_environment,
    load_settings,
    tell,
)
from megatron_kanana.config.batch_sizes import samples_of_steps
from megatron_kanana.config.ledger import read_ledger
from megatron_kanana.config.mixture import mixture, sources
from megatron_kanana.config.saved import goes_on
from megatron_kanana.config.saved_model import ONE_PROCESS


def main(arguments: list[str] | None = None) -> int:
    """Check the settings, write, and say how much; returns the exit code."""
    options = parse_arguments(arguments)
    try:
        words = [*options.overrides, *ONE_PROCESS]
        settings = load_settings(words, detect_environment(), options.config_dir)
    except ConfigurationError as error:
        return tell(error, 0)
    paths = {source.name: list(map(Path, source.paths)) for source in sources(settings.data)}
    if settings.data.tokenizer is None or not all(paths.values()):
        print("the run has no datasets of its own: there is nothing to prepare")
        return 0

    from megatron_kanana.data.mixed import MixedSamples, prepare_pass, sample_order
    from megatron_kanana.data.tokenizer import load_tokenizer

    checkpoint = checkpoint_to_start_from(settings) if goes_on(settings) else None
    ledger = read_ledger(checkpoint) if checkpoint else None
    consumed = ledger.consumed_samples if ledger else 0
    total = samples_of_steps(settings, settings.schedule.steps)
    order = sample_order(settings, load_tokenizer(settings.data.tokenizer))
    samples = MixedSamples(mixture(settings.data), paths, order, total, document_mask=False)
    missing = samples.missing(consumed)
    began = time.monotonic()
    if options.workers == 1:
        for path, number in missing:
            prepare_pass(path, number, order)
    else:
        with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
            jobs = [pool.submit(prepare_pass, path, number, order) for path, number in missing]
            for job in jobs:
                job.result()
    print(f"wrote {len(missing)} passes over datasets in {time.monotonic() - began:.1f} s")
    return 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command-line options; everything else is an override of the configuration."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="group=name or setting=value")
    parser.add_argument("--config-dir", help="folder with config groups of your own")
    parser.add_argument("--workers", type=int, default=1, help="processes that write")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
