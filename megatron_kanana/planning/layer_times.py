"""How long one process takes for a pass of one microbatch through a layer, part by part.

Products take their operations over the rate that `calibration.Efficiencies` says is reached;
everything else takes the bytes it moves over the memory's. Launching from Python goes on meanwhile:
a pass takes (host^p + gpu^p)^(1/p) of the two. Before experts the host waits for the GPU, as it has
to know how many tokens each expert gets; that counts with the host's time. Messages that nothing
overlaps are added.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .activations import MAX_LOGIT_ROWS, takes_gradients_early
from .architecture import Architecture, Weight, multiply_size
from .calibration import Efficiencies, Implementation
from .communication import (
    Message,
    dispatch,
    tensor_parallel,
    tensor_parallel_message,
)
from .flops import attention_flops
from .layout import Layout, Stage
from .machines import Machine

FORWARD_SHARE_OF_HOST = 1 / 3  # a backward pass launches about twice as much


@dataclass(frozen=True)
class Job:
    """What is computed, where and how.

    Attributes:
        architecture: the network.
        layout: its layout.
        machine: GPUs and network.
        implementation: how layers are computed.
        fp8: whether projections and experts compute in fp8; the output layer never does.
        efficiencies: shares of the machine's peaks.
    """

    architecture: Architecture
    layout: Layout
    machine: Machine
    implementation: Implementation
    fp8: bool = False
    efficiencies: Efficiencies = field(default_factory=Efficiencies)


class Parts(defaultdict[str, float]):
    """Seconds by part of a layer, 'host' among them; communication's begin with 'messages: '."""

    def __init__(self) -> None:
        super().__init__(float)

    def add(self, others: Mapping[str, float], times: float = 1.0) -> None:
        """Add the seconds of others, so many times."""
        for part, seconds in others.items():
            self[part] += times * seconds


def pass_seconds(job: Job, parts: Parts) -> float:
    """How long a pass with these parts takes."""
    power = job.efficiencies.host_overlap
    messages = sum(time for part, time in parts.items() if part.startswith("messages"))
    gpu = sum(parts.values()) - parts["host"] - messages
    return float((gpu**power + parts["host"] ** power) ** (1 / power) + messages)


def stage_parts(job: Job, stage: Stage) -> tuple[Parts, Parts]:
    """Parts of the forward and of the backward pass of a virtual stage."""
    forward, backward = Parts(), Parts()

    def add(parts: Callable[..., Parts], times: int, **options: bool) -> None:
        for target, is_forward in ((forward, True), (backward, False)):
            target.add(parts(job, forward=is_forward, **options), times)

    for is_moe, layers in ((False, stage.dense), (True, stage.moe + stage.mtp)):
        if layers:
            add(layer_parts, layers, is_moe=is_moe)
    if stage.output:
        add(output_parts, 1 + stage.mtp)
    if stage.output or stage.embedding:
        host = job.implementation.host_stage * job.machine.host_time / 2
        forward["host"] += host * FORWARD_SHARE_OF_HOST * (stage.output + stage.embedding)
        backward["host"] += host * (1 - FORWARD_SHARE_OF_HOST) * (stage.output + stage.embedding)
    return forward, backward


def layer_parts(job: Job, *, forward: bool, is_moe: bool) -> Parts:
    """Parts of one layer's pass, what is computed again included."""
    parts = _plain_layer_parts(job, forward=forward, is_moe=is_moe)
    if forward:
        return parts
    again = _plain_layer_parts(job, forward=True, is_moe=is_moe)
    recompute = job.layout.recompute
    if "full" in recompute:
        parts.add(again)
        return parts
    if "up_projections" in recompute:
        kinds = ("query", "query_up", "key_value_up")
        up = [weight for weight in job.architecture.attention() if weight.kind in kinds]
        parts["attention projections"] += _products(job, up, forward=True)
    if "dense_feed_forward" in recompute and not is_moe:
        parts["dense feed-forward"] += again["dense feed-forward"]
    if "activations" in recompute or "norms" in recompute:
        parts["moving data"] += again["moving data"] / 4
    return parts


def _plain_layer_parts(job: Job, *, forward: bool, is_moe: bool) -> Parts:
    architecture, layout = job.architecture, job.layout
    parts = Parts()
    parts["attention projections"] = _products(job, architecture.attention(), forward=forward)
    parts["core attention"] = _core_attention(job, forward=forward)
    parts["moving data"] = _moving(job, forward=forward, is_moe=is_moe)
    host = job.implementation.host_layer
    if is_moe:
        experts = architecture.experts()
        routed = [weight for weight in experts if weight.group == "experts"]
        others = [weight for weight in experts if weight.group != "experts"]
        parts["routed experts"] = _products(job, routed, forward=forward)
        parts["shared experts"] = _products(job, others, forward=forward)
        local = architecture.num_experts / layout.expert
        form = "fp8" if job.fp8 else "bf16"
        host += job.implementation.host_moe
        if not job.implementation.experts.single_launch:
            host += local * job.implementation.host_expert[form]
        sent = dispatch(architecture, layout, job.machine, job.implementation)
        both = 2 * layout.expert_load * _seconds(job, sent)  # there and back
        if layout.overlaps_dispatch:
            both *= 1 - job.efficiencies.dispatch_hidden
        parts["messages: dispatch"] = both
    else:
        weights = architecture.dense_feed_forward()
        parts["dense feed-forward"] = _products(job, weights, forward=forward)
    host *= job.machine.host_time
    parts["host"] = host * (FORWARD_SHARE_OF_HOST if forward else 1 - FORWARD_SHARE_OF_HOST)
    if is_moe and forward:
        parts["host"] += _waiting_for_counts(job, parts)
    has_split = not is_moe or architecture.shared_hidden_size > 0
    attention, feed_forward = tensor_parallel(architecture, layout)
    size = attention + (feed_forward if has_split else 0.0)
    parts["messages: tensor parallelism"] = _seconds(
        job, tensor_parallel_message(size, layout, job.machine, forward=forward)
    )
    return parts


def _waiting_for_counts(job: Job, parts: Parts) -> float:
    """Seconds by which attention outlasts its launching, after which tokens are counted.

    megatron-core's dispatchers copy the number of tokens of each expert to the host, ours where
    they leave the process.
    """
    layout = job.layout
    if job.implementation.experts.single_launch and layout.expert * layout.expert_tensor == 1:
        return 0.0
    power = job.efficiencies.host_overlap
    gpu = parts["attention projections"] + parts["core attention"]
    host = job.implementation.host_layer * job.machine.host_time * FORWARD_SHARE_OF_HOST
    return float((gpu**power + host**power) ** (1 / power) - host)


def output_parts(job: Job, *, forward: bool) -> Parts:
    """Parts of the pass through the output layer and the loss."""
    architecture, layout = job.architecture, job.layout
    parts = Parts()
    output = [weight for weight in architecture.output_layer() if weight.kind == "output_layer"]
    if job.implementation.linear_loss:
        parts["output layer and loss"] = _linear_loss_seconds(job, output, forward=forward)
        return parts
    parts["output layer and loss"] = _products(job, output, forward=forward, in_bf16=True)
    # Reads and writes of the logits beside the product's, in bf16 sizes. peers: about 10 ms of
    # cross-entropy at 8,192 tokens where it is not fused, which is 15 times their bytes.
    passes = 2.0 if job.implementation.fused else 7.5
    logits = 2.0 * architecture.vocab_size * layout.tokens / layout.tensor
    parts["output layer and loss"] += _memory_seconds(job, passes * logits)
    return parts


def _linear_loss_seconds(job: Job, output: list[Weight], *, forward: bool) -> float:
    """Seconds of a loss without whole logits, whose gradients may come in the forward pass."""
    architecture, layout = job.architecture, job.layout
    logits = 2.0 * architecture.vocab_size * layout.tokens / layout.tensor
    gradients = _products(job, output, forward=False, in_bf16=True)
    gradients += _memory_seconds(job, 2 * logits)  # read, and overwritten by their gradient
    early = takes_gradients_early(architecture, layout)
    if forward:
        seconds = _products(job, output, forward=True, in_bf16=True)
        seconds += _memory_seconds(job, logits)  # read, for the softmax's sums
        return seconds + gradients if early else seconds
    if early:  # the weight's gradient and the sums are read, and the sums written
        size = architecture.vocab_size * architecture.hidden_size / layout.tensor
        return _memory_seconds(job, 12.0 * size)
    return gradients


def _products(job: Job, weights: list[Weight], *, forward: bool, in_bf16: bool = False) -> float:
    """Seconds of the products with weights; backward, those of both gradients."""
    layout, efficiencies, machine = job.layout, job.efficiencies, job.machine
    seconds = 0.0
    fp8 = job.fp8 and not in_bf16
    for weight in weights:
        if weight.kind == "vector":
            continue
        visits = 1.0
        if weight.group == "experts":
            visits = job.architecture.num_experts_per_token * layout.expert_load
        flops = 2.0 * multiply_size([weight]) * visits * layout.tokens / layout.tensor
        flops *= 1 if forward else 2
        if fp8:
            share = efficiencies.matmul_fp8
            if weight.group == "experts":
                share *= efficiencies.grouped_matmul / efficiencies.matmul
            rate = machine.fp8_flops * share
        elif weight.group == "experts":
            rate = machine.bf16_flops * efficiencies.grouped_matmul
        else:
            rate = machine.bf16_flops * efficiencies.matmul
        seconds += flops / rate
        if not forward:  # weight gradients are added to fp32 sums
            moved = 8.0 if job.implementation.fused else 12.0
            size = weight.local_size(layout.tensor, layout.expert, layout.expert_tensor)
            seconds += _memory_seconds(job, moved * size)
    return seconds


def _core_attention(job: Job, *, forward: bool) -> float:
    layout, attention = job.layout, job.implementation.attention
    forward_share, backward_share = attention.shares_at(layout.sequence_length)
    flops = attention_flops(job.architecture, layout.sequence_length)
    flops *= layout.micro_batch_size / layout.tensor
    if not forward:  # five products where the forward pass has two, with the widths they have
        query, value = job.architecture.query_key_dim, job.architecture.value_dim
        flops *= (3 * query + 2 * value) / (query + value)
        return flops / (job.machine.bf16_flops * backward_share)
    seconds = flops / (job.machine.bf16_flops * forward_share)
    if attention.second_product:  # bf16 written and read, fp32 written, masked (both) and read
        rows = min(MAX_LOGIT_ROWS, layout.sequence_length)  # up to the last one's diagonal
        logits = float(layout.micro_batch_size * layout.sequence_length)
        logits *= (layout.sequence_length + rows) / 2 * job.architecture.num_heads / layout.tensor
        seconds += _memory_seconds(job, 20.0 * logits)
        seconds += (
            2.0
            * job.architecture.query_key_dim
            * logits
            / (job.machine.bf16_flops * job.efficiencies.matmul)
        )
    return seconds


def _moving(job: Job, *, forward: bool, is_moe: bool) -> float:
    """Seconds of norms, residual sums, rotary embedding, activations, permutation and casts."""
    architecture, fused = job.architecture, job.implementation.fused
    hidden, heads = architecture.hidden_size, architecture.num_heads
    query, value = architecture.query_key_dim, architecture.value_dim
    keys = heads if architecture.kv_lora_rank is not None else architecture.num_key_value_heads
    # Two norms read and write, two sums read two and write one; latent's norm.
    moved = 20.0 * hidden + 4 * (architecture.kv_lora_rank or 0)
    rotated = 4.0 * heads * architecture.rope_dim if architecture.rope_dim else 4.0 * heads * query
    rotated += 4.0 * keys * (query + value)  # keys and values are written anew
    moved += rotated if fused else 2 * rotated
    visited, width = architecture.num_experts_per_token, architecture.expert_hidden_size
    activation = (6.0, 10.0) if fused else (14.0, 25.0)
    of_experts = job.implementation.experts
    acting_experts = (6.0, 10.0) if of_experts.fused else (14.0, 25.0)
    weighted = (0.0, 2.0) if of_experts.fused else (14.0, 25.0)  # by the probabilities
    which = 0 if forward else 1
    if is_moe:
        local = architecture.num_experts // job.layout.expert
        copies = (14.0 if local > 1 else 6.0) if fused else 22.0
        if job.implementation.sends_once == "node":
            copies = 8.0
        if of_experts.single_launch:  # rows written by products, then added up
            copies = 4.0
        gathered = visited * job.layout.expert_load
        permuted = copies * gathered * hidden
        acting = (acting_experts[which] + weighted[which]) * gathered * width
        acting += acting_experts[which] * architecture.shared_hidden_size
    else:
        permuted = 0.0
        acting = activation[which] * architecture.ffn_hidden_size
    if not forward:
        moved *= 2
    moved += permuted + acting
    if job.fp8:  # read in bf16, written twice in fp8
        quantised = architecture.hidden_size * 2.0 + heads * value
        quantised += visited * (hidden + width) if is_moe else architecture.ffn_hidden_size
        moved += 4.0 * quantised * (1 if forward else 1.5)
    return _memory_seconds(job, moved * job.layout.tokens / job.layout.tensor)


def _memory_seconds(job: Job, moved: float) -> float:
    return moved / (job.machine.memory_bandwidth * job.efficiencies.memory)


def _seconds(job: Job, message: Message) -> float:
    return message.seconds(job.machine, job.efficiencies)
