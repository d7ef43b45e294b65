"""Whether a checkpoint is as it was saved, found out by all ranks together before it is loaded."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from megatron_kanana.config.manifest import (
    MANIFEST_FILE,
    THREADS,
    Damage,
    DamagedManifestError,
    FileEntry,
    damage_of,
    damage_of_size,
    read_manifest,
    strange_parts,
)
from megatron_kanana.config.saved import glance

from .free_space import readable
from .torch_dist_blocks import BlockReader

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CheckpointError(Exception):
    """Raised on every rank when there is no whole checkpoint where one must be."""


def verify_alone(
    checkpoint: Path, *, contents: bool = True, from_disk: bool = False
) -> list[Damage]:
    """What is wrong with a checkpoint, found by this process alone.

    Args:
        checkpoint: its folder.
        contents: read everything; else names and sizes alone are looked at.
        from_disk: read what the disk has, not what memory still holds of it.
    """
    try:
        entries = read_manifest(checkpoint)
    except FileNotFoundError:
        return verify_without_manifest(checkpoint)
    except DamagedManifestError as error:
        return [Damage(MANIFEST_FILE, str(error))]
    found = damage_of_files(checkpoint, entries, contents=contents, from_disk=from_disk)
    return found + strange_parts(checkpoint, entries)


def verify_without_manifest(checkpoint: Path) -> list[Damage]:
    """What is wrong with a checkpoint that may be of an earlier version, without a manifest.

    That every file is there and long enough is all that can be told of such a one.
    """
    if found := glance(checkpoint):
        return found
    try:
        BlockReader(checkpoint)
    except ValueError as error:
        return [Damage(checkpoint.name, f"cannot be read: {error}")]
    return []


def damage_of_files(
    folder: Path,
    entries: Mapping[str, FileEntry],
    *,
    contents: bool = True,
    from_disk: bool = False,
) -> list[Damage]:
    """What is wrong with these files; several are read at a time."""

    def look(item: tuple[str, FileEntry]) -> Damage | None:
        if not contents:
            return damage_of_size(folder, *item)
        return damage_of(folder, *item, from_disk=from_disk)

    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        return [damage for damage in pool.map(look, entries.items()) if damage]


def verify_together(checkpoint: Path, *, contents: bool = True) -> list[Damage]:
    """As `verify_alone`, with each file read by one rank; every rank must call this.

    Returns:
        what is wrong, the same on every rank.
    """
    started = time.monotonic()

    def entries_or_damage() -> dict[str, FileEntry] | list[Damage]:
        try:
            return read_manifest(checkpoint)
        except FileNotFoundError:
            return verify_without_manifest(checkpoint)
        except DamagedManifestError as error:
            return [Damage(MANIFEST_FILE, str(error))]

    found = on_first_rank(entries_or_damage)
    if isinstance(found, list):
        if not found and dist.get_rank() == 0:
            logger.warning(
                "%s has no %s, as it was made by an earlier version: that its files are there is"
                " all that can be verified",
                checkpoint,
                MANIFEST_FILE,
            )
        return found
    shares = share_out(found, dist.get_world_size())
    mine = damage_of_files(
        checkpoint, {name: found[name] for name in shares[dist.get_rank()]}, contents=contents
    )
    if dist.get_rank() == 0:
        mine += strange_parts(checkpoint, found)
    gathered: list[list[Damage]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, mine)
    damages = [damage for of_rank in gathered for damage in of_rank]
    if not damages and contents and dist.get_rank() == 0:
        size = readable(sum(entry.size for entry in found.values()))
        seconds = time.monotonic() - started
        logger.info("verified %s: %d files, %s, %.1f s", checkpoint, len(found), size, seconds)
    return damages


def ensure_whole(checkpoint: Path, *, contents: bool = True) -> None:
    """Verify a checkpoint that nothing may take the place of; every rank must call this.

    Raises:
        CheckpointError: it is not whole.
    """
    if damages := verify_together(checkpoint, contents=contents):
        raise CheckpointError(
            f"{report(checkpoint, damages)}\n  remedy: take another checkpoint, or a copy of this"
            " one; checkpoint.verify=false trusts the files' sizes"
        )


def report(checkpoint: Path, damages: Sequence[Damage], most: int = 10) -> str:
    """What is wrong with a checkpoint, a line a file."""
    lines = [f"  {damage}" for damage in damages[:most]]
    if len(damages) > most:
        lines.append(f"  and {len(damages) - most} files more")
    return "\n".join([f"{checkpoint} is not whole:", *lines])


def share_out(entries: Mapping[str, FileEntry], ranks: int) -> list[list[str]]:
    """The files that each rank reads: each file once, and about the same number of bytes."""
    shares: list[list[str]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for name in sorted(entries, key=lambda name: (-entries[name].size, name)):
        rank = totals.index(min(totals))
        shares[rank].append(name)
        totals[rank] += entries[name].size
    return shares


def on_first_rank(function: Callable[[], T]) -> T:
    """What the function gives on the first rank, on every rank."""
    result = [function() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(result)
    return result[0]  # type: ignore[return-value]
