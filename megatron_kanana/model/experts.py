"""The routed experts that lie on one process: one parameter for each projection of all of them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

from megatron_kanana.kernels.moe import Permutation, routed_experts
from megatron_kanana.kernels.moe.common_rows import CommonRows
from megatron_kanana.kernels.moe.fp8 import Fp8Choices, routed_experts_fp8

from .matrix_stack import MatrixStack, matrix_stack
from .quantized_weights import WeightCopies

# What megatron-core's SequentialMLP calls them in a checkpoint.
STORED_NAMES = {"gate_up": "experts.linear_fc1.weight", "down": "experts.linear_fc2.weight"}


class GroupedExperts(MegatronModule):
    """Gated feed-forwards, of which each token goes through the few it was sent to.

    In a checkpoint they are megatron-core's SequentialMLP's: a tensor for each projection with a
    leading axis of all experts.

    Attributes:
        gate_up: [local experts, 2N, D], in each expert N rows of the gate, then N of the up
            projection; N is this process's part under expert tensor parallelism.
        down: [local experts, D, N].
        is_first_microbatch: whether weights may have changed; megatron-core's schedules set it.

    Args:
        num_local_experts: E.
        config: megatron-core's; gives the sizes.
        backend: implementation (see `kernels.moe`).
        fp8: what else is in fp8 where products are (see `kernels.moe.fp8`); None for bf16.
        pg_collection: megatron-core's process groups.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        backend: str,
        fp8: Fp8Choices | None = None,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.backend = backend
        self.fp8 = fp8
        self.fp8_copies = WeightCopies()
        self.is_first_microbatch = True
        self.ep_group = pg_collection.ep
        self.tp_group = pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        width = config.moe_ffn_hidden_size // self.tp_group.size()
        self.gate_up = self._parameter((2 * width, config.hidden_size), split_axis=1, parts=2)
        self.down = self._parameter((config.hidden_size, width), split_axis=2, parts=1)

    def _parameter(self, shape: tuple[int, int], split_axis: int, parts: int) -> torch.nn.Parameter:
        config = self.config
        parameter = torch.nn.Parameter(
            torch.empty(
                (self.num_local_experts, *shape),
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),
            )
        )
        with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
            config.init_method(parameter)
        set_tensor_model_parallel_attributes(parameter, True, split_axis, parts)
        # Whether its replicas are those of the dense layers, over which gradients are reduced.
        parameter.allreduce = (  # type: ignore[attr-defined]
            config.expert_model_parallel_size == 1
            and config.expert_tensor_parallel_size == config.tensor_model_parallel_size
        )
        return parameter

    def forward(
        self,
        hidden_states: torch.Tensor,
        permutation: Permutation,
        weights: torch.Tensor,
        *,
        common_rows: CommonRows | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Weighted sum over each token's experts, as far as they lie here.

        Args:
            hidden_states: [T, D].
            permutation: of the tokens' slots to the experts.
            weights: fp32 [T, K].
            common_rows: with the shared experts, in fp8.

        Returns:
            [T, D], zero for tokens without an expert here, and megatron-core's bias, None.
        """
        inputs = (hidden_states, weights, permutation, self.gate_up, self.down)
        if self.fp8 is None:
            return routed_experts(*inputs, backend=self.backend), None
        step = self.fp8_copies.for_forward(self, (self.gate_up, self.down))
        out = routed_experts_fp8(
            *inputs,
            *step.copies,
            choices=self.fp8,
            sums_are_zero=step.sums_are_zero,
            common_rows=common_rows,
        )
        return out, None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, MatrixStack]:
        """Places of the local experts in the checkpoint's tensors of all experts."""
        return {prefix + name: self._stored(name, prefix, sharded_offsets) for name in STORED_NAMES}

    def _stored(
        self, name: str, prefix: str, sharded_offsets: tuple[tuple[int, int, int], ...]
    ) -> MatrixStack:
        stack: torch.nn.Parameter = getattr(self, name)
        number = self.num_local_experts
        first, total = self.ep_group.rank() * number, self.ep_group.size() * number
        matrices = []
        for index, matrix in enumerate(stack.detach()):
            offsets = (*sharded_offsets, (len(sharded_offsets), first + index, total))
            matrix_part = make_tp_sharded_tensor_for_checkpoint(
                matrix,
                prefix + STORED_NAMES[name],
                tp_axis=0 if name == "gate_up" else 1,
                replica_id=(0, 0, self.dp_group.rank()),
                prepend_offsets=offsets,
                tp_group=self.tp_group,
                dp_cp_group=self.dp_group,
            )
            if name == "gate_up":
                matrix_part = apply_swiglu_sharded_factory(matrix_part, offsets)
            matrices.append(matrix_part)
        return matrix_stack(stack, matrices)
