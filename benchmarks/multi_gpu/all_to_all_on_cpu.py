"""megatron-core's all-to-all of tokens without CUDA's streams: a CPU tries what GPUs run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from .. import megatron_model


@contextlib.contextmanager
def peer_with_all_to_all() -> Iterator[None]:
    """Inside, megatron-core's model gets its all-to-all on a CPU too.

    Its dispatcher copies the numbers of rows from the GPU on a stream of its own, and has them as
    arrays of numpy then. Here they become these arrays at once, for the rest of the process.
    """
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    def as_arrays(self: Any, point: str, tokens_per_expert: torch.Tensor) -> torch.Tensor:
        if point == self.cuda_dtoh_point:
            for name in ("input_splits", "output_splits", "output_splits_tp"):
                value = getattr(self, name)
                setattr(self, name, value.numpy() if torch.is_tensor(value) else value)
        return tokens_per_expert

    dispatcher: Any = MoEAlltoAllTokenDispatcher
    dispatcher.cuda_dtoh_stream = "none on a CPU"
    dispatcher._maybe_dtoh_and_synchronize = as_arrays
    dispatched = {"moe_token_dispatcher_type": "alltoall"}
    with mock.patch.dict(megatron_model.ON_CPU, dispatched):
        yield
