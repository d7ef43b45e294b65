"""Memory, step time and cost of a run, predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_kanana.config import Settings
from megatron_kanana.config.batch_sizes import samples_of_steps
from megatron_kanana.config.schema import OptimizerSettings

from .activations import stage_bytes
from .architecture import ALL_FP8, Architecture
from .calibration import KANANA, RESERVED_MEMORY, Implementation
from .communication import pipeline_message
from .flops import flops_per_token
from .holdings import (
    COPY_BYTES,
    GRADIENT_BYTES,
    Holding,
    local_parameters,
    quantised_weights,
    state_bytes,
)
from .implementation import fp8_of, implementation_of
from .layer_times import Job, Parts, pass_seconds, stage_parts
from .layout import Layout, Stage, stages
from .machines import Machine
from .pipeline import makespan, peak_bytes
from .update import update_parts

MUON_ROUND_BYTES = 64 * 2**20 * 14
"""A round of `optimizer/distributed_muon.py`, 64M elements: sent, received, joined, iterated and
dealt out in 16 bits, seven tensors of its size."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on a process of one pipeline rank.

    Attributes:
        parameters: elements by holding.
        weights, gradients, optimizer: as the dry run has them.
        copies: of weights in fp8.
        activations: largest sum of what waits for backward passes and of what a pass needs.
        update: what the update needs, when there are no activations.
    """

    parameters: dict[Holding, int]
    weights: float
    gradients: float
    optimizer: float
    copies: float
    activations: float
    update: float

    @property
    def held(self) -> float:
        """What is there between steps."""
        return self.weights + self.gradients + self.optimizer + self.copies

    @property
    def peak(self) -> float:
        """Largest sum, without CUDA's and NCCL's own."""
        return self.held + max(self.activations, self.update)


@dataclass(frozen=True)
class Plan:
    """What is predicted of a job.

    Attributes:
        job: what is computed, where and how.
        memory: by pipeline rank.
        parts: seconds of a step by part, on the pipeline rank with most work; their sum is the
            step. 'launching' is what launching work adds to the work itself, 'waiting' the
            pipeline's bubble.
        step: seconds of a step.
        flops: of one token, as `flops.flops_per_token` counts them.
        checkpoint_bytes: of a whole checkpoint.
    """

    job: Job
    memory: tuple[RankMemory, ...]
    parts: Parts
    step: float
    flops: float
    checkpoint_bytes: float

    @property
    def peak_memory(self) -> float:
        """Bytes on the fullest process."""
        return max(rank.peak for rank in self.memory)

    @property
    def fits(self) -> bool:
        """Whether a GPU has room for it, with `RESERVED_MEMORY` to spare."""
        return self.peak_memory <= self.job.machine.memory_bytes * (1 - RESERVED_MEMORY)

    @property
    def flops_per_gpu(self) -> float:
        """Operations a second on a GPU, by the model's count."""
        return self.flops * self.tokens_per_second / self.job.layout.world_size

    @property
    def utilization(self) -> float:
        """`flops_per_gpu` over the peak (MFU): that of fp8 where all products are in it."""
        machine = self.job.machine
        all_fp8 = self.job.fp8 == ALL_FP8 and not self.job.implementation.experts.share_fp8
        return self.flops_per_gpu / (machine.fp8_flops if all_fp8 else machine.bf16_flops)

    @property
    def tokens_per_second(self) -> float:
        """Of the whole job."""
        return self.job.layout.tokens_per_step / self.step

    def days(self, tokens: float) -> float:
        """To train on so many tokens, if nothing stops it."""
        return tokens / self.tokens_per_second / 86400

    @property
    def checkpoint_seconds(self) -> float:
        """To write a checkpoint, which training does not wait for."""
        return self.checkpoint_bytes / self.job.machine.disk_bandwidth


def plan(
    job: Job,
    optimizer: OptimizerSettings,
    *,
    fp32_gradients: bool = True,
) -> Plan:
    """Predict a job.

    Args:
        job: what is computed, where and how.
        optimizer: settings of the optimizer.
        fp32_gradients: whether gradients are accumulated and reduced in fp32.
    """
    return _plan(job, optimizer, predict_memory(job, optimizer, fp32_gradients), fp32_gradients)


def predict_memory(
    job: Job, optimizer: OptimizerSettings, fp32_gradients: bool = True
) -> tuple[RankMemory, ...]:
    """Memory by pipeline rank; arguments as those of `plan`."""
    return tuple(
        _memory(job, rank, of_rank, optimizer, fp32_gradients)
        for rank, of_rank in enumerate(stages(job.architecture, job.layout))
    )


def _plan(
    job: Job,
    optimizer: OptimizerSettings,
    memory: tuple[RankMemory, ...],
    fp32_gradients: bool,
) -> Plan:
    architecture, layout = job.architecture, job.layout
    ranks = stages(architecture, layout)
    parts_of = {stage: stage_parts(job, stage) for of_rank in ranks for stage in set(of_rank)}
    forward = [[pass_seconds(job, parts_of[stage][0]) for stage in of_rank] for of_rank in ranks]
    backward = [[pass_seconds(job, parts_of[stage][1]) for stage in of_rank] for of_rank in ranks]
    message = pipeline_message(architecture, layout, job.machine)
    hop = message.seconds(job.machine, job.efficiencies)
    flush = min(layout.microbatches_per_flush or layout.microbatches, layout.microbatches)
    flushes = layout.microbatches // flush
    # Messages between interleaved stages overlap with the passes of other microbatches.
    passes = flushes * makespan(flush, forward, backward, hop if layout.virtual == 1 else 0.0)
    if layout.virtual > 1:
        passes += flushes * 2 * (layout.pipeline - 1) * hop

    work = [sum(f) + sum(b) for f, b in zip(forward, backward, strict=True)]
    busiest = max(range(layout.pipeline), key=work.__getitem__)
    parts = Parts()
    for stage in ranks[busiest]:
        for parts_of_pass in parts_of[stage]:
            shown = Parts()
            shown.add(parts_of_pass)
            # Launching counts with what it adds to the work that it goes on beside.
            launching = pass_seconds(job, parts_of_pass) - (sum(shown.values()) - shown.pop("host"))
            shown["launching"] = launching
            parts.add(shown, layout.microbatches)
    parts["waiting"] = passes - work[busiest] * layout.microbatches
    updates = [
        update_parts(
            job,
            of_rank,
            memory[rank].parameters,
            optimizer,
            gradient_bytes=GRADIENT_BYTES[fp32_gradients],
            last_backward=sum(backward[rank]),
            quantised=memory[rank].copies / COPY_BYTES,
        )
        for rank, of_rank in enumerate(ranks)
    ]
    slowest = max(updates, key=lambda update: sum(update.values()))
    if layout.shards_weights and flushes > 1:
        for part in ("messages: gradients", "messages: weights"):
            slowest[part] *= flushes
    update = sum(slowest.values())
    parts.add(slowest)
    return Plan(
        job=job,
        memory=memory,
        parts=parts,
        step=passes + update,
        flops=flops_per_token(architecture, layout.sequence_length),
        checkpoint_bytes=_checkpoint_bytes(job, optimizer),
    )


def job_of(
    settings: Settings,
    world_size: int,
    machine: Machine,
    implementation: Implementation,
    global_batch_size: int | None = None,
    *,
    fp8: bool = False,
    expert_load: float = 1.0,
) -> Job:
    """The job of a run's settings, in the format that `precision` says.

    Args:
        settings: checked for `world_size` processes.
        world_size: processes of the job.
        machine: GPUs and network.
        implementation: how layers are computed. `KANANA` becomes what the settings choose on this
            machine.
        global_batch_size: of a step, where it is not the first one of the settings.
        fp8: whether projections and experts compute in fp8 whatever `precision` says, for other
            implementations than this version.
        expert_load: of the busiest process, as `Layout` has it.
    """
    batch = global_batch_size or settings.schedule.global_batch_size
    precision = settings.precision
    computed = ALL_FP8 if fp8 else fp8_of(settings)
    if implementation is KANANA:
        implementation = implementation_of(settings, machine)
    return Job(
        architecture=Architecture.of(settings.model),
        layout=Layout.of(settings, world_size, batch, expert_load),
        machine=machine,
        implementation=implementation,
        fp8=computed,
        bf16_layers=(precision.bf16_layers_at_start, precision.bf16_layers_at_end),
    )


@dataclass(frozen=True)
class RunPlan:
    """A whole run: a plan for each batch size, and the tokens trained with it."""

    plans: tuple[tuple[float, Plan], ...]

    @property
    def tokens(self) -> float:
        """Of the run."""
        return sum(tokens for tokens, _ in self.plans)

    @property
    def days(self) -> float:
        """Of training, if nothing stops it."""
        return sum(plan.days(tokens) for tokens, plan in self.plans)

    @property
    def gpu_hours(self) -> float:
        """Of training, if nothing stops it."""
        return self.days * 24 * self.plans[0][1].job.layout.world_size


def plan_run(
    settings: Settings,
    world_size: int,
    machine: Machine,
    implementation: Implementation,
    *,
    tokens: float | None = None,
    fp8: bool = False,
    expert_load: float = 1.0,
) -> RunPlan:
    """Predict a run from its settings, batch size after batch size.

    Args:
        settings, world_size, machine, implementation, fp8, expert_load: as `job_of` takes them.
        tokens: of the run, where they are not those of `schedule.steps`.
    """
    schedule, length = settings.schedule, settings.data.sequence_length
    total = tokens or float(samples_of_steps(settings, schedule.steps) * length)
    begins = [0.0, *(change.tokens for change in schedule.batch_size_changes)]
    sizes = [
        schedule.global_batch_size,
        *(change.global_batch_size for change in schedule.batch_size_changes),
    ]
    plans = []
    for index, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
        end = min(total, begins[index + 1]) if index + 1 < len(begins) else total
        if end > begin:
            job = job_of(
                settings,
                world_size,
                machine,
                implementation,
                size,
                fp8=fp8,
                expert_load=expert_load,
            )
            fp32 = settings.precision.reduce_gradients_in_fp32
            plans.append((end - begin, plan(job, settings.optimizer, fp32_gradients=fp32)))
    return RunPlan(tuple(plans))


def _memory(
    job: Job,
    rank: int,
    of_rank: Sequence[Stage],
    optimizer: OptimizerSettings,
    fp32_gradients: bool,
) -> RankMemory:
    architecture, layout = job.architecture, job.layout
    parameters = local_parameters(architecture, layout, of_rank, optimizer)
    size = state_bytes(parameters, layout, fp32_gradients=fp32_gradients)
    each = [
        stage_bytes(
            *(architecture, layout, job.implementation, stage),
            fp8=job.fp8,
            bf16_layers=job.bf16_layers,
        )
        for stage in of_rank
    ]
    activations = peak_bytes(
        rank,
        layout.pipeline,
        layout.virtual,
        layout.microbatches,
        [kept for kept, _ in each],
        [transient for _, transient in each],
    )
    largest = sum(
        count / (layout.data if group == "dense" else layout.expert_data)
        for (group, name), count in parameters.items()
        if name == "muon"
    )
    update = min(MUON_ROUND_BYTES, 14.0 * largest)
    quantised = quantised_weights(architecture, layout, of_rank, job.fp8, job.bf16_layers)
    copies = float(COPY_BYTES * quantised)
    return RankMemory(parameters, **size, copies=copies, activations=activations, update=update)


def _checkpoint_bytes(job: Job, optimizer: OptimizerSettings) -> float:
    """Weights in bf16, and for each parameter its fp32 weight and the optimizer's state."""
    whole = Layout(1, 1, 1, 1, 1, 1, False, 1, 1, 1)
    [[everything]] = stages(job.architecture, whole)
    parameters = local_parameters(job.architecture, whole, [everything], optimizer)
    size = state_bytes(parameters, whole, fp32_gradients=True)
    return size["weights"] + size["optimizer"]
