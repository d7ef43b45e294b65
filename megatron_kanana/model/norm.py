"""RMSNorm with sequence parallelism and, optionally, zero-centred gain."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_kanana.kernels.norm import rms_norm


class RMSNorm(torch.nn.Module):
    """x / rms(x) * gain over the last dimension (arXiv 1910.07467).

    megatron-core's own fallback without Transformer Engine refuses sequence parallelism and a
    zero-centred gain. With `layernorm_zero_centered_gamma` the weight holds gain - 1, so that
    weight decay pulls the gain to one.

    Args:
        config: gives the parameter dtype, sequence parallelism and the form of the gain.
        hidden_size: width of the last dimension.
        eps: added to the mean square.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        initial = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(initial(hidden_size, dtype=config.params_dtype))
        # Each rank normalises its own part of the sequence, so gradients are summed over ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> the same shape and dtype."""
        gain = self.weight + 1.0 if self.zero_centered else self.weight
        return F.rms_norm(hidden_states, gain.shape, gain, self.eps)


class CompiledRMSNorm(RMSNorm):
    """The same by csrc's kernels, for Hopper GPUs."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """bf16 [..., hidden_size] -> the same shape and dtype."""
        return rms_norm(hidden_states, self.weight, self.eps, zero_centered=self.zero_centered)


def norm_class(backend: str) -> type[RMSNorm]:
    """Of `kernels.norm_backend`, 'csrc' or 'torch'; parameters have the same names in both."""
    return CompiledRMSNorm if backend == "csrc" else RMSNorm
