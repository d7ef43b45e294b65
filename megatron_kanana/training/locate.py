"""Where numbers stopped being finite: the process, the layer and the tensor, by a second look.

The step's microbatches run again with a look at every tensor, and without adding gradients over
processes, which would carry what is not finite to all of them.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import unwrap_model

from megatron_kanana.model.shared_experts import SharedExperts

from .layer_trace import Sighting
from .replay import forget_pass, local_gradients

if TYPE_CHECKING:
    from .run import Run

WEIGHTS, FORWARD, LOSS, BACKWARD, GRADIENTS = range(5)  # in the order of their making


@dataclass(frozen=True, order=True)
class Place:
    """A tensor with a number that is not finite; the smaller of two is nearer to the origin.

    Attributes:
        kind: weights, then outputs of modules, the loss, gradients of outputs, of weights.
        depth: how far the pass had come: (layer, module in it), negative in the backward pass.
        rank: process.
        layer: number of the layer from 1; 0 before the first and after the last.
        tensor: its name.
        host: machine of the process.
    """

    kind: int
    depth: tuple[int, int]
    rank: int
    layer: int
    tensor: str
    host: str

    def __str__(self) -> str:
        layer = f"layer {self.layer}, " if self.layer else ""
        return f"rank {self.rank} on {self.host}, {layer}{self.tensor}"


def locate(run: Run, one_pass: Callable[[], list[torch.Tensor]]) -> Place | None:
    """The origin of what is not finite, over all processes, or None if it did not come again.

    Every process must call this. Gradients and counters are cleared before and after.

    Args:
        one_pass: forward and backward passes of the step's microbatches; their losses.
    """
    forget_pass(run)
    search = _Search(run)
    search.look_at_weights()
    with search.of_modules(), local_gradients(run):
        search.look_at_losses(one_pass())
    search.look_at_gradients()
    forget_pass(run)
    return _nearest_to_origin(search.places)


def transient_origin(sighting: Sighting | None) -> Place | None:
    """The same for a fault that did not come again, from what the layers' trace kept."""
    if sighting is None:
        return _nearest_to_origin([])
    kind = BACKWARD if sighting.is_backward else FORWARD
    place = Place(
        kind,
        (sighting.depth, 0),
        dist.get_rank(),
        sighting.layer,
        sighting.tensor,
        socket.gethostname(),
    )
    return _nearest_to_origin([place])


def _nearest_to_origin(places: list[Place]) -> Place | None:
    of_processes: list[Place | None] = [None] * dist.get_world_size()
    dist.all_gather_object(of_processes, min(places, default=None))
    return min((place for place in of_processes if place is not None), default=None)


class _Search:
    def __init__(self, run: Run) -> None:
        self._run = run
        self.places: list[Place] = []

    def found(self, kind: int, depth: tuple[int, int], layer: int, tensor: str) -> None:
        place = Place(kind, depth, dist.get_rank(), layer, tensor, socket.gethostname())
        self.places.append(place)

    def _parameters(self) -> Iterator[tuple[int, str, torch.nn.Parameter]]:
        for chunk in self._run.chunks:
            for path, layer, module in _modules(chunk):
                for name, parameter in module.named_parameters(recurse=False):
                    yield layer, f"{path}.{name}", parameter

    def look_at_weights(self) -> None:
        for order, (layer, name, weight) in enumerate(self._parameters()):
            if not _is_finite(weight):
                self.found(WEIGHTS, (layer, order), layer, f"weight {name}{_first_of(weight)}")

    def look_at_losses(self, losses: list[torch.Tensor]) -> None:
        if not all(map(_is_finite, losses)):
            self.found(LOSS, (0, 0), 0, "loss")

    def look_at_gradients(self) -> None:
        for order, (layer, name, weight) in enumerate(self._parameters()):
            gradient: torch.Tensor = weight.main_grad  # type: ignore[attr-defined]
            if not _is_finite(gradient):
                tensor = f"gradient of {name}{_first_of(gradient)}"
                self.found(GRADIENTS, (-layer, -order), layer, tensor)

    @contextlib.contextmanager
    def of_modules(self) -> Iterator[None]:
        """Look at the output of each module that computes itself, and at its gradient."""
        last = self._run.config.num_layers + (self._run.config.mtp_num_layers or 0) + 1
        turns = itertools.count()
        handles = []
        for chunk in self._run.chunks:
            for path, layer, module in _modules(chunk):
                # The shared experts compute with their children's weights.
                if next(module.children(), None) is None or isinstance(module, SharedExperts):
                    row = layer if layer or "embedding" in path else last
                    look = _Look(self, path, layer, row, turns)
                    handles.append(module.register_forward_hook(look.after_forward))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Look:
    """At one module; an output counts where all the inputs were finite, so that what another
    process sent is not taken for this one's."""

    def __init__(
        self, search: _Search, path: str, layer: int, row: int, turns: Iterator[int]
    ) -> None:
        self._search = search
        self._path = path
        self._layer = layer
        self._row = row
        self._turns = turns
        self._turn: int | None = None

    def after_forward(self, module: Any, inputs: Any, output: Any) -> None:
        if self._turn is None:  # modules are not declared in the order they compute in
            self._turn = next(self._turns)
        outputs = list(_tensors(output))
        if not all(map(_is_finite, outputs)) and all(map(_is_finite, _tensors(inputs))):
            depth = self._row, self._turn
            self._search.found(FORWARD, depth, self._layer, f"output of {self._path}")
        for tensor in outputs:
            if tensor.requires_grad:
                tensor.register_hook(self.after_backward)

    def after_backward(self, gradient: torch.Tensor) -> None:
        if not _is_finite(gradient):
            assert self._turn is not None
            tensor = f"gradient of the output of {self._path}"
            self._search.found(BACKWARD, (-self._row, -self._turn), self._layer, tensor)


def _modules(chunk: Any) -> Iterator[tuple[str, int, torch.nn.Module]]:
    """Path, number of the layer (0 outside of one) and module."""
    layers: dict[str, int] = {}
    for path, module in unwrap_model(chunk).named_modules():
        if isinstance(module, TransformerLayer):
            layers[f"{path}."] = module.layer_number
        numbers = (number for start, number in layers.items() if path.startswith(start))
        yield path, next(numbers, 0), module


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)


def _first_of(stack: torch.Tensor) -> str:
    """Of the matrices of a stack, as experts' weights are, the first that is not finite: '[3]'."""
    if stack.dim() < 3:
        return ""
    return f"[{next(number for number, each in enumerate(stack) if not _is_finite(each))}]"


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.detach().isfinite().all())
