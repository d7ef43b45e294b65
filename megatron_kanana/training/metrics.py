"""Measurements of a step over all processes: loss, attention logits, expert load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.utils import unwrap_model


class ExpertLoadRecorder:
    """Keeps each layer's tokens per expert, which megatron-core clears with every step.

    Attributes:
        loads: local token counts of the last step, fp32 [num_experts], by layer number from 1.
    """

    def __init__(self) -> None:
        self.loads: dict[int, torch.Tensor] = {}

    def finalize_model_grads(self, model: list[Any], *args: Any, **kwargs: Any) -> None:
        """megatron-core's gradient finalisation, after a look at the routers' counters."""
        self.loads = {
            router.layer_number: router.local_tokens_per_expert.clone()
            for chunk in model
            for router in _modules(chunk, TopKRouter)
        }
        finalize_model_grads(model, *args, **kwargs)


@dataclass
class StepMetrics:
    """One step, over all processes.

    Attributes:
        loss: mean over the global batch, in nats a token, of the next token alone.
        max_logits: largest attention logit of each layer, over heads, samples and processes.
        expert_loads: tokens each expert received, [num_experts] by layer number from 1.
        mtp_losses: the same mean for each multi-token prediction layer. In the other fields these
            layers come after the model's own.
        num_clipped: times a head was scaled down by QK-Clip since the last measured step.
    """

    loss: float
    max_logits: list[float]
    expert_loads: dict[int, list[float]]
    mtp_losses: list[float] = field(default_factory=list)
    num_clipped: int = 0

    @property
    def max_logit(self) -> float:
        """The largest attention logit of the model."""
        return max(self.max_logits)

    @property
    def max_violations(self) -> dict[int, float]:
        """MaxVio of each MoE layer: how far the busiest expert is above the mean, relatively."""
        return {layer: max_violation(load) for layer, load in self.expert_loads.items()}

    @property
    def mean_max_violation(self) -> float:
        """MaxVio averaged over the MoE layers; 0 where there are none."""
        violations = self.max_violations.values()
        return sum(violations) / len(violations) if violations else 0.0


def max_violation(load: list[float]) -> float:
    """max(load) / mean(load) - 1 (arXiv 2408.15664, equation 4)."""
    mean = sum(load) / len(load)
    return max(load) / mean - 1.0 if mean else 0.0


def collect_metrics(
    chunks: list[Any],
    config: MLATransformerConfig,
    loss: float,
    mtp_losses: torch.Tensor | None,
    max_logits: list[float],
    num_clipped: int,
    recorder: ExpertLoadRecorder,
) -> StepMetrics:
    """Combine the processes' measurements; one collective, on every process.

    Args:
        loss, max_logits, num_clipped: the same on every process already.
        The others are this process's.
    """
    num_mtp_layers, num_experts = config.mtp_num_layers or 0, config.num_moe_experts
    num_layers = config.num_layers + num_mtp_layers
    has_experts = [*config.moe_layer_freq, *[1] * num_mtp_layers]
    device = next(chunks[0].parameters()).device
    sums = torch.zeros(num_layers, num_experts + 1, dtype=torch.float64, device=device)
    for layer, load in recorder.loads.items():
        sums[layer - 1, :num_experts] = load
    if mtp_losses is not None:
        sums[:num_mtp_layers, -1] = local_share(mtp_losses)
    dist.all_reduce(sums)
    loads = sums[:, :num_experts].tolist()
    return StepMetrics(
        loss=loss,
        max_logits=max_logits,
        expert_loads={
            layer: loads[layer - 1] for layer in range(1, num_layers + 1) if has_experts[layer - 1]
        },
        mtp_losses=sums[:num_mtp_layers, -1].tolist(),
        num_clipped=num_clipped,
    )


def local_loss_share(losses: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """This process's part of the mean loss, fp64 []; the parts of all processes add up to it.

    Args:
        losses: of the microbatches; empty on processes without the output layer.
        device: where the part is to lie, which is where the losses do.
    """
    if not losses:
        return torch.zeros((), dtype=torch.float64, device=device)
    return local_share(torch.stack(losses).double().mean())


def local_share(means: torch.Tensor) -> torch.Tensor:
    """This process's part of means over data-parallel processes, equal on tensor-parallel ones."""
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        return torch.zeros_like(means)
    data_parallel_size: int = parallel_state.get_data_parallel_world_size()
    return means / data_parallel_size


def _modules(chunk: Any, kind: type) -> Iterator[Any]:
    return (module for module in unwrap_model(chunk).modules() if isinstance(module, kind))
