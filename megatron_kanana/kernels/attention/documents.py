"""Where each token's document begins and ends, and which keys a query sees."""

from __future__ import annotations

import torch


def documents_of(segment_ids_BS: torch.Tensor) -> torch.Tensor:
    """First position of each token's document and one past its last: int32 [2, batch, sequence].

    Both are a padding token's own position.

    Args:
        segment_ids_BS: int [batch, sequence], documents numbered from 0 in the order in which they
            lie; padding is -1.
    """
    length = segment_ids_BS.shape[1]
    positions_S = torch.arange(length, device=segment_ids_BS.device)
    begins_BS = segment_ids_BS.diff(dim=1, prepend=segment_ids_BS[:, :1] - 1) != 0
    ends_BS = begins_BS.roll(-1, dims=1)
    ends_BS[:, -1:] = True
    first_BS = torch.where(begins_BS, positions_S, 0).cummax(dim=1).values
    stop_BS = torch.where(ends_BS, positions_S + 1, length).flip(1).cummin(dim=1).values.flip(1)
    documents_2BS = torch.stack([first_BS, stop_BS])
    return torch.where(segment_ids_BS < 0, positions_S, documents_2BS).to(torch.int32)


def documents_of_lengths(cumulative_lengths: torch.Tensor, length: int) -> torch.Tensor:
    """As `documents_of`, int32 [2, 1, length], of documents that lie one behind the other.

    Args:
        cumulative_lengths: int [documents + 1], 0, then the end of each document; equal ones are
            empty documents. Positions from the last one on are padding.
        length: of the sequence.
    """
    positions_S = torch.arange(length, device=cumulative_lengths.device, dtype=torch.int32)
    boundaries = cumulative_lengths.to(torch.int32)
    next_boundary_S = torch.searchsorted(boundaries, positions_S, right=True)
    padding_S = next_boundary_S == len(boundaries)
    next_boundary_S = next_boundary_S.clamp(max=len(boundaries) - 1)
    documents_2S = torch.stack([boundaries[next_boundary_S - 1], boundaries[next_boundary_S]])
    return torch.where(padding_S, positions_S, documents_2S)[:, None]


def hidden_keys(
    queries: range,
    num_keys: int,
    causal: bool,
    documents_2BS: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """Which keys queries do not see: bool [batch or 1, 1, queries, keys].

    Args:
        queries: their positions.
        documents_2BS: see `attention`.
    """
    keys_T = torch.arange(num_keys, device=device)
    queries_S1 = torch.arange(queries.start, queries.stop, device=device)[:, None]
    hidden_BST = torch.zeros(1, len(queries), num_keys, dtype=torch.bool, device=device)
    if causal:
        hidden_BST = hidden_BST | (keys_T > queries_S1)
    if documents_2BS is not None:
        first_BS1, stop_BS1 = documents_2BS[:, :, queries.start : queries.stop, None]
        hidden_BST = hidden_BST | (keys_T < first_BS1) | (keys_T >= stop_BS1)
    return hidden_BST[:, None]
