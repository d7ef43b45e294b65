"""A network as the planner sees it: its weights, layer by layer, and the widths of its attention.

Kanana-2 and DeepSeek-V3 have multi-head latent attention (MLA). Grouped-query attention is here
too, because the only public figures for some layouts are those of models that have it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_kanana.config.precision_settings import DENSE_WEIGHTS
from megatron_kanana.config.schema import ModelSettings, OptimizerSettings

ADAMW_KINDS = ("router", "embedding", "output_layer", "vector")
"""Kinds of weights that Muon leaves to AdamW unless the settings say otherwise."""

EXPERTS = "experts"
ALL_FP8 = frozenset({*DENSE_WEIGHTS, "query_key_value", EXPERTS})
"""Everything that can compute in fp8: kinds of dense weights, and routed and shared experts."""
OUTPUT_LAYER = "output_layer"
"""Kind of the output layer's weight; beside `ALL_FP8` where its products are in fp8."""
EXPERT_GRADIENTS = "expert_weight_gradients"
"""Beside `EXPERTS` where the products of their weights' gradients are in fp8 as well."""
KEPT_ACTIVATIONS = "kept_activations"
"""Beside `EXPERTS` where these keep gate and up in fp8."""


@dataclass(frozen=True)
class Weight:
    """Weights of one kind in one layer.

    Attributes:
        kind: as in `config.schema.PARAMETER_KINDS`; 'vector' for norms.
        rows, columns: of the whole weight, [output, input].
        is_split: whether tensor parallelism splits it.
        number: how many there are, as for routed experts.
        group: 'experts' for routed experts, else 'dense'.
        of_experts: whether it is one of routed or shared experts.
        matrices: rows of each matrix that Muon makes orthogonal, repeated if it holds several;
            empty means the whole.
    """

    kind: str
    rows: int
    columns: int
    is_split: bool = True
    number: int = 1
    group: str = "dense"
    matrices: tuple[int, ...] = ()
    of_experts: bool = False

    @property
    def format_key(self) -> str:
        """What `layer_times.Job.fp8` has where products with it are in fp8."""
        return EXPERTS if self.of_experts else self.kind

    @property
    def size(self) -> int:
        """Elements of all of them."""
        return self.number * self.rows * self.columns

    def local_size(self, tensor: int, expert: int, expert_tensor: int) -> int:
        """Elements on one process of a layout with these sizes."""
        if self.group == "experts":
            return self.size // expert // expert_tensor
        return self.size // tensor if self.is_split else self.size


@dataclass(frozen=True)
class Architecture:
    """Sizes of a network.

    Attributes:
        num_layers, num_dense_layers: transformer layers, and the first ones without experts.
        hidden_size: width of the residual stream.
        vocab_size: rows of embedding and output layer, padding included.
        num_heads: query heads.
        query_key_dim, value_dim: widths of one head in the products of attention.
        ffn_hidden_size: width of the dense layers.
        num_experts, num_experts_per_token, expert_hidden_size: routed experts.
        shared_hidden_size: width of the shared experts together.
        kv_lora_rank, q_lora_rank, rope_dim: of MLA; no `kv_lora_rank` is grouped-query attention.
        num_key_value_heads: of grouped-query attention.
        num_mtp_layers: multi-token prediction layers.
        num_routing_nodes: on how many nodes a token's experts lie at most (DeepSeek-V3, 2.1.2);
            None if its routing knows no nodes.
    """

    num_layers: int
    num_dense_layers: int
    hidden_size: int
    vocab_size: int
    num_heads: int
    query_key_dim: int
    value_dim: int
    ffn_hidden_size: int
    num_experts: int
    num_experts_per_token: int
    expert_hidden_size: int
    shared_hidden_size: int
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    rope_dim: int = 0
    num_key_value_heads: int = 0
    num_mtp_layers: int = 0
    num_routing_nodes: int | None = None

    @classmethod
    def of(cls, model: ModelSettings) -> Architecture:
        """The sizes in a model's settings."""
        return cls(
            num_layers=model.num_layers,
            num_dense_layers=model.num_dense_layers,
            hidden_size=model.hidden_size,
            vocab_size=model.padded_vocab_size,
            num_heads=model.num_attention_heads,
            query_key_dim=model.qk_nope_head_dim + model.qk_rope_head_dim,
            value_dim=model.v_head_dim,
            ffn_hidden_size=model.ffn_hidden_size,
            num_experts=model.num_experts,
            num_experts_per_token=model.num_experts_per_token,
            expert_hidden_size=model.moe_ffn_hidden_size,
            shared_hidden_size=model.shared_expert_hidden_size,
            kv_lora_rank=model.kv_lora_rank,
            q_lora_rank=model.q_lora_rank,
            rope_dim=model.qk_rope_head_dim,
            num_mtp_layers=model.num_mtp_layers,
        )

    def attention(self) -> list[Weight]:
        """Attention of one layer, its own norms included."""
        hidden, heads = self.hidden_size, self.num_heads
        out = Weight("attention_output", hidden, heads * self.value_dim)
        if self.kv_lora_rank is None:
            keys = self.num_key_value_heads
            rows = (heads + keys) * self.query_key_dim + keys * self.value_dim
            norms = Weight("vector", 2, self.query_key_dim, is_split=False)
            return [Weight("query_key_value", rows, hidden), norms, out]
        queries = heads * self.query_key_dim
        if self.q_lora_rank is None:
            query = [Weight("query", queries, hidden)]
        else:
            query = [
                Weight("query_down", self.q_lora_rank, hidden, is_split=False),
                Weight("vector", 1, self.q_lora_rank, is_split=False),
                Weight("query_up", queries, self.q_lora_rank),
            ]
        latent, keys = self.kv_lora_rank, self.query_key_dim - self.rope_dim
        down = (latent, self.rope_dim)
        up = (heads * keys, heads * self.value_dim)
        return [
            *query,
            Weight("key_value_down", sum(down), hidden, is_split=False, matrices=down),
            Weight("vector", 1, latent, is_split=False),
            Weight("key_value_up", sum(up), latent, matrices=up),
            out,
        ]

    def dense_feed_forward(self) -> list[Weight]:
        """Feed-forward of a dense layer."""
        return self._gated(self.ffn_hidden_size)

    def experts(self) -> list[Weight]:
        """Router, routed and shared experts of one layer."""
        router = Weight("router", self.num_experts, self.hidden_size, is_split=False)
        routed = self._gated(self.expert_hidden_size, self.num_experts, "experts")
        shared = self._gated(self.shared_hidden_size) if self.shared_hidden_size else []
        return [
            router,
            *(dataclasses.replace(each, of_experts=True) for each in (*routed, *shared)),
        ]

    def layer(self, *, is_moe: bool) -> list[Weight]:
        """One transformer layer."""
        norms = Weight("vector", 2, self.hidden_size, is_split=False)
        feed_forward = self.experts() if is_moe else self.dense_feed_forward()
        return [norms, *self.attention(), *feed_forward]

    def mtp_layer(self) -> list[Weight]:
        """One multi-token prediction layer without its copy of the embedding."""
        hidden = self.hidden_size
        norms = Weight("vector", 3, hidden, is_split=False)
        return [norms, Weight("mtp_projection", hidden, 2 * hidden), *self.layer(is_moe=True)]

    def embedding(self) -> list[Weight]:
        """The embedding, on the first stage, and with multi-token prediction on the last too."""
        return [Weight("embedding", self.vocab_size, self.hidden_size)]

    def output_layer(self) -> list[Weight]:
        """The last norm and the output layer."""
        norm = Weight("vector", 1, self.hidden_size, is_split=False)
        return [norm, Weight(OUTPUT_LAYER, self.vocab_size, self.hidden_size)]

    def _gated(self, width: int, number: int = 1, group: str = "dense") -> list[Weight]:
        """Gate and up projections in one weight, and the down projection."""
        hidden = self.hidden_size
        return [
            Weight("gate_up", 2 * width, hidden, True, number, group, matrices=(width, width)),
            Weight("down", hidden, width, True, number, group),
        ]


def optimizer_of(weight: Weight, settings: OptimizerSettings) -> str:
    """'muon' or 'adamw', as `optimizer/logical_matrices.py` decides it."""
    kind = weight.kind
    if settings.name != "muon" or kind == "vector" or kind in settings.adamw_kinds:
        return "adamw"
    return "adamw" if kind in ADAMW_KINDS and kind not in settings.muon_kinds else "muon"


def multiply_size(weights: Iterable[Weight]) -> int:
    """Elements that a token is multiplied with: matrices that are not looked up, one expert each.

    Routed experts count once; multiply them by the experts that a token visits.
    """
    return sum(
        weight.size // weight.number
        for weight in weights
        if weight.kind not in ("vector", "embedding")
    )
