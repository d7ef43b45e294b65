"""fp8 that the machine, its software or the model's sizes do not have."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_kanana.native_library import HOPPER_FP8_OUTPUT_LAYER_UNIT

from .environment import Environment, resolve_device, resolve_fp8, resolve_precision
from .expert_sizes import expert_layer_sizes
from .precision_settings import FP8_RECIPES, OUTPUT_LAYER_TRANSFORMER_ENGINE, Fp8Recipe
from .problems import Problem
from .schema import Settings

PACKAGE = "transformer-engine[pytorch]"


def check_precision(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """`precision.fp8` is for this machine, this model and this layout; a CPU leaves it out."""
    device = resolve_device(settings.device, environment)
    fp8 = resolve_fp8(settings.precision.fp8, device)
    if settings.precision.experts == "fp8":
        yield from _check_experts(settings, environment)
    else:
        for name in ("expert_weight_gradients", "kept_activations"):
            if getattr(settings.precision, name) == "fp8":
                yield Problem(
                    f"precision.{name}",
                    "fp8",
                    f"needs precision.experts = fp8, and it is {settings.precision.experts}",
                    f"set precision=fp8_blockwise_experts or precision.{name}=bf16",
                )
    if settings.precision.output_layer == "fp8":
        yield from _check_output_layer(settings, environment)
    if fp8 == "none":
        return
    recipe = FP8_RECIPES[fp8]
    if resolve_precision(settings.precision.compute, device) == "fp32":
        yield Problem(
            "precision.fp8",
            fp8,
            "multiplies beside bf16, and precision.compute = fp32",
            "set precision.compute=bf16 or precision.fp8=none",
        )
    yield from _check_machine(fp8, recipe, environment)
    yield from _check_software(fp8, recipe, environment)
    yield from _check_sizes(fp8, recipe, settings)
    yield from _check_bf16_layers(settings)


def _check_experts(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """`precision.experts` = fp8 has kernels."""
    remedy = "set precision.experts=bf16"

    def problem(reason: str, remedy: str = remedy) -> Problem:
        return Problem("precision.experts", "fp8", reason, remedy)

    fp8 = settings.precision.fp8
    if fp8 != "blockwise":
        yield problem(
            f"needs precision.fp8 = blockwise, and it is {fp8}",
            f"set precision=fp8_blockwise, or {remedy}",
        )
    if resolve_device(settings.device, environment) == "cpu":
        return
    yield from _check_kernels("experts", "moe_backend", settings, environment)
    for limit in expert_layer_sizes(settings).hopper_fp8_limits_passed():
        yield problem(f"on CUDA it takes {limit}")


def _check_output_layer(settings: Settings, environment: Environment) -> Iterator[Problem]:
    """`precision.output_layer` = fp8 has Transformer Engine's products and a kernel."""
    remedy = "set precision.output_layer=bf16"

    def problem(reason: str, remedy: str = remedy) -> Problem:
        return Problem("precision.output_layer", "fp8", reason, remedy)

    if settings.precision.fp8 == "none":
        yield problem(
            "needs precision.fp8 other than none", f"set precision=fp8_blockwise, or {remedy}"
        )
    if resolve_device(settings.device, environment) == "cpu":
        return
    yield from _check_kernels("output_layer", "loss_backend", settings, environment)
    installed, needed = environment.transformer_engine_version, OUTPUT_LAYER_TRANSFORMER_ENGINE
    if installed is not None:
        yield from _check_version("output_layer", "fp8", installed, needed, remedy)
    words = settings.model.padded_vocab_size // settings.parallel.tensor_parallel_size
    if words % HOPPER_FP8_OUTPUT_LAYER_UNIT:
        unit = HOPPER_FP8_OUTPUT_LAYER_UNIT
        yield problem(f"takes words in multiples of {unit}, a process has {words}")


def _check_kernels(
    part: str, backend: str, settings: Settings, environment: Environment
) -> Iterator[Problem]:
    """`precision` has this part in fp8, for which csrc has kernels for Hopper."""
    name, remedy = f"precision.{part}", f"set precision.{part}=bf16"
    if getattr(settings.kernels, backend) == "torch":
        reason = f"kernels.{backend} = torch has no fp8"
        yield Problem(name, "fp8", reason, f"choose csrc, or {remedy}")
    found = environment.compute_capability
    if found is not None and found != (9, 0):
        yield Problem(name, "fp8", f"needs a Hopper GPU; {environment.gpu_name} is none", remedy)


def _check_machine(fp8: str, recipe: Fp8Recipe, environment: Environment) -> Iterator[Problem]:
    found = environment.compute_capability
    if found is None or (found >= recipe.capability and (not recipe.below or found < recipe.below)):
        return
    fitting = [
        name
        for name, other in FP8_RECIPES.items()
        if found >= other.capability and (not other.below or found < other.below)
    ]
    names = " or ".join(f"precision.fp8={name}" for name in fitting)
    reach = _dotted(recipe.capability)
    reach += f" to below {recipe.below[0]}.0" if recipe.below else " or higher"
    yield Problem(
        "precision.fp8",
        fp8,
        f"needs a GPU of compute capability {reach} ({recipe.gpus});"
        f" {environment.gpu_name} has {found[0]}.{found[1]}",
        f"set {names}, or precision=bf16" if fitting else "set precision=bf16",
    )


def _check_software(fp8: str, recipe: Fp8Recipe, environment: Environment) -> Iterator[Problem]:
    installed, needed = environment.transformer_engine_version, recipe.transformer_engine
    otherwise = "set precision=bf16"
    if installed is None:
        remedy = f"{_installing(needed)} or {otherwise}"
        yield Problem("precision.fp8", fp8, f"{PACKAGE} is not installed", remedy)
    else:
        yield from _check_version("fp8", fp8, installed, needed, otherwise)
    cuda = environment.cuda_version
    if cuda is not None and _version(cuda) < recipe.cuda:
        wanted = _dotted(recipe.cuda)
        yield Problem(
            "precision.fp8",
            fp8,
            f"needs CUDA {wanted}; torch is built with {cuda}",
            f"install torch for CUDA {wanted} or newer, or set precision=bf16",
        )


def _check_version(
    part: str, value: str, installed: str, needed: tuple[int, int], otherwise: str
) -> Iterator[Problem]:
    """`precision` has a value that this version of Transformer Engine is new enough for."""
    if _version(installed) < needed:
        reason = f"needs transformer-engine {_dotted(needed)}; {installed} is installed"
        yield Problem(f"precision.{part}", value, reason, f"{_installing(needed)} or {otherwise}")


def _installing(needed: tuple[int, int]) -> str:
    return f"run pip install '{PACKAGE}>={_dotted(needed)}'"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _version(text: str) -> tuple[int, ...]:
    """Its first two numbers."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def _check_sizes(fp8: str, recipe: Fp8Recipe, settings: Settings) -> Iterator[Problem]:
    """Both sides of every product's operands are multiples of what the recipe takes."""
    parallel, schedule = settings.parallel, settings.schedule
    parts = parallel.tensor_parallel_size
    sizes = {name: (size, recipe.multiple) for name, size in linear_sizes(settings).items()}
    tokens = settings.data.sequence_length * schedule.micro_batch_size
    tokens //= parts * parallel.context_parallel_size
    is_gathered = parts > 1
    sizes["data.sequence_length x schedule.micro_batch_size of a process"] = (
        tokens,
        recipe.gathered_multiple if is_gathered else recipe.multiple,
    )
    if is_gathered:  # inputs of layers that are split by columns
        for name in ("model.hidden_size", "model.q_lora_rank", "model.kv_lora_rank"):
            if name in sizes:
                sizes[name] = (sizes[name][0], recipe.gathered_multiple)
    for name, (size, multiple) in sizes.items():
        if size % multiple:
            yield Problem(
                name,
                size,
                f"precision.fp8 = {fp8} multiplies sizes that are multiples of {multiple}",
                f"choose a multiple of {multiple}, or set precision=bf16",
            )


def linear_sizes(settings: Settings) -> dict[str, int]:
    """Widths of inputs and outputs of the dense linear layers, as one process holds them."""
    model, parts = settings.model, settings.parallel.tensor_parallel_size
    heads = model.num_attention_heads // parts
    of_process = "over parallel.tensor_parallel_size"
    query = model.qk_nope_head_dim + model.qk_rope_head_dim
    sizes = {
        "model.hidden_size": model.hidden_size,
        "model.kv_lora_rank": model.kv_lora_rank,
        "model.kv_lora_rank + model.qk_rope_head_dim": model.kv_lora_rank + model.qk_rope_head_dim,
        f"width of the queries {of_process}": heads * query,
        f"width of the keys and values {of_process}": (
            heads * (model.qk_nope_head_dim + model.v_head_dim)
        ),
        f"width of the values {of_process}": heads * model.v_head_dim,
    }
    if model.q_lora_rank is not None:
        sizes["model.q_lora_rank"] = model.q_lora_rank
    if model.num_dense_layers:
        sizes[f"model.ffn_hidden_size {of_process}"] = model.ffn_hidden_size // parts
    if model.num_mtp_layers:
        sizes[f"model.hidden_size {of_process}"] = model.hidden_size // parts
    return sizes


def _check_bf16_layers(settings: Settings) -> Iterator[Problem]:
    """megatron-core looks for them in the first and in the last pipeline stage."""
    layers, stages = settings.model.num_layers, settings.parallel.pipeline_parallel_size
    of_stage = layers // stages
    counts = {
        "precision.bf16_layers_at_start": settings.precision.bf16_layers_at_start,
        "precision.bf16_layers_at_end": settings.precision.bf16_layers_at_end,
    }
    for name, count in counts.items():
        if count > of_stage:
            yield Problem(
                name,
                count,
                f"a pipeline stage has {of_stage} of model.num_layers = {layers}",
                f"choose at most {of_stage}",
            )
    if all(count <= of_stage for count in counts.values()) and sum(counts.values()) >= layers:
        yield Problem(
            " + ".join(counts),
            sum(counts.values()),
            f"leaves none of model.num_layers = {layers} to precision.fp8",
            "choose fewer, or set precision=bf16",
        )
