"""Which routing and experts a run will have: `kernels.moe_backend` on a GPU that is not at hand."""

from __future__ import annotations

from megatron_kanana.config import Settings
from megatron_kanana.config.environment import resolve_precision
from megatron_kanana.config.expert_sizes import expert_layer_sizes

from .attention import HOPPER
from .calibration import CSRC_EXPERTS, PLAIN_EXPERTS, Experts
from .machines import Machine


def experts_of(settings: Settings, machine: Machine) -> Experts:
    """This version's experts with these settings on this machine, the operations compiled there."""
    if (
        settings.kernels.moe_backend == "torch"
        or machine.name not in HOPPER
        or any(expert_layer_sizes(settings).hopper_limits_passed())
        or resolve_precision(settings.precision.compute, "cuda") == "fp32"
    ):
        return PLAIN_EXPERTS
    return CSRC_EXPERTS
