"""How long the optimizer takes after the passes: elementwise work, Muon's products and messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_kanana.config.schema import OptimizerSettings

from .architecture import optimizer_of
from .calibration import ORTHOGONALIZATION, ORTHOGONALIZATION_LAUNCH, UPDATE_BYTES
from .communication import gradients, muon_exchange, ring
from .holdings import Holding, orthogonalization_cost
from .layer_times import Job, Parts, quantising_weights_seconds
from .layout import Stage


def update_parts(
    job: Job,
    rank_stages: Sequence[Stage],
    parameters: dict[Holding, int],
    optimizer: OptimizerSettings,
    *,
    gradient_bytes: int,
    last_backward: float,
    quantised: float = 0.0,
) -> Parts:
    """Parts of what follows a step's passes on a process.

    Args:
        parameters: that the process holds.
        optimizer: settings.
        gradient_bytes: of an element where gradients are reduced.
        last_backward: seconds of the last microbatch's backward passes, which hide the reduction of
            gradients if the layout overlaps them.
        quantised: weights of the process that have copies in fp8, made anew for the next step.
    """
    layout, machine, efficiencies = job.layout, job.machine, job.efficiencies
    shared_by = {"dense": layout.data, "experts": layout.expert_data}
    local: Counter[str] = Counter()
    moved = 0.0
    for (group, name), count in parameters.items():
        local[group] += count
        moved += UPDATE_BYTES[name] * count / shared_by[group]
    moved += gradient_bytes * sum(local.values())  # set to zero
    parts = Parts()
    parts["update"] = moved / (machine.memory_bandwidth * efficiencies.optimizer_memory)

    reduced = gradients(local["dense"], local["experts"], layout, machine, gradient_bytes)
    seconds = sum(message.seconds(machine, efficiencies) for message in reduced)
    hidden = last_backward if layout.overlaps_gradients else 0.0
    parts["messages: gradients"] = max(0.0, seconds - hidden)
    gathered = [
        ring(2.0 * local["dense"], layout.data, layout.tensor, machine),
        ring(
            2.0 * local["experts"],
            layout.expert_data,
            layout.expert_tensor * layout.expert,
            machine,
        ),
    ]
    parts["messages: weights"] = sum(m.seconds(machine, efficiencies) for m in gathered)
    if quantised:
        parts["quantising weights"] = quantising_weights_seconds(job, quantised)
    if optimizer.name == "muon":
        parts.add(_muon_parts(job, rank_stages, parameters, optimizer))
    return parts


def _muon_parts(
    job: Job,
    rank_stages: Sequence[Stage],
    parameters: dict[Holding, int],
    optimizer: OptimizerSettings,
) -> Parts:
    """Muon's products and exchange. Of what is exchanged, all but the first round is hidden."""
    layout, machine, efficiencies = job.layout, job.machine, job.efficiencies
    owners = {
        "dense": layout.data * layout.tensor,
        "experts": layout.expert_data * layout.expert_tensor,
    }
    total, largest = Parts(), Parts()
    shapes = set()
    for stage in rank_stages:
        for weight in stage.weights(job.architecture):
            if optimizer_of(weight, optimizer) != "muon":
                continue
            cost = orthogonalization_cost(weight)
            number = weight.number // layout.expert if weight.group == "experts" else 1
            total[weight.group] += cost * number
            largest[weight.group] = max(largest[weight.group], cost)
            shapes |= {(rows, weight.columns) for rows in weight.matrices or (weight.rows,)}
    # Work is dealt by whole weights: the busiest has its share, or the largest weight.
    busiest = sum(max(total[group] / owners[group], largest[group]) for group in total)
    flops = optimizer.orthogonalization_steps * busiest
    parts = Parts()
    share = ORTHOGONALIZATION.get(machine.name, min(ORTHOGONALIZATION.values()))
    computing = flops / (machine.bf16_flops * share)
    parts["orthogonalisation"] = max(computing, ORTHOGONALIZATION_LAUNCH * len(shapes))
    dense, experts = (parameters.get((group, "muon"), 0) for group in ("dense", "experts"))
    exchanged = muon_exchange(dense, experts, layout, machine)
    seconds = sum(message.seconds(machine, efficiencies) for message in exchanged)
    parts["messages: Muon"] = max(seconds - computing, seconds / 4)
    return parts
