"""Say whether checkpoints are as they were saved.

    python tools/verify_checkpoint.py runs/kanana_2_tiny/checkpoints
    python tools/verify_checkpoint.py CHECKPOINT --from-disk

Takes folders of checkpoints, or folders that hold some. Every file is compared with the size and
the checksum in the checkpoint's manifest. Ends with 0 if all are whole and with 1 otherwise;
nothing is changed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from megatron_kanana.checkpoint.free_space import readable
from megatron_kanana.checkpoint.verification import report, verify_alone
from megatron_kanana.config.manifest import DamagedManifestError, read_manifest
from megatron_kanana.config.saved import SETTINGS_FILE, whole_path, whole_steps

EXIT_DAMAGED = 1
EXIT_NOTHING = 2


def main(arguments: list[str] | None = None) -> int:
    """Verify each; returns the exit code."""
    options = parse_arguments(arguments)
    checkpoints = [path for folder in options.folders for path in checkpoints_in(folder)]
    if not checkpoints:
        print("no checkpoint there: name a step_… folder, or one that holds some", file=sys.stderr)
        return EXIT_NOTHING
    all_whole = True
    for checkpoint in checkpoints:
        started = time.monotonic()
        damages = verify_alone(checkpoint, contents=not options.sizes, from_disk=options.from_disk)
        if damages:
            all_whole = False
            print(report(checkpoint, damages, most=len(damages)))
        else:
            print(f"{checkpoint}: {found_whole(checkpoint)}, {time.monotonic() - started:.1f} s")
    return 0 if all_whole else EXIT_DAMAGED


def checkpoints_in(folder: Path) -> list[Path]:
    """The folder itself if it is a checkpoint, else those in it, oldest first."""
    steps = whole_steps(folder)
    if steps and not (folder / SETTINGS_FILE).exists():
        return [whole_path(folder, step) for step in steps]
    return [folder] if folder.is_dir() else []


def found_whole(checkpoint: Path) -> str:
    """What can be said of a checkpoint in which nothing is wrong."""
    try:
        entries = read_manifest(checkpoint)
    except (FileNotFoundError, DamagedManifestError):
        return "complete; without a manifest, as of an earlier version, its content is unverified"
    size = readable(sum(entry.size for entry in entries.values()))
    return f"whole, {len(entries)} files, {size}"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--sizes", action="store_true", help="look at names and sizes alone")
    how.add_argument(
        "--from-disk",
        action="store_true",
        help="read again from the disk what this machine's memory still holds",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
