"""Logits of a model in any layout, by one forward pass through megatron-core's schedule."""

from __future__ import annotations

from typing import Any

import torch


def logits_of(chunks: list[Any], tokens: torch.Tensor) -> torch.Tensor | None:
    """Logits after every token, fp32 [batch, sequence, vocabulary] on the CPU; every process calls.

    Args:
        chunks: of this process; they are left in evaluation mode.
        tokens: int64 [batch, sequence], the same on every process.

    Returns:
        None but on the last pipeline stage.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
    from megatron.core.utils import unwrap_model

    from megatron_kanana.model.context_parallel import undivided

    where = next(chunks[0].parameters()).device
    tokens = tokens.to(where)
    positions = torch.arange(tokens.shape[1], device=where).expand_as(tokens)

    def collect(output: torch.Tensor, *, non_loss_data: bool) -> torch.Tensor:
        assert non_loss_data
        whole: torch.Tensor = gather_from_tensor_model_parallel_region(output.float())
        return whole

    def forward_step(_: Any, chunk: Any) -> Any:
        return chunk(tokens, positions, None), collect

    for chunk in chunks:
        chunk.eval()
    several = len(chunks) > 1
    config = unwrap_model(chunks[0]).config
    shared_by = config.context_parallel_size  # the schedules divide lengths by it
    with torch.no_grad(), undivided(chunks, config):
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[None] * len(chunks) if several else None,
            model=chunks if several else chunks[0],
            # Interleaved stages take a multiple of their number; all microbatches are the same.
            num_microbatches=parallel_state.get_pipeline_model_parallel_world_size(),
            seq_length=tokens.shape[1] * shared_by,
            micro_batch_size=tokens.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
    return results[0].cpu() if results else None
