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


def orthogonalization_cost(weight: Weight) -> float:
    """Operations of one plain iteration on each of a weight's matrices, for one of its number."""
    total = 0.0
    for rows in weight.matrices or (weight.rows,):
        short, long = sorted((rows, weight.columns))
        total += 4.0 * short * short * long + 2.0 * short**3
    return total
