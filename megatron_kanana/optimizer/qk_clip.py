"""QK-Clip for multi-head latent attention: heads whose logits grew too large are scaled down.

Kimi Team, "Kimi K2: Open Agentic Intelligence" (arXiv 2507.20534), section 2.1: with S the largest
attention logit of a head over the step's batch and tau the threshold, gamma = min(1, tau / S);
the head's query and key rows without position are multiplied by sqrt(gamma), its rotary query rows
by gamma. The rotary key is shared by all heads and stays. Every logit of the head so becomes gamma
times what it was; values are not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from megatron.core.utils import unwrap_model

from megatron_kanana.config.schema import ModelSettings

from .flat_shards import flat_parameters, members


@dataclass(frozen=True)
class ClippedWeight:
    """This process's piece of one attention layer's query or key-value up-projection.

    Attributes:
        layer: the layer's row in the largest logits.
        is_query: whether it holds queries; else keys and values.
        main: fp32 weights of the piece, flat.
        start: element of the (tensor-parallel shard of the) weight at which the piece begins.
        columns: width of the weight.
    """

    layer: int
    is_query: bool
    main: torch.Tensor
    start: int
    columns: int


class QKClip:
    """Scales heads down after each step that the optimizer makes.

    It works on the fp32 weights, wherever the distributed optimizer keeps their pieces, after
    their update and before megatron-core copies them to the model's weights and gathers those: the
    model's weights follow from it without another collective. A step that is skipped changes
    nothing.

    Attributes:
        max_logits: largest logits of the step under way over all processes, fp32 [layers, heads]
            on the CPU; to be set before the optimizer's step.

    Args:
        optimizer: megatron-core's optimizer.
        chunks: the model's chunks on this process.
        model: sizes of heads.
        threshold: largest logit a head may keep.
    """

    def __init__(
        self, optimizer: Any, chunks: Sequence[Any], model: ModelSettings, threshold: float
    ) -> None:
        self.max_logits: torch.Tensor | None = None
        self._model = model
        self._threshold = threshold
        self._num_clipped = 0
        num_heads = (
            model.num_attention_heads // parallel_state.get_tensor_model_parallel_world_size()
        )
        first_head = num_heads * parallel_state.get_tensor_model_parallel_rank()
        self._heads = slice(first_head, first_head + num_heads)
        dense = members(optimizer)[0]
        self._weights = _clipped_weights(dense, chunks)
        dense.optimizer.register_step_post_hook(lambda *_: self.clip())

    @torch.no_grad()
    def clip(self) -> None:
        """Scale the pieces of heads above the threshold, once for each `max_logits`."""
        if self.max_logits is None:
            return
        gamma = clip_factors(self.max_logits, self._threshold)
        self.max_logits = None
        self._num_clipped += int((gamma < 1.0).sum())
        for weight in self._weights:
            gamma_of_heads = gamma[weight.layer, self._heads]
            if bool((gamma_of_heads < 1.0).any()):
                factors = row_factors(gamma_of_heads, self._model, is_query=weight.is_query)
                scale_rows_(weight.main, weight.start, weight.columns, factors)

    def take_num_clipped(self) -> int:
        """Heads scaled down since the last call, each as often as it was; over all processes."""
        num_clipped, self._num_clipped = self._num_clipped, 0
        return num_clipped


def clip_factors(max_logits: torch.Tensor, threshold: float) -> torch.Tensor:
    """gamma of each head, at most 1; 1 where a maximum is negative, infinite or not a number."""
    too_large = (max_logits > threshold) & max_logits.isfinite()
    return torch.where(too_large, threshold / max_logits, 1.0)


def row_factors(gamma: torch.Tensor, model: ModelSettings, *, is_query: bool) -> torch.Tensor:
    """Factor of each row of the weight that makes queries, or keys and values, of some heads.

    Args:
        gamma: factor on the logits of each head, fp32 [heads].
        model: sizes of heads.
        is_query: rows of a head are [without position | rotary], else [key | value].

    Returns:
        fp32 [rows].
    """
    rest = gamma if is_query else torch.ones_like(gamma)
    num_rest = model.qk_rope_head_dim if is_query else model.v_head_dim
    by_head = [
        gamma.sqrt()[:, None].expand(-1, model.qk_nope_head_dim),
        rest[:, None].expand(-1, num_rest),
    ]
    return torch.cat(by_head, 1).flatten()


def scale_rows_(piece: torch.Tensor, start: int, columns: int, factors: torch.Tensor) -> None:
    """Multiply each element of a flat piece of a matrix by the factor of its row, in place.

    Args:
        piece: elements from `start` on of the flattened matrix.
        columns: width of the matrix.
        factors: [rows of the matrix].
    """
    end = start + piece.numel()
    first, last = start // columns, -(-end // columns)
    rows = factors[first:last].to(piece.device)
    offset = start - first * columns
    piece.mul_(rows.repeat_interleave(columns)[offset : offset + piece.numel()])


def _clipped_weights(member: Any, chunks: Sequence[Any]) -> list[ClippedWeight]:
    flats = {flat.parameter: flat for flat in flat_parameters(member)}
    result = []
    for chunk in chunks:
        for module in unwrap_model(chunk).modules():
            if not isinstance(module, MultiLatentAttention):
                continue
            without_rank = module.config.q_lora_rank is None
            query = module.linear_q_proj if without_rank else module.linear_q_up_proj
            for linear in (query, module.linear_kv_up_proj):
                flat = flats[linear.weight]
                if flat.main is not None and flat.piece is not None:
                    result.append(
                        ClippedWeight(
                            module.layer_number - 1,
                            linear is query,
                            flat.main,
                            flat.piece.start,
                            linear.weight.shape[1],
                        )
                    )
    return result
