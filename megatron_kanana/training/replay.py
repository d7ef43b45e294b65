"""Running a step's microbatches more than once, and forgetting what a pass left behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import unwrap_model

from megatron_kanana.model.multi_token import take_mtp_losses

if TYPE_CHECKING:
    from .run import DataIterators, Run


class Replay:
    """Hands a step's microbatches on the first time, and the same ones every other time.

    Args:
        sources: an iterator, or None, for each model chunk.
    """

    def __init__(self, sources: DataIterators) -> None:
        self._sources = sources
        self._taken: list[list[Any]] | None = None

    def iterators(self) -> DataIterators:
        """Iterators over the microbatches, for one pass."""
        if self._taken is not None:
            pairs = zip(self._sources, self._taken, strict=True)
            return [None if source is None else iter(taken) for source, taken in pairs]
        self._taken = [[] for _ in self._sources]
        pairs = zip(self._sources, self._taken, strict=True)
        return [None if source is None else _keeping(source, taken) for source, taken in pairs]


def _keeping(source: Iterable[Any], taken: list[Any]) -> Iterator[Any]:
    for batch in source:
        taken.append(batch)
        yield batch


class RouterBiases:
    """The biases that balance the experts' loads as they were before a step.

    megatron-core moves them with the gradients' reduction, before it is known whether the step
    counts.
    """

    def __init__(self, chunks: Sequence[Any]) -> None:
        self._biases = [router.expert_bias for router in _balancing_routers(chunks)]
        self._before = [torch.empty_like(bias) for bias in self._biases]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the biases."""
        if self._biases:
            torch._foreach_copy_(self._before, self._biases)

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo every change since they were remembered."""
        if self._biases:
            torch._foreach_copy_(self._biases, self._before)


def _balancing_routers(chunks: Sequence[Any]) -> Iterator[TopKRouter]:
    for chunk in chunks:
        for module in unwrap_model(chunk).modules():
            if isinstance(module, TopKRouter) and getattr(module, "expert_bias", None) is not None:
                yield module


def forget_pass(run: Run) -> None:
    """Clear the gradients, counters and maxima that a forward and backward pass left."""
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    for router in _balancing_routers(run.chunks):
        router.local_tokens_per_expert.zero_()
    clear_aux_losses_tracker()
    take_mtp_losses(1)
    run.attention_logits.forget()


@contextlib.contextmanager
def local_gradients(run: Run) -> Iterator[None]:
    """Meanwhile a pass leaves this process's own gradients, which are reduced with nobody's."""
    config = run.config
    before = config.no_sync_func, config.finalize_model_grads_func
    config.no_sync_func = config.finalize_model_grads_func = None
    with contextlib.ExitStack() as stack:
        for chunk in run.chunks:
            stack.enter_context(chunk.no_sync())
        try:
            yield
        finally:
            config.no_sync_func, config.finalize_model_grads_func = before
