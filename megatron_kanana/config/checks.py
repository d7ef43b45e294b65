"""Combinations of settings that cannot work, each with its remedy.

One function a subject; each yields every problem it finds. Limits of a single setting are
declared beside it in `schema.py`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from .dataset_files import sequence_count
from .environment import (
    TESTED_MEGATRON_CORE,
    Environment,
    resolve_device,
    resolve_precision,
)
from .problems import Problem
from .saved import (
    SETTINGS_FILE,
    checkpoint_to_start_from,
    newest_checkpoint,
    read_settings,
)
from .schema import Settings

BUILTIN_VOCABULARY = (2048, 16384)
"""Smallest and largest vocabulary that the built-in text is enough for."""


def check(settings: Settings, environment: Environment) -> list[Problem]:
    """Every wrong combination in `settings` for this machine and launch."""
    subjects = (
        check_versions,
        check_device,
        check_model,
        check_sharding,
        check_world,
        check_schedule,
        check_data,
        check_checkpoint,
    )
    return [problem for subject in subjects for problem in subject(settings, environment)]


def _divisors(value: int) -> str:
    """The divisors of `value`, for a remedy."""
    return ", ".join(str(d) for d in range(1, value + 1) if value % d == 0)


def check_versions(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """Only tested versions of megatron-core are run."""
    version = environment.megatron_core_version
    if version not in TESTED_MEGATRON_CORE:
        wanted = " or ".join(TESTED_MEGATRON_CORE)
        yield Problem(
            "megatron-core",
            version or "not installed",
            "this project was not tested with this version",
            f"pip install megatron-core=={TESTED_MEGATRON_CORE[0]} (tested: {wanted})",
        )


def check_device(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """The machine has what device, precision and kernels ask for."""
    device = resolve_device(settings.device, environment)
    if device == "cuda" and not environment.has_cuda:
        yield Problem("device", "cuda", "no CUDA device is visible", "set device=cpu or auto")
    elif device == "cuda" and environment.local_world_size > environment.cuda_device_count:
        yield Problem(
            "torchrun --nproc-per-node",
            environment.local_world_size,
            f"this machine has {environment.cuda_device_count} CUDA devices",
            "start one process a device",
        )
    compute = resolve_precision(settings.precision.compute, device)
    if compute == "fp8" and device == "cpu":
        yield Problem(
            "precision.compute", "fp8", "a CPU has no fp8 arithmetic", "choose fp32 or bf16"
        )
    elif compute == "fp8":
        yield Problem(
            "precision.compute",
            "fp8",
            "the layers of this version compute in bf16 or fp32",
            "choose bf16",
        )
    backend = settings.kernels.backend
    if backend == "sdpa" and device == "cpu":
        yield Problem(
            "kernels.backend", backend, "is for CUDA devices", "choose csrc, torch or auto"
        )
    if backend == "csrc" and device == "cuda":
        yield Problem("kernels.backend", backend, "runs on CPUs only", "choose sdpa, torch or auto")
    elif backend == "csrc" and not environment.has_native_library:
        yield Problem(
            "kernels.backend",
            backend,
            "the compiled operations are not built",
            "run pip install --no-build-isolation -e . or choose torch or auto",
        )


def check_model(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """The network's sizes fit one another."""
    model = settings.model
    if model.qk_rope_head_dim % 2:
        yield Problem(
            "model.qk_rope_head_dim",
            model.qk_rope_head_dim,
            "rotary embedding turns pairs of channels",
            "choose an even width",
        )
    if model.num_dense_layers > model.num_layers:
        yield Problem(
            "model.num_dense_layers",
            model.num_dense_layers,
            f"the model has only model.num_layers = {model.num_layers}",
            f"choose at most {model.num_layers}",
        )
    if model.num_experts_per_token > model.num_experts:
        yield Problem(
            "model.num_experts_per_token",
            model.num_experts_per_token,
            f"a layer has only model.num_experts = {model.num_experts}",
            f"choose at most {model.num_experts}",
        )


def check_sharding(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """Sizes divide by the processes they are split over."""
    model, parallel = settings.model, settings.parallel
    tensor = parallel.tensor_parallel_size
    split = [
        ("model.num_attention_heads", model.num_attention_heads, "tensor_parallel_size"),
        ("model.ffn_hidden_size", model.ffn_hidden_size, "tensor_parallel_size"),
        ("model.vocab_size_multiple", model.vocab_size_multiple, "tensor_parallel_size"),
        ("data.sequence_length", settings.data.sequence_length, "tensor_parallel_size"),
        ("model.num_experts", model.num_experts, "expert_parallel_size"),
        ("model.moe_ffn_hidden_size", model.moe_ffn_hidden_size, "expert_tensor_parallel_size"),
    ]
    if model.num_shared_experts:
        width = model.shared_expert_hidden_size
        split.append(("width of the shared experts", width, "tensor_parallel_size"))
    for name, size, over in split:
        parts = getattr(parallel, over)
        if size % parts:
            yield Problem(
                f"parallel.{over}",
                parts,
                f"does not divide {name} = {size}",
                f"choose one of {_divisors(size)}" if size < 512 else "choose a divisor of it",
            )
    stages = parallel.pipeline_parallel_size * parallel.virtual_pipeline_stages
    if model.num_layers % stages:
        yield Problem(
            "parallel.pipeline_parallel_size x parallel.virtual_pipeline_stages",
            stages,
            f"does not divide model.num_layers = {model.num_layers}",
            f"choose a product among {_divisors(model.num_layers)}",
        )
    if parallel.virtual_pipeline_stages > 1 and parallel.pipeline_parallel_size == 1:
        yield Problem(
            "parallel.virtual_pipeline_stages",
            parallel.virtual_pipeline_stages,
            "there is no pipeline to interleave",
            "set it to 1, or parallel.pipeline_parallel_size above 1",
        )
    if tensor > 1 and parallel.expert_tensor_parallel_size > tensor:
        yield Problem(
            "parallel.expert_tensor_parallel_size",
            parallel.expert_tensor_parallel_size,
            f"is larger than parallel.tensor_parallel_size = {tensor}",
            f"choose at most {tensor}",
        )


def check_world(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """The processes of the launch can be laid out, and the batch dealt over them."""
    parallel, schedule = settings.parallel, settings.schedule
    world = environment.world_size
    dense = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    expert = (
        parallel.expert_tensor_parallel_size
        * parallel.expert_parallel_size
        * parallel.pipeline_parallel_size
    )
    if world % dense:
        yield Problem(
            "parallel.tensor_parallel_size x parallel.pipeline_parallel_size",
            dense,
            f"does not divide the world of {world} processes",
            f"start a multiple of {dense} processes, or choose a divisor of {world}",
        )
    if world % expert:
        yield Problem(
            "parallel.expert_tensor_parallel_size x parallel.expert_parallel_size"
            " x parallel.pipeline_parallel_size",
            expert,
            f"does not divide the world of {world} processes",
            f"start a multiple of {expert} processes, or choose a divisor of {world}",
        )
    if world % dense or world % expert:
        return
    data_parallel = settings.data_parallel_size(world)
    samples = schedule.micro_batch_size * data_parallel
    if schedule.global_batch_size % samples:
        yield Problem(
            "schedule.global_batch_size",
            schedule.global_batch_size,
            f"is not a multiple of schedule.micro_batch_size = {schedule.micro_batch_size}"
            f" x {data_parallel} data-parallel processes",
            f"choose a multiple of {samples}",
        )
    elif (
        parallel.virtual_pipeline_stages > 1
        and settings.num_microbatches(world) % parallel.pipeline_parallel_size
    ):
        yield Problem(
            "schedule.global_batch_size",
            schedule.global_batch_size,
            f"makes {settings.num_microbatches(world)} microbatches, which interleaved stages need"
            f" in multiples of parallel.pipeline_parallel_size = {parallel.pipeline_parallel_size}",
            f"choose a multiple of {samples * parallel.pipeline_parallel_size}",
        )


def check_schedule(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """Warm-up, decay and their learning rates fit the run."""
    schedule, optimizer = settings.schedule, settings.optimizer
    if schedule.warmup_steps >= schedule.steps:
        yield Problem(
            "schedule.warmup_steps",
            schedule.warmup_steps,
            f"leaves nothing of schedule.steps = {schedule.steps}",
            f"choose at most {schedule.steps - 1}",
        )
    elif schedule.warmup_steps + schedule.decay_steps > schedule.steps:
        yield Problem(
            "schedule.warmup_steps + schedule.decay_steps",
            schedule.warmup_steps + schedule.decay_steps,
            f"is longer than schedule.steps = {schedule.steps}",
            "shorten one of them, or train longer",
        )
    if schedule.minimum_learning_rate > optimizer.learning_rate:
        yield Problem(
            "schedule.minimum_learning_rate",
            schedule.minimum_learning_rate,
            f"is above optimizer.learning_rate = {optimizer.learning_rate}",
            "choose a smaller one",
        )


def check_data(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """Files the data settings name exist."""
    data, vocab_size = settings.data, settings.model.vocab_size
    smallest, largest = BUILTIN_VOCABULARY
    if data.tokenizer is None and not smallest <= vocab_size <= largest:
        yield Problem(
            "model.vocab_size",
            vocab_size,
            "the built-in text cannot train a tokenizer of this size",
            f"choose {smallest} to {largest}, or name a tokenizer with data.tokenizer",
        )
    if data.tokenizer is not None:
        yield from check_tokenizer(data.tokenizer, vocab_size)
    if data.blend and data.tokenizer is None:
        yield Problem(
            "data.tokenizer",
            "null",
            "data.blend names datasets, which were made with some tokenizer",
            "name the SentencePiece model that they were made with",
        )
    for index, entry in enumerate(data.blend):
        yield from check_dataset(f"data.blend[{index}].path", entry.path, data.held_out_percent)
    if settings.schedule.evaluation_interval and data.held_out_percent == 0:
        yield Problem(
            "data.held_out_percent",
            data.held_out_percent,
            "leaves no text to evaluate on",
            "choose a share above 0, or schedule.evaluation_interval=0",
        )


def check_dataset(setting: str, path: str, held_out_percent: float) -> Iterator[Problem]:
    """A dataset's files are whole, and large enough to hold some documents out."""
    try:
        count = sequence_count(path)
    except ValueError as error:
        yield Problem(setting, path, str(error), "make it with tools/preprocess_data.py")
        return
    training = round(count * (100 - held_out_percent) / 100)  # as megatron-core splits
    if training == 0 or (training == count and held_out_percent):
        kept = "training" if training == 0 else "evaluation"
        yield Problem(
            setting,
            path,
            f"data.held_out_percent = {held_out_percent} of its {count} documents leaves none"
            f" for {kept}",
            "choose another data.held_out_percent (0 holds nothing out), or a larger dataset",
        )


def check_tokenizer(path: str, vocab_size: int) -> Iterator[Problem]:
    """The tokenizer can be read, and its ids are rows of the embedding."""
    if not Path(path).is_file():
        yield Problem("data.tokenizer", path, "no such file", "give a SentencePiece .model file")
        return
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=path).vocab_size()
    except RuntimeError:
        yield Problem("data.tokenizer", path, "is not a SentencePiece model", "give a .model file")
        return
    if pieces != vocab_size:
        yield Problem(
            "model.vocab_size",
            vocab_size,
            f"the tokenizer {path} has {pieces} pieces",
            f"set model.vocab_size={pieces}, or name another tokenizer",
        )


def check_checkpoint(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """Checkpoints can be found, fit the model, and can be written where they should go."""
    checkpoint = settings.checkpoint
    if checkpoint.load is not None and not (Path(checkpoint.load) / SETTINGS_FILE).is_file():
        yield Problem(
            "checkpoint.load",
            checkpoint.load,
            "is not a whole checkpoint",
            f"name a step_… folder that holds {SETTINGS_FILE}",
        )
    elif not checkpoint.resume and (newest := newest_checkpoint(settings.checkpoint_dir)):
        yield Problem(
            "checkpoint.resume",
            "false",
            f"this run has a checkpoint already: {newest}",
            "choose another run_name to start anew, or checkpoint.resume=true to go on",
        )
    else:
        yield from check_saved_model(settings)
    if checkpoint.keep_every and checkpoint.save_interval == 0:
        yield Problem(
            "checkpoint.keep_every",
            checkpoint.keep_every,
            "checkpoint.save_interval = 0 saves only at the end",
            "set checkpoint.save_interval",
        )
    elif checkpoint.keep_every and checkpoint.keep_every % checkpoint.save_interval:
        yield Problem(
            "checkpoint.keep_every",
            checkpoint.keep_every,
            f"is not a multiple of checkpoint.save_interval = {checkpoint.save_interval}",
            "choose a multiple of it",
        )
    for name, folder in (
        ("output_dir", settings.run_dir),
        ("checkpoint.directory", settings.checkpoint_dir),
        ("data.cache_dir", settings.data.cache_dir),
    ):
        path = Path(folder).absolute()
        existing = next(p for p in [path, *path.parents] if p.exists())
        if not existing.is_dir():
            yield Problem(name, folder, f"{existing} is a file", "name a folder")
        elif not os.access(existing, os.W_OK):
            yield Problem(name, folder, f"{existing} cannot be written to", "name another folder")


def check_saved_model(settings: Settings) -> Iterator[Problem]:
    """The checkpoint that the run would start from holds this model."""
    path = checkpoint_to_start_from(settings)
    if path is None:
        return
    saved = read_settings(path)["model"]
    for field in dataclasses.fields(settings.model):
        value = getattr(settings.model, field.name)
        if field.metadata.get("fixed_by_checkpoint") and saved.get(field.name) != value:
            yield Problem(
                f"model.{field.name}",
                value,
                f"the checkpoint {path} was made with {saved.get(field.name)}",
                "take that value, or another run_name to start anew",
            )
