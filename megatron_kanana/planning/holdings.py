"""Elements of weights on the processes of a pipeline rank, as the dry run finds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from megatron_kanana.config.schema import OptimizerSettings

from .architecture import Architecture, Weight, optimizer_of
from .layout import Layout, Stage

WEIGHT_BYTES = 2
GRADIENT_BYTES = {True: 4, False: 2}
"""By `precision.reduce_gradients_in_fp32`."""
OPTIMIZER_BYTES = {"muon": 4 + 4, "adamw": 4 + 8}
"""fp32 weights, and momentum or two moments."""

COPY_BYTES = 2
"""Of a weight in fp8: one byte in each order, for the products forward and backward. Scales of
blocks of 128 x 128 do not count."""

Holding = tuple[str, str]
"""'dense' or 'experts', and 'muon' or 'adamw'."""


def local_parameters(
    architecture: Architecture,
    layout: Layout,
    rank_stages: Iterable[Stage],
    optimizer: OptimizerSettings,
) -> dict[Holding, int]:
    """Elements that a process of a pipeline rank holds, before sharding over data parallelism."""
    counts: Counter[Holding] = Counter()
    for stage in rank_stages:
        for weight in stage.weights(architecture):
            size = weight.local_size(layout.tensor, layout.expert, layout.expert_tensor)
            counts[weight.group, optimizer_of(weight, optimizer)] += size
    return {holding: count for holding, count in counts.items() if count}


def state_bytes(
    parameters: dict[Holding, int],
    layout: Layout,
    *,
    fp32_gradients: bool,
) -> dict[str, float]:
    """Bytes of 'weights', 'gradients' and the process's share of the 'optimizer'.

    With weights sharded over data parallelism, all three are shares.
    """
    sharded = {"dense": layout.data, "experts": layout.expert_data}
    whole = {group: 1 if not layout.shards_weights else count for group, count in sharded.items()}
    local = sum(count / whole[group] for (group, _), count in parameters.items())
    return {
        "weights": WEIGHT_BYTES * local,
        "gradients": GRADIENT_BYTES[fp32_gradients] * local,
        "optimizer": sum(
            OPTIMIZER_BYTES[optimizer] * count / sharded[group]
            for (group, optimizer), count in parameters.items()
        ),
    }


def quantised_weights(
    architecture: Architecture,
    layout: Layout,
    rank_stages: Iterable[Stage],
    fp8: frozenset[str],
    bf16_layers: tuple[int, int],
) -> int:
    """Elements of a process's weights that have copies in fp8, kept from step to step.

    Args:
        fp8, bf16_layers: as `layer_times.Job` has them.
    """
    count = 0
    for stage in rank_stages:
        of_format = stage.layers_by_format(architecture.num_layers, bf16_layers)
        for is_moe, in_fp8, layers in of_format:
            if in_fp8:
                weights = architecture.layer(is_moe=is_moe)
                count += layers * sum(_quantised(weight, layout, fp8) for weight in weights)
        for weight in architecture.mtp_layer():
            if weight.kind == "mtp_projection":
                count += stage.mtp * _quantised(weight, layout, fp8)
    return count


def _quantised(weight: Weight, layout: Layout, fp8: frozenset[str]) -> int:
    if weight.format_key not in fp8:
        return 0
    return weight.local_size(layout.tensor, layout.expert, layout.expert_tensor)


def orthogonalization_cost(weight: Weight) -> float:
    """Operations of one plain iteration on each of a weight's matrices, for one of its number."""
    total = 0.0
    for rows in weight.matrices or (weight.rows,):
        short, long = sorted((rows, weight.columns))
        total += 4.0 * short * short * long + 2.0 * short**3
    return total
