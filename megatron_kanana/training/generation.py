"""Continuing a text with the model as it lies over the processes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from .evaluation import evaluation_mode
from .run import Model

TEMPERATURE = 0.7


def generate(model: Model, prompt: str, max_tokens: int, seed: int = 0) -> str:
    """Sample a continuation of `prompt`; every process must call this, all get the text.

    Each token costs a forward pass over a whole window of `data.sequence_length` tokens: meant
    for a look at the model, not for serving.
    """
    tokens = model.tokenizer.encode(prompt) or [model.tokenizer.eod]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max_tokens):
        token = _next_token(model, tokens, generator)
        if token == model.tokenizer.eod:
            break
        tokens.append(token)
    return model.tokenizer.decode(tokens)


def _next_token(model: Model, tokens: list[int], generator: torch.Generator) -> int:
    length = model.settings.data.sequence_length
    window = tokens[-length:]
    # Padding comes after the text, where the causal mask hides it.
    padded = torch.tensor([window + [0] * (length - len(window))], device=model.device.torch_device)
    several = len(model.chunks) > 1
    step = partial(_forward_step, padded, len(window) - 1)
    with evaluation_mode(model):
        results = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[None] * len(model.chunks) if several else None,
            model=model.chunks if several else model.chunks[0],
            # Interleaved stages take microbatches in multiples of the pipeline's depth.
            num_microbatches=parallel_state.get_pipeline_model_parallel_world_size(),
            seq_length=length,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    choice = torch.zeros(1, dtype=torch.int64, device=model.device.torch_device)
    if results:
        choice[0] = _sample(results[0], model.tokenizer.vocab_size, generator)
    # Every last stage has the same logits; take the choice of one of them.
    dist.broadcast(choice, src=dist.get_world_size() - 1)
    return int(choice)


def _forward_step(tokens: torch.Tensor, position: int, _: Any, chunk: Any) -> Any:
    position_ids = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
    return chunk(tokens, position_ids, None), partial(_logits_at, position)


def _logits_at(position: int, logits: torch.Tensor, *, non_loss_data: bool) -> torch.Tensor:
    """fp32 [padded vocabulary] logits after the token at `position`."""
    assert non_loss_data
    whole: torch.Tensor = gather_from_tensor_model_parallel_region(
        logits[0, position].float().unsqueeze(0)
    )
    return whole.squeeze(0)


def _sample(logits: torch.Tensor, vocab_size: int, generator: torch.Generator) -> int:
    probabilities = (logits[:vocab_size].cpu() / TEMPERATURE).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
