"""Tokens to the processes that hold their experts and outputs back, each token once a process.

Shape suffixes: T tokens of this process, K slots (the experts of a token), P processes of expert
parallelism, R rows (a token as it travels to one process), S the most rows of a token, min(K, P),
D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_kanana.kernels.moe import permutation_of


@dataclass(frozen=True)
class Destinations:
    """Where the slots of this process's tokens are to go.

    Attributes:
        process_TK: int32, process of each slot's expert.
        expert_TK: int32, number of each slot's expert there.
        first_TK: `process_TK` where no earlier slot of the token has the same one, else -1.
    """

    process_TK: torch.Tensor
    expert_TK: torch.Tensor
    first_TK: torch.Tensor


@dataclass(frozen=True)
class Routes:
    """Which rows travel; sorted by process, then by token.

    Attributes:
        token_of_row_R: int64, token of each row sent.
        rows_of_token_TS: int32, rows of each token, filled up with R.
        sent, received: number of rows to and from each process.
        group: the processes.
    """

    token_of_row_R: torch.Tensor
    rows_of_token_TS: torch.Tensor
    sent: list[int]
    received: list[int]
    group: dist.ProcessGroup


def destinations_of(experts_TK: torch.Tensor, num_local_experts: int) -> Destinations:
    """Destinations of slots, given each one's expert among all (int32 [tokens, K])."""
    process_TK = experts_TK // num_local_experts
    num_slots = experts_TK.shape[1]
    earlier_KK = torch.ones(num_slots, num_slots, dtype=torch.bool, device=experts_TK.device).tril(
        -1
    )
    is_repeated_TK = ((process_TK[:, :, None] == process_TK[:, None]) & earlier_KK).any(2)
    return Destinations(
        process_TK,
        experts_TK - process_TK * num_local_experts,
        process_TK.masked_fill(is_repeated_TK, -1),
    )


def counts_of(destinations: Destinations, num_processes: int) -> torch.Tensor:
    """Rows and slots to each process, int64 [P, 2]; nothing waits for the device."""
    processes = torch.arange(num_processes, device=destinations.process_TK.device)
    of_slots = (destinations.first_TK, destinations.process_TK)
    return torch.stack(
        [(which_TK.flatten()[:, None] == processes).sum(0) for which_TK in of_slots], 1
    )


def routes_of(
    destinations: Destinations,
    sent: Sequence[int],
    received: Sequence[int],
    group: dist.ProcessGroup,
    backend: str,
) -> tuple[Routes, torch.Tensor]:
    """Routes, and the experts of each row where it goes.

    Args:
        destinations: of the tokens.
        sent, received: number of rows to and from each process.
        group: the processes.
        backend: of `kernels.moe`.

    Returns:
        routes; and int32 [R, K], -1 for slots whose experts are not on the row's process.
    """
    num_rows, num_slots = sum(sent), destinations.process_TK.shape[1]
    order = permutation_of(destinations.first_TK, len(sent), num_rows, backend=backend)
    slot_of_row_R = order.slot_of_row_M.long()
    token_of_row_R = slot_of_row_R // num_slots
    process_R = destinations.process_TK.flatten()[slot_of_row_R]
    expert_RK = torch.where(
        destinations.process_TK[token_of_row_R] == process_R[:, None],
        destinations.expert_TK[token_of_row_R],
        -1,
    )
    row_of_slot_TK = order.row_of_slot_TK
    rows_of_token_TK = row_of_slot_TK.masked_fill(row_of_slot_TK < 0, num_rows).sort(1).values
    rows_of_token_TS = rows_of_token_TK[:, : min(num_slots, len(sent))].contiguous()
    return Routes(token_of_row_R, rows_of_token_TS, list(sent), list(received), group), expert_RK


def send_tokens(
    hidden_states_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    expert_RK: torch.Tensor,
    routes: Routes,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Send each token with its weights and the numbers of its experts.

    Two all-to-alls: hidden states; weights and numbers together. Backward as well: gradients of
    hidden states, and of weights. A token's gradients are added in fp32, by process.

    Args:
        hidden_states_TD: tokens.
        weights_TK: fp32, weights of their slots.
        expert_RK: int32, from `routes_of`.
        routes: of the tokens.

    Returns:
        rows that came: hidden states, weights and experts, sorted by the process they came from,
        and in the order of tokens there.
    """
    hidden_states, weights, experts = _SendTokens.apply(
        hidden_states_TD,
        weights_TK,
        expert_RK,
        routes.token_of_row_R,
        routes.rows_of_token_TS,
        routes,
    )
    return hidden_states, weights, experts


def return_outputs(output: torch.Tensor, routes: Routes) -> torch.Tensor:
    """Send the outputs of rows that came back to where they came from, and add up each token's.

    Args:
        output: [rows that came, D].
        routes: with which they came.

    Returns:
        [T, D]; a token's outputs are added in fp32, by process.
    """
    result: torch.Tensor = _ReturnOutputs.apply(
        output, routes.token_of_row_R, routes.rows_of_token_TS, routes
    )
    return result


class _SendTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states_TD: torch.Tensor,
        weights_TK: torch.Tensor,
        expert_RK: torch.Tensor,
        token_of_row_R: torch.Tensor,
        rows_of_token_TS: torch.Tensor,
        routes: Routes,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(token_of_row_R, rows_of_token_TS)
        ctx.sizes = routes.sent, routes.received, routes.group
        hidden_states = _exchange(hidden_states_TD[token_of_row_R], *ctx.sizes)
        weight_RK = weights_TK[token_of_row_R]
        together = _exchange(torch.cat([expert_RK, weight_RK.view(torch.int32)], 1), *ctx.sizes)
        experts, weights = (part.contiguous() for part in together.chunk(2, 1))
        ctx.mark_non_differentiable(experts)
        return hidden_states, weights.view(torch.float32), experts

    @staticmethod
    def backward(
        ctx: Any, grad_hidden_states: torch.Tensor, grad_weights: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        _, rows_of_token_TS = ctx.saved_tensors
        grads = [
            _exchange_and_add(gradient, rows_of_token_TS, *ctx.sizes)
            for gradient in (grad_hidden_states, grad_weights)
        ]
        return *grads, None, None, None, None


class _ReturnOutputs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        token_of_row_R: torch.Tensor,
        rows_of_token_TS: torch.Tensor,
        routes: Routes,
    ) -> torch.Tensor:
        ctx.save_for_backward(token_of_row_R)
        ctx.sizes = routes.sent, routes.received, routes.group
        return _exchange_and_add(output, rows_of_token_TS, *ctx.sizes)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (token_of_row_R,) = ctx.saved_tensors
        return _exchange(grad_TD[token_of_row_R], *ctx.sizes), None, None, None


def _exchange(
    rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """One all-to-all of rows."""
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result


def _exchange_and_add(
    rows: torch.Tensor,
    rows_of_token_TS: torch.Tensor,
    sent: list[int],
    received: list[int],
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """The way back of `_exchange`; then the sum of each token's rows, in fp32."""
    returned = rows.new_empty(sum(sent) + 1, rows.shape[1])
    returned[-1] = 0  # the row that fills up
    dist.all_to_all_single(returned[:-1], rows.contiguous(), sent, received, group=group)
    return sums_of_rows(returned, rows_of_token_TS)


def sums_of_rows(rows_RD: torch.Tensor, rows_of_token_TS: torch.Tensor) -> torch.Tensor:
    """Each token's sum of its rows, added in fp32 one after another: [T, D] in the rows' dtype."""
    # One kernel on CUDA; on a CPU it would add in the rows' dtype.
    if rows_RD.is_cuda and len(rows_of_token_TS):
        return F.embedding_bag(rows_of_token_TS, rows_RD, mode="sum")
    shape = len(rows_of_token_TS), rows_RD.shape[1]
    sums_TD = rows_RD.new_zeros(shape, dtype=torch.float32)
    for rows_T in rows_of_token_TS.unbind(1):
        sums_TD += rows_RD.index_select(0, rows_T)
    return sums_TD.to(rows_RD.dtype)
