"""Several training runs of different widths, one after another in one process."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from megatron_kanana import device
from megatron_kanana.config import Settings, detect_environment, load_settings

if TYPE_CHECKING:
    from megatron_kanana.training.run import Run

PARAMETRIZATIONS = ("muP", "standard")
HEAD_OVERRIDES = (
    "model.qk_nope_head_dim=32",
    "model.qk_rope_head_dim=16",
    "model.v_head_dim=32",
    "model.kv_lora_rank=64",
)
"""Sizes of heads, the same at any width."""


def width_overrides(base_hidden_size: int, base_num_experts: int, multiple: int) -> list[str]:
    """Hidden size, heads of 32 channels, and experts, all `multiple` times the base's."""
    hidden_size = base_hidden_size * multiple
    return [
        *HEAD_OVERRIDES,
        f"model.hidden_size={hidden_size}",
        f"model.num_attention_heads={hidden_size // 32}",
        f"model.num_experts={base_num_experts * multiple}",
    ]


def parametrization_overrides(parametrization: str, base_hidden_size: int) -> list[str]:
    """muP, or the standard one, which is the same at the base width: both start with init_std."""
    base = base_hidden_size if parametrization == "muP" else "null"
    return [
        f"transfer.base_hidden_size={base}",
        "transfer.vector_init_std=null",
        "transfer.matrix_init_std=null",
    ]


def settings_of(overrides: Sequence[str]) -> Settings:
    """Checked settings of a run that is not written anywhere, and goes on from none that was."""
    unwritten = ["logging.report=false", "logging.tensorboard=false", "run_name=unwritten"]
    return load_settings([*unwritten, "data.num_workers=0", *overrides], detect_environment())


class OneProcess:
    """This process as the whole world of one run after another.

    Args:
        settings: of any of the runs; they share device, precision and layout.
    """

    def __init__(self, settings: Settings) -> None:
        logging.basicConfig(level=logging.WARNING)
        self.device = device.prepare_device(settings, detect_environment())
        torch.compiler.set_stance("force_eager")  # compiling takes longer than such a run
        if not torch.distributed.is_initialized():
            device.initialize_process_groups(settings, self.device)

    def build(self, settings: Settings) -> Run:
        """A new run, initialised from its settings alone."""
        from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

        from megatron_kanana.training.run import build_run

        unset_num_microbatches_calculator()
        torch.manual_seed(settings.seed)
        return build_run(settings, self.device)
