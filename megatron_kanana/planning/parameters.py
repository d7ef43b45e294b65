"""Parameters of a model, from its settings alone."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_kanana.config.schema import ModelSettings


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of the whole model, over all processes.

    Attributes:
        embeddings: input embedding and output layer, rows of padding included.
        attention: projections and the norms inside attention, of all layers.
        dense_feed_forward: feed-forward of the dense layers.
        routed_experts: all routed experts of all layers.
        active_experts: the part of `routed_experts` that one token visits.
        shared_experts: experts every token visits.
        routers: router weights; the balancing bias is no parameter.
        norms: norms before attention and feed-forward, and the last one.
        multi_token_prediction: the multi-token prediction layers, all their experts included. They
            share both embeddings, of which a pipeline's last stage holds one more copy.
    """

    embeddings: int
    attention: int
    dense_feed_forward: int
    routed_experts: int
    active_experts: int
    shared_experts: int
    routers: int
    norms: int
    multi_token_prediction: int

    @property
    def total(self) -> int:
        """Everything that is trained."""
        return (
            self.embeddings
            + self.attention
            + self.dense_feed_forward
            + self.routed_experts
            + self.shared_experts
            + self.routers
            + self.norms
            + self.multi_token_prediction
        )

    @property
    def active(self) -> int:
        """What one token uses at inference.

        Everything but the experts it does not visit and the multi-token prediction layers, which
        are there for training.
        """
        idle_experts = self.routed_experts - self.active_experts
        return self.total - idle_experts - self.multi_token_prediction


def count_parameters(model: ModelSettings) -> ParameterCount:
    """Count the parameters of a model."""
    moe_layers = model.num_layers - model.num_dense_layers
    expert = gated_feed_forward(model.hidden_size, model.moe_ffn_hidden_size)
    return ParameterCount(
        embeddings=2 * model.padded_vocab_size * model.hidden_size,
        attention=model.num_layers * attention(model),
        dense_feed_forward=model.num_dense_layers
        * gated_feed_forward(model.hidden_size, model.ffn_hidden_size),
        routed_experts=moe_layers * model.num_experts * expert,
        active_experts=moe_layers * model.num_experts_per_token * expert,
        shared_experts=moe_layers * model.num_shared_experts * expert,
        routers=moe_layers * model.num_experts * model.hidden_size,
        norms=(2 * model.num_layers + 1) * model.hidden_size,
        multi_token_prediction=model.num_mtp_layers * multi_token_prediction_layer(model),
    )


def multi_token_prediction_layer(model: ModelSettings) -> int:
    """One layer of DeepSeek-V3, section 2.2: an expert layer, a projection and five norms."""
    hidden = model.hidden_size
    experts = model.num_experts + model.num_shared_experts
    return (
        2 * hidden * hidden
        + 5 * hidden
        + attention(model)
        + experts * gated_feed_forward(hidden, model.moe_ffn_hidden_size)
        + model.num_experts * hidden
    )


def gated_feed_forward(hidden_size: int, ffn_hidden_size: int) -> int:
    """Gate, up and down projections."""
    return 3 * hidden_size * ffn_hidden_size


def attention(model: ModelSettings) -> int:
    """One layer of multi-head latent attention (DeepSeek-V2, section 2.1)."""
    heads, hidden = model.num_attention_heads, model.hidden_size
    query_width = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    if model.q_lora_rank is None:
        query = hidden * query_width
    else:  # down, norm, up
        query = model.q_lora_rank * (hidden + 1 + query_width)
    key_value_down = hidden * (model.kv_lora_rank + model.qk_rope_head_dim) + model.kv_lora_rank
    key_value_up = model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    out = heads * model.v_head_dim * hidden
    return query + key_value_down + key_value_up + out
