"""A multi-token prediction layer that can be recomputed under fp8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer


class PredictionLayer(MultiTokenPredictionLayer):
    """megatron-core's layer, whose recomputed inputs come by position under fp8.

    megatron-core 0.16.1 hands them by name to Transformer Engine's checkpoint, which differentiates
    by positional ones alone: the layer would learn nothing, without any error.
    """

    def _checkpointed_forward(self, forward_func: Callable[..., Any], **inputs: Any) -> Any:
        if not self.config.fp8:
            return super()._checkpointed_forward(forward_func, **inputs)
        from megatron.core.extensions.transformer_engine import te_checkpoint

        def by_position(*values: Any) -> Any:
            return forward_func(**dict(zip(inputs, values, strict=True)))

        return te_checkpoint(
            by_position,
            self.config.distribute_saved_activations,
            get_cuda_rng_tracker,
            parallel_state.get_tensor_model_parallel_group(),
            *inputs.values(),
        )
