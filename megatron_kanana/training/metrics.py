"""Measurements of a step over all processes: loss, attention logits, expert load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.utils import unwrap_model

from megatron_kanana.model.attention import MaxLogitCoreAttention


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
        loss: mean over the global batch, in nats a token.
        max_logits: largest attention logit of each layer, over heads, samples and processes.
        expert_loads: tokens each expert received, [num_experts] by layer number from 1.
    """

    loss: float
    max_logits: list[float]
    expert_loads: dict[int, list[float]]

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
    losses: list[torch.Tensor],
    recorder: ExpertLoadRecorder,
) -> StepMetrics:
    """Combine the processes' measurements; two collectives, on every process.

    Running maxima of the attention modules are taken, so that the next step starts anew.
    """
    num_layers, num_experts = config.num_layers, config.num_moe_experts
    device = next(chunks[0].parameters()).device
    max_logits = torch.full((num_layers,), float("-inf"), device=device)
    for chunk in chunks:
        for attention in _modules(chunk, MaxLogitCoreAttention):
            if (heads := attention.take_max_logits()) is not None:
                max_logits[attention.layer_number - 1] = heads.max()
    sums = torch.zeros(num_layers, num_experts + 1, dtype=torch.float64, device=device)
    for layer, load in recorder.loads.items():
        sums[layer - 1, :num_experts] = load
    sums[0, -1] = local_loss_share(losses)
    dist.all_reduce(max_logits, op=dist.ReduceOp.MAX)
    dist.all_reduce(sums)
    loads = sums[:, :num_experts].tolist()
    return StepMetrics(
        loss=float(sums[0, -1]),
        max_logits=max_logits.tolist(),
        expert_loads={
            layer: loads[layer - 1]
            for layer in range(1, num_layers + 1)
            if config.moe_layer_freq[layer - 1]
        },
    )


def local_loss_share(losses: list[torch.Tensor]) -> float:
    """This process's part of the mean loss; the parts of all processes add up to it."""
    if not losses or parallel_state.get_tensor_model_parallel_rank() != 0:
        return 0.0
    mean = float(torch.stack(losses).double().mean())
    data_parallel_size: int = parallel_state.get_data_parallel_world_size()
    return mean / data_parallel_size


def _modules(chunk: Any, kind: type) -> Iterator[Any]:
    return (module for module in unwrap_model(chunk).modules() if isinstance(module, kind))
