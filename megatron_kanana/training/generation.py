"""Continuing a text with the model as it lies over the processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .cached_forward import CachedForward
from .evaluation import evaluation_mode
from .run import Model
from .sampling import Sampling, next_token_probabilities

STOP, MAX_TOKENS, CONTEXT = "stop token", "max tokens", "context full"


@dataclass(frozen=True)
class Continuation:
    """What was generated.

    Attributes:
        tokens: new tokens, without the one that stopped it.
        ended_by: `STOP`, `MAX_TOKENS` or `CONTEXT`.
    """

    tokens: list[int]
    ended_by: str


def generate(
    model: Model, prompt: Sequence[int], max_tokens: int, sampling: Sampling
) -> Continuation:
    """Continue `prompt`; every process must call this, and all get the same continuation.

    Args:
        model: the model; its `data.sequence_length` is the context, which prompt and continuation
            share.
        prompt: token ids, at least one.
        max_tokens: tokens to generate at most.
        sampling: how each is chosen.

    Raises:
        ValueError: the prompt leaves no room in the context.
    """
    context = model.settings.data.sequence_length
    if len(prompt) >= context:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, which leaves no room in a context of {context}"
            " (data.sequence_length)"
        )
    room = min(max_tokens, context - len(prompt))
    forward = CachedForward(model, len(prompt) + room)
    generator = torch.Generator().manual_seed(sampling.seed)
    tokens: list[int] = []
    with evaluation_mode(model):
        new: Sequence[int] = prompt
        while len(tokens) < room:
            token = _choose(model, forward.append(new), sampling, generator)
            if token in model.tokenizer.stop_ids:
                return Continuation(tokens, STOP)
            tokens.append(token)
            new = [token]
    return Continuation(tokens, MAX_TOKENS if room == max_tokens else CONTEXT)


def _choose(
    model: Model, logits: torch.Tensor | None, sampling: Sampling, generator: torch.Generator
) -> int:
    choice = torch.zeros(1, dtype=torch.int64, device=model.device.torch_device)
    if logits is not None:
        tokenizer = model.tokenizer
        probabilities = next_token_probabilities(
            logits, sampling, tokenizer.vocab_size, tokenizer.unused_ids
        )
        choice[0] = torch.multinomial(probabilities.cpu(), 1, generator=generator)
    # Every process of the last stage has the same logits; take the choice of one of them.
    dist.broadcast(choice, src=dist.get_world_size() - 1)
    return int(choice)
