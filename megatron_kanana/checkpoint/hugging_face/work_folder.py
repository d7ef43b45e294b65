"""The folder a conversion writes into: resumed after an interruption, whole only under its name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from .problems import ConversionError

IDENTITY_FILE = "conversion.json"
JOURNAL_FOLDER = "conversion"


class WorkFolder:
    """`OUT.partial` until everything is written, `OUT` then.

    What is finished in it is noted in a journal, so that the same conversion, started again, goes
    on. A folder left by another conversion is written anew.

    Attributes:
        path: the folder to write into.
        resumed: whether an interrupted conversion goes on.

    Args:
        target: OUT.
        identity: what is converted and how; only the same conversion goes on.
        force: whether an existing OUT may be replaced; it stays until the new one is whole.

    Raises:
        ConversionError: OUT exists and may not be replaced, or cannot be written.
    """

    def __init__(self, target: Path, identity: dict[str, Any], *, force: bool) -> None:
        self.target = target
        self.path = target.with_name(f"{target.name}.partial")
        self._replaced = target.with_name(f"{target.name}.replaced")
        self._finish_replacing()
        if target.exists() and not force:
            raise ConversionError([f"{target} exists: give another --out, or --force"])
        written = json.dumps(identity, sort_keys=True)
        noted = self.path / IDENTITY_FILE
        self.resumed = noted.is_file() and noted.read_text(encoding="utf-8") == written
        try:
            if not self.resumed:
                shutil.rmtree(self.path, ignore_errors=True)
                (self.path / JOURNAL_FOLDER).mkdir(parents=True)
                noted.write_text(written, encoding="utf-8")
        except OSError as error:
            raise ConversionError([f"{self.path} cannot be made ({error.strerror})"]) from None

    def note(self, name: str, content: Any) -> None:
        """Remember that `name` is finished, with what is needed to go on from there."""
        path = self.path / JOURNAL_FOLDER / f"{name}.json"
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)

    def noted(self, name: str) -> Any:
        """What was noted of `name`, or None while it is not finished."""
        path = self.path / JOURNAL_FOLDER / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def is_note(self, name: str) -> bool:
        """Whether a file of the folder, by its name, belongs to the journal, not to the result."""
        return name == IDENTITY_FILE or name.startswith(f"{JOURNAL_FOLDER}/")

    def publish(self) -> None:
        """Give the whole folder its name; an older one is deleted only after that."""
        shutil.rmtree(self.path / JOURNAL_FOLDER)
        (self.path / IDENTITY_FILE).unlink()
        if self.target.exists():
            self.target.rename(self._replaced)
        self.path.rename(self.target)
        self._finish_replacing()

    def _finish_replacing(self) -> None:
        """After an interruption in `publish`: the older folder goes, or comes back if it is all."""
        if not self._replaced.is_dir():
            return
        if self.target.exists():
            shutil.rmtree(self._replaced)
        else:
            self._replaced.rename(self.target)


def files_identity(files: list[Path]) -> list[list[Any]]:
    """Names, sizes and times of files: another download is another conversion."""
    return [
        [str(file.absolute()), (status := file.stat()).st_size, status.st_mtime_ns]
        for file in sorted(files)
    ]
