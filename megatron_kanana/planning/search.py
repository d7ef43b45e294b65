"""The layouts of a run on a number of GPUs, those that fit first by step time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_kanana.config import Environment, Settings
from megatron_kanana.config.checks import check

from .calibration import RESERVED_MEMORY, Implementation
from .machines import Machine
from .plan import Plan, job_of, plan, predict_memory

POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MICRO_BATCHES = (1, 2, 4)
RECOMPUTE = ("none", "full")


@dataclass(frozen=True)
class Candidate:
    """A layout that could be started, and its prediction."""

    settings: Settings
    plan: Plan

    @property
    def overrides(self) -> list[str]:
        """What to write on the command line for it."""
        parallel = dataclasses.asdict(self.settings.parallel)
        words = [
            f"parallel.{name}={str(value).lower() if isinstance(value, bool) else value}"
            for name, value in parallel.items()
        ]
        return [*words, f"schedule.micro_batch_size={self.settings.schedule.micro_batch_size}"]


def valid_layouts(settings: Settings, environment: Environment) -> Iterator[Settings]:
    """The settings with every layout that a real start would not refuse.

    Tensor parallelism stays in a node; experts are not split further. Other settings of the layout
    are those that were given.
    """
    world, model = environment.world_size, settings.model
    for tensor, pipeline, virtual, expert in itertools.product(POWERS, repeat=4):
        if tensor > environment.local_world_size or tensor * pipeline > world:
            continue
        if pipeline * virtual > model.num_layers + 2 or expert > model.num_experts:
            continue
        for counted in (False, True):
            parallel = dataclasses.replace(
                settings.parallel,
                tensor_parallel_size=tensor,
                pipeline_parallel_size=pipeline,
                virtual_pipeline_stages=virtual,
                embeddings_count_as_layers=counted,
                expert_parallel_size=expert,
                expert_tensor_parallel_size=1,
            )
            yield from _valid_steps(dataclasses.replace(settings, parallel=parallel), environment)


def _valid_steps(settings: Settings, environment: Environment) -> Iterator[Settings]:
    """The settings with microbatches of every size that can be dealt, with and without recompute.

    Where one of a size cannot, one of a multiple cannot either.
    """
    for size in MICRO_BATCHES:
        schedule = dataclasses.replace(settings.schedule, micro_batch_size=size)
        sized = dataclasses.replace(settings, schedule=schedule)
        if check(sized, environment, with_files=False):
            return
        for recompute in RECOMPUTE:
            parallel = dataclasses.replace(settings.parallel, recompute=recompute)
            yield dataclasses.replace(sized, parallel=parallel)


def search(
    settings: Settings,
    environment: Environment,
    machine: Machine,
    implementation: Implementation,
    *,
    global_batch_size: int | None = None,
    fp8: bool = False,
    expert_load: float = 1.0,
) -> Sequence[Candidate]:
    """All layouts that fit, fastest first.

    Args:
        settings: of the run, checked.
        environment: the job's processes.
        machine: GPUs and network.
        implementation: how layers are computed.
        global_batch_size, fp8, expert_load: as `plan.job_of` takes them.
    """
    found = []
    for candidate in valid_layouts(settings, environment):
        job = job_of(
            candidate,
            environment.world_size,
            machine,
            implementation,
            global_batch_size,
            fp8=fp8,
            expert_load=expert_load,
        )
        fp32 = settings.precision.reduce_gradients_in_fp32
        memory = predict_memory(job, settings.optimizer, fp32)
        if max(rank.peak for rank in memory) <= machine.memory_bytes * (1 - RESERVED_MEMORY):
            planned = plan(job, settings.optimizer, fp32_gradients=fp32)
            found.append(Candidate(candidate, planned))
    return sorted(found, key=lambda each: (each.plan.step, each.plan.peak_memory))
