"""Losses with the vocabulary split over the processes; prints errors against one process's."""

from __future__ import annotations

import itertools
import json

import torch
import torch.distributed as dist

from megatron_kanana.kernels.linear_cross_entropy import linear_cross_entropy

TOKENS, WORDS = 96, 46


def main() -> None:
    """Every way in which gradients come about, with and without sequence parallelism."""
    dist.init_process_group("gloo")
    errors = {
        f"{backend}, hidden size {hidden}, known {known}, sequence parallel {split}": worst_error(
            backend, hidden, known, split
        )
        for backend, hidden, known, split in itertools.product(
            ("csrc", "torch"), (8, 128), (True, False), (True, False)
        )
    }
    if dist.get_rank() == 0:
        print(json.dumps(errors))
    dist.destroy_process_group()


def worst_error(backend: str, hidden: int, known: bool, split: bool) -> float:
    """The largest relative error of losses and gradients, of any process."""
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(hidden)
    hidden_states = torch.randn(TOKENS, hidden, generator=generator)
    weight = torch.randn(WORDS, hidden, generator=generator)
    labels = torch.randint(WORDS, (TOKENS,), generator=generator)
    weights = (torch.rand(TOKENS, generator=generator) < 0.7).float()

    def found(part: torch.Tensor, words: torch.Tensor, with_group: bool) -> list[torch.Tensor]:
        leaves = [part.clone().requires_grad_(), words.clone().requires_grad_()]
        losses = linear_cross_entropy(
            *leaves,
            labels,
            weights if known else None,
            backend=backend,
            tp_group=dist.group.WORLD if with_group else None,
            sequence_parallel=split and with_group,
            chunk_bytes=4 * 7 * len(words),
        )
        (losses * weights / 3).sum().backward()
        return [losses.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    losses, grad_hidden, grad_weight = found(hidden_states, weight, False)
    part = hidden_states.chunk(size)[rank] if split else hidden_states
    right = (losses, grad_hidden.chunk(size)[rank] if split else grad_hidden)
    values = found(part, weight.chunk(size)[rank], True)
    errors = [
        (value - expected).norm() / expected.norm()
        for value, expected in zip(values, (*right, grad_weight.chunk(size)[rank]), strict=True)
    ]
    worst = torch.stack(errors).max()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


if __name__ == "__main__":
    main()
