"""What a folder holds, in words: for `tools/convert_checkpoint.py inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_kanana.config.saved import checkpoint_tokenizer
from megatron_kanana.config.schema import ModelSettings
from megatron_kanana.planning import count_parameters

from .architecture import CONFIG_FILE
from .to_hugging_face import MegatronModel, open_megatron
from .to_megatron import HuggingFaceModel, open_hugging_face


def describe(folder: Path) -> list[str]:
    """Lines about a Hugging Face folder or a checkpoint.

    Raises:
        ConversionError: it is neither, or not whole.
    """
    if (folder / CONFIG_FILE).is_file():
        return _hugging_face(open_hugging_face(folder, mtp="keep"))
    return _megatron(open_megatron(folder))


def _hugging_face(model: HuggingFaceModel) -> list[str]:
    source = model.source
    kept = [source.tensors[placement.hugging_face] for placement in model.placements]
    lines = [
        f"{model.folder}: a Hugging Face model",
        *_model(model.settings.model),
        _formats((entry.dtype, torch.Size(entry.shape).numel()) for entry in kept),
        f"files: {len({entry.file for entry in kept})}, {_size(model.num_bytes)} once read",
    ]
    if source.is_quantized:
        lines.append("fp8 weights: dequantised to bf16 by to-megatron")
    return lines


def _megatron(model: MegatronModel) -> list[str]:
    names = {placement.megatron for placement in model.placements}
    tensors = model.reader.tensors
    weights = [tensors[name] for name in names]
    has_optimizer = any(name.startswith("optimizer.") for name in tensors)
    try:
        tokenizer = checkpoint_tokenizer(model.folder).name
    except FileNotFoundError:
        tokenizer = "none"
    return [
        f"{model.folder}: a checkpoint, {'with' if has_optimizer else 'without'} optimizer state",
        *_model(model.settings),
        _formats((str(w.properties.dtype), w.size.numel()) for w in weights),
        f"tokenizer: {tokenizer}",
        f"size on disk: {_size(sum(file.stat().st_size for file in model.folder.rglob('*')))}",
    ]


def _model(model: ModelSettings) -> list[str]:
    count = count_parameters(model)
    queries = "direct" if model.q_lora_rank is None else f"rank {model.q_lora_rank}"
    lines = [
        f"model: {model.name}",
        f"parameters: {count.total / 1e9:.4g}B, {count.active / 1e9:.4g}B of them active",
        f"layers: {model.num_layers}, {model.num_dense_layers} of them dense,"
        f" and {model.num_mtp_layers} for multi-token prediction",
        f"width: {model.hidden_size}, {model.num_attention_heads} heads, queries {queries},"
        f" latent {model.kv_lora_rank}",
        f"experts: {model.num_experts} of width {model.moe_ffn_hidden_size},"
        f" {model.num_experts_per_token} a token, {model.num_shared_experts} shared",
        f"vocabulary: {model.vocab_size}",
    ]
    if model.yarn_factor > 1:
        lines.append(f"YaRN: {model.yarn_factor:g} x {model.yarn_original_context} positions")
    return lines


def _formats(numbers: Iterable[tuple[str, int]]) -> str:
    totals: Counter[str] = Counter()
    for dtype, count in numbers:
        totals[dtype.removeprefix("torch.")] += count
    return "formats: " + ", ".join(f"{count:,} {dtype}" for dtype, count in totals.most_common())


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
