"""A vocabulary split over processes: what each computes of a chunk, and what they exchange."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Vocabulary:
    """This process's words of an output layer, and whom it shares the vocabulary with.

    Attributes:
        rows: `compiled` or `plain`.
        group: processes with the other words; None for all words here.
        sequence_parallel: whether hidden states are split over the group as well.
        chunk_bytes: most bytes of logits at once.
    """

    rows: ModuleType
    group: dist.ProcessGroup | None
    sequence_parallel: bool
    chunk_bytes: int

    @property
    def size(self) -> int:
        """Processes that share the vocabulary."""
        return 1 if self.group is None else self.group.size()

    def first_word(self, weight_VD: torch.Tensor) -> int:
        """Number of this process's first word."""
        return 0 if self.group is None else self.group.rank() * weight_VD.shape[0]

    def check(
        self,
        hidden_states_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_T: torch.Tensor,
        weights_T: torch.Tensor | None,
    ) -> None:
        """Refuse what does not go together."""
        tokens = hidden_states_TD.shape[0] * (self.size if self.sequence_parallel else 1)
        if hidden_states_TD.dim() != 2 or weight_VD.shape[1:] != hidden_states_TD.shape[1:]:
            raise RuntimeError(
                "hidden_states must have shape [tokens, hidden size] and weight [words, hidden "
                f"size], got {[*hidden_states_TD.shape]} and {[*weight_VD.shape]}"
            )
        dtype = hidden_states_TD.dtype
        if dtype not in (torch.float32, torch.bfloat16) or weight_VD.dtype != dtype:
            raise RuntimeError(
                "hidden_states and weight must both be float32 or both bfloat16, got "
                f"{dtype} and {weight_VD.dtype}"
            )
        for name, tensor, wanted in (
            ("labels", labels_T, torch.int64),
            ("weights", weights_T, torch.float32),
        ):
            if tensor is not None and (tensor.shape != (tokens,) or tensor.dtype != wanted):
                raise RuntimeError(
                    f"{name} must be {wanted} [{tokens}], one of each token, got {tensor.dtype} "
                    f"{[*tensor.shape]}"
                )

    def chunks(self, num_tokens: int, bytes_per_token: int, multiple: int) -> Iterator[slice]:
        """Slices of tokens, as equal as can be; an empty one if there are no tokens.

        Args:
            num_tokens: of all slices.
            bytes_per_token: of a chunk, which has at most `chunk_bytes` where `multiple` allows.
            multiple: of which each slice's tokens are multiples, but for the last one.
        """
        most = max(1, self.chunk_bytes // (bytes_per_token * multiple)) * multiple
        count = max(1, -(-num_tokens // most))
        size = max(1, -(-num_tokens // (count * multiple)) * multiple)
        for first in range(0, max(1, num_tokens), size):
            yield slice(first, min(first + size, num_tokens))

    def statistics(
        self, logits_CV: torch.Tensor, weight_VD: torch.Tensor, labels_C: torch.Tensor
    ) -> torch.Tensor:
        """Those of `plain.statistics` over the whole vocabulary; one collective of small rows."""
        own_3C: torch.Tensor = self.rows.statistics(logits_CV, labels_C, self.first_word(weight_VD))
        if self.size == 1:
            return own_3C
        rows_of_all = own_3C.new_empty(self.size * 3, own_3C.shape[1])
        dist.all_gather_into_tensor(rows_of_all, own_3C, group=self.group)
        largest_PC, sum_PC, of_label_PC = rows_of_all.view(self.size, 3, -1).unbind(1)
        largest_C = largest_PC.amax(0)
        sum_C = ((largest_PC - largest_C).exp() * sum_PC).sum(0)
        return torch.stack([largest_C, sum_C, of_label_PC.sum(0)])

    def gather(self, hidden_states_TD: torch.Tensor) -> torch.Tensor:
        """Hidden states of all tokens, from this process's."""
        if not self.sequence_parallel or self.size == 1:
            return hidden_states_TD
        tokens, width = hidden_states_TD.shape
        all_TD = hidden_states_TD.new_empty(self.size * tokens, width)
        dist.all_gather_into_tensor(all_TD, hidden_states_TD.contiguous(), group=self.group)
        return all_TD

    def reduce(self, gradient_TD: torch.Tensor) -> torch.Tensor:
        """Sum of the processes' gradients of hidden states; under sequence parallelism its part."""
        if self.size == 1:
            return gradient_TD
        if not self.sequence_parallel:
            dist.all_reduce(gradient_TD, group=self.group)
            return gradient_TD
        tokens, width = gradient_TD.shape
        own_TD = gradient_TD.new_empty(tokens // self.size, width)
        dist.reduce_scatter_tensor(own_TD, gradient_TD, group=self.group)
        return own_TD
