"""What a manifest says of files, of itself, and who reads which of them."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from megatron_kanana.checkpoint.parts import ChecksummedFile
from megatron_kanana.checkpoint.verification import share_out
from megatron_kanana.config.manifest import (
    MANIFEST_FILE,
    DamagedManifestError,
    FileEntry,
    digest,
    manifest_bytes,
    read_manifest,
    seal,
)


@pytest.mark.parametrize("seed", range(20))
def test_every_file_is_read_by_one_rank_and_no_rank_reads_much_more(seed: int) -> None:
    dice = random.Random(seed)
    ranks = dice.randrange(1, 20)
    entries = {
        f"__{number}.distcp": FileEntry(dice.randrange(1, 10_000), "")
        for number in range(dice.randrange(0, 100))
    }
    shares = share_out(entries, ranks)
    assert len(shares) == ranks
    assert sorted(name for share in shares for name in share) == sorted(entries)
    totals = [sum(entries[name].size for name in share) for share in shares]
    largest = max((entry.size for entry in entries.values()), default=0)
    assert max(totals) - min(totals) <= largest


def test_checksum_is_that_of_what_was_written_whatever_the_pieces(tmp_path: Path) -> None:
    dice = random.Random(1)
    content = dice.randbytes(300_000)
    with ChecksummedFile(tmp_path / "file") as file:
        start = 0
        while start < len(content):
            end = start + dice.randrange(1, 60_000)
            file.write(memoryview(content)[start:end])
            start = end
    assert (tmp_path / "file").read_bytes() == content
    assert file.entry == FileEntry(len(content), hashlib.sha256(content).hexdigest())
    assert digest(tmp_path / "file") == digest(tmp_path / "file", from_disk=True) == file.entry


def test_manifest_lists_every_file_and_not_itself(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    for name in ("settings.yaml", "tokenizer/tokenizer.json", "__0_0.distcp"):
        (tmp_path / name).write_text(name)
    seal(tmp_path)
    seal(tmp_path)
    entries = read_manifest(tmp_path)
    assert sorted(entries) == ["__0_0.distcp", "settings.yaml", "tokenizer/tokenizer.json"]
    expected = hashlib.sha256(b"tokenizer/tokenizer.json").hexdigest()
    assert entries["tokenizer/tokenizer.json"] == FileEntry(24, expected)


def test_manifest_of_a_newer_version_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    text = manifest_bytes({"file": FileEntry(3, "0" * 64)}).decode()
    (tmp_path / MANIFEST_FILE).write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(DamagedManifestError, match="format 2, of a newer version"):
        read_manifest(tmp_path)
    for other in (text.replace("3", "4", 1), text + " ", text[:-1], "[]", "[" * 9999, "{}", "7"):
        (tmp_path / MANIFEST_FILE).write_text(other)
        with pytest.raises(DamagedManifestError, match="is damaged"):
            read_manifest(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_manifest(tmp_path / "nothing")
