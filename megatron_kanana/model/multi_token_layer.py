"""A multi-token prediction layer that can be recomputed under fp8."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer


class PredictionLayer(MultiTokenPredictionLayer):
    """megatron-core's layer, with the number of a layer after the model's, and recomputed rightly.

    megatron-core 0.19 numbers these layers from one again, as the model's first layers; here
    numbers tell layers apart. Nor are they given a padding mask, as 0.19 does, moved by one place
    within each process's part of the sequence.

    megatron-core 0.16.1 hands inputs that are recomputed under fp8 by name to Transformer Engine's
    checkpoint, which differentiates by positional ones alone: the layer would learn nothing,
    without any error. Here they come by position.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        modules: Iterable[Any] = self.children()
        for module in itertools.chain.from_iterable(child.modules() for child in modules):
            if hasattr(module, "layer_number"):
                module.layer_number = self.config.num_layers + self.layer_number

    def forward(self, *args: Any, padding_mask: torch.Tensor | None = None, **inputs: Any) -> Any:
        """As megatron-core's, which documents it; `padding_mask` is not looked at."""
        return super().forward(*args, **inputs)

    def _checkpointed_forward(self, *forward_func: Callable[..., Any], **inputs: Any) -> Any:
        if not forward_func or not self.config.fp8:
            return super()._checkpointed_forward(*forward_func, **inputs)
        from megatron.core.extensions.transformer_engine import te_checkpoint

        def by_position(*values: Any) -> Any:
            return forward_func[0](**dict(zip(inputs, values, strict=True)))

        return te_checkpoint(
            by_position,
            self.config.distribute_saved_activations,
            get_cuda_rng_tracker,
            parallel_state.get_tensor_model_parallel_group(),
            *inputs.values(),
        )
