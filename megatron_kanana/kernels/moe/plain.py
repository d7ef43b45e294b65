"""Mixture of experts in plain torch, one expert after another: the reference.

Products are taken in the dtype of the hidden states, everything between them in fp32 (float64 in
float64). Gradients are autograd's; no sum has an order that changes from run to run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..weight_gradients import collects_gradient
from .permutation import Permutation


def route(
    logits_TX: torch.Tensor,
    expert_bias_X: torch.Tensor | None,
    num_experts_per_token: int,
    num_groups: int,
    groups_per_token: int,
    scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `route` of the package."""
    scores_TX = logits_TX.sigmoid()
    choice_TX = scores_TX.detach()
    if expert_bias_X is not None:
        choice_TX = choice_TX + expert_bias_X
    if num_groups > 1:
        choice_TX = _within_best_groups(choice_TX, num_groups, groups_per_token)
    experts_TK = _best(choice_TX, num_experts_per_token)
    weights_TK = scores_TX.gather(1, experts_TK)
    if num_experts_per_token > 1:
        weights_TK = weights_TK / (weights_TK.sum(1, keepdim=True) + 1e-20)
    return weights_TK * scaling_factor, experts_TK.int()


def _best(values: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the largest values in the last dimension; of equals the first."""
    order = values.sort(dim=-1, descending=True, stable=True).indices
    best: torch.Tensor = order[..., :count]
    return best


def _within_best_groups(
    choice_TX: torch.Tensor, num_groups: int, groups_per_token: int
) -> torch.Tensor:
    """-inf for the experts of all groups but the best of each token."""
    choice_TGX = choice_TX.unflatten(1, (num_groups, -1))
    worth_TG = choice_TGX.topk(min(2, choice_TGX.shape[2])).values.sum(2)
    kept_TG = torch.zeros_like(worth_TG, dtype=torch.bool)
    kept_TG.scatter_(1, _best(worth_TG, groups_per_token), True)
    kept_TX = kept_TG.repeat_interleave(choice_TGX.shape[2], dim=1)
    return choice_TX.masked_fill(~kept_TX, float("-inf"))


def count_tokens(
    experts_TK: torch.Tensor, counts_X: torch.Tensor, padding_T: torch.Tensor | None
) -> None:
    """See `count_tokens` of the package."""
    ones_TK = torch.ones_like(experts_TK, dtype=counts_X.dtype)
    if padding_T is not None:
        ones_TK = ones_TK.masked_fill(padding_T[:, None], 0.0)
    counts_X.index_add_(0, experts_TK.flatten(), ones_TK.flatten())


def permutation_of(experts_TK: torch.Tensor, num_experts: int, num_rows: int) -> Permutation:
    """See `permutation_of` of the package."""
    flat = experts_TK.flatten().long()
    last = flat.where(flat >= 0, num_experts)
    slot_of_row_M = last.argsort(stable=True)[:num_rows]
    first_rows = torch.arange(num_experts + 1, device=flat.device)
    offsets_E1 = torch.searchsorted(last[slot_of_row_M], first_rows)
    row_of_slot = torch.full_like(flat, -1)
    row_of_slot[slot_of_row_M] = torch.arange(num_rows, device=flat.device)
    return Permutation(
        offsets_E1.int(), slot_of_row_M.int(), row_of_slot.int().view(experts_TK.shape)
    )


def routed_experts(
    hidden_states_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    permutation: Permutation,
    gate_up_E2ND: torch.Tensor,
    down_EDN: torch.Tensor,
) -> torch.Tensor:
    """See `routed_experts` of the package. Waits for the device, to know each expert's rows."""
    slots = weights_TK.shape[1]
    slot_of_row_M = permutation.slot_of_row_M.long()
    # Through one copy a slot, no token is gathered twice: its gradient is a sum of fixed order.
    slots_SD = hidden_states_TD[:, None].expand(-1, slots, -1).flatten(0, 1)
    rows_MD = slots_SD.index_select(0, slot_of_row_M)
    counts = permutation.offsets_E1.diff().tolist()
    outputs = [
        _gated_mlp(rows_CD, gate_up_2ND, down_DN)
        for rows_CD, gate_up_2ND, down_DN in zip(
            rows_MD.split(counts),
            collects_gradient(gate_up_E2ND).unbind(),
            collects_gradient(down_EDN).unbind(),
            strict=True,
        )
    ]
    wide = torch.promote_types(hidden_states_TD.dtype, torch.float32)
    slots_SD = torch.zeros_like(slots_SD).index_copy(0, slot_of_row_M, torch.cat(outputs))
    slots_TKD = slots_SD.reshape(*weights_TK.shape, hidden_states_TD.shape[1]).to(wide)
    return (slots_TKD * weights_TK[:, :, None]).sum(1).to(hidden_states_TD.dtype)


def gated_mlp(
    hidden_states_TD: torch.Tensor, gate_up_2ND: torch.Tensor, down_DN: torch.Tensor
) -> torch.Tensor:
    """See `gated_mlp` of the package."""
    return _gated_mlp(hidden_states_TD, collects_gradient(gate_up_2ND), collects_gradient(down_DN))


def _gated_mlp(
    hidden_states_TD: torch.Tensor, gate_up_2ND: torch.Tensor, down_DN: torch.Tensor
) -> torch.Tensor:
    dtype = hidden_states_TD.dtype
    gate_TN, up_TN = (
        (hidden_states_TD @ gate_up_2ND.T).to(torch.promote_types(dtype, torch.float32)).chunk(2, 1)
    )
    return (F.silu(gate_TN) * up_TN).to(dtype) @ down_DN.T
