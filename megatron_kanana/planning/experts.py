"""Which routing and experts a run will have: `kernels.moe_backend` on a GPU that is not at hand."""

from __future__ import annotations

from megatron_kanana.config import Settings
from megatron_kanana.config.environment import resolve_precision
from megatron_kanana.native_library import HOPPER_EXPERT_WIDTH_UNIT

from .attention import HOPPER
from .calibration import CSRC_EXPERTS, PLAIN_EXPERTS, Experts
from .machines import Machine


def experts_of(settings: Settings, machine: Machine) -> Experts:
    """This version's experts with these settings on this machine, the operations compiled there."""
    model = settings.model
    width = model.moe_ffn_hidden_size // settings.parallel.expert_tensor_parallel_size
    if (
        settings.kernels.moe_backend == "torch"
        or machine.name not in HOPPER
        or model.hidden_size % HOPPER_EXPERT_WIDTH_UNIT
        or width % HOPPER_EXPERT_WIDTH_UNIT
        or resolve_precision(settings.precision.compute, "cuda") == "fp32"
    ):
        return PLAIN_EXPERTS
    return CSRC_EXPERTS
