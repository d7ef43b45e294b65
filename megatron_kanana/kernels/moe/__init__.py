"""Mixture of experts: routing, the order of rows by expert, and the experts; two backends.

`csrc`: this project's compiled kernels. `torch`: the plain reference.

Shape suffixes: T tokens, K slots (the experts a token visits), X all experts, E experts held here,
M rows (pairs of a token and an expert held here), D hidden size, N width of an expert.
"""

from __future__ import annotations

import torch

from . import compiled, plain
from .permutation import Permutation

__all__ = [
    "Permutation",
    "count_tokens",
    "gated_mlp",
    "permutation_of",
    "route",
    "routed_experts",
]

_BACKENDS = {"csrc": compiled, "torch": plain}


def route(
    logits_TX: torch.Tensor,
    expert_bias_X: torch.Tensor | None,
    *,
    num_experts_per_token: int,
    num_groups: int = 1,
    groups_per_token: int = 1,
    scaling_factor: float = 1.0,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each token's experts by sigmoid score + bias, and weigh them by their scores.

    DeepSeek-V3 (arXiv 2412.19437), section 2.1.2. With several groups, those of a token are the
    ones with the largest sum of their best two experts, and its experts are the best of these
    groups. Of equals the lower number is chosen.

    Args:
        logits_TX: fp32 [tokens, experts], of all experts.
        expert_bias_X: fp32 [experts], used for the choice alone; None is zero.
        num_experts_per_token: experts of a token, K.
        num_groups: equal parts into which the experts are dealt, in their order.
        groups_per_token: groups a token's experts may come from.
        scaling_factor: factor on the weights.
        backend: 'csrc' or 'torch'.

    Returns:
        weights fp32 [tokens, K]: scaling_factor * score / (sum of the token's K scores + 1e-20),
        for K = 1 scaling_factor * score; differentiable in the logits. And experts int32
        [tokens, K], by falling score + bias.

    Raises:
        RuntimeError: the shapes do not go together.
    """
    weights_TK, experts_TK = _BACKENDS[backend].route(
        logits_TX,
        expert_bias_X,
        num_experts_per_token,
        num_groups,
        groups_per_token,
        scaling_factor,
    )
    return weights_TK, experts_TK


def count_tokens(
    experts_TK: torch.Tensor,
    counts_X: torch.Tensor,
    padding_T: torch.Tensor | None = None,
    *,
    backend: str,
) -> None:
    """Add to `counts_X` how many tokens visit each expert, without waiting for the device.

    Args:
        experts_TK: int32 [tokens, K], from `route`.
        counts_X: fp32 [experts], raised in place.
        padding_T: bool [tokens]; tokens that are True are left out.
        backend: 'csrc' or 'torch'.
    """
    _BACKENDS[backend].count_tokens(experts_TK, counts_X, padding_T)


def permutation_of(
    experts_TK: torch.Tensor, num_experts: int, num_rows: int, *, backend: str
) -> Permutation:
    """Sort the slots whose experts are held here by expert, and within an expert by token.

    Args:
        experts_TK: int32 [tokens, K], numbers below `num_experts`, or -1 for an expert elsewhere.
        num_experts: experts held here, E.
        num_rows: slots that are not -1, M; the caller knows it, so nothing waits for the device.
        backend: 'csrc' or 'torch'.
    """
    permutation: Permutation = _BACKENDS[backend].permutation_of(experts_TK, num_experts, num_rows)
    return permutation


def routed_experts(
    hidden_states_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    permutation: Permutation,
    gate_up_E2ND: torch.Tensor,
    down_EDN: torch.Tensor,
    *,
    backend: str,
) -> torch.Tensor:
    """Each token's weighted sum of its experts, down(silu(gate(x)) * up(x)).

    Gradients of the experts' weights go straight into `main_grad` where megatron-core's data
    parallelism gave the parameters one (see `kernels.weight_gradients`). Between forward and
    backward `csrc` keeps the hidden states, the experts' pre-activations, the weights and the
    permutation.

    Args:
        hidden_states_TD: [tokens, hidden size], fp32 or bf16.
        weights_TK: fp32 [tokens, K]; those of slots elsewhere are not used, their gradient is 0.
        permutation: of the same slots.
        gate_up_E2ND: [experts, 2 * width, hidden size], rows of gate, then rows of up, in the dtype
            of the hidden states.
        down_EDN: [experts, hidden size, width].
        backend: 'csrc' or 'torch'; `choose_moe_backend` knows which ones run here.

    Returns:
        [tokens, hidden size] in the dtype of the hidden states, summed in fp32; zero for a token
        whose slots are all elsewhere.

    Raises:
        RuntimeError: shapes or dtypes do not go together, or the backend does not have them.
    """
    out_TD: torch.Tensor = _BACKENDS[backend].routed_experts(
        hidden_states_TD, weights_TK, permutation, gate_up_E2ND, down_EDN
    )
    return out_TD


def gated_mlp(
    hidden_states_TD: torch.Tensor,
    gate_up_2ND: torch.Tensor,
    down_DN: torch.Tensor,
    *,
    backend: str,
) -> torch.Tensor:
    """The same for one expert that every token visits: down(silu(gate(x)) * up(x)).

    Args:
        hidden_states_TD: [tokens, hidden size], fp32 or bf16.
        gate_up_2ND: [2 * width, hidden size], rows of gate, then rows of up.
        down_DN: [hidden size, width].
        backend: 'csrc' or 'torch'.

    Returns:
        [tokens, hidden size] in the dtype of the hidden states.

    Raises:
        RuntimeError: as `routed_experts`.
    """
    out_TD: torch.Tensor = _BACKENDS[backend].gated_mlp(hidden_states_TD, gate_up_2ND, down_DN)
    return out_TD
