"""fp8 and kernels of dense layers that the machine, its software or the model do not have."""

from __future__ import annotations

import dataclasses

from megatron_kanana.config import Environment

from .case import CUDA_MACHINE, Bad

AMPERE = dataclasses.replace(
    CUDA_MACHINE, compute_capability=(8, 0), gpu_name="NVIDIA A100-SXM4-80GB"
)
BLACKWELL = dataclasses.replace(CUDA_MACHINE, compute_capability=(10, 0), gpu_name="NVIDIA B200")
ADA = dataclasses.replace(CUDA_MACHINE, compute_capability=(8, 9), gpu_name="NVIDIA L40S")
TWO_GPUS = Environment(world_size=2, local_world_size=2, cuda_device_count=2)


def _without(**versions: str | None) -> Environment:
    return dataclasses.replace(CUDA_MACHINE, **versions)  # type: ignore[arg-type]


PRECISION = {
    "format that is now named by its scales": Bad(
        ("precision.compute=fp8",), "precision.compute", "fp8", "auto or fp32 or bf16"
    ),
    "mxfp8 on Hopper": Bad(
        ("precision=mxfp8",),
        "precision.fp8",
        "mxfp8",
        "set precision.fp8=tensorwise or precision.fp8=blockwise, or precision=bf16",
        CUDA_MACHINE,
    ),
    "mxfp8 on a Blackwell workstation": Bad(
        ("precision=mxfp8",),
        "precision.fp8",
        "mxfp8",
        "set precision.fp8=tensorwise or precision.fp8=blockwise",
        dataclasses.replace(BLACKWELL, compute_capability=(12, 0)),
    ),
    "fp8 before Hopper": Bad(
        ("precision=fp8_blockwise",), "precision.fp8", "blockwise", "set precision=bf16", AMPERE
    ),
    "fp8 in blocks on Ada": Bad(
        ("precision=fp8_blockwise",),
        "precision.fp8",
        "blockwise",
        "set precision.fp8=tensorwise, or precision=bf16",
        ADA,
    ),
    "fp8 without Transformer Engine": Bad(
        ("precision=fp8_tensorwise",),
        "precision.fp8",
        "tensorwise",
        "pip install 'transformer-engine[pytorch]>=2.2'",
        _without(transformer_engine_version=None),
    ),
    "Transformer Engine that is too old": Bad(
        ("precision=fp8_blockwise",),
        "precision.fp8",
        "blockwise",
        "pip install 'transformer-engine[pytorch]>=2.3'",
        _without(transformer_engine_version="2.2.0"),
    ),
    "CUDA that is too old for scales in blocks": Bad(
        ("precision=fp8_blockwise",),
        "precision.fp8",
        "blockwise",
        "install torch for CUDA 12.9 or newer",
        _without(cuda_version="12.8"),
    ),
    "experts in fp8 beside layers in bf16": Bad(
        ("precision=bf16", "precision.experts=fp8"),
        "precision.experts",
        "fp8",
        "set precision=fp8_blockwise",
    ),
    "activations kept in fp8 by experts in bf16": Bad(
        ("precision=fp8_blockwise", "precision.kept_activations=fp8"),
        "precision.kept_activations",
        "fp8",
        "set precision=fp8_blockwise_experts or precision.kept_activations=bf16",
    ),
    "weight gradients in fp8 of experts in bf16": Bad(
        ("precision=fp8_blockwise", "precision.expert_weight_gradients=fp8"),
        "precision.expert_weight_gradients",
        "fp8",
        "set precision=fp8_blockwise_experts or precision.expert_weight_gradients=bf16",
    ),
    "experts in fp8 in torch": Bad(
        ("precision=fp8_blockwise", "precision.experts=fp8", "kernels.moe_backend=torch"),
        "precision.experts",
        "fp8",
        "choose csrc",
        CUDA_MACHINE,
    ),
    "experts in fp8 on Blackwell": Bad(
        ("precision=fp8_blockwise", "precision.experts=fp8"),
        "precision.experts",
        "fp8",
        "set precision.experts=bf16",
        BLACKWELL,
    ),
    "experts in fp8 between the blocks": Bad(
        ("precision=fp8_blockwise", "precision.experts=fp8", "model.moe_ffn_hidden_size=192"),
        "precision.experts",
        "fp8",
        "set precision.experts=bf16",
        CUDA_MACHINE,
    ),
    "output layer in fp8 beside layers in bf16": Bad(
        ("precision=bf16", "precision.output_layer=fp8"),
        "precision.output_layer",
        "fp8",
        "set precision=fp8_blockwise, or set precision.output_layer=bf16",
    ),
    "output layer in fp8 in torch": Bad(
        ("precision=fp8_blockwise_output_layer", "kernels.loss_backend=torch"),
        "precision.output_layer",
        "fp8",
        "choose csrc",
        CUDA_MACHINE,
    ),
    "output layer in fp8 on Blackwell": Bad(
        ("precision=fp8_blockwise", "precision.output_layer=fp8"),
        "precision.output_layer",
        "fp8",
        "set precision.output_layer=bf16",
        BLACKWELL,
    ),
    "output layer in fp8 with an older Transformer Engine": Bad(
        ("precision=fp8_blockwise", "precision.output_layer=fp8"),
        "precision.output_layer",
        "fp8",
        "pip install 'transformer-engine[pytorch]>=2.11'",
        _without(transformer_engine_version="2.10.0"),
    ),
    "words of no multiple of 16 a process": Bad(
        (
            *("precision=fp8_tensorwise", "precision.output_layer=fp8"),
            *("model.vocab_size=312", "model.vocab_size_multiple=8"),
        ),
        "precision.output_layer",
        "fp8",
        "set precision.output_layer=bf16",
        CUDA_MACHINE,
    ),
    "fp8 beside fp32": Bad(
        ("precision=fp8_blockwise", "precision.compute=fp32"),
        "precision.fp8",
        "blockwise",
        "set precision.compute=bf16 or precision.fp8=none",
        CUDA_MACHINE,
    ),
    "fp8 in torch": Bad(
        ("precision=fp8_blockwise", "kernels.linear_backend=torch"),
        "kernels.linear_backend",
        "torch",
        "choose te or auto, or set precision=bf16",
        CUDA_MACHINE,
    ),
    "latent of no multiple of 16": Bad(
        ("precision=fp8_tensorwise", "model.kv_lora_rank=72"),
        "model.kv_lora_rank",
        "72",
        "choose a multiple of 16",
        CUDA_MACHINE,
    ),
    "queries of no multiple of 16": Bad(
        ("precision=fp8_blockwise", "model.num_attention_heads=1", "model.qk_nope_head_dim=24"),
        "width of the queries over parallel.tensor_parallel_size",
        "40",
        "choose a multiple of 16",
        CUDA_MACHINE,
    ),
    "sizes of no multiple of 32 for mxfp8": Bad(
        ("precision=mxfp8",),
        "model.kv_lora_rank + model.qk_rope_head_dim",
        "80",
        "choose a multiple of 32",
        BLACKWELL,
    ),
    "tokens of no multiple of 16": Bad(
        ("precision=fp8_tensorwise", "data.sequence_length=100", "schedule.micro_batch_size=1"),
        "data.sequence_length x schedule.micro_batch_size of a process",
        "100",
        "choose a multiple of 16",
        CUDA_MACHINE,
    ),
    "tokens gathered in blocks of 128": Bad(
        (
            *("precision=fp8_blockwise", "parallel.tensor_parallel_size=2"),
            *("schedule.micro_batch_size=1", "schedule.global_batch_size=8"),
        ),
        "data.sequence_length x schedule.micro_batch_size of a process",
        "64",
        "choose a multiple of 128",
        TWO_GPUS,
    ),
    "latent gathered in blocks of 128": Bad(
        ("precision=fp8_blockwise", "parallel.tensor_parallel_size=2"),
        "model.kv_lora_rank",
        "64",
        "choose a multiple of 128",
        TWO_GPUS,
    ),
    "more layers in bf16 than there are": Bad(
        ("precision=fp8_blockwise", "precision.bf16_layers_at_start=5"),
        "precision.bf16_layers_at_start",
        "5",
        "choose at most 4",
        CUDA_MACHINE,
    ),
    "more layers in bf16 than a pipeline stage has": Bad(
        (
            *("precision=fp8_blockwise", "precision.bf16_layers_at_end=3"),
            "parallel.pipeline_parallel_size=2",
        ),
        "precision.bf16_layers_at_end",
        "3",
        "choose at most 2",
        TWO_GPUS,
    ),
    "no layer left to fp8": Bad(
        (
            *("precision=fp8_blockwise", "precision.bf16_layers_at_start=2"),
            "precision.bf16_layers_at_end=2",
        ),
        "precision.bf16_layers_at_start + precision.bf16_layers_at_end",
        "4",
        "choose fewer",
        CUDA_MACHINE,
    ),
    "Transformer Engine's linear layers on a CPU": Bad(
        ("kernels.linear_backend=te",), "kernels.linear_backend", "te", "choose torch or auto"
    ),
    "linear layers of a library that is not installed": Bad(
        ("kernels.linear_backend=te",),
        "kernels.linear_backend",
        "te",
        "pip install 'transformer-engine[pytorch]'",
        _without(transformer_engine_version=None),
    ),
    "GPU kernel of rotary embeddings on a CPU": Bad(
        ("kernels.rope_backend=triton",), "kernels.rope_backend", "triton", "choose torch or auto"
    ),
    "GPU kernel of rotary embeddings in fp32": Bad(
        ("kernels.rope_backend=triton", "precision=fp32"),
        "kernels.rope_backend",
        "triton",
        "set precision.compute=bf16",
        CUDA_MACHINE,
    ),
    "GPU kernel of rotary embeddings in a deterministic run": Bad(
        ("kernels.rope_backend=triton", "kernels.deterministic=true"),
        "kernels.rope_backend",
        "triton",
        "set kernels.deterministic=false, or choose torch or auto",
        CUDA_MACHINE,
    ),
    "GPU kernel of rotary embeddings for parts of sequences": Bad(
        ("kernels.rope_backend=triton", "parallel.context_parallel_size=2"),
        "kernels.rope_backend",
        "triton",
        "choose torch or auto",
        dataclasses.replace(CUDA_MACHINE, world_size=2),
    ),
    "GPU kernels of norms on a CPU": Bad(
        ("kernels.norm_backend=csrc",), "kernels.norm_backend", "csrc", "choose torch or auto"
    ),
    "GPU kernels of norms in fp32": Bad(
        ("kernels.norm_backend=csrc", "precision=fp32"),
        "kernels.norm_backend",
        "csrc",
        "set precision.compute=bf16",
        CUDA_MACHINE,
    ),
    "GPU kernels of norms that are not built": Bad(
        ("kernels.norm_backend=csrc",),
        "kernels.norm_backend",
        "csrc",
        "run pip install --no-build-isolation -e .",
        dataclasses.replace(CUDA_MACHINE, has_native_library=False),
    ),
    "GPU kernels of norms for a width of 20": Bad(
        ("kernels.norm_backend=csrc", "model.kv_lora_rank=20"),
        "kernels.norm_backend",
        "csrc",
        "choose torch or auto",
        CUDA_MACHINE,
    ),
    "GPU kernel of rotary embeddings for 24 heads": Bad(
        ("kernels.rope_backend=triton", "model.num_attention_heads=24"),
        "kernels.rope_backend",
        "triton",
        "choose torch or auto",
        CUDA_MACHINE,
    ),
}
