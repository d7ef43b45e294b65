"""Which attention a run will have: `kernels.backend` on a GPU that is not at hand."""

from __future__ import annotations

from megatron_kanana.config import Settings
from megatron_kanana.config.environment import resolve_precision
from megatron_kanana.native_library import HOPPER_ATTENTION_WIDTHS

from .calibration import CSRC, CSRC_DETERMINISTIC, SDPA, Attention
from .machines import Machine

HOPPER = ("h100", "h200")
"""Machines that csrc's CUDA kernels are compiled for."""


def attention_of(settings: Settings, machine: Machine) -> Attention:
    """This version's attention with these settings on this machine, the operations compiled there.

    `auto` takes csrc where it can (docs/attention.md, Backends). Everything that is not csrc is
    taken for SDPA, as no other's time was measured inside this version.
    """
    kernels, model = settings.kernels, settings.model
    widths = (model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim)
    if (
        kernels.backend not in ("auto", "csrc")
        or machine.name not in HOPPER
        or widths not in HOPPER_ATTENTION_WIDTHS
        or resolve_precision(settings.precision.compute, "cuda") == "fp32"
    ):
        return SDPA
    return CSRC_DETERMINISTIC if kernels.deterministic else CSRC
