"""Forward passes that remember keys and values: a longer text costs only its new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_kanana.model.context_parallel import undivided
from megatron_kanana.model.rotary import any_number_of_tokens

from .run import Model

CHUNK_TOKENS = 512  # of a long prompt at a time, which bounds the memory of logits


class CachedForward:
    """One text, the cache of its keys and values on every process, and the logits after it.

    Keys and values of this process's layers and heads lie in megatron-core's static inference
    context. Under sequence parallelism, whose ranks take equal parts of a forward pass, tokens are
    padded: what follows the last one is hidden by the causal mask, and overwritten by what comes
    next. Every process must make the same calls, in `evaluation_mode`.

    Args:
        model: the model as it lies over the processes.
        capacity: tokens the text may have.
    """

    def __init__(self, model: Model, capacity: int) -> None:
        self._model = model
        self._multiple = parallel_state.get_tensor_model_parallel_world_size()
        self._context = StaticInferenceContext(1, capacity + self._multiple - 1)
        self._context.materialize_only_last_token_logits = False
        self.capacity = capacity

    @property
    def length(self) -> int:
        """Tokens of the text so far."""
        return int(self._context.sequence_len_offset)

    def append(self, tokens: Sequence[int]) -> torch.Tensor | None:
        """Add tokens to the text.

        Args:
            tokens: at least one, and no more than there is room for.

        Returns:
            logits after the last one, fp32 [padded vocabulary], on processes of the last pipeline
            stage; None on the others.
        """
        assert tokens
        assert self.length + len(tokens) <= self.capacity
        logits = None
        for start in range(0, len(tokens), CHUNK_TOKENS):
            logits = self._forward(tokens[start : start + CHUNK_TOKENS])
        return logits

    def _forward(self, tokens: Sequence[int]) -> torch.Tensor | None:
        padding = -len(tokens) % self._multiple
        device = self._model.device.torch_device
        tokens_BS = torch.tensor([[*tokens, *[0] * padding]], device=device)
        positions_BS = torch.arange(tokens_BS.shape[1], device=device)[None] + self.length

        def forward_step(_: Any, chunk: Any) -> Any:
            logits = chunk(
                tokens_BS,
                positions_BS,
                None,
                inference_context=self._context,
                runtime_gather_output=True,
            )
            return logits, lambda logits, non_loss_data: logits[0, len(tokens) - 1].float()

        chunks = self._model.chunks
        several = len(chunks) > 1
        config = self._model.config
        shared_by = config.context_parallel_size
        with any_number_of_tokens(config), undivided(chunks, config):
            results = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[None] * len(chunks) if several else None,
                model=chunks if several else chunks[0],
                # Interleaved stages take microbatches in multiples of the pipeline's depth. They
                # are all the same, and write the same into the cache.
                num_microbatches=(
                    parallel_state.get_pipeline_model_parallel_world_size() if several else 1
                ),
                # The schedules divide it by context parallelism's size.
                seq_length=tokens_BS.shape[1] * shared_by,
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
        self._context.increment_sequence_len_offset(len(tokens))
        return results[0] if results else None
