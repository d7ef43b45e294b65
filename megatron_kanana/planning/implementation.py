"""Who computes what in a run of this version, on a GPU that is not at hand."""

from __future__ import annotations

import dataclasses

from megatron_kanana.config import Settings
from megatron_kanana.config.environment import resolve_precision

from .architecture import ALL_FP8, EXPERT_GRADIENTS, EXPERTS, KEPT_ACTIVATIONS, OUTPUT_LAYER
from .attention import attention_of
from .calibration import KANANA, Implementation
from .experts import experts_of
from .machines import Machine


def implementation_of(settings: Settings, machine: Machine) -> Implementation:
    """This version with these settings, its operations and Transformer Engine being there."""
    in_fp32 = resolve_precision(settings.precision.compute, "cuda") == "fp32"
    by_deep_ep = settings.parallel.token_dispatcher == "deepep"
    return dataclasses.replace(
        KANANA,
        fused=not in_fp32 and settings.kernels.linear_backend != "torch",
        attention=attention_of(settings, machine),
        experts=experts_of(settings, machine),
        sends_once="node" if by_deep_ep else "process",
    )


def fp8_of(settings: Settings) -> frozenset[str]:
    """What computes in fp8, as `layer_times.Job` has it. Recipes are taken to be alike."""
    precision = settings.precision
    if precision.fp8 == "none":
        return frozenset()
    left_out = {*precision.bf16_weights, *(() if precision.experts == "fp8" else (EXPERTS,))}
    more = {
        EXPERT_GRADIENTS: precision.expert_weight_gradients,
        KEPT_ACTIVATIONS: precision.kept_activations,
        OUTPUT_LAYER: precision.output_layer,
    }
    return ALL_FP8 - left_out | {name for name, form in more.items() if form == "fp8"}
