"""Looking at an indexed dataset's files without opening the dataset.

Layout of a megatron-core .idx file: 9 bytes of magic, version (u64), code of the token format (u8),
number of sequences (u64), number of documents (u64), then each sequence's length (i32 each) and
its first byte in the .bin file (i64 each).
"""

from __future__ import annotations

import struct
from pathlib import Path

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}
"""Bytes of one token by format code: uint8, int8, int16, int32, int64, float64, float32, uint16."""


def sequence_count(prefix: str) -> int:
    """Sequences in the dataset `prefix`.bin and `prefix`.idx.

    Raises:
        ValueError: says in words why the files cannot be used.
    """
    for suffix in (".bin", ".idx"):
        if not Path(prefix + suffix).is_file():
            raise ValueError(f"{prefix}{suffix} does not exist")
    with Path(f"{prefix}.idx").open("rb") as index:
        header = index.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise ValueError(f"{prefix}.idx is not the index of a dataset")
        _, version, code, count, _ = HEADER.unpack(header)
        if count == 0:
            raise ValueError(f"{prefix} has no documents")
        if version != VERSION or code not in TOKEN_BYTES:
            raise ValueError(f"{prefix}.idx is of version {version} and format {code}")
        if HEADER.size + 12 * count > Path(f"{prefix}.idx").stat().st_size:
            raise ValueError(f"{prefix}.idx is cut short")
        index.seek(HEADER.size + 4 * (count - 1))
        last_length = index.read(4)
        index.seek(HEADER.size + 4 * count + 8 * (count - 1))
        last_start = index.read(8)
    (tokens,), (start,) = struct.unpack("<i", last_length), struct.unpack("<q", last_start)
    expected = start + tokens * TOKEN_BYTES[code]
    size = Path(f"{prefix}.bin").stat().st_size
    if size != expected:
        raise ValueError(f"{prefix}.bin has {size} bytes, its index tells {expected}")
    return int(count)


def training_sequences(count: int, held_out_percent: float) -> int:
    """How many of a dataset's sequences are for training; the last ones are held out."""
    return round(count * (100 - held_out_percent) / 100)


def tokens_before(prefix: str, sequence: int) -> int:
    """Tokens of the first sequences of a whole dataset, `sequence` of them."""
    with Path(f"{prefix}.idx").open("rb") as index:
        _, _, code, count, _ = HEADER.unpack(index.read(HEADER.size))
        if sequence == count:
            return Path(f"{prefix}.bin").stat().st_size // TOKEN_BYTES[code]
        index.seek(HEADER.size + 4 * count + 8 * sequence)
        (start,) = struct.unpack("<q", index.read(8))
    return int(start) // TOKEN_BYTES[code]
