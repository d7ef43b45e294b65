"""What differs between the versions of megatron-core that the project runs on: all of it is here.

The project is written for the seams of 0.16.1, the newest for Python 3.11. On 0.19, which needs
Python 3.12, `NEWER_PATCHES` let the same code stand; each says what 0.19 does otherwise. The rest
of the project asks for no version.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch

from .patch import Patch


def megatron_core_is_newer() -> bool:
    """Whether megatron-core is 0.19 or later, not 0.16; reads the package's version alone."""
    version = importlib.metadata.version("megatron-core")
    return tuple(int(number) for number in version.split(".")[:2]) >= (0, 19)


def version_patches(device: str) -> tuple[Patch, ...]:
    """What the installed version of megatron-core needs on `device`, 'cpu' or 'cuda'."""
    if not megatron_core_is_newer():
        return OLDER_PATCHES
    return (*NEWER_PATCHES, *(NEWER_CPU_PATCHES if device == "cpu" else ()))


def prediction_layer_name() -> str:
    """What a multi-token prediction layer calls its transformer layer; not in checkpoints."""
    return "mtp_model_layer" if megatron_core_is_newer() else "transformer_layer"


def prediction_layer_submodules(transformer_layer: Any, **others: Any) -> Any:
    """megatron-core's MultiTokenPredictionLayerSubmodules, of which 0.19 renamed a field.

    Args:
        transformer_layer: specification of the transformer layer.
        others: fields that have one name.
    """
    from megatron.core.transformer.multi_token_prediction import (
        MultiTokenPredictionLayerSubmodules,
    )

    others[prediction_layer_name()] = transformer_layer
    return MultiTokenPredictionLayerSubmodules(**others)


def results_queue_name() -> str:
    """Name of the function that makes the queue of megatron-core's own checkpoint writers."""
    return "get_write_results_queue" if megatron_core_is_newer() else "_get_write_results_queue"


def build_from_specification(specification: Any, *inputs: Any, **options: Any) -> Any:
    """What 0.19 calls where 0.16 hands the specification to megatron-core's `build_module`.

    Two new arguments are left out. `name` chooses recipes of quantisation by layer, which are not
    used. `is_mtp_layer` says that a layer's number starts from one again; see `PredictionLayer`.
    """
    from megatron.core.transformer.spec_utils import build_module

    for new in ("name", "is_mtp_layer"):
        options.pop(new, None)
    return build_module(specification, *inputs, **options)


def _mla_transformer_engine_flag() -> None:
    from megatron.core.transformer import multi_latent_attention

    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False


def _specifications_are_called() -> None:
    from megatron.core.transformer.spec_utils import ModuleSpec

    ModuleSpec.__call__ = build_from_specification


def _no_query_norm() -> None:
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    def as_specified(self: Any, submodules: Any) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")
        return {name: getattr(submodules, name) for name in (*names, "q_layernorm", "kv_layernorm")}

    MLASelfAttention._resolve_qk_norm_config = as_specified


def _whole_layers() -> None:
    from megatron.core.post_training.modelopt.layers import Linear
    from megatron.core.transformer import multi_latent_attention

    multi_latent_attention.Linear = Linear


def _gradients_for_norm() -> None:
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    MegatronOptimizer.get_main_grads_for_grad_norm = MegatronOptimizer.get_grads_for_grad_norm


def _plan_of_a_checkpoint() -> None:
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    method: Any = TorchDistSaveShardedStrategy.async_save
    method.__defaults__ = ("mcore",)


def _recompute_without_compiler() -> None:
    from megatron.core.tensor_parallel import random

    @torch.no_grad()
    def fill_storage(output: torch.Tensor, computed_again: torch.Tensor) -> None:
        """As 0.16 does it; megatron-core's own operation shares the memory instead."""
        storage = computed_again.untyped_storage()
        output.untyped_storage().resize_(storage.size())
        output.untyped_storage().copy_(storage)

    random._get_share_storage = lambda: fill_storage


def _current_stream() -> None:
    torch.cuda.current_stream = lambda device=None: None  # type: ignore[assignment,return-value]


def _losses_of_prediction_layers() -> None:
    from megatron.core.models.gpt import gpt_model
    from megatron.core.transformer.multi_token_prediction import (
        MTPLossAutoScaler,
        MTPLossLoggingHelper,
        roll_tensor,
    )

    def process_mtp_loss(
        *,
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        loss_mask: torch.Tensor,
        output_layer: Any,
        compute_language_model_loss: Any,
        config: Any,
        cp_group: Any,
        **_: Any,
    ) -> torch.Tensor:
        count = config.mtp_num_layers
        scale = config.mtp_loss_scaling_factor / count
        own, *predictions = hidden_states.chunk(1 + count)
        tracker = MTPLossLoggingHelper.tracker
        if "values" not in tracker:
            tracker["values"] = torch.zeros(count, device=own.device)
        for index, prediction in enumerate(predictions):
            labels, _ = roll_tensor(labels, shifts=-1, dims=-1, cp_group=cp_group)
            loss_mask, num_tokens = roll_tensor(loss_mask, shifts=-1, dims=-1, cp_group=cp_group)
            losses = loss_mask * compute_language_model_loss(labels, output_layer(prediction)[0])
            tracker["values"][index] += losses.detach().sum() / num_tokens
            weighted = scale * losses
            if not config.calculate_per_token_loss:
                weighted = weighted / num_tokens
            own = MTPLossAutoScaler.apply(own, weighted)
        return own

    gpt_model.process_mtp_loss = process_mtp_loss


OLDER_PATCHES = (
    Patch(
        "mla_transformer_engine_flag",
        "multi_latent_attention.HAVE_TE is true without it, and isinstance() meets a mock",
        _mla_transformer_engine_flag,
    ),
)

NEWER_PATCHES = (
    Patch(
        "specifications_are_called",
        "layers call what builds their parts, and a ModuleSpec cannot be called",
        _specifications_are_called,
    ),
    Patch(
        "no_query_norm",
        "MLA without a low rank of queries insists on a norm inside the query projection",
        _no_query_norm,
    ),
    Patch(
        "whole_layers",
        "MLA forgets the class of layers that are whole on each process without Transformer Engine",
        _whole_layers,
    ),
    Patch(
        "losses_of_prediction_layers",
        "right predictions are counted in logits, which the output layer does not give"
        " where losses are wanted; and sums of losses are weighted by numbers of labels",
        _losses_of_prediction_layers,
    ),
    Patch(
        "gradients_for_norm",
        "the optimizer's method that lists gradients without copies has another name",
        _gradients_for_norm,
    ),
    Patch(
        "plan_of_a_checkpoint",
        "checkpoints are planned by nvidia-resiliency-ext unless megatron-core is asked for",
        _plan_of_a_checkpoint,
    ),
    Patch(
        "recompute_without_compiler",
        "what is computed again gets its memory from an operation in C++ that each node compiles"
        " when it is first needed",
        _recompute_without_compiler,
    ),
)

NEWER_CPU_PATCHES = (
    Patch(
        "current_stream",
        "the reduction of gradients looks up torch.cuda.current_stream(), which raises",
        _current_stream,
    ),
)
