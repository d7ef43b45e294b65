"""Writing a safetensors file without holding its tensors in memory together.

The library's own writer takes all tensors of a file at once. The format is a header of known size
(https://github.com/huggingface/safetensors: eight bytes of its length, then JSON) followed by the
tensors' bytes, so they can as well follow one by one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its name, format and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_safetensors(
    path: Path, entries: Sequence[Entry], read: Callable[[Entry], torch.Tensor]
) -> None:
    """Write a file; it appears under its name only when it is whole and on the disk.

    Args:
        path: of the file.
        entries: its tensors.
        read: gives each tensor, in the format and shape of its entry.
    """
    # Wider formats first, so that every tensor begins at a multiple of its element's size.
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in ordered:
        end = position + entry.num_bytes
        header[entry.name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in ordered:
            tensor = read(entry)
            assert tensor.dtype == entry.dtype and tuple(tensor.shape) == entry.shape, entry
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
