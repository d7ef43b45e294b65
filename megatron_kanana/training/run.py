"""Everything one process of a run holds, built from the settings."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_kanana.checkpoint import state as checkpoint_state
from megatron_kanana.checkpoint.local_tier import load_part
from megatron_kanana.checkpoint.newest import newest_whole
from megatron_kanana.checkpoint.verification import ensure_whole
from megatron_kanana.config import (
    ConfigurationError,
    Problem,
    Settings,
)
from megatron_kanana.config.batch_sizes import global_batch_size, samples_of_steps
from megatron_kanana.config.check_files import check_saved_model
from megatron_kanana.config.check_mixture import check_position
from megatron_kanana.config.expert_sizes import expert_layer_sizes
from megatron_kanana.config.ledger import Ledger, SampleRange, read_ledger
from megatron_kanana.config.mixture import mixture, sources, tokens_by_source
from megatron_kanana.config.norm_sizes import norm_limits_passed
from megatron_kanana.config.rotary_sizes import fused_rope_limits_passed
from megatron_kanana.data.builtin import BuiltinData, builtin_data, prepare_builtin_data
from megatron_kanana.data.held_out import HeldOutText, read_held_out
from megatron_kanana.data.loader import MicrobatchSampler, microbatches
from megatron_kanana.data.mixed import (
    HeldOutSamples,
    MixedSamples,
    prepare_pass,
    sample_order,
)
from megatron_kanana.data.tokenizer import Tokenizer, load_tokenizer
from megatron_kanana.device import Device
from megatron_kanana.kernels.backend import Backends, choose_backend
from megatron_kanana.kernels.dense import (
    choose_linear_backend,
    choose_norm_backend,
    choose_rope_backend,
)
from megatron_kanana.kernels.linear_cross_entropy.backend import (
    choose_fp8_output_layer,
    choose_loss_backend,
)
from megatron_kanana.kernels.moe.backend import choose_fp8_experts, choose_moe_backend
from megatron_kanana.model.builder import build_model
from megatron_kanana.model.megatron_config import transformer_config
from megatron_kanana.model.router import reset_expert_bias
from megatron_kanana.optimizer.build import build_optimizer, wrap_data_parallel
from megatron_kanana.optimizer.qk_clip import QKClip
from megatron_kanana.optimizer.schedule import build_scheduler
from megatron_kanana.optimizer.weight_average import WeightAverage

from .attention_logits import AttentionLogits
from .conversation_data import conversation_datasets
from .guards import Guards
from .metrics import ExpertLoadRecorder
from .passed_over import repeat_rollback

logger = logging.getLogger(__name__)

DataIterators = list[Any]
"""One iterator of microbatches, or None, for each model chunk of the process."""


@dataclass
class Model:
    """The model as it lies on one process, enough to evaluate it and to generate text.

    Attributes:
        chunks: one, or one a virtual pipeline stage.
    """

    settings: Settings
    device: Device
    config: MLATransformerConfig
    chunks: list[Any]
    tokenizer: Tokenizer


@dataclass
class Run(Model):
    """State of a training run on one process.

    Attributes:
        expert_loads: remembers each step's tokens per expert.
        attention_logits: brings the largest attention logits together.
        qk_clip: scales attention heads down after a step; None only watches their logits.
        weight_average: averages the weights over the steps; None where none is kept.
        guards: look at every step before its update.
        step: optimizer steps done.
        consumed_samples: sequences the steps have used or passed over, over all processes.
        skipped_samples: ranges of them that were passed over.
        earlier_tokens: tokens by source of the runs whose weights this one began with.
    """

    optimizer: Any
    scheduler: Any
    expert_loads: ExpertLoadRecorder
    attention_logits: AttentionLogits
    qk_clip: QKClip | None
    weight_average: WeightAverage | None
    guards: Guards
    step: int = 0
    consumed_samples: int = 0
    skipped_samples: list[SampleRange] = field(default_factory=list)
    earlier_tokens: dict[str, int] = field(default_factory=dict)

    @property
    def global_batch_size(self) -> int:
        """Sequences of the next step."""
        return global_batch_size(self.settings, self.consumed_samples)

    @property
    def consumed_tokens(self) -> int:
        """Tokens the steps have used, over all processes."""
        skipped = sum(end - begin for begin, end in self.skipped_samples)
        return (self.consumed_samples - skipped) * self.settings.data.sequence_length

    @property
    def ledger(self) -> Ledger:
        """Tokens that the steps have used, by source, and those of earlier runs."""
        data = self.settings.data
        return Ledger(
            self.consumed_samples,
            data.sequence_length,
            tokens_by_source(data, self.consumed_samples, self.skipped_samples),
            self.earlier_tokens,
            self.skipped_samples,
        )


def build_bare_model(settings: Settings, device: Device) -> Model:
    """The initialised model without optimizer and data parallelism."""
    schedule = settings.schedule
    init_num_microbatches_calculator(
        rank=dist.get_rank(),
        rampup_batch_size=None,
        global_batch_size=schedule.global_batch_size,
        micro_batch_size=schedule.micro_batch_size,
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )
    tokenizer = prepare_tokenizer(settings)
    config, chunks = build_chunks(settings, device)
    return Model(settings, device, config, chunks, tokenizer)


def build_chunks(settings: Settings, device: Device) -> tuple[MLATransformerConfig, list[Any]]:
    """The initialised model chunks with the backends that the settings choose here."""
    backends = choose_backends(settings, device)
    config = transformer_config(settings, device, backends)
    return config, build_model(settings, config, device, backends)


def choose_backends(settings: Settings, device: Device) -> Backends:
    """Which implementations the model computes with here; logs why.

    Raises:
        RuntimeError: what the settings ask for cannot be used.
    """
    model, kernels = settings.model, settings.kernels
    attention = choose_backend(
        kernels.backend,
        device.torch_device.type,
        dtype=device.dtype,
        widths=(model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim),
        deterministic=kernels.deterministic,
    )
    experts = choose_moe_backend(
        kernels.moe_backend,
        device.torch_device.type,
        dtype=device.dtype,
        sizes=expert_layer_sizes(settings),
    )
    linear = choose_linear_backend(
        kernels.linear_backend,
        device.torch_device.type,
        dtype=device.dtype,
        fp8=settings.precision.fp8,
    )
    rope = choose_rope_backend(
        kernels.rope_backend,
        device.torch_device.type,
        dtype=device.dtype,
        limits_passed=fused_rope_limits_passed(settings),
        deterministic=kernels.deterministic,
    )
    norm = choose_norm_backend(
        kernels.norm_backend,
        device.torch_device.type,
        dtype=device.dtype,
        limits_passed=norm_limits_passed(settings),
    )
    loss = choose_loss_backend(kernels.loss_backend, device.torch_device.type)
    experts_fp8 = choose_fp8_experts(
        settings.precision.experts,
        settings.precision.fp8,
        experts,
        device.torch_device.type,
        expert_layer_sizes(settings),
    )
    output_layer_fp8 = choose_fp8_output_layer(
        settings.precision.output_layer, loss, device.torch_device.type
    )
    return Backends(attention, experts, linear, rope, norm, loss, experts_fp8, output_layer_fp8)


def build_run(settings: Settings, device: Device) -> Run:
    """The initialised model behind data parallelism, its optimizer and its schedule."""
    model = build_bare_model(settings, device)
    config = model.config
    chunks = wrap_data_parallel(model.chunks, settings)
    optimizer = build_optimizer(chunks, settings, device)
    threshold = settings.optimizer.qk_clip_threshold
    qk_clip = None if threshold is None else QKClip(optimizer, chunks, settings.model, threshold)
    schedule = settings.schedule
    weight_average = (
        None
        if schedule.weight_average_decay is None
        else WeightAverage(
            optimizer, schedule.weight_average_decay, schedule.weight_average_interval
        )
    )
    expert_loads = ExpertLoadRecorder()
    config.finalize_model_grads_func = expert_loads.finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if settings.parallel.overlap_gradient_reduction:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return Run(
        settings=settings,
        device=device,
        config=config,
        chunks=chunks,
        tokenizer=model.tokenizer,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, settings),
        expert_loads=expert_loads,
        attention_logits=AttentionLogits(chunks, config),
        qk_clip=qk_clip,
        weight_average=weight_average,
        guards=Guards(chunks, settings.guards),
    )


def prepare_tokenizer(settings: Settings) -> Tokenizer:
    """The tokenizer the settings name, or the built-in one."""
    return load_tokenizer(settings.data.tokenizer or _prepare_builtin(settings).tokenizer)


def prepare_sources(settings: Settings) -> dict[str, list[Path]]:
    """The indexed datasets of each source that the settings name, or of the built-in text."""
    of_run = sources(settings.data)
    paths = {source.name: [Path(path) for path in source.paths] for source in of_run}
    if not all(paths.values()):
        builtin = {path.name: path for path, _ in _prepare_builtin(settings).datasets}
        paths |= {name: [builtin[name]] for name in paths if not paths[name]}
    return paths


def evaluation_sets(settings: Settings, tokenizer: Tokenizer) -> dict[str, HeldOutText]:
    """The held-out sets by name; without any, the built-in text's languages if it is trained on.

    Raises:
        ConfigurationError: a set cannot be read, or holds too little to predict.
    """
    data = settings.data
    if data.evaluation_sets:
        paths = {each.name: Path(each.path) for each in data.evaluation_sets}
    elif data.conversations or any(source.paths for source in sources(data)):
        return {}
    else:
        paths = _prepare_builtin(settings).held_out
    texts: dict[str, HeldOutText] = {}
    problems: list[Problem] = []
    for name, path in paths.items():
        try:
            texts[name] = read_held_out(path, tokenizer, data.sequence_length)
        except ValueError as error:
            remedy = "give text that the run's tokenizer encodes to two tokens or more"
            problems.append(Problem(f"data.evaluation_sets ({name})", path, str(error), remedy))
    if problems:
        raise ConfigurationError(problems)
    return texts


def _prepare_builtin(settings: Settings) -> BuiltinData:
    """Built-in tokenizer and datasets; rank 0 makes them at first use, the others wait."""
    builtin = builtin_data(Path(settings.data.cache_dir), settings.model.vocab_size)
    if dist.get_rank() == 0:
        prepare_builtin_data(builtin, settings.model.vocab_size)
    dist.barrier()
    return builtin


def restore(run: Run, up_to_step: int | None = None) -> Path | None:
    """Load the newest whole checkpoint of the run, else `checkpoint.load`; returns its folder.

    May be called again in the middle of a run, when no checkpoint is being written. Every process
    must call this.

    Args:
        run: as it was built, or at a later step.
        up_to_step: do not go on from later ones, and put them aside.

    Raises:
        CheckpointError: no checkpoint of the run is whole, or `checkpoint.load` is not.
        ConfigurationError: the one that is whole does not fit the settings.
    """
    settings = run.settings
    found = newest_whole(settings, up_to_step)
    if found is not None:
        problems = [*check_saved_model(settings, found.path), *check_position(settings, found.path)]
        if problems:
            raise ConfigurationError(problems)
        _go_on(run, found.path, local=found.local)
        return found.path
    if settings.checkpoint.load is None:
        return None
    path = Path(settings.checkpoint.load)
    ensure_whole(path, contents=settings.checkpoint.verify)
    if settings.checkpoint.load_what == "everything":
        _go_on(run, path, local=False)
    else:
        _begin_with(run, path)
    if run.step == 0 and settings.checkpoint.reset_expert_bias:
        reset_expert_bias(run.chunks)
    return path


def _go_on(run: Run, path: Path, *, local: bool) -> None:
    """Take everything from a checkpoint, or from this rank's part in the local tier."""
    ledger = read_ledger(path)
    if local:
        load_part(run, path)
    else:
        checkpoint_state.load(run, path)
    run.earlier_tokens = ledger.earlier_tokens if ledger else {}
    run.skipped_samples = list(ledger.skipped_samples) if ledger else []
    repeat_rollback(run)
    logger.info("loaded %s: step %d, %d samples", path, run.step, run.consumed_samples)


def _begin_with(run: Run, path: Path) -> None:
    """Take the weights of a checkpoint, and the optimizer's moments if the settings say so."""
    ledger = read_ledger(path)
    with_optimizer = run.settings.checkpoint.load_what == "weights_and_optimizer"
    checkpoint_state.load_for_new_run(run, path, with_optimizer=with_optimizer)
    run.earlier_tokens = ledger.all_tokens if ledger else {}
    logger.info("loaded the weights of %s: this run begins at step 0", path)


def training_data(run: Run) -> tuple[DataIterators, Any]:
    """Iterators over the rest of the run's training microbatches, and the evaluation dataset."""
    settings, data, schedule = run.settings, run.settings.data, run.settings.schedule
    rest = samples_of_steps(settings, schedule.steps - run.step, run.consumed_samples)
    total = run.consumed_samples + rest
    if data.conversations:
        conversations, held_out = conversation_datasets(settings, run.tokenizer, total)
        return data_iterators(run, conversations, run.consumed_samples, total), held_out
    paths = prepare_sources(settings)
    order = sample_order(settings, run.tokenizer)
    of_run, document_mask = mixture(data), data.document_mask
    train = MixedSamples(of_run, paths, order, total, document_mask=document_mask)
    evaluation = None
    if schedule.evaluation_interval:
        samples = schedule.evaluation_batches * schedule.global_batch_size
        evaluation = HeldOutSamples(of_run, paths, order, samples, document_mask=document_mask)
    if dist.get_rank() == 0:
        for path, number in train.missing(run.consumed_samples):
            logger.info("first use: writing the order of samples of %s, pass %d", path, number + 1)
            prepare_pass(path, number, order)
        if evaluation is not None:
            evaluation.prepare()
    dist.barrier()
    return data_iterators(run, train, run.consumed_samples, total), evaluation


def data_iterators(run: Run, dataset: Any, consumed_samples: int, total: int) -> DataIterators:
    """Microbatches for each model chunk that embeds tokens or computes the loss.

    A dataset whose samples have `segment_ids` says so by a true attribute `has_segment_ids`. Every
    chunk gets its microbatches, as attention everywhere keeps the documents apart.
    """
    sampler = MicrobatchSampler(
        consumed_samples,
        total,
        run.settings.schedule.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )

    def needs_data(vp_stage: int | None) -> bool:
        return bool(
            getattr(dataset, "has_segment_ids", False)
            or parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
            or parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        )

    stages = range(len(run.chunks)) if len(run.chunks) > 1 else [None]
    return [
        microbatches(dataset, sampler, run.settings.data.num_workers) if needs_data(stage) else None
        for stage in stages
    ]
