"""A layer of experts: router, dispatcher, experts, combination, and the shared experts beside."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_kanana.kernels.moe.common_rows import CommonRows, experts_take_quantized_rows

from .dispatcher import LocalDispatcher, token_dispatcher


class ExpertLayer(MoELayer):
    """megatron-core's MoELayer, with lists of experts instead of maps of all tokens and experts.

    The shared experts are computed while the sizes of what is to be sent come to the host.

    Args:
        dispatcher: `parallel.token_dispatcher`.
        backend: implementation of the permutation (see `kernels.moe`).
        The others are megatron-core's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        dispatcher: str,
        backend: str,
    ) -> None:
        super().__init__(config, submodules, layer_number, pg_collection)
        groups = pg_collection or get_default_pg_collection()
        self.token_dispatcher = token_dispatcher(
            dispatcher, self.num_local_experts, config, groups, backend
        )
        self._has_common_rows = self._experts_have_common_rows() and experts_take_quantized_rows()

    def _experts_have_common_rows(self) -> bool:
        """Whether routed and shared experts take the same rows, and in the same formats of fp8.

        Tokens that come from other processes are others, gathered ones lie elsewhere.
        """
        return (
            self.use_shared_expert
            and type(self.token_dispatcher) is LocalDispatcher
            and self.shared_experts.tp_group.size() == 1
            and self.experts.fp8 is not None
            and self.experts.fp8 == self.shared_experts.fp8
        )

    def set_for_recompute_pre_mlp_layernorm(self) -> None:
        """Nothing to do under fp8: no layer in here keeps a quantised copy of its input."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        intermediate_tensors: Any = None,
        padding_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """As MoELayer's, which captures parts of it in CUDA graphs; this one does not.

        Args:
            hidden_states: [sequence, batch, D].
            intermediate_tensors: None; of CUDA graphs.
            padding_mask: bool [batch, sequence], true where there is padding.

        Returns:
            [sequence, batch, D]; and megatron-core's bias, None.
        """
        assert intermediate_tensors is None
        if padding_mask is not None:
            padding_mask = padding_mask.transpose(0, 1).bool()
        dispatcher = self.token_dispatcher
        weights, experts = self.router(hidden_states, padding_mask)
        tokens, weights = dispatcher.dispatch_preprocess(hidden_states, experts, weights)
        # Both compute on one stream, so that neither waits for what the other quantised.
        common_rows = CommonRows() if self._has_common_rows else None
        shared = None
        if self.use_shared_expert:
            shared = self.shared_experts(hidden_states, common_rows=common_rows)
        tokens, weights = dispatcher.token_dispatch(tokens, weights)
        tokens, permutation, weights = dispatcher.dispatch_postprocess(tokens, weights)
        output, _ = self.experts(tokens, permutation, weights, common_rows=common_rows)
        output = dispatcher.token_combine(dispatcher.combine_preprocess(output))
        output = dispatcher.combine_postprocess(output)
        return output if shared is None else output + shared, None
