"""Silent corruption: does a process compute the same gradients twice from the same microbatches?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .replay import forget_pass, local_gradients

if TYPE_CHECKING:
    from .run import Run


def processes_that_differ(run: Run, one_pass: Callable[[], Any], tolerance: float) -> list[int]:
    """Ranks whose gradients of two passes differ; on every process, which must all call this.

    Each process looks at its own gradients, before they are added over processes, by the sum and
    the norm of each of its buffers. Gradients and counters are cleared afterwards.

    Args:
        one_pass: forward and backward passes, of the same microbatches each time.
        tolerance: relative difference that is allowed; at 0 the bits must be equal.
    """
    fingerprints = []
    for _ in range(2):
        forget_pass(run)
        with local_gradients(run):
            one_pass()
        fingerprints.append(gradient_fingerprint(run))
    forget_pass(run)
    one, other = fingerprints
    allowed = tolerance * torch.maximum(one.abs(), other.abs())
    # Two that are not finite do not differ by this: other guards look at those.
    differ = ((one - other).abs() > allowed).any()
    flags = torch.zeros(dist.get_world_size(), device=one.device)
    flags[dist.get_rank()] = differ.float()
    dist.all_reduce(flags)
    return [int(rank) for rank in flags.nonzero()]


def gradient_fingerprint(run: Run) -> torch.Tensor:
    """Sum and norm of every gradient buffer of this process, fp64 [2 x buffers]."""
    parts = []
    for chunk in run.chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            gradients = buffer.grad_data
            parts += [gradients.sum(dtype=torch.float64), gradients.norm(dtype=torch.float64)]
    return torch.stack(parts)
