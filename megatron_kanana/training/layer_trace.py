"""Which layer's output or gradient stopped being finite first, kept through every step.

A fault that does not repeat can be named by this alone. It costs two small reductions a layer and
microbatch, whose results stay on the device until somebody asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import unwrap_model

FORWARD, BACKWARD = "output", "gradient of the output"


@dataclass(frozen=True, order=True)
class Sighting:
    """A layer where numbers were not finite; the smaller of two is nearer to the origin.

    Attributes:
        is_backward: in the backward pass, which comes after the forward pass.
        depth: layers passed before it in its pass.
        layer: number of the layer, from 1.
    """

    is_backward: bool
    depth: int
    layer: int

    @property
    def tensor(self) -> str:
        """What was not finite."""
        return f"{BACKWARD if self.is_backward else FORWARD} of layer {self.layer}"


class LayerTrace:
    """Follows the layers of this process's chunks in training passes."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        self._sums: list[tuple[bool, int, torch.Tensor]] = []
        for chunk in chunks:
            for module in unwrap_model(chunk).modules():
                if isinstance(module, TransformerLayer):
                    module.register_forward_hook(self._after_forward)

    def _after_forward(self, layer: TransformerLayer, _: Any, output: Any) -> None:
        hidden_states = output[0] if isinstance(output, tuple) else output
        if not layer.training:
            return
        self._keep(False, layer.layer_number, hidden_states)
        if hidden_states.requires_grad:
            hidden_states.register_hook(partial(self._keep, True, layer.layer_number))

    def _keep(self, is_backward: bool, layer: int, tensor: torch.Tensor) -> None:
        # One number that is not finite makes the sum so; no other reduction is as fast everywhere.
        self._sums.append((is_backward, layer, tensor.detach().sum(dtype=torch.float32)))

    def first(self) -> Sighting | None:
        """The sighting nearest to the origin since `clear`; waits for the device."""
        sightings = [
            Sighting(is_backward, -layer if is_backward else layer, layer)
            for is_backward, layer, total in self._sums
            if not bool(total.isfinite())
        ]
        return min(sightings, default=None)

    def clear(self) -> None:
        """Begin anew; at the beginning of every pass."""
        self._sums.clear()
