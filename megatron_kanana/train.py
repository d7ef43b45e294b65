"""The main job: train a Kanana-2 model.

    python -m megatron_kanana.train [group=name ...] [setting=value ...]
    torchrun --nproc-per-node 2 -m megatron_kanana.train parallel=expert_parallel

The configuration is composed from megatron_kanana/conf and checked as a whole before anything
starts; a wrong one ends with exit code 2 and the list of what to mend.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import sys

from megatron_kanana.config import (
    ConfigurationError,
    Environment,
    detect_environment,
    load_settings,
    tell,
)
from megatron_kanana.config.exit_status import CANNOT_SAVE, STOPPED
from megatron_kanana.config.help import settings_help
from megatron_kanana.config.schema import Settings
from megatron_kanana.garbage_collection import garbage_collection_off
from megatron_kanana.run_folder import held_run_folder


def main(arguments: list[str] | None = None) -> int:
    """Run the job on this process; returns its exit code."""
    options = parse_arguments(arguments)
    environment = detect_environment()
    try:
        settings = load_settings(options.overrides, environment, options.config_dir)
    except ConfigurationError as error:
        return tell(error, environment.rank)
    if options.print_config:
        import yaml

        print(yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False))
        return 0
    level = logging.INFO if environment.rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s")
    folder = held_run_folder(settings) if environment.rank == 0 else contextlib.nullcontext()
    try:
        with folder:
            return run_job(settings, environment)
    except ConfigurationError as error:  # of the folder, or in what is read
        return tell(error, environment.rank)


def run_job(settings: Settings, environment: Environment) -> int:
    """Train with settings that have been checked; returns this process's exit code.

    Raises:
        ConfigurationError: what is read does not fit the settings.
    """
    with garbage_collection_off(lasting=True):
        from megatron_kanana import device

        where = device.prepare_device(settings, environment)

        from megatron_kanana.checkpoint.verification import CheckpointError
        from megatron_kanana.checkpoint.writer import SaveError
        from megatron_kanana.device.safe_unpickling import UnsafeFileError
        from megatron_kanana.training.interruption import Interruption
        from megatron_kanana.training.loop import train
        from megatron_kanana.training.rollback import RunStoppedError
        from megatron_kanana.training.run import build_run, restore
        from megatron_kanana.training.watchdog import Watchdog

    try:
        with (
            Interruption(settings.watchdog.time_limit) as interruption,
            Watchdog(settings, environment) as watchdog,
        ):
            device.initialize_process_groups(settings, where)
            run = build_run(settings, where)
            restore(run)
            train(run, interruption, watchdog)
            device.destroy_process_groups()
    except (CheckpointError, UnsafeFileError) as error:  # in what is read
        return tell(error, environment.rank)
    except SaveError as error:
        return tell(error, environment.rank, CANNOT_SAVE)
    except RunStoppedError as error:
        return tell(error, environment.rank, STOPPED)
    return interruption.exit_status


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command-line options; everything else is an override of the configuration."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_kanana.train",
        description="Train a Kanana-2 model.",
        epilog=settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="group=name or setting=value")
    parser.add_argument("--config-dir", help="folder with config groups of your own")
    parser.add_argument(
        "--print-config", action="store_true", help="print the checked configuration and stop"
    )
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
