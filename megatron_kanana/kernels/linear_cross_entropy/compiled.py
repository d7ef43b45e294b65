"""Rows of cross-entropy by the operations of csrc/, for Hopper and for CPUs: one pass each."""

from __future__ import annotations

import functools

import torch

from ..native import load_native_operations

_operations = torch.ops.megatron_kanana


def statistics(logits_CV: torch.Tensor, labels_C: torch.Tensor, first_word: int) -> torch.Tensor:
    """See `plain.statistics`."""
    _load()
    result: torch.Tensor = _operations.cross_entropy_statistics(logits_CV, labels_C, first_word)
    return result


def gradient_(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    first_word: int,
    statistics_3C: torch.Tensor,
    weights_C: torch.Tensor,
) -> None:
    """See `plain.gradient_`."""
    _load()
    _operations.cross_entropy_gradient(logits_CV, labels_C, first_word, statistics_3C, weights_C)


@functools.cache
def _load() -> None:
    load_native_operations("kernels.loss_backend")
