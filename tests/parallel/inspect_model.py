"""Generate with a cache, recompute without one, and predict a text, in layouts one after another.

Arguments: CHECKPOINT TEXT JOBS; the last is JSON, a list of [port for the processes to meet at,
.npz file to write, overrides of settings].
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_kanana import device
from megatron_kanana.config import detect_environment
from megatron_kanana.config.saved_model import settings_of_saved_model
from megatron_kanana.data.held_out import read_held_out
from tests.logits import logits_of

PROMPT_LENGTHS = (1, 2, 37, 600)
NEW_TOKENS = 7
CONTEXT, WINDOW = 620, 62


def main(checkpoint: Path, text: Path, jobs: list[tuple[int, str, list[str]]]) -> None:
    """Look at the model in each layout."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # it remembers the layout before
    for port, output, overrides in jobs:
        os.environ["MASTER_PORT"] = str(port)
        inspect(checkpoint, text, Path(output), overrides)
        from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

        unset_num_microbatches_calculator()


def inspect(checkpoint: Path, text: Path, output: Path, overrides: list[str]) -> None:
    """Everything the tests want to know of one layout."""
    environment = detect_environment()
    context = f"data.sequence_length={CONTEXT}"
    settings = settings_of_saved_model(checkpoint, ["device=cpu", context, *overrides], environment)
    where = device.prepare_device(settings, environment)
    device.initialize_process_groups(settings, where)

    from megatron_kanana.checkpoint.state import load_model
    from megatron_kanana.training.generation import generate
    from megatron_kanana.training.perplexity import held_out_loss
    from megatron_kanana.training.run import build_bare_model
    from megatron_kanana.training.sampling import Sampling

    model = build_bare_model(settings, where)
    load_model(model.chunks, checkpoint)
    before = buffers(model)
    found: dict[str, Any] = {}
    for length in PROMPT_LENGTHS:
        prompt = np.random.default_rng(length).integers(3, 2048, length).tolist()
        greedy = generate(model, prompt, NEW_TOKENS, Sampling(temperature=0)).tokens
        found[f"greedy {length}"] = greedy
        found[f"cached {length}"] = cached_logits(model, prompt, greedy)
        found[f"recomputed {length}"] = full_logits(model, [*prompt, *greedy])[length - 1 :]
        sampling = Sampling(temperature=1.0, top_p=0.9, seed=length)
        found[f"sampled {length}"] = generate(model, prompt, NEW_TOKENS, sampling).tokens
    held_out = read_held_out(text, model.tokenizer, WINDOW)
    loss = held_out_loss(model, held_out)
    found["loss"] = [loss.nats, loss.predicted, loss.loss, loss.bits_per_byte]
    if environment.world_size == 1:
        found["exact"] = exact_nats(model, held_out.windows, held_out.lengths)
    assert all(torch.equal(a, b) for a, b in zip(before, buffers(model), strict=True))
    assert not any(maxima(model))
    if environment.rank == environment.world_size - 1:
        np.savez(output, **found)
    device.destroy_process_groups()


def cached_logits(model: Any, prompt: list[int], tokens: list[int]) -> Any:
    """Logits after the prompt and after each token, [tokens + 1, vocabulary], on the last stage."""
    from megatron_kanana.training.cached_forward import CachedForward
    from megatron_kanana.training.evaluation import evaluation_mode

    forward = CachedForward(model, len(prompt) + len(tokens))
    with evaluation_mode(model):
        logits = [forward.append(new) for new in [prompt, *([token] for token in tokens)]]
    assert forward.length == len(prompt) + len(tokens)
    return np.array([row.numpy() for row in logits if row is not None])


def full_logits(model: Any, tokens: list[int]) -> Any:
    """Logits after every token, [tokens, vocabulary], from one forward pass without a cache."""
    from megatron_kanana.training.evaluation import evaluation_mode

    padded = torch.tensor([[*tokens, *[0] * (-len(tokens) % 2)]])
    with evaluation_mode(model):
        logits = logits_of(model.chunks, padded)
    return np.empty((0, 0)) if logits is None else logits[0, : len(tokens)].numpy()


def exact_nats(model: Any, windows: Any, lengths: Any) -> float:
    """Sum of the losses in float64, window by window, from whole logits."""
    nats = 0.0
    for window, length in zip(windows, lengths, strict=True):
        logits = torch.from_numpy(full_logits(model, window.tolist())).double()
        chosen = logits[: length - 1].log_softmax(-1)
        nats -= float(chosen[range(length - 1), window[1:length].tolist()].sum())
    return nats


def buffers(model: Any) -> list[torch.Tensor]:
    """Expert biases and tokens counted an expert."""
    return [tensor.clone() for chunk in model.chunks for tensor in chunk.buffers()]


def maxima(model: Any) -> list[Any]:
    """What the core attentions have kept."""
    modules = [module for chunk in model.chunks for module in chunk.modules()]
    return [module.max_logits for module in modules if hasattr(module, "max_logits")]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
