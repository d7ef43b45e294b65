"""A layer of experts: router, dispatcher, experts, combination, and the shared experts beside."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig

from .dispatcher import token_dispatcher


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
        shared = self.shared_experts(hidden_states) if self.use_shared_expert else None
        tokens, weights = dispatcher.token_dispatch(tokens, weights)
        tokens, permutation, weights = dispatcher.dispatch_postprocess(tokens, weights)
        output, _ = self.experts(tokens, permutation, weights)
        output = dispatcher.token_combine(dispatcher.combine_preprocess(output))
        output = dispatcher.combine_postprocess(output)
        return output if shared is None else output + shared, None
