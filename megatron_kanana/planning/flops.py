"""Floating-point operations of training.

6 operations a token for each weight that it is multiplied with (2 forward, 4 backward), and those
of causal attention: 2 H S^2 (q + v) / 2 forward for H heads of widths q (query and key) and v, and
twice that backward. Embeddings are looked up and count nothing; neither does what is computed
again. Routed experts count for the tokens they get. This is the convention of the measurements it
is compared with.
"""

from __future__ import annotations

from .architecture import Architecture, multiply_size


def attention_flops(architecture: Architecture, sequence_length: int) -> float:
    """Of causal attention's two products, forward, one sequence, one layer, all heads."""
    widths = architecture.query_key_dim + architecture.value_dim
    return float(architecture.num_heads * sequence_length**2 * widths)


def multiply_size_of_layer(architecture: Architecture, *, is_moe: bool) -> int:
    """Weights that one token is multiplied with in a layer."""
    size = multiply_size(architecture.attention())
    if not is_moe:
        return size + multiply_size(architecture.dense_feed_forward())
    experts = architecture.experts()
    routed = [weight for weight in experts if weight.group == "experts"]
    others = [weight for weight in experts if weight.group != "experts"]
    return size + multiply_size(others) + architecture.num_experts_per_token * multiply_size(routed)


def flops_per_token(
    architecture: Architecture, sequence_length: int, *, with_mtp: bool = True
) -> float:
    """Operations of one token's training, multi-token prediction with its logits included."""
    dense, mtp = architecture.num_dense_layers, architecture.num_mtp_layers if with_mtp else 0
    moe = architecture.num_layers - dense
    head = architecture.vocab_size * architecture.hidden_size
    size = (
        dense * multiply_size_of_layer(architecture, is_moe=False)
        + (moe + mtp) * multiply_size_of_layer(architecture, is_moe=True)
        + (1 + mtp) * head
        + mtp * 2 * architecture.hidden_size**2
    )
    layers = architecture.num_layers + mtp
    attention = layers * attention_flops(architecture, sequence_length) / sequence_length
    return 6.0 * size + 3.0 * attention
