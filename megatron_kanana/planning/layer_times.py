"""How long one process takes for a pass of one microbatch through a layer, part by part.

Products take their operations over the rate that `calibration.Efficiencies` says is reached;
everything else takes the bytes it moves over the memory's. Launching from Python goes on meanwhile:
a pass takes (host^p + gpu^p)^(1/p) of the two. Before experts the host waits for the GPU, as it has
to know how many tokens each expert gets; that counts with the host's time. Messages that nothing
overlaps are added.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .activations import MAX_LOGIT_ROWS, takes_gradients_early
from .architecture import (
    EXPERT_GRADIENTS,
    EXPERTS,
    OUTPUT_LAYER,
    Architecture,
    Weight,
    multiply_size,
)
from .calibration import QUANTISING_BYTES, Efficiencies, Implementation
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
        fp8: what computes in fp8, of `architecture.ALL_FP8`: kinds of dense weights, and 'experts';
            and perhaps `architecture.KEPT_ACTIVATIONS` and `OUTPUT_LAYER`.
        bf16_layers: first and last layers that it leaves out.
        efficiencies: shares of the machine's peaks.
    """

    architecture: Architecture
    layout: Layout
    machine: Machine
    implementation: Implementation
    fp8: frozenset[str] = frozenset()
    bf16_layers: tuple[int, int] = (0, 0)
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

    def add(parts: Callable[..., Parts], chosen: Job, times: int, **options: bool) -> None:
        for target, is_forward in ((forward, True), (backward, False)):
            target.add(parts(chosen, forward=is_forward, **options), times)

    in_bf16 = dataclasses.replace(job, fp8=frozenset())
    for is_moe, in_fp8, layers in stage.layers_by_format(
        job.architecture.num_layers, job.bf16_layers
    ):
        add(layer_parts, job if in_fp8 else in_bf16, layers, is_moe=is_moe)
    if stage.output:
        add(output_parts, job, 1 + stage.mtp)
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
    linear = [weight.kind for weight in architecture.attention() if weight.kind != "vector"]
    host += job.implementation.host_fp8 * len(job.fp8.intersection(linear)) / len(linear)
    if is_moe:
        experts = architecture.experts()
        routed = [weight for weight in experts if weight.group == "experts"]
        others = [weight for weight in experts if weight.group != "experts"]
        parts["routed experts"] = _products(job, routed, forward=forward)
        parts["shared experts"] = _products(job, others, forward=forward)
        local = architecture.num_experts / layout.expert
        form = "fp8" if EXPERTS in job.fp8 else "bf16"
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
    output = [weight for weight in architecture.output_layer() if weight.kind == OUTPUT_LAYER]
    if job.implementation.linear_loss:
        parts["output layer and loss"] = _linear_loss_seconds(job, output, forward=forward)
        return parts
    parts["output layer and loss"] = _products(job, output, forward=forward)
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
    gradients = _products(job, output, forward=False)
    # Read, and overwritten by their gradient, or in fp8 written in both orders.
    gradients += _memory_seconds(job, 2 * logits)
    early = takes_gradients_early(architecture, layout)
    if forward:
        seconds = _products(job, output, forward=True)
        seconds += _memory_seconds(job, logits)  # read, for the softmax's sums
        if OUTPUT_LAYER in job.fp8:
            numbers = architecture.hidden_size * (
                architecture.vocab_size / layout.tensor + layout.tokens
            )
            seconds += _memory_seconds(job, QUANTISING_BYTES * numbers)
        return seconds + gradients if early else seconds
    if early:  # the weight's gradient and the sums are read, and the sums written
        size = architecture.vocab_size * architecture.hidden_size / layout.tensor
        return _memory_seconds(job, 12.0 * size)
    return gradients


def _products(job: Job, weights: list[Weight], *, forward: bool) -> float:
    """Seconds of the products with weights; backward, those of both gradients."""
    layout = job.layout
    experts = job.implementation.experts
    seconds = 0.0
    for weight in weights:
        if weight.kind == "vector":
            continue
        visits = 1.0
        if weight.group == "experts":
            visits = job.architecture.num_experts_per_token * layout.expert_load
        flops = 2.0 * multiply_size([weight]) * visits * layout.tokens / layout.tensor
        for_input, for_weight = _rates(job, weight)
        seconds += flops / for_input
        if forward:
            continue
        seconds += flops / for_weight
        # Weight gradients are added to fp32 sums.
        moved = 8.0 if job.implementation.fused else 12.0
        size = weight.local_size(layout.tensor, layout.expert, layout.expert_tensor)
        share = experts.gradient_memory if weight.of_experts else None
        seconds += _memory_seconds(job, moved * size, share)
    return seconds


def _rates(job: Job, weight: Weight) -> tuple[float, float]:
    """Operations a second of products with a weight, and of those that give its gradient."""
    efficiencies, machine, experts = job.efficiencies, job.machine, job.implementation.experts
    is_routed = weight.group == "experts"
    if weight.kind == OUTPUT_LAYER:
        rate = machine.bf16_flops * efficiencies.output_matmul
        if OUTPUT_LAYER in job.fp8:
            rate = machine.fp8_flops * efficiencies.output_matmul_fp8
        return rate, rate
    if weight.of_experts and experts.share is not None:
        in_bf16 = machine.bf16_flops * experts.share
        if EXPERTS not in job.fp8 or experts.share_fp8 is None:
            return in_bf16, in_bf16
        in_fp8 = machine.fp8_flops * experts.share_fp8
        if EXPERT_GRADIENTS not in job.fp8 or experts.share_fp8_gradients is None:
            return in_fp8, in_bf16
        return in_fp8, machine.fp8_flops * experts.share_fp8_gradients
    of_group = efficiencies.grouped_matmul if is_routed else efficiencies.matmul
    if weight.format_key not in job.fp8:
        rate = machine.bf16_flops * of_group
        return rate, rate
    share = job.implementation.matmul_fp8 or efficiencies.matmul_fp8
    rate = machine.fp8_flops * share * of_group / efficiencies.matmul
    return rate, rate


def _core_attention(job: Job, *, forward: bool) -> float:
    layout, attention = job.layout, job.implementation.attention
    shares = attention.shares_at(layout.sequence_length)
    forward_share, backward_share = (share * attention.in_step for share in shares)
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
    activation = (6.0, 10.0) if job.implementation.fuses_activations else (14.0, 25.0)
    of_experts = job.implementation.experts
    acting_experts = (6.0, 10.0) if of_experts.fused else (14.0, 25.0)
    weighted = (0.0, 2.0) if of_experts.fused else (14.0, 25.0)  # by the probabilities
    which = 0 if forward else 1
    if is_moe:
        local = architecture.num_experts // job.layout.expert
        copies = (14.0 if local > 1 else 6.0) if fused else 22.0
        if job.implementation.sends_once == "node":
            copies = 8.0
        if of_experts.single_launch:  # rows that products wrote are added up
            copies = 2.0
        gathered = visited * job.layout.expert_load
        permuted = copies * gathered * hidden
        acting = (acting_experts[which] + weighted[which]) * gathered * width
        acting += acting_experts[which] * architecture.shared_hidden_size
        if of_experts.share is not None:  # which has these passes
            acting = 0.0
    else:
        permuted = 0.0
        acting = activation[which] * architecture.ffn_hidden_size
    if not forward:
        moved *= 2
    moved += permuted + acting
    numbers = _quantised(job, forward=forward, is_moe=is_moe)
    moved += QUANTISING_BYTES * numbers
    tokens = job.layout.tokens / job.layout.tensor
    return job.implementation.moving * _memory_seconds(job, moved * tokens)


def _quantised(job: Job, *, forward: bool, is_moe: bool) -> float:
    """Numbers of a token that are quantised: inputs of products, backward gradients of outputs."""
    architecture = job.architecture
    hidden, visited = architecture.hidden_size, architecture.num_experts_per_token
    weights = architecture.attention()
    if not is_moe:
        weights += architecture.dense_feed_forward()
    matrices = [weight for weight in weights if weight.kind in job.fp8]
    numbers = float(sum(weight.columns if forward else weight.rows for weight in matrices))
    if EXPERTS in job.fp8 and is_moe:
        width, shared = architecture.expert_hidden_size, architecture.shared_hidden_size
        if job.implementation.experts.single_launch:  # the others leave products in fp8
            numbers += hidden
        elif forward:
            numbers += visited * (hidden + width) + (hidden + shared if shared else 0)
        else:
            numbers += visited * (hidden + 2 * width) + (hidden + 2 * shared if shared else 0)
    return numbers


def quantising_weights_seconds(job: Job, numbers: float) -> float:
    """To make fp8 copies of so many weights in both orders: read in 16 bits, written twice."""
    return _memory_seconds(job, 4.0 * numbers)


def _memory_seconds(job: Job, moved: float, share: float | None = None) -> float:
    return moved / (job.machine.memory_bandwidth * (share or job.efficiencies.memory))


def _seconds(job: Job, message: Message) -> float:
    return message.seconds(job.machine, job.efficiencies)
