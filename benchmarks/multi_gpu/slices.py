"""A slice of a model on each process: ours and its peer's, behind data parallelism."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_kanana.config import Settings
from megatron_kanana.device import Device

from ..megatron_model import CUTLASS, megatron_model
from .all_to_all_on_cpu import peer_with_all_to_all

SHARED_EXPERTS = {"moe_shared_expert_overlap": True}
"""megatron-core's shared experts compute while tokens travel."""
MICROBATCHES = {"overlap_moe_expert_parallel_comm": True, "delay_wgrad_compute": True}
"""One of its microbatches computes while another one's tokens travel."""

OURS = "ours"
PEER = "megatron-core + TE"
PEER_SHARED = "megatron-core + TE, shared experts beside the all-to-all"
PEER_MICROBATCHES = "megatron-core + TE, microbatches beside the all-to-all"


@dataclass
class Slice:
    """One contender; has what `training.step.run_schedule` reads of a run.

    Attributes:
        chunks: the model behind data parallelism.
        microbatches: of a step.
        iterator: of random tokens.
    """

    settings: Settings
    device: Device
    config: Any
    chunks: list[Any]
    microbatches: int
    iterator: Iterator[dict[str, torch.Tensor]]
    environment: Mapping[str, str] = field(default_factory=dict)

    def step(self, *, reduce_gradients: bool = True) -> torch.Tensor:
        """Forward and backward of a step, gradients reduced; the last microbatch's loss."""
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker

        os.environ.update(self.environment)
        (chunk,) = self.chunks
        chunk.zero_grad_buffer()
        self.config.finalize_model_grads_func = finalize_model_grads if reduce_gradients else None
        # The schedule enters it for all microbatches but the last, and so may end ours.
        self.config.no_sync_func = chunk.no_sync if reduce_gradients else contextlib.nullcontext
        with contextlib.nullcontext() if reduce_gradients else chunk.no_sync():
            losses = self.run_schedule()
        clear_aux_losses_tracker()
        return losses[-1]

    def run_schedule(self) -> list[torch.Tensor]:
        """All microbatches through megatron-core's schedule."""
        from megatron_kanana.training.step import run_schedule

        run: Any = self
        return run_schedule(run, [self.iterator], self.microbatches, forward_only=False)


class PlannedSlice(Slice):
    """The peer with `overlap_moe_expert_parallel_comm`, whose forward step returns a plan."""

    def run_schedule(self) -> list[torch.Tensor]:
        """All microbatches through megatron-core's combined schedule."""
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.utils import get_attr_wrapped_model

        from megatron_kanana.training.step import masked_loss

        def forward_step(iterator: Any, chunk: Any, return_schedule_plan: bool = False) -> Any:
            batch = {name: each.to("cuda") for name, each in next(iterator).items()}
            words = (batch["tokens"], batch["position_ids"], None)
            options = {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}
            plan = get_attr_wrapped_model(chunk, "build_schedule_plan")
            out = plan(*words, **options) if return_schedule_plan else chunk(*words, **options)
            return out, partial(masked_loss, batch["loss_mask"], None)

        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=self.iterator,
            model=self.chunks[0],
            num_microbatches=self.microbatches,
            seq_length=self.settings.data.sequence_length,
            micro_batch_size=self.settings.schedule.micro_batch_size,
            forward_only=False,
        )
        return [result["loss"] for result in results]


def build_slice(name: str, settings: Settings, device: Device, microbatches: int) -> Slice:
    """A contender by its name.

    Raises:
        Exception: whatever a peer that cannot be built raises.
    """
    from benchmarks.optimizer_step import random_microbatches
    from megatron_kanana.optimizer.build import wrap_data_parallel
    from megatron_kanana.training.run import build_chunks

    kind: type[Slice] = Slice
    environment: Mapping[str, str] = {}
    if name == OURS:
        config, chunks = build_chunks(settings, device)
    else:
        changes = {PEER_SHARED: SHARED_EXPERTS, PEER_MICROBATCHES: MICROBATCHES}.get(name, {})
        with contextlib.nullcontext() if device.is_cuda else peer_with_all_to_all():
            config, model = megatron_model(settings, device, **changes)
        chunks, environment = [model], {CUTLASS: "1"}
        kind = PlannedSlice if name == PEER_MICROBATCHES else Slice
    wrapped = wrap_data_parallel(chunks, settings)
    own_tokens = dataclasses.replace(settings, seed=settings.seed + dist.get_rank())
    iterator = random_microbatches(own_tokens)
    return kind(settings, device, config, wrapped, microbatches, iterator, environment)


def update_of(ours: Slice) -> Callable[[], None]:
    """Clipping, MuonClip and gathering of weights, on the gradients that are there."""
    from megatron_kanana.optimizer.build import build_optimizer
    from megatron_kanana.optimizer.qk_clip import QKClip
    from megatron_kanana.optimizer.update import gradient_norm_and_loss, update_weights
    from megatron_kanana.training.attention_logits import AttentionLogits

    settings, device = ours.settings, ours.device
    optimizer = build_optimizer(ours.chunks, settings, device)
    threshold = settings.optimizer.qk_clip_threshold
    assert threshold is not None
    qk_clip = QKClip(optimizer, ours.chunks, settings.model, threshold)
    logits = AttentionLogits(ours.chunks, ours.config)

    def update() -> None:
        loss = torch.zeros((), dtype=torch.float64, device=device.torch_device)
        norm, _ = gradient_norm_and_loss(optimizer, loss)
        qk_clip.max_logits = logits.reduce()
        update_weights(optimizer, norm)

    return update


def free(slices: dict[str, Slice]) -> None:
    """Give the memory of contenders back, also of those that something keeps.

    megatron-core's own model stays after its last step, held by nodes of autograd whose hooks hold
    it in turn: the collector of garbage does not see through C++.
    """
    for chunk in [chunk for each in slices.values() for chunk in each.chunks]:
        held = [*chunk.module.parameters(), *chunk.module.buffers()]
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            held += [buffer.grad_data, buffer.param_data]
        for tensor in held:
            if tensor is not None:
                tensor.untyped_storage().resize_(0)
    slices.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
