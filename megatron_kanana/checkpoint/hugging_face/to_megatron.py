"""From a Hugging Face folder to a checkpoint that every layout loads."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_kanana.checkpoint.torch_dist_blocks import Block, BlockWriter
from megatron_kanana.config import Settings, write_settings
from megatron_kanana.config.manifest import files_in, sync_files, write_manifest

from .architecture import CONFIG_FILE, model_settings, read_config
from .groups import group_by_size
from .problems import ConversionError
from .safetensors_source import SafetensorsSource
from .text_files import keep_text_files
from .weight_map import Placement, copies, empty_tensors, placements
from .work_folder import WorkFolder, files_identity

logger = logging.getLogger(__name__)

PART_BYTES = 1 << 30
"""Size of a checkpoint's files; what an interruption costs at most."""

# Buffers that older versions of transformers saved, and that every model computes itself.
COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class HuggingFaceModel:
    """A Hugging Face folder, found to hold exactly the model that its config.json describes.

    Attributes:
        folder: with config.json and the weights.
        settings: default settings around the model.
        source: its weights.
        placements: where each weight goes.
        copies: weights that are there twice: the copy's name, and the first one's.
        dropped: weights that were left out on request, or that every model computes itself.
    """

    folder: Path
    settings: Settings
    source: SafetensorsSource
    placements: list[Placement]
    copies: dict[str, str]
    dropped: list[str]

    @property
    def num_bytes(self) -> int:
        """Bytes of all the weights that are taken."""
        tensors = self.source.tensors
        return sum(tensors[placement.hugging_face].num_bytes for placement in self.placements)

    def read(self, placement: Placement) -> torch.Tensor:
        """A weight as our checkpoint stores it, in the shape of its block."""
        weight = self.source.read(placement.hugging_face)
        if placement.gain_offset:
            weight += placement.gain_offset
        return weight.view(placement.block)


def open_hugging_face(
    folder: Path, mtp: str | None, parallel: Mapping[str, int] | None = None
) -> HuggingFaceModel:
    """Look at a Hugging Face folder and check all of it but the numbers.

    Args:
        folder: with config.json and safetensors.
        mtp: 'keep' or 'drop' its multi-token prediction layers; None where it has none.
        parallel: sizes of a layout that the model must fit.

    Raises:
        ConversionError: with everything that cannot be taken.
    """
    config = read_config(folder)
    source = SafetensorsSource(folder, config)
    num_layers = config.get("num_hidden_layers")
    # Where it is no number, the settings say so below.
    mtp_tensors = _mtp_tensors(source, num_layers) if isinstance(num_layers, int) else {}
    if mtp_tensors and mtp is None:
        raise ConversionError(
            [
                f"the model has {len(mtp_tensors)} multi-token prediction layers:"
                " say --mtp keep or --mtp drop"
            ]
        )
    kept = len(mtp_tensors) if mtp == "keep" else 0
    settings = model_settings(config, folder.resolve().name, kept, parallel or {})
    dropped = [name for name in source.tensors if COMPUTED.fullmatch(name)]
    if not kept:
        dropped += [name for names in mtp_tensors.values() for name in names]
    placed = placements(settings.model)
    copied = copies(settings.model)
    ignored = {*dropped, *empty_tensors(settings.model)}
    problems = _mismatches(source, placed, copied, ignored)
    if problems:
        raise ConversionError(problems)
    return HuggingFaceModel(folder, settings, source, placed, copied, dropped)


def _mtp_tensors(source: SafetensorsSource, num_layers: int) -> dict[int, list[str]]:
    """Names of the tensors of layers beyond the model's own, by layer."""
    layers: dict[int, list[str]] = {}
    for name in source.tensors:
        match = re.match(r"model\.layers\.(\d+)\.", name)
        if match and int(match.group(1)) >= num_layers:
            layers.setdefault(int(match.group(1)), []).append(name)
    return layers


def _mismatches(
    source: SafetensorsSource,
    placed: Sequence[Placement],
    copied: Mapping[str, str],
    ignored: set[str],
) -> list[str]:
    """Tensors that are missing, that are too many, or that have another shape."""
    shapes = {placement.hugging_face: placement.shape for placement in placed}
    shapes |= {copy: shapes[original] for copy, original in copied.items()}
    there = source.tensors
    problems = [f"{name} is missing" for name in shapes if name not in there]
    problems += [
        f"{name} has shape {list(there[name].shape)}, but config.json gives {list(shape)}"
        for name, shape in shapes.items()
        if name in there and there[name].shape != shape
    ]
    surplus = [name for name in there if name not in shapes and name not in ignored]
    problems += [f"{name} has no place in the model" for name in surplus]
    if any(name.endswith(".experts.gate_up_proj") for name in surplus):
        problems.insert(0, "the experts are stacked: save_pretrained writes each alone")
    dtypes = {name: there[name].torch_dtype for name in shapes if name in there}
    by_target: dict[str, torch.dtype] = {}
    for placement in placed:
        dtype = dtypes.get(placement.hugging_face)
        if dtype and by_target.setdefault(placement.megatron, dtype) != dtype:
            problems.append(
                f"{placement.hugging_face} is {dtype}, but other parts of"
                f" {placement.megatron} are {by_target[placement.megatron]}: save in one format"
            )
    return problems


def to_megatron(
    model: HuggingFaceModel, out: Path, *, force: bool = False, on_bytes: OnBytes | None = None
) -> None:
    """Write a checkpoint of the weights; an interrupted conversion goes on where it was.

    Args:
        model: what to convert.
        out: the checkpoint's folder, which appears only when it is whole.
        force: whether an existing `out` may be replaced.
        on_bytes: called with the bytes of each weight once it is read.

    Raises:
        ConversionError: `out` exists, or a copied tensor differs from its original.
    """
    by_block = {}
    for placement in model.placements:
        dtype = model.source.tensors[placement.hugging_face].torch_dtype
        block = Block(
            *(placement.megatron, placement.megatron_shape, placement.offset, placement.block),
            dtype=dtype,
        )
        by_block[block] = placement
    padding = {block for block in map(_padding, by_block) if block is not None}
    parts = group_by_size([*by_block, *sorted(padding, key=lambda b: b.tensor)], PART_BYTES)

    def read(block: Block) -> torch.Tensor:
        if block in padding:
            return torch.zeros(block.shape, dtype=block.dtype)
        content = model.read(by_block[block])
        if on_bytes is not None:
            on_bytes(block.num_bytes)
        return content

    files = {entry.file for entry in model.source.tensors.values()}
    identity = {
        "from": files_identity([*files, model.folder / CONFIG_FILE]),
        "mtp_layers": model.settings.model.num_mtp_layers,
        "blocks": len(by_block),
    }
    work = WorkFolder(out, identity, force=force)
    if work.resumed:
        logger.info("going on with the conversion in %s", work.path)
    _check_copies(model)
    writer = BlockWriter(work.path, parts, read)
    places = []
    for number, part in enumerate(parts):
        name = f"part_{number:05d}"
        written = work.noted(name)
        if written is None:
            written = writer.write(number)
            work.note(name, written)
        elif on_bytes is not None:
            on_bytes(sum(block.num_bytes for block in part if block not in padding))
        places.append(written)
    writer.finish(places)
    keep_text_files(model.folder, work.path)
    write_settings(work.path, model.settings)
    names = [name for name in files_in(work.path) if not work.is_note(name)]
    write_manifest(work.path, sync_files(work.path, names))
    work.publish()


def _padding(block: Block) -> Block | None:
    """The rows that the embedding has for divisibility alone, of a block of its other rows."""
    rows, padded = block.shape[0], block.tensor_shape[0]
    is_vocabulary = block.tensor in ("embedding.word_embeddings.weight", "output_layer.weight")
    if not is_vocabulary or rows == padded:
        return None
    shape = (padded - rows, *block.shape[1:])
    return Block(block.tensor, block.tensor_shape, (rows, 0), shape, block.dtype)


def _check_copies(model: HuggingFaceModel) -> None:
    problems = [
        f"{copy} differs from {original}, which the model shares: say --mtp drop"
        for copy, original in model.copies.items()
        if not torch.equal(model.source.read(copy), model.source.read(original))
    ]
    if problems:
        raise ConversionError(problems)
