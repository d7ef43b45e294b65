"""Number formats: of weights and activations, and of the dense layers' products in fp8."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import setting

DENSE_WEIGHTS = (
    "query",
    "query_down",
    "query_up",
    "key_value_down",
    "key_value_up",
    "attention_output",
    "gate_up",
    "down",
    "mtp_projection",
)
"""Kinds of weights in linear layers; what `precision.fp8` is about where they are not experts'."""


@dataclass(kw_only=True)
class PrecisionSettings:
    """Number formats."""

    compute: str = setting(
        "auto",
        help="format of weights and activations; auto is bf16 on CUDA and fp32 on a CPU",
        choices=("auto", "fp32", "bf16"),
    )
    fp8: str = setting(
        "none",
        help="scales of the dense linear layers' operands in fp8, by Transformer Engine: blockwise"
        " has one for each 1 x 128 inputs and 128 x 128 weights, tensorwise one a tensor, mxfp8 one"
        " for each 32 values (Blackwell); none computes them in precision.compute, as a CPU does",
        choices=("none", "blockwise", "tensorwise", "mxfp8"),
    )
    experts: str = setting(
        "bf16",
        help="format of the products of routed and shared experts: fp8 needs precision.fp8 ="
        " blockwise and a Hopper GPU; a CPU leaves it out; read docs/precision.md before",
        choices=("bf16", "fp8"),
    )
    expert_weight_gradients: str = setting(
        "bf16",
        help="format of the products that are the gradients of routed and shared experts' weights:"
        " fp8 needs precision.experts = fp8; sums are in fp32 either way; a CPU leaves it out",
        choices=("bf16", "fp8"),
    )
    kept_activations: str = setting(
        "bf16",
        help="format in which routed and shared experts keep gate and up for the backward pass: fp8"
        " needs precision.experts = fp8, halves their memory, and has a scale for each 128 numbers"
        " of a row; a CPU leaves it out",
        choices=("bf16", "fp8"),
    )
    output_layer: str = setting(
        "bf16",
        help="format of the output layer's three products in training: fp8 needs precision.fp8 and"
        " a Hopper GPU, has one scale a tensor, and e5m2 for the logits' gradient; evaluation and"
        " generation stay in bf16; a CPU leaves it out; read docs/precision.md before",
        choices=("bf16", "fp8"),
    )
    bf16_layers_at_start: int = setting(
        0, help="first transformer layers that precision.fp8 leaves out", minimum=0
    )
    bf16_layers_at_end: int = setting(
        0,
        help="last transformer layers that precision.fp8 leaves out; multi-token prediction layers"
        " are not among them",
        minimum=0,
    )
    bf16_weights: list[str] = setting(
        [],
        help="kinds of dense weights that precision.fp8 leaves out in every layer; gate_up and down"
        " are those of dense feed-forwards",
        choices=DENSE_WEIGHTS,
    )
    reduce_gradients_in_fp32: bool = setting(True, help="accumulate and reduce gradients in fp32")


@dataclass(frozen=True)
class Fp8Recipe:
    """What a value of `precision.fp8` needs (Transformer Engine 2.11, `pytorch/quantization.py`).

    Attributes:
        capability: lowest compute capability of the GPU.
        below: compute capability from which on it is not supported again; None for no such.
        gpus: which GPUs these are, for a person.
        cuda: lowest version of CUDA that torch is built with.
        transformer_engine: lowest version (megatron-core 0.16.1, `fp8_utils.get_fp8_recipe`).
        multiple: what sizes and tokens of a product are multiples of.
        gathered_multiple: the same for what tensor parallelism gathers in fp8.
    """

    capability: tuple[int, int]
    below: tuple[int, int] | None
    gpus: str
    cuda: tuple[int, int]
    transformer_engine: tuple[int, int]
    multiple: int
    gathered_multiple: int


FP8_RECIPES = {
    "tensorwise": Fp8Recipe((8, 9), None, "Ada, Hopper or newer", (12, 1), (2, 2), 16, 16),
    "blockwise": Fp8Recipe((9, 0), None, "Hopper or newer", (12, 9), (2, 3), 16, 128),
    "mxfp8": Fp8Recipe((10, 0), (12, 0), "Blackwell", (12, 8), (2, 1), 32, 32),
}
"""By `precision.fp8`. mxfp8's version of CUDA is that of cuBLAS with its scales."""

OUTPUT_LAYER_TRANSFORMER_ENGINE = (2, 11)
"""Lowest version for `precision.output_layer` = fp8: `general_gemm` took other arguments before."""
