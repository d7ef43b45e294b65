"""Context parallelism: the processes of a group share each sequence.

A sequence is cut into twice as many pieces as there are processes, and process r has the pieces r
and, from the end, r: megatron-core's order, in which its rotary embeddings and multi-token
prediction count positions. Attention alone needs whole sequences. For it heads are dealt out
instead, by an all-to-all before and one after (DeepSpeed-Ulysses, arXiv 2309.14509), so that every
implementation of attention, documents and the largest logits stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank


def part_of_batch(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This process's part of tensors [batch, sequence], others as they are."""
    whole = {name: tensor for name, tensor in batch.items() if tensor.dim() == 2}
    return {**batch, **get_batch_on_this_cp_rank(whole)}


def positions(tokens: int, device: torch.device) -> torch.Tensor:
    """Where in the sequence this process's tokens lie, int64 [tokens]."""
    everywhere = tokens * parallel_state.get_context_parallel_world_size()
    whole = torch.arange(everywhere, device=device)[None]
    result: torch.Tensor = part_of_batch({"positions": whole})["positions"][0]
    return result


def sum_over_group(value: torch.Tensor) -> torch.Tensor:
    """The sum over the processes that share sequences; `value` itself where there is one."""
    if parallel_state.get_context_parallel_world_size() == 1:
        return value
    result = value.clone()
    dist.all_reduce(result, group=parallel_state.get_context_parallel_group())
    return result


def whole_sequence(x_SBNW: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """From all heads of a part of the sequence to a part of the heads of the whole sequence.

    Args:
        x_SBNW: [tokens, batch, heads, width] of this process.
        group: processes that share the sequence; their number divides that of heads.

    Returns:
        [all tokens, batch, heads / processes, width], tokens in their order.
    """
    ranks = group.size()
    tokens, batch, heads, width = x_SBNW.shape
    by_rank = x_SBNW.view(tokens, batch, ranks, heads // ranks, width).permute(2, 0, 1, 3, 4)
    received = all_to_all(group, by_rank.contiguous())
    pieces = received.view(2 * ranks, tokens // 2, batch, heads // ranks, width)
    return torch.cat([pieces[place] for place in _places(ranks)])


def part_of_sequence(x_SBNW: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The other way: [all tokens, batch, some heads, width] to [tokens, batch, heads, width]."""
    ranks = group.size()
    everywhere, batch, heads, width = x_SBNW.shape
    pieces = x_SBNW.chunk(2 * ranks)
    by_place = sorted(zip(_places(ranks), pieces, strict=True), key=lambda placed: placed[0])
    received: torch.Tensor = all_to_all(group, torch.cat([piece for _, piece in by_place]))
    by_rank = received.view(ranks, everywhere // ranks, batch, heads, width)
    return by_rank.permute(1, 2, 0, 3, 4).reshape(everywhere // ranks, batch, ranks * heads, width)


def _places(ranks: int) -> list[int]:
    """Of each piece of the sequence: where it lies among the pieces of all processes in turn."""
    return [2 * rank for rank in range(ranks)] + [2 * rank + 1 for rank in reversed(range(ranks))]


@contextmanager
def undivided(chunks: Iterable[torch.nn.Module], config: MLATransformerConfig) -> Iterator[None]:
    """Meanwhile each process computes whole sequences by itself, all of a group the same ones.

    Args:
        chunks: of the model.
        config: the one that the model was built with.
    """
    if config.context_parallel_size == 1:
        yield
        return
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    rotary = [
        module
        for chunk in chunks
        for module in chunk.modules()
        if isinstance(module, RotaryEmbedding)
    ]
    before = config.context_parallel_size, [module.cp_group for module in rotary]
    try:
        config.context_parallel_size = 1
        for module in rotary:
            module.cp_group = alone
        _forget_rotary_embeddings()
        yield
    finally:
        config.context_parallel_size = before[0]
        for module, group in zip(rotary, before[1], strict=True):
            module.cp_group = group
        _forget_rotary_embeddings()


def _forget_rotary_embeddings() -> None:
    for kind in (RotaryEmbedding, YarnRotaryEmbedding):
        kind.forward.cache_clear()
