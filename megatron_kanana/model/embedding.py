"""The embedding on a Hopper GPU: megatron-core's, with a lookup of our own in it."""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from megatron_kanana.kernels.embedding import lookup


def add_embedding_gradients_in_place(model: torch.nn.Module) -> None:
    """Have embeddings add their gradients to `main_grad`, in the rows that were looked up."""
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding):
            module.forward = partial(_looked_up, module)


def _looked_up(embedding: VocabParallelEmbedding, words: torch.Tensor) -> torch.Tensor:
    """As megatron-core's forward: [batch, tokens] to rows, summed over tensor parallelism."""
    some_elsewhere = embedding.tp_group.size() > 1
    if some_elsewhere:
        first, end = embedding.vocab_start_index, embedding.vocab_end_index
        words = torch.where((words >= first) & (words < end), words - first, -1)
    rows = lookup(words, embedding.weight, some_elsewhere=some_elsewhere)
    result: torch.Tensor
    if embedding.reduce_scatter_embeddings:
        rows = rows.transpose(0, 1).contiguous()
        result = reduce_scatter_to_sequence_parallel_region(rows, group=embedding.tp_group)
    else:
        result = reduce_from_tensor_model_parallel_region(rows, group=embedding.tp_group)
    return result
