"""The map between Hugging Face's tensors and ours: one table, read in both directions.

A Hugging Face tensor is always one block of one of our tensors: gate and up projections are halves
of `linear_fc1`, an expert is one index of a stacked tensor, everything else is a whole tensor.
Neither rows nor columns are permuted: megatron-core's MLA keeps DeepSeek-V3's order of heads and
of rotary channels (shown by `tests/model`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_kanana.config.schema import ModelSettings


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        hugging_face: name below the prefix of its group.
        megatron: name below the prefix of its group.
        shape: the Hugging Face tensor's dimensions, words of `dimensions`.
        part: which half of the megatron tensor's first axis this is; None for all of it.
        is_gain: whether it is RMSNorm's gain, which a zero-centred model stores less one.
    """

    hugging_face: str
    megatron: str
    shape: str
    part: int | None = None
    is_gain: bool = False


def _norm(hugging_face: str, megatron: str, shape: str) -> Row:
    return Row(f"{hugging_face}.weight", f"{megatron}.weight", shape, is_gain=True)


def _gated_feed_forward(hugging_face: str, megatron: str, width: str) -> tuple[Row, ...]:
    fc1, fc2 = f"{megatron}.linear_fc1.weight", f"{megatron}.linear_fc2.weight"
    return (
        Row(f"{hugging_face}.gate_proj.weight", fc1, f"{width} hidden", part=0),
        Row(f"{hugging_face}.up_proj.weight", fc1, f"{width} hidden", part=1),
        Row(f"{hugging_face}.down_proj.weight", fc2, f"hidden {width}"),
    )


# Below "" and ""
MODEL = (
    Row("model.embed_tokens.weight", "embedding.word_embeddings.weight", "vocabulary hidden"),
    _norm("model.norm", "decoder.final_layernorm", "hidden"),
    Row("lm_head.weight", "output_layer.weight", "vocabulary hidden"),
)

# Below "model.layers.{layer}." and "decoder.layers.{layer}."
EVERY_LAYER = (
    _norm("input_layernorm", "input_layernorm", "hidden"),
    Row(
        "self_attn.kv_a_proj_with_mqa.weight",
        "self_attention.linear_kv_down_proj.weight",
        "latent_and_rope hidden",
    ),
    _norm("self_attn.kv_a_layernorm", "self_attention.kv_layernorm", "latent"),
    Row(
        "self_attn.kv_b_proj.weight",
        "self_attention.linear_kv_up_proj.weight",
        "keys_values latent",
    ),
    Row("self_attn.o_proj.weight", "self_attention.linear_proj.weight", "hidden values"),
    _norm("post_attention_layernorm", "pre_mlp_layernorm", "hidden"),
)
DIRECT_QUERIES = (
    Row("self_attn.q_proj.weight", "self_attention.linear_q_proj.weight", "queries hidden"),
)
LOW_RANK_QUERIES = (
    Row("self_attn.q_a_proj.weight", "self_attention.linear_q_down_proj.weight", "q_rank hidden"),
    _norm("self_attn.q_a_layernorm", "self_attention.q_layernorm", "q_rank"),
    Row("self_attn.q_b_proj.weight", "self_attention.linear_q_up_proj.weight", "queries q_rank"),
)
DENSE_FEED_FORWARD = _gated_feed_forward("mlp", "mlp", "dense_width")
ROUTER = (
    Row("mlp.gate.weight", "mlp.router.weight", "experts hidden"),
    Row("mlp.gate.e_score_correction_bias", "mlp.router.expert_bias", "experts"),
)
SHARED_EXPERTS = _gated_feed_forward("mlp.shared_experts", "mlp.shared_experts", "shared_width")
# Our experts are stacked: {expert} is an index of the first axis.
ROUTED_EXPERT = _gated_feed_forward("mlp.experts.{expert}", "mlp.experts.experts", "expert_width")

# Below "model.layers.{num_layers + k}." and "mtp.layers.{k}."; the layer itself is as above.
MULTI_TOKEN_PREDICTION = (
    _norm("enorm", "enorm", "hidden"),
    _norm("hnorm", "hnorm", "hidden"),
    Row("eh_proj.weight", "eh_proj.weight", "hidden two_hidden"),
    _norm("shared_head.norm", "final_layernorm", "hidden"),
)
# DeepSeek-V3 stores these again in each MTP layer: its name there, and whose copy it is.
MULTI_TOKEN_PREDICTION_COPIES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": "lm_head.weight",
}
MTP_LAYER = "transformer_layer."
"""Prefix of the transformer layer inside megatron-core's MTP layer."""


def dimensions(model: ModelSettings) -> dict[str, int]:
    """The words used for shapes, in numbers."""
    heads = model.num_attention_heads
    return {
        "vocabulary": model.vocab_size,
        "hidden": model.hidden_size,
        "two_hidden": 2 * model.hidden_size,
        "queries": heads * (model.qk_nope_head_dim + model.qk_rope_head_dim),
        "q_rank": model.q_lora_rank or 0,
        "latent": model.kv_lora_rank,
        "latent_and_rope": model.kv_lora_rank + model.qk_rope_head_dim,
        "keys_values": heads * (model.qk_nope_head_dim + model.v_head_dim),
        "values": heads * model.v_head_dim,
        "dense_width": model.ffn_hidden_size,
        "expert_width": model.moe_ffn_hidden_size,
        "shared_width": model.shared_expert_hidden_size,
        "experts": model.num_experts,
    }


@dataclass(frozen=True)
class Placement:
    """Where one Hugging Face tensor lies in ours.

    Attributes:
        hugging_face: name of the Hugging Face tensor.
        shape: its shape.
        megatron: name of our tensor, as checkpoints name it.
        megatron_shape: shape of our whole tensor.
        offset: where the block begins in our tensor.
        block: shape of the block; `shape`, with a leading 1 where experts are stacked.
        gain_offset: what is added to the tensor on its way to us: -1 for a zero-centred gain.
    """

    hugging_face: str
    shape: tuple[int, ...]
    megatron: str
    megatron_shape: tuple[int, ...]
    offset: tuple[int, ...]
    block: tuple[int, ...]
    gain_offset: float = 0.0


def placements(model: ModelSettings) -> list[Placement]:
    """Every tensor of the model, layer by layer."""
    return list(_placements(model))


def copies(model: ModelSettings) -> dict[str, str]:
    """Tensors that a Hugging Face checkpoint holds twice: the copy's name, and the first one's."""
    return {
        f"model.layers.{model.num_layers + index}.{name}": original
        for index in range(model.num_mtp_layers)
        for name, original in MULTI_TOKEN_PREDICTION_COPIES.items()
    }


def empty_tensors(model: ModelSettings) -> dict[str, tuple[int, ...]]:
    """Tensors without numbers and their shapes: transformers keeps shared experts of width zero."""
    if model.num_shared_experts:
        return {}
    sizes = dimensions(model)
    return {
        f"model.layers.{layer}.{row.hugging_face}": tuple(sizes[word] for word in row.shape.split())
        for layer in range(model.num_dense_layers, model.num_layers + model.num_mtp_layers)
        for row in SHARED_EXPERTS
    }


def _placements(model: ModelSettings) -> Iterator[Placement]:
    yield from (_place(model, row, "", "") for row in MODEL)
    for layer in range(model.num_layers):
        prefixes = (f"model.layers.{layer}.", f"decoder.layers.{layer}.")
        yield from _layer(model, *prefixes, is_moe=layer >= model.num_dense_layers)
    for index in range(model.num_mtp_layers):
        hugging_face = f"model.layers.{model.num_layers + index}."
        megatron = f"mtp.layers.{index}."
        for row in MULTI_TOKEN_PREDICTION:
            yield _place(model, row, hugging_face, megatron)
        yield from _layer(model, hugging_face, megatron + MTP_LAYER, is_moe=True)


def _layer(
    model: ModelSettings, hugging_face: str, megatron: str, *, is_moe: bool
) -> Iterator[Placement]:
    queries = DIRECT_QUERIES if model.q_lora_rank is None else LOW_RANK_QUERIES
    rows = (*EVERY_LAYER, *queries)
    if is_moe:
        rows += (*ROUTER, *(SHARED_EXPERTS if model.num_shared_experts else ()))
    else:
        rows += DENSE_FEED_FORWARD
    yield from (_place(model, row, hugging_face, megatron) for row in rows)
    for expert in range(model.num_experts if is_moe else 0):
        for row in ROUTED_EXPERT:
            yield _place(model, row, hugging_face, megatron, expert)


def _place(
    model: ModelSettings, row: Row, hugging_face: str, megatron: str, expert: int | None = None
) -> Placement:
    sizes = dimensions(model)
    shape = tuple(sizes[word] for word in row.shape.split())
    whole, offset, block = list(shape), [0] * len(shape), shape
    if row.part is not None:
        whole[0], offset[0] = 2 * shape[0], row.part * shape[0]
    if row.shape.startswith("vocabulary"):
        whole[0] = model.padded_vocab_size
    if expert is not None:
        whole, offset, block = [model.num_experts, *whole], [expert, *offset], (1, *shape)
    return Placement(
        hugging_face=hugging_face + row.hugging_face.format(expert=expert),
        shape=shape,
        megatron=megatron + row.megatron,
        megatron_shape=tuple(whole),
        offset=tuple(offset),
        block=block,
        gain_offset=-1.0 if row.is_gain and model.zero_centered_gamma else 0.0,
    )
