"""Writing the index of megatron-core's indexed datasets, without importing megatron-core.

Its layout stands in `config/dataset_files.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_kanana.config.dataset_files import HEADER, MAGIC, VERSION

FORMAT_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
TWO_BYTE_VOCABULARY = 65500  # below it, megatron-core stores tokens in two bytes


def token_dtype(vocab_size: int) -> np.dtype[np.int32] | np.dtype[np.uint16]:
    """The type in which megatron-core stores tokens of a vocabulary."""
    return np.dtype(np.uint16) if vocab_size < TWO_BYTE_VOCABULARY else np.dtype(np.int32)


def write_index(path: Path, lengths: npt.NDArray[np.int32], dtype: np.dtype[np.generic]) -> None:
    """Write an .idx file of documents that lie one after another, each one sequence.

    Args:
        path: file to write.
        lengths: int32 [documents], tokens of each.
        dtype: of the tokens, as `token_dtype` chooses.
    """
    ends = np.cumsum(lengths, dtype="<i8") * dtype.itemsize
    starts = np.concatenate((np.zeros(min(1, len(ends)), "<i8"), ends[:-1]))
    code, count = FORMAT_CODES[np.dtype(dtype)], len(lengths)
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, code, count, count + 1))
        file.write(lengths.astype("<i4", copy=False).tobytes())
        file.write(starts.tobytes())
        file.write(np.arange(count + 1, dtype="<i8").tobytes())
