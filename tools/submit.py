"""Start a run on a SLURM cluster, or on this machine, from one line.

    python tools/submit.py experiment=kanana_2_tiny cluster=slurm nodes=4 partition=gpu
    python tools/submit.py experiment=kanana_2_tiny cluster=slurm nodes=4 --dry-run
    python tools/submit.py experiment=kanana_2_tiny
    python tools/submit.py experiment=kanana_2_tiny cluster=slurm nodes=4 --in-job

The whole configuration is checked first, for the processes that the nodes will have. The script is
kept in the run's folder under cluster/, where logs and records follow; docs/cluster.md tells how a
run is watched, and how it goes on after a time limit.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys

from megatron_kanana.cluster.submit import prepare, start_here, submit, unusable_nodes, write
from megatron_kanana.config import ConfigurationError, tell


def main() -> int:
    """Check, write the script, start it."""
    options = parse_arguments()
    command = shlex.join(["python", *sys.argv])
    try:
        submission = prepare(
            options.overrides,
            options.config_dir,
            command,
            chain=options.chain,
            starts=not options.dry_run,
            with_files=not options.without_files,
        )
    except ConfigurationError as error:
        return tell(error, 0)
    write(submission)
    if options.dry_run:
        print(submission.script)
        print(f"written to {submission.path}; nothing was started", file=sys.stderr)
        return 0
    if submission.settings.cluster.kind == "local":
        return start_here(submission)
    if options.in_job:
        os.execvp("bash", ["bash", str(submission.path)])  # as the shell that SLURM signals
    for line in unusable_nodes(submission.settings):
        print(f"left out: {line}")
    try:
        jobs = submit(submission, options.chain)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"script: {submission.path}")
    for job in jobs:
        print(f"submitted job {job}; log: {submission.path.parent / f'{job}.log'}")
    return 0


def parse_arguments() -> argparse.Namespace:
    """Options; everything else is an override of the configuration."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        help="as of the main job; nodes, spare_nodes, partition, account and time_limit need no"
        " cluster. before them",
    )
    parser.add_argument("--config-dir", help="folder with config groups of your own")
    parser.add_argument("--dry-run", action="store_true", help="write and print the script only")
    parser.add_argument(
        "--without-files",
        action="store_true",
        help="with --dry-run: files that the settings name need not be there yet",
    )
    parser.add_argument(
        "--in-job",
        action="store_true",
        help="be the batch script of the job of SLURM that this is called in, instead of submitting"
        " one: with exec, in a script whose options of sbatch are those the settings ask for",
    )
    parser.add_argument(
        "--chain", type=int, default=1, metavar="N", help="submit N jobs, each after the one before"
    )
    options = parser.parse_intermixed_args()
    if options.without_files and not options.dry_run:
        parser.error("--without-files belongs to --dry-run")
    if options.in_job and (options.chain > 1 or "SLURM_JOB_ID" not in os.environ):
        parser.error("--in-job is for the batch script of a job, and not for --chain")
    return options


if __name__ == "__main__":
    sys.exit(main())
