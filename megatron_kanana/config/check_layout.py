"""Sizes of the model that fit one another, the processes they are split over, and the batch."""

from __future__ import annotations

from collections.abc import Iterator

from .environment import Environment
from .problems import Problem
from .schema import RECOMPUTE_PARTS, ModelSettings, ParallelSettings, Settings


def _divisors(value: int) -> str:
    """The divisors of `value`, for a remedy."""
    return ", ".join(str(d) for d in range(1, value + 1) if value % d == 0)


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
    if settings.data.sequence_length <= model.num_mtp_layers:
        yield Problem(
            "model.num_mtp_layers",
            model.num_mtp_layers,
            "leaves the last of these layers no label in data.sequence_length ="
            f" {settings.data.sequence_length} tokens",
            "choose fewer layers (DeepSeek-V3: 1), or longer sequences",
        )
    reach = model.yarn_factor * model.yarn_original_context
    if model.yarn_factor > 1 and settings.data.sequence_length > reach:
        yield Problem(
            "model.yarn_factor",
            model.yarn_factor,
            f"extends model.yarn_original_context = {model.yarn_original_context} to {reach:.0f}"
            f" positions, and data.sequence_length = {settings.data.sequence_length}",
            "choose a larger factor, or shorter sequences",
        )
    yield from check_expert_groups(model)


def check_expert_groups(model: ModelSettings) -> Iterator[Problem]:
    """Group-limited routing is DeepSeek-V3's: a group is worth the sum of its best two experts."""
    groups, chosen = model.num_expert_groups, model.num_expert_groups_per_token
    if groups == 1:
        return
    if model.num_experts % groups:
        yield Problem(
            "model.num_expert_groups",
            groups,
            f"does not divide model.num_experts = {model.num_experts}",
            f"choose one of {_divisors(model.num_experts)}",
        )
    if chosen > groups:
        yield Problem(
            "model.num_expert_groups_per_token",
            chosen,
            f"there are only model.num_expert_groups = {groups}",
            f"choose at most {groups}",
        )
    if model.num_experts_per_token // chosen != 2:
        yield Problem(
            "model.num_expert_groups_per_token",
            chosen,
            "groups are judged by their best two experts only if model.num_experts_per_token ="
            f" {model.num_experts_per_token} is twice this (DeepSeek-V3: 8 and 4)",
            f"choose {model.num_experts_per_token // 2}, or model.num_expert_groups=1",
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
    yield from check_stages(settings)
    yield from check_context(settings)
    yield from check_recompute(settings.parallel)
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


def check_context(settings: Settings) -> Iterator[Problem]:
    """Sequences can be cut for context parallelism, and heads dealt out for attention."""
    model, parallel = settings.model, settings.parallel
    name, parts = "parallel.context_parallel_size", parallel.context_parallel_size
    if parts == 1:
        return
    pieces = parallel.sequence_pieces
    if settings.data.sequence_length % pieces:
        yield Problem(
            name,
            parts,
            f"cuts sequences into {pieces} pieces, two for each process of it and of"
            " parallel.tensor_parallel_size, which do not divide data.sequence_length ="
            f" {settings.data.sequence_length}",
            f"choose a length that is a multiple of {pieces}",
        )
    heads = model.num_attention_heads // parallel.tensor_parallel_size
    if heads % parts:
        yield Problem(
            name,
            parts,
            f"does not divide the {heads} heads of model.num_attention_heads over"
            " parallel.tensor_parallel_size",
            f"choose one of {_divisors(heads)}",
        )
    if model.num_mtp_layers > 1:
        yield Problem(
            name,
            parts,
            f"takes one layer for multi-token prediction, not model.num_mtp_layers ="
            f" {model.num_mtp_layers}",
            "set it to 1, or model.num_mtp_layers to 0 or 1",
        )


def check_recompute(parallel: ParallelSettings) -> Iterator[Problem]:
    """Parts of layers are named where they are computed again, and only there."""
    parts = parallel.recompute_parts
    if parallel.recompute == "selective" and not parts:
        yield Problem(
            "parallel.recompute_parts",
            parts,
            "is empty, and parallel.recompute = selective computes nothing else again",
            f"name some of {', '.join(RECOMPUTE_PARTS)}, or set parallel.recompute=none",
        )
    elif parallel.recompute != "selective" and parts:
        yield Problem(
            "parallel.recompute_parts",
            parts,
            f"has no effect with parallel.recompute = {parallel.recompute}",
            "set parallel.recompute=selective, or leave it empty",
        )


def check_stages(settings: Settings) -> Iterator[Problem]:
    """The layers can be dealt over the pipeline's stages, and none is left without."""
    model, parallel = settings.model, settings.parallel
    stages = parallel.pipeline_parallel_size * parallel.virtual_pipeline_stages
    name = "parallel.pipeline_parallel_size x parallel.virtual_pipeline_stages"
    counted = 2 if parallel.embeddings_count_as_layers else 0
    places = model.num_layers + counted
    if parallel.embeddings_count_as_layers and parallel.pipeline_parallel_size == 1:
        yield Problem(
            "parallel.embeddings_count_as_layers",
            True,
            "there is no pipeline to deal layers over",
            "set it to false, or parallel.pipeline_parallel_size above 1",
        )
    elif places % stages:
        also = " + embedding and output layer" if counted else ""
        other = model.num_layers + 2 - counted
        remedy = f"choose a product among {_divisors(places)}"
        if other % stages == 0 and parallel.pipeline_parallel_size > 1:
            turned = str(not counted).lower()
            remedy += f", or parallel.embeddings_count_as_layers={turned}"
        yield Problem(
            name, stages, f"does not divide model.num_layers = {model.num_layers}{also}", remedy
        )
    elif counted and places == stages:
        yield Problem(
            name,
            stages,
            "with parallel.embeddings_count_as_layers leaves the first and the last stage without"
            " a transformer layer",
            f"choose a product among {_divisors(places)} below {stages}",
        )


def check_world(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """The processes of the launch can be laid out, and the batch dealt over them."""
    parallel, schedule = settings.parallel, settings.schedule
    world = environment.world_size
    dense = parallel.model_parallel_size
    expert = (
        parallel.expert_tensor_parallel_size
        * parallel.expert_parallel_size
        * parallel.pipeline_parallel_size
    )
    if world % dense:
        yield Problem(
            "parallel.tensor_parallel_size x parallel.context_parallel_size"
            " x parallel.pipeline_parallel_size",
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
    sizes = {"schedule.global_batch_size": schedule.global_batch_size}
    for index, change in enumerate(schedule.batch_size_changes):
        sizes[f"schedule.batch_size_changes[{index}].global_batch_size"] = change.global_batch_size
    for name, size in sizes.items():
        yield from _check_batch(settings, world, samples, name, size)


def _check_batch(
    settings: Settings, world: int, samples: int, name: str, size: int
) -> Iterator[Problem]:
    """A step's sequences can be dealt over the processes, `samples` of them at a time."""
    parallel, schedule = settings.parallel, settings.schedule
    data_parallel = settings.data_parallel_size(world)
    num_microbatches = settings.num_microbatches(world, size)
    if size % samples:
        yield Problem(
            name,
            size,
            f"is not a multiple of schedule.micro_batch_size = {schedule.micro_batch_size}"
            f" x {data_parallel} data-parallel processes",
            f"choose a multiple of {samples}",
        )
    elif (
        parallel.virtual_pipeline_stages > 1 and num_microbatches % parallel.pipeline_parallel_size
    ):
        yield Problem(
            name,
            size,
            f"makes {num_microbatches} microbatches, which interleaved stages need"
            f" in multiples of parallel.pipeline_parallel_size = {parallel.pipeline_parallel_size}",
            f"choose a multiple of {samples * parallel.pipeline_parallel_size}",
        )
