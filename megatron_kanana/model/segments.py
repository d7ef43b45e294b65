"""Documents that share a sequence: what the model is told of them beside attention.

`segment_ids`, int [batch, sequence], numbers the documents of each sample from 0 in the order in
which they lie; padding is -1. `documents`, int32 [2, batch, sequence], are their boundaries
(`kernels.attention.documents_of`).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

from .context_parallel import part_of_batch, positions


def padding_mask(segment_ids: torch.Tensor, chunk: Any) -> torch.Tensor:
    """Where there is padding, as a model chunk takes it: bool [batch, sequence or a part of it].

    megatron-core deals the mask out over the processes of sequence parallelism where tokens are
    embedded, and expects each process's part elsewhere.
    """
    padding_BS: torch.Tensor = segment_ids < 0
    model = unwrap_model(chunk)
    if model.pre_process or not model.config.sequence_parallel:
        return padding_BS
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    rank: int = parallel_state.get_tensor_model_parallel_rank()
    return padding_BS.chunk(ranks, dim=1)[rank]


def mask_within_documents(
    loss_mask: torch.Tensor, documents: torch.Tensor, distance: int
) -> torch.Tensor:
    """`loss_mask` without the labels of which a document has fewer than `distance` tokens before.

    Args:
        loss_mask: [batch, this process's tokens], one where the label of a position counts.
        documents: [2, batch, sequence].
        distance: how many positions before the label's the prediction is made, at least 1.
    """
    begins_BS = part_of_batch({"begins": documents[0]})["begins"]
    positions_S = positions(loss_mask.shape[1], loss_mask.device)
    return torch.where(positions_S >= begins_BS + distance, loss_mask, 0)
