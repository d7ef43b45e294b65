"""A checkpoint's manifest: each of its files with size and SHA-256, and what differs from it.

`manifest.json` is written last. Its own checksum covers its text, so that a manifest which was
damaged is not taken for the description of damaged files.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST_FILE = "manifest.json"
FORMAT = 1
CHUNK_BYTES = 1 << 22
THREADS = 4
"""Files that a process reads at the same time."""

TEXT_FILES = re.compile(r"settings\.yaml|ledger\.json|tokenizer\.model|tokenizer/.+")
"""Small files, which are read before any process group exists."""

PARTS = re.compile(TEXT_FILES.pattern + r"|common\.pt|metadata\.json|\.metadata|[^/]+\.distcp")
"""Names under which a file is read as a part of a checkpoint; others may be notes."""


@dataclass(frozen=True)
class FileEntry:
    """What the content of a file must be.

    Attributes:
        size: in bytes.
        sha256: in hexadecimal digits.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class Damage:
    """A file that is not what was saved.

    Attributes:
        file: its name in the checkpoint's folder.
        reason: what is wrong with it.
    """

    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file} {self.reason}"


class DamagedManifestError(ValueError):
    """Raised for a manifest that is not as it was written."""


def manifest_bytes(entries: Mapping[str, FileEntry]) -> bytes:
    """The manifest of these files, as it lies on disk."""
    files = {name: vars(entry) for name, entry in entries.items()}
    content: dict[str, Any] = {"format": FORMAT, "files": files, "sha256": ""}
    text = json.dumps(content, indent=1, sort_keys=True)
    content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def read_manifest(folder: Path) -> dict[str, FileEntry]:
    """The entries of a checkpoint's files by name, relative to its folder.

    Raises:
        FileNotFoundError: there is no manifest.
        DamagedManifestError: it is not as it was written, or cannot be read.
    """
    path = folder / MANIFEST_FILE
    try:
        with _open(path) as file:
            content = file.readall()
        parsed = json.loads(content)
        if parsed["format"] > FORMAT:
            raise DamagedManifestError(
                f"has format {parsed['format']}, of a newer version of this program"
            )
        entries = {name: FileEntry(**entry) for name, entry in parsed["files"].items()}
        intact = manifest_bytes(entries) == content
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedManifestError(f"cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, DamagedManifestError):
            raise
        raise DamagedManifestError("is damaged") from None
    if not intact:
        raise DamagedManifestError("is damaged")
    return entries


def digest(path: Path, *, from_disk: bool = False) -> FileEntry:
    """Size and checksum of a file.

    Args:
        path: an ordinary file.
        from_disk: read what the disk has, not what memory still holds of it.

    Raises:
        OSError: it is no ordinary file, or cannot be read.
    """
    with _open(path) as file:
        if from_disk:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        checksum = hashlib.sha256()
        size = 0
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while count := file.readinto(buffer):
            checksum.update(buffer[:count])
            size += count
    return FileEntry(size, checksum.hexdigest())


def _open(path: Path) -> io.FileIO:
    """Open an ordinary file; anything else is refused, and not waited for.

    Raises:
        OSError: it is none, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for a writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "not a file")
    return io.FileIO(descriptor)


def write_durably(path: Path, content: bytes) -> FileEntry:
    """Write a file and wait until the disk has it; returns its entry.

    Raises:
        OSError: names the file.
    """
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)
        raise
    return FileEntry(len(content), hashlib.sha256(content).hexdigest())


def sync_files(folder: Path, names: Sequence[str]) -> dict[str, FileEntry]:
    """Entries of files that were just written, once the disk has them and their folders.

    The checksum is computed before the disk gets them: it is that of what was meant to be written,
    and tells later if the disk holds something else.
    """
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        found = pool.map(digest, [folder / name for name in names])
        entries = dict(zip(names, found, strict=True))
    for path in [*(folder / name for name in entries), *folders_of(folder, entries)]:
        sync(path)
    return entries


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder.

    Raises:
        OSError: names it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise


def folders_of(folder: Path, names: Iterable[str]) -> list[Path]:
    """The folders that hold these files, `folder` last."""
    return sorted({(folder / name).parent for name in names} | {folder}, reverse=True)


def files_in(folder: Path) -> list[str]:
    """Names of the files in a folder and in those below it, relative to it; not its manifest's."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(str(file) for file in files if str(file) != MANIFEST_FILE)


def write_manifest(folder: Path, entries: Mapping[str, FileEntry]) -> None:
    """Write the manifest; after this and not before, the folder may get a checkpoint's name."""
    write_durably(folder / MANIFEST_FILE, manifest_bytes(entries))
    sync(folder)


def seal(folder: Path) -> None:
    """Write the manifest of a folder in which everything lies as it should."""
    write_manifest(folder, sync_files(folder, files_in(folder)))


def damage_of_size(folder: Path, name: str, entry: FileEntry) -> Damage | None:
    """What a look at a file without reading it shows."""
    try:
        status = (folder / name).stat()
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        return Damage(name, "is missing" if missing else f"cannot be read ({error.strerror})")
    if not stat.S_ISREG(status.st_mode):
        return Damage(name, "is not a file")
    if status.st_size != entry.size:
        return Damage(name, f"has {status.st_size:,} bytes instead of {entry.size:,}")
    return None


def damage_of(
    folder: Path, name: str, entry: FileEntry, *, from_disk: bool = False
) -> Damage | None:
    """What is wrong with a file; reads all of it."""
    if damage := damage_of_size(folder, name, entry):
        return damage
    try:
        found = digest(folder / name, from_disk=from_disk)
    except OSError as error:
        return Damage(name, f"cannot be read ({error.strerror})")
    return None if found == entry else Damage(name, "has another content than what was saved")


def strange_parts(folder: Path, entries: Mapping[str, FileEntry]) -> list[Damage]:
    """Files that would be read as parts of the checkpoint, but were not saved with it."""
    return [
        Damage(name, "was not saved with the checkpoint")
        for name in files_in(folder)
        if name not in entries and PARTS.fullmatch(name)
    ]
