"""The experts that every token visits, as one operation."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_kanana.kernels.moe import gated_mlp
from megatron_kanana.kernels.moe.common_rows import CommonRows
from megatron_kanana.kernels.moe.fp8 import Fp8Choices, gated_mlp_fp8

from .quantized_weights import WeightCopies


class SharedExperts(SharedExpertMLP):
    """megatron-core's shared experts, with its parameters and their names, by `kernels.moe`.

    Attributes:
        is_first_microbatch: whether weights may have changed; megatron-core's schedules set it.

    Args:
        backend: implementation (see `kernels.moe`).
        fp8: what else is in fp8 where products are (see `kernels.moe.fp8`); None for bf16.
        The others are megatron-core's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        gate: bool,
        pg_collection: ProcessGroupCollection,
        *,
        backend: str,
        fp8: Fp8Choices | None = None,
    ) -> None:
        super().__init__(config, submodules, gate, pg_collection)
        self.backend = backend
        self.fp8 = fp8
        self.fp8_copies = WeightCopies()
        self.is_first_microbatch = True

    def forward(
        self, hidden_states: torch.Tensor, *, common_rows: CommonRows | None = None
    ) -> torch.Tensor:
        """[sequence or this process's part of it, batch, D] -> the same shape.

        Args:
            hidden_states: of the layer.
            common_rows: with the routed experts, in fp8; only where `tp_group` is one process.
        """
        if self.tp_group.size() == 1:
            return self._compute(hidden_states, common_rows)
        gathered = gather_from_sequence_parallel_region(hidden_states, group=self.tp_group)
        with _kept_in_parts(gathered, hidden_states.detach(), self.tp_group):
            partial_sums = self._compute(gathered)
        summed: torch.Tensor = reduce_scatter_to_sequence_parallel_region(
            partial_sums, group=self.tp_group
        )
        return summed

    def _compute(
        self, hidden_states: torch.Tensor, common_rows: CommonRows | None = None
    ) -> torch.Tensor:
        weights = (self.linear_fc1.weight, self.linear_fc2.weight)
        inputs = (hidden_states.flatten(0, -2), *weights)
        if self.fp8 is None:
            return gated_mlp(*inputs, backend=self.backend).view(hidden_states.shape)
        step = self.fp8_copies.for_forward(self, [weight[None] for weight in weights])
        out = gated_mlp_fp8(
            *inputs,
            *step.copies,
            choices=self.fp8,
            sums_are_zero=step.sums_are_zero,
            common_rows=common_rows,
        )
        return out.view(hidden_states.shape)


def _kept_in_parts(gathered: torch.Tensor, part: torch.Tensor, group: Any) -> Any:
    """Have autograd keep this process's part of `gathered`, and gather it again when it is needed.

    megatron-core's column-parallel layers do the same.
    """

    place, size = gathered.data_ptr(), gathered.numel()  # autograd keeps the hooks, too

    def pack(tensor: torch.Tensor) -> Any:
        is_gathered = tensor.data_ptr() == place and tensor.numel() == size
        return (tensor.shape, part) if is_gathered else tensor

    def unpack(kept: Any) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        shape, own = kept
        whole: torch.Tensor = gather_from_sequence_parallel_region(own, group=group)
        return whole.view(shape)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
