"""Rows of cross-entropy in plain torch: the reference."""

from __future__ import annotations

import torch


def statistics(logits_CV: torch.Tensor, labels_C: torch.Tensor, first_word: int) -> torch.Tensor:
    """Largest logit, sum of exp(logit - largest), and the label's logit, fp32 [3, C].

    Args:
        logits_CV: of this process's words.
        labels_C: over the whole vocabulary; the logit of one that is not here is zero.
        first_word: number of the first word here.
    """
    logits_CV = logits_CV.float()
    largest_C = logits_CV.amax(1)
    sum_C = (logits_CV - largest_C[:, None]).exp().sum(1)
    places_C, is_here_C = _places(labels_C, first_word, logits_CV.shape[1])
    of_label_C = logits_CV.gather(1, places_C[:, None])[:, 0].where(is_here_C, 0.0)
    return torch.stack([largest_C, sum_C, of_label_C])


def gradient_(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    first_word: int,
    statistics_3C: torch.Tensor,
    weights_C: torch.Tensor,
) -> None:
    """Put the gradient of the weighted losses in the logits' place.

    Args:
        logits_CV, labels_C, first_word: as those of `statistics`.
        statistics_3C: of the whole vocabulary.
        weights_C: gradient of each loss, fp32.
    """
    largest_C, sum_C, _ = statistics_3C
    gradient_CV = (logits_CV.float() - largest_C[:, None]).exp() * (weights_C / sum_C)[:, None]
    places_C, is_here_C = _places(labels_C, first_word, logits_CV.shape[1])
    gradient_CV.scatter_add_(1, places_C[:, None], -weights_C.where(is_here_C, 0.0)[:, None])
    logits_CV.copy_(gradient_CV)


def _places(
    labels_C: torch.Tensor, first_word: int, num_words: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels as columns, zero where they are not here; and whether they are."""
    columns_C = labels_C - first_word
    is_here_C = (columns_C >= 0) & (columns_C < num_words)
    return columns_C.where(is_here_C, 0), is_here_C
