"""Reading the safetensors files of a Hugging Face folder, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .problems import ConversionError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
RELEASE_BYTES = 256 << 20
"""Bytes read from a mapped file before it is mapped anew: read pages count as used memory."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FP8_DTYPE = "F8_E4M3"
SCALE_SUFFIX = "_scale_inv"
"""Of the tensor beside a block-quantised one, with a factor for each block (DeepSeek-V3)."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a folder: its file, and its format and shape as the file's header says."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size once read, in bytes."""
        return self.torch_dtype.itemsize * torch.Size(self.shape).numel()

    @property
    def torch_dtype(self) -> torch.dtype:
        """Format once read: fp8 is dequantised to bf16."""
        return torch.bfloat16 if self.dtype == FP8_DTYPE else DTYPES[self.dtype]


class SafetensorsSource:
    """The weights of a folder.

    Attributes:
        tensors: every weight by name; scales of fp8 weights are not among them.

    Args:
        folder: with model.safetensors, or shards and model.safetensors.index.json.
        config: contents of config.json, for how weights are quantised.

    Raises:
        ConversionError: with every file and tensor that cannot be used.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        problems: list[str] = []
        files, indexed = _files(folder)
        stored = _read_headers(files, problems)
        if indexed is not None and not problems:
            problems += _compare_with_index(indexed, stored)
        quantization = config.get("quantization_config")
        block = _block_size(quantization, problems) if quantization else None
        self.scales = {
            name: entry for name, entry in stored.items() if block and name.endswith(SCALE_SUFFIX)
        }
        self.tensors = {name: entry for name, entry in stored.items() if name not in self.scales}
        self._block = block
        self._handle: Any = None
        self._open_file: Path | None = None
        self._bytes_read = 0
        for name, entry in self.tensors.items():
            problems += _check_format(name, entry, self.scales, block)
        problems += [
            f"{name}: there is no weight that it scales"
            for name in self.scales
            if name.removesuffix(SCALE_SUFFIX) not in self.tensors
        ]
        if problems:
            raise ConversionError(problems)

    @property
    def is_quantized(self) -> bool:
        """Whether there are fp8 weights, which are dequantised as they are read."""
        return bool(self.scales)

    def read(self, name: str) -> torch.Tensor:
        """One weight, in memory of its own; fp8 is dequantised to bf16."""
        weight = self._read(self.tensors[name], name)
        scale_name = name + SCALE_SUFFIX
        if scale_name not in self.scales:
            return weight
        assert self._block is not None
        scales = self._read(self.scales[scale_name], scale_name)
        return dequantize(weight, scales, self._block)

    def _read(self, entry: StoredTensor, name: str) -> torch.Tensor:
        if entry.file != self._open_file or self._bytes_read > RELEASE_BYTES:
            self._handle = None
            self._handle = safe_open(str(entry.file), framework="pt")
            self._open_file, self._bytes_read = entry.file, 0
        self._bytes_read += entry.num_bytes
        tensor: torch.Tensor = self._handle.get_tensor(name).clone()
        return tensor


def dequantize(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """bf16 weight from fp8 [rows, columns] and a factor for each block (DeepSeek-V3, section 3.3).

    Args:
        weight: fp8 [rows, columns].
        scales: fp32 [ceil(rows / block[0]), ceil(columns / block[1])], to multiply by.
        block: rows and columns that share a factor.
    """
    rows, columns = weight.shape
    result = torch.empty(rows, columns, dtype=torch.bfloat16)
    for index, row_scales in enumerate(scales):  # a stripe at a time: fp32 takes four times fp8
        stripe = slice(index * block[0], (index + 1) * block[0])
        factors = row_scales.repeat_interleave(block[1])[:columns]
        result[stripe] = (weight[stripe].float() * factors).to(torch.bfloat16)
    return result


def _files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The folder's safetensors files, and the index's file name for each tensor, if it has one."""
    index_path, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if index_path.is_file():
        try:
            indexed = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
            names = indexed.values()
            assert all(isinstance(name, str) and Path(name).name == name for name in names)
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError, AssertionError):
            raise ConversionError(
                [f"{index_path} holds no weight_map of files beside it: download it again"]
            ) from None
        return [folder / name for name in sorted(set(indexed.values()))], indexed
    if single.is_file():
        return [single], None
    if list(folder.glob("*.safetensors")):
        raise ConversionError([f"{index_path} does not exist: the shards need it, download it"])
    remedy = "give a folder with safetensors"
    if list(folder.glob("*.bin")):
        remedy = "its .bin files are pickles, which could run code: save it as safetensors"
    raise ConversionError([f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: {remedy}"])


def _read_headers(files: list[Path], problems: list[str]) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for file in files:
        if not file.is_file():
            problems.append(f"{file} does not exist: download this shard")
            continue
        try:
            with safe_open(str(file), framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118  (not a mapping)
                    view = handle.get_slice(name)
                    if name in stored:
                        problems.append(
                            f"{name} is in both {stored[name].file.name} and {file.name}"
                        )
                    stored[name] = StoredTensor(file, view.get_dtype(), tuple(view.get_shape()))
        except (SafetensorError, OSError) as error:
            problems.append(f"{file} is cut short or damaged ({error}): download it again")
    return stored


def _compare_with_index(indexed: dict[str, str], stored: dict[str, StoredTensor]) -> list[str]:
    problems = [
        f"{name} is not in {file}, where the index has it"
        for name, file in indexed.items()
        if name not in stored or stored[name].file.name != file
    ]
    problems += [
        f"{name} is in {entry.file.name}, but not in the index"
        for name, entry in stored.items()
        if name not in indexed
    ]
    return problems


def _block_size(quantization: Mapping[str, Any], problems: list[str]) -> tuple[int, int] | None:
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    match block:
        case [int(rows), int(columns)] if method == "fp8" and rows > 0 and columns > 0:
            return rows, columns
    problems.append(
        f"config.json: quantization_config of method {method!r} with weight_block_size {block!r}"
        " cannot be taken, only fp8 in blocks: save the model in bf16"
    )
    return None


def _check_format(
    name: str,
    entry: StoredTensor,
    scales: Mapping[str, StoredTensor],
    block: tuple[int, int] | None,
) -> list[str]:
    if entry.dtype != FP8_DTYPE:
        if entry.dtype in DTYPES:
            return []
        return [f"{name} has format {entry.dtype}: save the model in bf16 or fp32"]
    scale = scales.get(name + SCALE_SUFFIX)
    if scale is None or block is None:
        return [f"{name} is fp8 without {name}{SCALE_SUFFIX}: save the model in bf16"]
    if len(entry.shape) != len(block):
        return [f"{name} is fp8 of shape {list(entry.shape)}, no matrix: save the model in bf16"]
    blocks = tuple(-(-size // side) for size, side in zip(entry.shape, block, strict=True))
    if scale.shape != blocks:
        return [f"{name}{SCALE_SUFFIX} has shape {list(scale.shape)}, not {list(blocks)}"]
    return []
