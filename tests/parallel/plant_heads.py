"""Plants attention heads with far too large logits, and checks what QK-Clip does with them.

Arguments: overrides of the small experiment; run on two processes. Every process checks its own
part; the first failure ends with a traceback.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_kanana import device
from megatron_kanana.config import detect_environment, load_settings
from tests.launch import CONFIG_DIR

PLANTED, THRESHOLD = 300.0, 100.0


class Planted:
    """A run on one microbatch, the same in every step, with a planted head in some layers."""

    def __init__(self, overrides: list[str]) -> None:
        words = ["experiment=small", *overrides]
        environment = detect_environment()
        settings = load_settings(words, environment, str(CONFIG_DIR))
        where = device.prepare_device(settings, environment)
        device.initialize_process_groups(settings, where)
        from megatron.core import parallel_state

        from megatron_kanana.training.run import build_run

        self.run = build_run(settings, where)
        assert self.run.qk_clip is not None
        self.qk_clip = self.run.qk_clip
        self.model = settings.model
        self.shard = parallel_state.get_tensor_model_parallel_rank()
        self.heads_here = self.model.num_attention_heads // settings.parallel.tensor_parallel_size
        generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
        shape = (settings.schedule.micro_batch_size, settings.data.sequence_length)
        tokens = torch.randint(self.model.vocab_size, shape, generator=generator)
        positions = torch.arange(shape[1]).expand(shape)
        batch = {"tokens": tokens, "position_ids": positions, "labels": tokens.roll(-1, 1)}
        batch["loss_mask"] = torch.ones(shape)
        self.iterators: list[Any] = [itertools.repeat(batch)]

    def attentions(self) -> dict[int, Any]:
        """Attention modules by number of the layer, from 0."""
        from megatron.core.transformer.multi_latent_attention import MultiLatentAttention

        return {
            module.layer_number - 1: module
            for module in self.run.chunks[0].modules()
            if isinstance(module, MultiLatentAttention)
        }

    def forward(self) -> torch.Tensor:
        """Largest logits of every head in one training forward."""
        from megatron_kanana.training.step import run_schedule

        run_schedule(self.run, self.iterators, 1, forward_only=True)
        return self.run.attention_logits.reduce()

    @torch.no_grad()
    def plant(self, layer: int, head: int) -> None:
        """Scale a head's queries so that its largest logit is PLANTED, in both kinds of weights."""
        largest = float(self.forward()[layer, head])
        here = head - self.shard * self.heads_here
        if 0 <= here < self.heads_here:
            by_head(self.query(layer), self.heads_here)[here] *= PLANTED / largest
        self.run.optimizer.reload_model_params()

    def query(self, layer: int) -> torch.Tensor:
        """The weight that makes the queries of a layer's heads on this process."""
        attention = self.attentions()[layer]
        direct = self.model.q_lora_rank is None
        weight: torch.Tensor = (
            attention.linear_q_proj if direct else attention.linear_q_up_proj
        ).weight
        return weight

    def key_value(self, layer: int) -> torch.Tensor:
        """The weight that makes the keys and values of a layer's heads on this process."""
        weight: torch.Tensor = self.attentions()[layer].linear_kv_up_proj.weight
        return weight

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of all weights of the model."""
        named = self.run.chunks[0].named_parameters()
        return {name: parameter.detach().clone() for name, parameter in named}

    def step(self) -> Any:
        """One training step; the learning rate is too small to change a weight."""
        from megatron_kanana.training.step import train_step

        return train_step(self.run, self.iterators)


def by_head(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads, rows, columns] of a weight."""
    return weight.view(heads, -1, weight.shape[1])


def check_planted_heads_are_clipped(planted: Planted, heads: dict[int, int]) -> None:
    """Planted heads are brought to the threshold in model and fp32 weights; the rest stays."""
    for layer, head in heads.items():
        planted.plant(layer, head)
    before, logits = planted.weights(), planted.forward()
    for layer, head in heads.items():
        assert math.isclose(logits[layer, head], PLANTED, rel_tol=0.02), logits
    gammas = {layer: THRESHOLD / float(logits[layer, head]) for layer, head in heads.items()}
    result = planted.step()
    assert result.applied
    assert planted.qk_clip.take_num_clipped() == len(heads)
    _check_weights(planted, before, heads, gammas)
    # The fp32 weights, wherever their pieces are, are those of the model.
    after = planted.weights()
    planted.run.optimizer.step_with_ready_grads()
    for name, weight in planted.weights().items():
        assert torch.equal(weight, after[name]), name
    # The first of the layers still sees the same inputs.
    again = planted.forward()
    first, head = min(heads.items())
    in_fp32 = planted.query(first).dtype == torch.float32
    tolerance = 1e-5 if in_fp32 else 0.02
    assert math.isclose(again[first, head], THRESHOLD, rel_tol=tolerance), again
    others = torch.arange(planted.model.num_attention_heads) != head
    assert torch.equal(again[first, others], logits[first, others])


def _check_weights(
    planted: Planted,
    before: dict[str, torch.Tensor],
    heads: dict[int, int],
    gammas: dict[int, float],
) -> None:
    """Each weight is what it was, but for the planted heads' rows, which have their factors."""
    nope, here = planted.model.qk_nope_head_dim, planted.heads_here
    names = {parameter: name for name, parameter in planted.run.chunks[0].named_parameters()}
    expected = {name: weight.double() for name, weight in before.items()}
    for layer, head in heads.items():
        local = head - planted.shard * here
        if not 0 <= local < here:
            continue
        query = by_head(expected[names[planted.query(layer)]], here)[local]
        query[:nope] *= math.sqrt(gammas[layer])
        query[nope:] *= gammas[layer]
        by_head(expected[names[planted.key_value(layer)]], here)[local, :nope] *= math.sqrt(
            gammas[layer]
        )
    clipped = {
        names[weight(layer)] for layer in heads for weight in (planted.query, planted.key_value)
    }
    for name, weight in planted.weights().items():
        if name in clipped:
            tolerance = 1e-6 if weight.dtype == torch.float32 else 2.0**-8
            torch.testing.assert_close(weight.double(), expected[name], rtol=tolerance, atol=1e-12)
            unchanged = expected[name] == before[name]
            assert torch.equal(weight[unchanged], before[name][unchanged]), name
        else:
            assert torch.equal(weight, before[name]), name


def check_a_skipped_step_clips_nothing(planted: Planted) -> None:
    """A step that megatron-core does not apply leaves a head above the threshold as it is."""
    planted.plant(0, 1)
    before = planted.weights()
    with mock.patch.object(type(planted.run.optimizer), "prepare_grads", lambda _: True):
        result = planted.step()
    assert not result.applied
    assert math.isnan(result.grad_norm)
    assert planted.qk_clip.take_num_clipped() == 0
    assert all(torch.equal(weight, before[name]) for name, weight in planted.weights().items())


def check_evaluation_is_not_counted(planted: Planted) -> None:
    """Forwards of evaluation leave no maxima; the next step sees its own alone."""
    planted.run.attention_logits.reduce()
    for chunk in planted.run.chunks:
        chunk.eval()
    assert bool((planted.forward() == -torch.inf).all())
    for chunk in planted.run.chunks:
        chunk.train()


def check_one_collective(planted: Planted) -> None:
    """All layers' maxima take one collective."""
    counted: list[Any] = []
    all_reduce: Callable[..., Any] = dist.all_reduce

    def count(*arguments: Any, **options: Any) -> Any:
        counted.append(arguments)
        return all_reduce(*arguments, **options)

    with mock.patch.object(dist, "all_reduce", count):
        planted.run.attention_logits.reduce()
    assert len(counted) == 1
    assert len(planted.attentions()) == planted.model.num_layers + planted.model.num_mtp_layers


if __name__ == "__main__":
    planted = Planted(sys.argv[1:])
    last = planted.model.num_layers + planted.model.num_mtp_layers - 1
    check_planted_heads_are_clipped(planted, {1: 3, last: 0})
    check_a_skipped_step_clips_nothing(planted)
    check_evaluation_is_not_counted(planted)
    check_one_collective(planted)
    device.destroy_process_groups()
