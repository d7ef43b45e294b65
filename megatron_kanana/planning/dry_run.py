"""What chosen processes of a large job would hold, found by building it, without the job.

megatron-core's own modules are built, for one process after another, on torch's meta device: all
shapes, placements and checks are those of the real run, memory and machines are not needed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_kanana.config import Settings
from megatron_kanana.device.imagined import imagined_process, imagined_processes

from .holdings import GRADIENT_BYTES, OPTIMIZER_BYTES, WEIGHT_BYTES, Holding
from .parameters import count_parameters


@dataclass(frozen=True)
class ProcessPlan:
    """What one process holds.

    Attributes:
        rank: of the process, in the whole job.
        tensor_rank, pipeline_rank, expert_rank, data_rank: its place in the layout.
        stages: for each of its virtual stages what lies there: 'embedding', numbers of layers from
            1, 'output layer'.
        parameters: elements of the weights, before sharding over data parallelism.
        sharded_over: processes that share the optimizer's state of 'dense' and 'experts'.
        orthogonalization_imbalance: for 'dense' and 'experts', the orthogonalisations of the
            process with most to do over the mean of those that share them.
    """

    rank: int
    tensor_rank: int
    pipeline_rank: int
    expert_rank: int
    data_rank: int
    stages: tuple[tuple[str, ...], ...]
    parameters: dict[Holding, int]
    sharded_over: dict[str, int]
    orthogonalization_imbalance: dict[str, float]

    @property
    def num_parameters(self) -> int:
        """Elements of all its weights."""
        return sum(self.parameters.values())

    def state_bytes(self, settings: Settings) -> dict[str, float]:
        """Bytes of 'weights', 'gradients' and 'optimizer'; activations are not among them."""
        gradient = GRADIENT_BYTES[settings.precision.reduce_gradients_in_fp32]
        return {
            "weights": WEIGHT_BYTES * self.num_parameters,
            "gradients": gradient * self.num_parameters,
            "optimizer": sum(
                OPTIMIZER_BYTES[optimizer] * count / self.sharded_over[group]
                for (group, optimizer), count in self.parameters.items()
            ),
        }


@dataclass
class Coverage:
    """Which parts of which parameters some process writes into a checkpoint.

    Attributes:
        sizes: elements of each whole parameter.
        writers: for each part, by its parameter and place, how many processes write it.
        volumes: elements of each part.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    writers: Counter[tuple[str, tuple[int, ...]]] = field(default_factory=Counter)
    volumes: dict[tuple[str, tuple[int, ...]], int] = field(default_factory=dict)

    def add(self, shard: Any) -> None:
        """Note one of megatron-core's ShardedTensors."""
        place = (shard.key, tuple(shard.global_offset))
        self.sizes[shard.key] = math.prod(shard.global_shape)
        self.volumes[place] = math.prod(shard.local_shape)
        is_writer = shard.replica_id in (0, (0,) * len(_as_tuple(shard.replica_id)))
        self.writers[place] += int(is_writer)

    def problems(self, settings: Settings) -> list[str]:
        """Why the parts are not exactly the whole model; none if they are.

        Only all processes of a job together, or one of each kind, cover the model.
        """
        found = [
            f"{key} at {offset} is written by {count} processes"
            for (key, offset), count in self.writers.items()
            if count != 1
        ]
        held: Counter[str] = Counter()
        for (key, _), volume in self.volumes.items():
            held[key] += volume
        found += [
            f"{key}: {held[key]:,} of {size:,} elements have a place"
            for key, size in self.sizes.items()
            if held[key] != size
        ]
        total, expected = sum(held.values()), count_parameters(settings.model).total
        if total != expected:
            found.append(f"{total:,} parameters have a place, the model has {expected:,}")
        return found


def first_of_each_stage(settings: Settings, world_size: int) -> list[int]:
    """A process of each pipeline stage."""
    stages = settings.parallel.pipeline_parallel_size
    return [stage * world_size // stages for stage in range(stages)]


def dry_run(
    settings: Settings, world_size: int, ranks: Iterable[int], coverage: Coverage | None = None
) -> Iterator[ProcessPlan]:
    """Build what each of `ranks` would hold, one after another.

    Args:
        settings: checked for `world_size` processes.
        world_size: processes of the job.
        ranks: processes to build.
        coverage: is told every part of a parameter.

    Raises:
        UnknownParameterError: a parameter has no rule that says how it is updated.
    """
    with imagined_processes(settings) as where:
        for rank in ranks:
            with imagined_process(settings, rank, world_size):
                yield _plan_of_this_process(settings, rank, where, coverage)


def _plan_of_this_process(
    settings: Settings, rank: int, where: Any, coverage: Coverage | None
) -> ProcessPlan:
    from megatron.core import parallel_state

    from megatron_kanana.kernels.backend import REFERENCE
    from megatron_kanana.model.builder import gpt_model
    from megatron_kanana.model.initialization import shards
    from megatron_kanana.model.megatron_config import transformer_config

    config = transformer_config(settings, where)
    count = settings.parallel.virtual_pipeline_stages
    chunks = [
        gpt_model(settings, config, REFERENCE, stage if count > 1 else None)
        for stage in range(count)
    ]
    if coverage is not None:
        for chunk in chunks:
            parameters = {id(parameter) for parameter in chunk.parameters()}
            for entry in chunk.sharded_state_dict().values():
                if id(entry.data) in parameters:
                    for shard in shards(entry):
                        coverage.add(shard)
    dense = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    experts = parallel_state.get_expert_data_parallel_world_size()
    return ProcessPlan(
        rank=rank,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        stages=tuple(_contents(chunk) for chunk in chunks),
        parameters=_parameters(settings, chunks),
        sharded_over={"dense": dense, "experts": experts},
        orthogonalization_imbalance=_imbalance(settings, chunks, dense, experts),
    )


def _contents(chunk: Any) -> tuple[str, ...]:
    """What lies on a stage, in order."""
    layers = [str(layer.layer_number) for layer in chunk.decoder.layers]
    predicting = chunk.mtp.layers if getattr(chunk, "mtp", None) is not None else ()
    return (
        *(["embedding"] if chunk.pre_process else []),
        *layers,
        *["multi-token prediction" for _ in predicting],
        *(["output layer"] if chunk.post_process else []),
    )


def _parameters(settings: Settings, chunks: list[Any]) -> dict[Holding, int]:
    counts: Counter[Holding] = Counter()
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            optimizer = "muon" if _is_muon(name, settings) else "adamw"
            counts[_group(name), optimizer] += parameter.numel()
    return dict(counts)


def _imbalance(settings: Settings, chunks: list[Any], dense: int, experts: int) -> dict[str, float]:
    """How evenly Muon's work is dealt, as `optimizer.distributed_muon` deals it."""
    from megatron_kanana.optimizer.assignment import assign, orthogonalization_cost
    from megatron_kanana.optimizer.logical_matrices import matrix_shapes, rule_of

    parallel = settings.parallel
    shards = {
        "dense": parallel.tensor_parallel_size,
        "experts": parallel.expert_tensor_parallel_size,
    }
    costs: dict[str, list[int]] = {"dense": [], "experts": []}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if not _is_muon(name, settings):
                continue
            rule, group = rule_of(name), _group(name)
            num_shards = 1 if rule.shard_axis is None else shards[group]
            *stack, rows, columns = parameter.shape
            shape = [rows, columns]
            shape[rule.shard_axis or 0] *= num_shards
            whole = matrix_shapes(
                rule, (shape[0], shape[1]), settings.model, num_shards, settings.optimizer.per_head
            )
            costs[group] += [orthogonalization_cost(whole)] * math.prod(stack)
    owners = {"dense": dense * shards["dense"], "experts": experts * shards["experts"]}
    imbalance = {}
    for group, of_group in costs.items():
        load = [0] * owners[group]
        for cost, owner in zip(of_group, assign(of_group, owners[group]), strict=True):
            load[owner] += cost
        if sum(load):
            imbalance[group] = max(load) * len(load) / sum(load)
    return imbalance


def _is_muon(name: str, settings: Settings) -> bool:
    from megatron_kanana.optimizer.parameter_groups import is_muon_parameter

    return settings.optimizer.name == "muon" and is_muon_parameter(name, settings.optimizer)


def _group(name: str) -> str:
    return "experts" if ".mlp.experts." in name else "dense"


def _as_tuple(replica_id: int | tuple[int, ...]) -> tuple[int, ...]:
    return replica_id if isinstance(replica_id, tuple) else (replica_id,)
