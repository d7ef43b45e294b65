"""What megatron-core has noted of the experts' losses, in either of its versions."""

from __future__ import annotations

from typing import Any

import torch

from megatron_kanana.device.compatibility import megatron_core_is_newer


def forget_losses() -> None:
    """Begin anew, also for a model with another number of layers."""
    _noted().clear()


def balance_losses() -> torch.Tensor:
    """Sums since the last `forget_losses`, fp32 [layers]."""
    noted = _noted()["seq_load_balancing_loss"]
    values: torch.Tensor = noted.values if megatron_core_is_newer() else noted["values"]
    return values


def _noted() -> dict[str, Any]:
    noted: dict[str, Any]
    if megatron_core_is_newer():
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

        noted = get_moe_metrics_tracker().metrics
    else:
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        noted = get_moe_layer_wise_logging_tracker()
    return noted
