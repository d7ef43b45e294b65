"""The matrices that each parameter holds, and which optimizer updates it: one table for all.

A weight as megatron-core stores it may hold several matrices of the mathematics: keys and values
of every head in one tensor, gate and up projection in another. Muon orthogonalises the latter, so
every parameter is declared here; one that no rule names is an error. Weights are [rows, columns] =
[output, input]; a parameter of three dimensions is a stack of such weights, one an expert.

Rows of a weight are `groups` repetitions of the same parts, for example 32 heads x [key | value].
A logical matrix is one part of all groups together, or of each group alone.
"""

from __future__ import annotations

import enum
import fnmatch
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from megatron_kanana.config.schema import ModelSettings


class Groups(enum.Enum):
    """How often the parts of a weight follow one another in its rows."""

    ONE = "once"
    HEADS = "once for each attention head"
    SHARDS = "once for each tensor-parallel shard, in the concatenation of the shards"


@dataclass(frozen=True)
class Part:
    """One logical matrix of a weight, or one a head.

    Attributes:
        name: what it is called in `optimizer.per_head`.
        rows: its rows in one group; None for an equal share of the group's.
    """

    name: str
    rows: Callable[[ModelSettings], int] | None = None


@dataclass(frozen=True)
class Rule:
    """What the parameters of one kind hold.

    Attributes:
        kind: what they are called in `optimizer.muon_kinds` and `optimizer.adamw_kinds`.
        patterns: shell patterns of their names.
        parts: logical matrices; none for vectors, which are always AdamW's.
        groups: how often the parts are repeated.
        shard_axis: axis that tensor parallelism splits; None where each process holds all of it.
        muon: whether Muon updates them unless the settings say otherwise.
    """

    kind: str
    patterns: tuple[str, ...]
    parts: tuple[Part, ...] = ()
    groups: Groups = Groups.ONE
    shard_axis: int | None = None
    muon: bool = True


LOGICAL_MATRICES = (
    # Multi-head latent attention (DeepSeek-V2, section 2.1)
    Rule(
        "query",
        ("*.self_attention.linear_q_proj.weight",),
        (Part("query"),),
        Groups.HEADS,
        shard_axis=0,
    ),
    Rule(
        "query_down",
        ("*.self_attention.linear_q_down_proj.weight",),
        (Part("query_down"),),
    ),
    Rule(
        "query_up",
        ("*.self_attention.linear_q_up_proj.weight",),
        (Part("query"),),
        Groups.HEADS,
        shard_axis=0,
    ),
    Rule(
        "key_value_down",
        ("*.self_attention.linear_kv_down_proj.weight",),
        (
            Part("latent", lambda model: model.kv_lora_rank),
            Part("rope_key", lambda model: model.qk_rope_head_dim),
        ),
    ),
    Rule(
        "key_value_up",
        ("*.self_attention.linear_kv_up_proj.weight",),
        (
            Part("key", lambda model: model.qk_nope_head_dim),
            Part("value", lambda model: model.v_head_dim),
        ),
        Groups.HEADS,
        shard_axis=0,
    ),
    Rule(
        "attention_output",
        ("*.self_attention.linear_proj.weight",),
        (Part("attention_output"),),
        shard_axis=1,
    ),
    # Feed-forward: dense, shared experts, and each routed expert by itself
    Rule(
        "gate_up",
        ("*.linear_fc1.weight", "*.mlp.experts.gate_up"),
        (Part("gate"), Part("up")),
        Groups.SHARDS,
        shard_axis=0,
    ),
    Rule("down", ("*.linear_fc2.weight", "*.mlp.experts.down"), (Part("down"),), shard_axis=1),
    # Multi-token prediction: projection of a hidden state beside an embedding
    Rule("mtp_projection", ("*.eh_proj.weight",), (Part("mtp_projection"),), shard_axis=0),
    # Matrices whose rows are looked up or scored one by one
    Rule("router", ("*.router.weight",), (Part("router"),), muon=False),
    Rule(
        "embedding",
        ("embedding.word_embeddings.weight",),
        (Part("embedding"),),
        shard_axis=0,
        muon=False,
    ),
    Rule(
        "output_layer", ("output_layer.weight",), (Part("output_layer"),), shard_axis=0, muon=False
    ),
    # Vectors
    Rule("norm", ("*layernorm.weight", "*.enorm.weight", "*.hnorm.weight"), muon=False),
    Rule("bias", ("*.bias",), muon=False),
)


class UnknownParameterError(Exception):
    """Raised for parameters that no rule of the table names."""


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes of megatron-core's wrappers."""
    return name.rpartition("module.")[2]


def rule_of(name: str) -> Rule:
    """The rule for the parameter called `name`, with or without wrappers' prefixes.

    Raises:
        UnknownParameterError: there is none.
    """
    plain = plain_name(name)
    for rule in LOGICAL_MATRICES:
        if any(fnmatch.fnmatchcase(plain, pattern) for pattern in rule.patterns):
            return rule
    raise UnknownParameterError(
        f"no rule of LOGICAL_MATRICES names the parameter {plain}: say there which matrices it"
        " holds and which optimizer updates it"
    )


def is_muon(rule: Rule, muon_kinds: Collection[str], adamw_kinds: Collection[str]) -> bool:
    """Whether Muon updates the parameters of a rule.

    Args:
        rule: rule of the table.
        muon_kinds, adamw_kinds: kinds whose optimizer the settings change.
    """
    return (
        bool(rule.parts) and (rule.kind in muon_kinds or rule.muon) and rule.kind not in adamw_kinds
    )


def split(
    rule: Rule,
    weight: torch.Tensor,
    model: ModelSettings,
    num_shards: int,
    per_head: Collection[str] = (),
) -> list[torch.Tensor]:
    """The logical matrices of a whole weight, as [matrices, rows, columns], one tensor a part.

    Args:
        rule: the weight's rule.
        weight: [rows, columns], the tensor-parallel shards concatenated along `rule.shard_axis`.
        model: gives the sizes of heads and of the latent.
        num_shards: how many shards were concatenated.
        per_head: parts of which each head is a matrix of its own.
    """
    groups = _num_groups(rule, model, num_shards)
    by_group = weight.view(groups, -1, weight.shape[1])
    parts = by_group.split(_rows(rule, by_group.shape[1], model), dim=1)
    return [
        rows if _is_per_head(rule, part, per_head) else rows.reshape(1, -1, weight.shape[1])
        for part, rows in zip(rule.parts, parts, strict=True)
    ]


def merge(
    rule: Rule, matrices: Sequence[torch.Tensor], model: ModelSettings, num_shards: int
) -> torch.Tensor:
    """The whole weight of which `matrices` are the logical matrices: the inverse of `split`."""
    groups = _num_groups(rule, model, num_shards)
    columns = matrices[0].shape[-1]
    parts = [part.reshape(groups, -1, columns) for part in matrices]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return whole.reshape(-1, columns)


def matrix_shapes(
    rule: Rule,
    shape: tuple[int, int],
    model: ModelSettings,
    num_shards: int,
    per_head: Collection[str] = (),
) -> list[tuple[int, int, int]]:
    """Shapes of what `split` gives for a whole weight of `shape`: (matrices, rows, columns)."""
    groups = _num_groups(rule, model, num_shards)
    return [
        (groups, rows, shape[1])
        if _is_per_head(rule, part, per_head)
        else (1, groups * rows, shape[1])
        for part, rows in zip(rule.parts, _rows(rule, shape[0] // groups, model), strict=True)
    ]


def _is_per_head(rule: Rule, part: Part, per_head: Collection[str]) -> bool:
    return rule.groups is Groups.HEADS and part.name in per_head


def _num_groups(rule: Rule, model: ModelSettings, num_shards: int) -> int:
    counts = {
        Groups.ONE: 1,
        Groups.HEADS: model.num_attention_heads,
        Groups.SHARDS: num_shards,
    }
    return counts[rule.groups]


def _rows(rule: Rule, group_rows: int, model: ModelSettings) -> list[int]:
    """Rows of each part in one group."""
    share = group_rows // len(rule.parts)
    return [share if part.rows is None else part.rows(model) for part in rule.parts]
