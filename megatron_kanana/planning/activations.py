"""Bytes of activations that wait for the backward pass, by layer, and what a pass needs meanwhile.

Read off the modules of `model/` and megatron-core 0.16.1, and compared with what torch really saves
in `tests/unit/test_planning_activations.py`. In bytes a token, with hidden size d, H heads, query
and key width q, value width v, latent k and rotary width r, K experts a token of width n, shared
width s, E experts, and two bytes an element:

| | this version | Transformer Engine |
| --- | --- | --- |
| norm | input 2d, and fp32 1/rms 4 | the same |
| projections' input | 2d | the same |
| MLA | 2(k + r) + 2k + 4, with q_lora 4 q_lora + 4 more | the same |
| core attention | queries, keys 2Hq each, values, output 2Hv each, fp32 LSE 4H | the same |
| activation of width f, f-wide input of the down projection included | 10f | 6f |
| routed experts | csrc: pre-activations 4Kn; torch: 8Kd + 14Kn | 2Kd + 6Kn |
| shared experts | csrc 4s, torch 14s | 6s |
| router | csrc: logits, choice, order 4E + 16K + 4; torch: 16E + 16K + 8 | 17E + 28K + 12 |
| loss, V words | `output_bytes` | logits 2V, overwritten by their gradient |

Where tokens come from other processes, csrc's experts keep what comes (`arrived_bytes`).

In fp8 a projection keeps its input in blocks of e4m3, 1 + 1/32 bytes an element, and each has one
of its own: query and key-value down-projections two, where 2d bytes in bf16 serve both, or what is
in bf16 of them. The output
projection keeps attention's own output, and projections behind a norm that is computed again keep
its bf16 output, which is gone meanwhile (megatron-core's `set_save_original_input`). csrc's experts
keep in fp8 what they keep in bf16, or with `precision.kept_activations` their pre-activations in
fp8; megatron-core's keep all their inputs in fp8.

Core attention keeps the same with SDPA and with `csrc`. While SDPA's finds the largest logits there
are 1,024 rows of them, 6 bytes each; csrc's backward pass holds `attention_backward_bytes`.

Tensor parallelism divides all of it, sequence parallelism what it does not split by heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from .architecture import EXPERTS, KEPT_ACTIVATIONS, OUTPUT_LAYER, Architecture
from .calibration import FP8_BYTES, Implementation
from .communication import distinct
from .layout import Layout, Stage

MAX_LOGIT_ROWS = 1024  # the same of kernels/attention/fused_torch.py
CHUNK_BYTES = 2**30  # the same of kernels/linear_cross_entropy
FP8_LOGIT_BYTES = 1 + 3 / 4  # of its fp8_products: `bytes_per_token` and `token_multiple`
FP8_CHUNK_MULTIPLE = 512


def attention_bytes(
    architecture: Architecture,
    fp8: frozenset[str] = frozenset(),
    recompute: frozenset[str] = frozenset(),
) -> dict[str, float]:
    """Of one token in the attention of one layer, by name; the norm before it included.

    Args:
        fp8: what computes in fp8, as `layer_times.Job` has it.
        recompute: what is computed again, as `Layout` has it; what is taken away for it is still
            in here.
    """
    hidden, heads = architecture.hidden_size, architecture.num_heads
    query, value = architecture.query_key_dim, architecture.value_dim
    up_again = "up_projections" in recompute
    result = {"norm": 2.0 * hidden + 4, "projection input": 2.0 * hidden}
    if architecture.kv_lora_rank is None:
        readers = {"query_key_value"}
    else:
        readers = {"query" if architecture.q_lora_rank is None else "query_down", "key_value_down"}
    # Projections that are computed again keep their inputs as they came.
    quantised = readers & fp8 - ({"query"} if up_again else set())
    if "norms" not in recompute:
        kept = len(quantised) * FP8_BYTES + (2.0 if readers - quantised else 0.0)
        result["projection input"] = kept * hidden
    elif "query" in quantised:
        # megatron-core has the down-projections alone keep what is computed again.
        result["query projection input"] = FP8_BYTES * hidden

    def of_latent(kind: str) -> float:
        return FP8_BYTES if kind in fp8 and not up_again else 2.0

    keys = heads
    if architecture.kv_lora_rank is None:
        keys = architecture.num_key_value_heads
        # Queries and keys are normalised head by head; the norms keep their inputs.
        result["query and key norms"] = (heads + keys) * (2.0 * query + 4)
    else:
        latent = architecture.kv_lora_rank
        result["latent"] = 2.0 * (latent + architecture.rope_dim) + 4
        result["latent"] += of_latent("key_value_up") * latent
        if architecture.q_lora_rank is not None:
            result["query latent"] = (2.0 + of_latent("query_up")) * architecture.q_lora_rank + 4
    result["query, key, value"] = 2.0 * (heads * query + keys * (query + value))
    result["attention output"] = 2.0 * heads * value + 4 * heads
    return result


def computed_again(attention: Mapping[str, float], recompute: frozenset[str]) -> float:
    """Of one token: what a layer does not keep, and its attention's backward pass computes again.

    Args:
        attention: from `attention_bytes`, for the same `recompute`.
    """
    names = {"norms": "projection input", "up_projections": "query, key, value"}
    return sum(attention[name] for part, name in names.items() if part in recompute)


def attention_backward_bytes(architecture: Architecture) -> float:
    """That csrc's backward pass of one layer holds of one token (docs/attention.md, Memory).

    A query and head has fp32 sums of its gradient, two numbers and a bit; beside them are the
    gradients of query, key, value and output in bf16.
    """
    heads, query, value = architecture.num_heads, architecture.query_key_dim, architecture.value_dim
    keys = heads if architecture.kv_lora_rank is not None else architecture.num_key_value_heads
    gradients = 2.0 * (heads * (query + value) + keys * (query + value))
    return heads * (4 * (query + 2) + 1 / 8) + gradients


def feed_forward_bytes(
    architecture: Architecture,
    implementation: Implementation,
    *,
    is_moe: bool,
    fp8: frozenset[str] = frozenset(),
    recompute: frozenset[str] = frozenset(),
) -> dict[str, float]:
    """Of one token in the feed-forward of one layer, by name; the norm before it included.

    Args:
        fp8, recompute: as `attention_bytes` takes them.
    """
    hidden = architecture.hidden_size
    result = {"norm": 2.0 * hidden + 4, "projection input": 2.0 * hidden}
    if not is_moe:
        if "gate_up" in fp8 and not recompute & {"norms", "dense_feed_forward"}:
            result["projection input"] = FP8_BYTES * hidden
        of_width = 4.0 if implementation.fuses_activations else 8.0
        of_width += FP8_BYTES if "down" in fp8 else 2.0
        result["activation"] = of_width * architecture.ffn_hidden_size
        return result
    visited, width = architecture.num_experts_per_token, architecture.expert_hidden_size
    experts = implementation.experts
    of_expert, of_visit, of_token = experts.router
    result["router"] = of_expert * architecture.num_experts + of_visit * visited + of_token
    saved = 2.0 - FP8_BYTES if experts.quantised_inputs and EXPERTS in fp8 else 0.0
    of_hidden = max(0.0, experts.hidden - saved)
    if KEPT_ACTIVATIONS in fp8:
        saved += 2 * (2.0 - FP8_BYTES)
    result["gathered tokens"] = of_hidden * visited * hidden
    result["experts"] = (experts.width - saved) * visited * width
    if architecture.shared_hidden_size:
        result["shared experts"] = (experts.shared - saved) * architecture.shared_hidden_size
    return result


def arrived_bytes(architecture: Architecture, layout: Layout) -> float:
    """Of a token that is sent to its experts, once to each process, on average.

    A row there has its hidden state, the numbers and weights of its slots and their order.
    """
    if layout.expert * layout.expert_tensor == 1:
        return 0.0
    visited = architecture.num_experts_per_token
    rows = distinct(layout.expert, visited) * layout.expert_tensor
    return rows * (2.0 * architecture.hidden_size + 12 * visited + 8)


def layer_bytes(
    architecture: Architecture,
    layout: Layout,
    implementation: Implementation,
    *,
    is_moe: bool,
    fp8: frozenset[str] = frozenset(),
) -> float:
    """That one layer of one process keeps of a microbatch, with the layout's recompute choice."""
    hidden, tokens = architecture.hidden_size, layout.tokens / layout.tensor
    if layout.has_full_recompute:
        return 2.0 * hidden * tokens
    attention = attention_bytes(architecture, fp8, layout.recompute)
    feed_forward = feed_forward_bytes(
        architecture, implementation, is_moe=is_moe, fp8=fp8, recompute=layout.recompute
    )
    if is_moe:
        if implementation.experts.single_launch:
            feed_forward["gathered tokens"] += arrived_bytes(architecture, layout)
        for part in ("gathered tokens", "experts"):
            feed_forward[part] *= layout.expert_load
    kept = sum(attention.values()) + sum(feed_forward.values())
    kept -= computed_again(attention, layout.recompute)
    if "norms" in layout.recompute:
        kept -= feed_forward["projection input"]
    if "activations" in layout.recompute:
        width = architecture.expert_hidden_size * architecture.num_experts_per_token
        kept -= 2.0 * (width if is_moe else 0)
    if "dense_feed_forward" in layout.recompute and not is_moe:
        kept -= feed_forward["activation"]
    return kept * tokens


def stage_bytes(
    architecture: Architecture,
    layout: Layout,
    implementation: Implementation,
    stage: Stage,
    *,
    fp8: frozenset[str] = frozenset(),
    bf16_layers: tuple[int, int] = (0, 0),
) -> tuple[float, float]:
    """What a virtual stage keeps of a microbatch, and what a pass needs beside it for a while.

    Args:
        fp8, bf16_layers: as `layer_times.Job` has them.
    """
    hidden, tokens = architecture.hidden_size, layout.tokens
    has_experts = stage.moe + stage.mtp > 0

    def of_layer(is_moe: bool, chosen: Layout, form: frozenset[str] = fp8) -> float:
        return layer_bytes(architecture, chosen, implementation, is_moe=is_moe, fp8=form)

    kept = 0.0
    for is_moe, in_fp8, layers in stage.layers_by_format(architecture.num_layers, bf16_layers):
        kept += layers * of_layer(is_moe, layout, fp8 if in_fp8 else frozenset())
    # Two more norms and the projection of both; one norm's input the output layer has, too.
    kept += stage.mtp * (6.0 * hidden + 8) * tokens / layout.tensor
    kept += 8.0 * tokens if stage.embedding else 0.0
    if not stage.output:  # what went to the next stage stays until its gradient comes
        kept += 2.0 * hidden * tokens / layout.tensor
    passing = 6.0 * hidden
    if has_experts:
        of_hidden, of_width = implementation.experts.passing
        if KEPT_ACTIVATIONS in fp8:  # gradients of gate and up have no place to take
            of_width += 4.0
        passing = of_hidden * hidden + of_width * architecture.expert_hidden_size
        passing *= architecture.num_experts_per_token * layout.expert_load
    transient = passing * tokens / layout.tensor
    if implementation.attention.counts_backward and stage.dense + stage.moe + stage.mtp > 0:
        attention = attention_bytes(architecture, fp8, layout.recompute)
        of_attention = attention_backward_bytes(architecture)
        of_attention += computed_again(attention, layout.recompute)
        transient = max(transient, of_attention * tokens / layout.tensor)
    if implementation.attention.second_product:
        heads = architecture.num_heads / layout.tensor
        rows = min(MAX_LOGIT_ROWS, layout.sequence_length)
        logits = layout.micro_batch_size * heads * rows * layout.sequence_length
        transient = max(transient, 6.0 * logits)  # bf16, and fp32 of the same
    if layout.has_full_recompute and stage.dense + stage.moe + stage.mtp > 0:
        whole = dataclasses.replace(layout, recompute=frozenset())
        transient += of_layer(has_experts, whole)
    if stage.output:
        of_loss, passing = output_bytes(architecture, layout, implementation, fp8=fp8)
        of_output = (1 + stage.mtp) * of_loss
        kept += of_output
        # Layers pass before the loss and after it, when its memory is free.
        transient = max(passing, transient - of_output)
    return kept, transient


def takes_gradients_early(architecture: Architecture, layout: Layout) -> bool:
    """Whether gradients of losses are taken in the forward pass (docs/loss.md), in bf16."""
    return 2 * architecture.hidden_size < layout.tokens


def _chunks(tokens: float, size: float, multiple: int) -> int:
    """Into how many chunks a loss takes tokens, of which so many bytes are made in all."""
    most = max(1, int(CHUNK_BYTES * tokens / max(size, 1) / multiple)) * multiple
    return math.ceil(tokens / most)


def output_bytes(
    architecture: Architecture,
    layout: Layout,
    implementation: Implementation,
    *,
    fp8: frozenset[str] = frozenset(),
) -> tuple[float, float]:
    """What one loss keeps, the norm before it included, and what it needs beside it for a while.

    Args:
        architecture, layout, implementation: of the job.
        fp8: as `layer_times.Job` has it.
    """
    hidden, tokens = architecture.hidden_size, layout.tokens
    norm = (4.0 * hidden + 4) * tokens / layout.tensor
    logits = 2.0 * architecture.vocab_size * tokens / layout.tensor
    weight = 2.0 * architecture.vocab_size * hidden / layout.tensor
    if implementation.linear_loss:
        gathered = 4.0 * hidden * tokens if layout.tensor > 1 else 0.0
        is_early = takes_gradients_early(architecture, layout)
        if OUTPUT_LAYER in fp8:
            # Copies of the weight in both orders, and of a chunk its gradient by words, and by
            # tokens a quarter of it; of logits that are not kept a quarter too.
            gathered += weight
            of_logit = FP8_LOGIT_BYTES if is_early else FP8_LOGIT_BYTES - 2 / 4
            made = of_logit / 2 * logits
            chunks = _chunks(tokens, made, FP8_CHUNK_MULTIPLE) if is_early else 1
        else:
            made = logits if is_early else 0.0
            chunks = _chunks(tokens, made, 1)
        kept = 2 * weight + 4 * tokens if is_early else logits + 20 * tokens
        return norm + kept, made / chunks + gathered
    # The output layer's weight gradient exists in bf16 before it is added to the sums.
    if implementation.fused:
        return norm + logits + 9 * tokens, weight
    # Of the last loss, fp32 softmax and bf16 logits.
    return norm + 2 * logits + 9 * tokens, max(logits, weight - logits)
