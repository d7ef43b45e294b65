"""muP: learning rate and initial weights of one width used at another (arXiv 2608.20061).

Kakao's width proxies keep depth, head size, expert width, experts a token and MLA's ranks, and
grow hidden size, heads and experts together. For each class of parameter, tables 1 and 2 of the
paper say how learning rate and initial variance follow the number of inputs (fan-in). A base
model, which has another hidden size and as many heads less or more, gives the fan-in to compare
with.

With m = width / base width, the output layer's logits are divided by m, as in Tensor Programs V
(arXiv 2203.03466, table 8), whose output weights are of the class the paper puts them in. Here the
divisor is part of the weights: they start m times smaller, learn with a rate m times smaller and
decay by a factor m times larger, which is the same to AdamW; so a checkpoint is that of a plain
model.
"""

from __future__ import annotations

import dataclasses
import enum
import fnmatch
import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_kanana.config.schema import ModelSettings, TransferSettings

from .logical_matrices import plain_name, rule_of


class Scaling(enum.Enum):
    """How a hyperparameter follows the width."""

    CONSTANT = "the same at any width"
    FAN_IN = "times the base model's fan-in over the model's"


@dataclass(frozen=True)
class WidthRule:
    """How the parameters of one class follow the width.

    Attributes:
        kind: kind of the parameters in the table of logical matrices.
        fan_in: inputs of one output; None for vectors.
        learning_rate: how the learning rate follows.
        variance: how the initial variance follows. CONSTANT ones start with `vector_init_std`, the
            others with `matrix_init_std` at the base width.
        names: shell pattern that narrows the rule to some parameters of the kind.
    """

    kind: str
    fan_in: Callable[[ModelSettings], int | None]
    learning_rate: Scaling = Scaling.FAN_IN
    variance: Scaling = Scaling.FAN_IN
    names: str = "*"


def _hidden_size(model: ModelSettings) -> int:
    return model.hidden_size


WIDTH_RULES = (
    # Matrix-like: attention, dense feed-forward, router, and the experts' gate and up projections.
    # Fan-ins that no width changes (MLA's ranks, the dense layers' width) make their factors 1.
    WidthRule("query", _hidden_size),
    WidthRule("query_down", _hidden_size),
    WidthRule("query_up", lambda model: model.q_lora_rank),
    WidthRule("key_value_down", _hidden_size),
    WidthRule("key_value_up", lambda model: model.kv_lora_rank),
    WidthRule("attention_output", lambda model: model.num_attention_heads * model.v_head_dim),
    WidthRule("gate_up", _hidden_size),
    WidthRule("router", _hidden_size),
    WidthRule("mtp_projection", lambda model: 2 * model.hidden_size),
    # Vector-like for the learning rate: the experts' down projections, routed and shared
    WidthRule(
        "down",
        lambda model: model.shared_expert_hidden_size,
        learning_rate=Scaling.CONSTANT,
        names="*.shared_experts.*",
    ),
    WidthRule(
        "down",
        lambda model: model.moe_ffn_hidden_size,
        learning_rate=Scaling.CONSTANT,
        names="*.experts.*",
    ),
    WidthRule("down", lambda model: model.ffn_hidden_size),
    # Vector-like: embeddings in and out, and true vectors
    WidthRule("embedding", _hidden_size, Scaling.CONSTANT, Scaling.CONSTANT),
    WidthRule("output_layer", _hidden_size, Scaling.CONSTANT, Scaling.CONSTANT),
    WidthRule("norm", lambda model: None, Scaling.CONSTANT, Scaling.CONSTANT),
    WidthRule("bias", lambda model: None, Scaling.CONSTANT, Scaling.CONSTANT),
)


def width_rule(name: str) -> WidthRule:
    """The rule for the parameter or the checkpoint's tensor called `name`.

    Raises:
        UnknownParameterError: no rule of the table of logical matrices names it.
    """
    kind, plain = rule_of(name).kind, plain_name(name)
    return next(
        rule for rule in WIDTH_RULES if rule.kind == kind and fnmatch.fnmatchcase(plain, rule.names)
    )


def base_model(model: ModelSettings, base_hidden_size: int) -> ModelSettings:
    """The model at the base width: hidden size and heads shrink, heads keep their size.

    The number of experts, which shrinks with them, is no parameter's fan-in and is left alone.
    """
    heads = model.num_attention_heads * base_hidden_size // model.hidden_size
    return dataclasses.replace(model, hidden_size=base_hidden_size, num_attention_heads=heads)


def learning_rate_factor(name: str, model: ModelSettings, transfer: TransferSettings) -> float:
    """Learning rate of the parameter called `name` over that of the settings; 1 without muP.

    Raises:
        UnknownParameterError: with muP, no rule of the table of logical matrices names it.
    """
    if transfer.base_hidden_size is None:
        return 1.0
    rule = width_rule(name)
    factor = _factor(rule.learning_rate, rule, model, transfer.base_hidden_size)
    return factor * _output_multiplier(rule, model, transfer)


def weight_decay_factor(name: str, model: ModelSettings, transfer: TransferSettings) -> float:
    """Weight decay of the parameter called `name` over that of the settings; 1 without muP.

    It differs for the output layer alone, so that rate times decay is what it would be with the
    divisor outside the weights.

    Raises:
        UnknownParameterError: with muP, no rule of the table of logical matrices names it.
    """
    if transfer.base_hidden_size is None:
        return 1.0
    return 1.0 / _output_multiplier(width_rule(name), model, transfer)


def initial_std(name: str, model: ModelSettings, transfer: TransferSettings) -> float:
    """Standard deviation of the initial matrix called `name`, before depth is taken into account.

    Args:
        name: of a parameter, or of its tensor in a checkpoint.
        model: the model at its own width.
        transfer: base width and standard deviations there; without a base `model.init_std`.

    Raises:
        UnknownParameterError: with muP, no rule of the table of logical matrices names it.
    """
    if transfer.base_hidden_size is None:
        return model.init_std
    rule = width_rule(name)
    is_vector = rule.variance is Scaling.CONSTANT
    base_std = transfer.vector_init_std if is_vector else transfer.matrix_init_std
    factor = math.sqrt(_factor(rule.variance, rule, model, transfer.base_hidden_size))
    multiplier = _output_multiplier(rule, model, transfer)
    return (model.init_std if base_std is None else base_std) * factor * multiplier


def _factor(
    scaling: Scaling, rule: WidthRule, model: ModelSettings, base_hidden_size: int
) -> float:
    own, base = rule.fan_in(model), rule.fan_in(base_model(model, base_hidden_size))
    if scaling is Scaling.CONSTANT or own is None or base is None:
        return 1.0
    return base / own


def _output_multiplier(rule: WidthRule, model: ModelSettings, transfer: TransferSettings) -> float:
    if rule.kind != "output_layer" or not transfer.scale_output:
        return 1.0
    assert transfer.base_hidden_size is not None
    return transfer.base_hidden_size / model.hidden_size
