"""Every measured number that predictions rest on, with its source. Nothing else is fitted.

Sources, in short:

- peers: measured on one H200 on 2026-11-23, with torch 2.11, Transformer Engine 2.11, megatron-core
  0.16.1 and CUDA 13.0; whole steps of it are in `measured.py`.
- cards: `benchmarks/results/`, of one H100 or H200 as their names say.
- DeepEP: its README, on H800; UCCL-EP: its README, the same measurement on H200.

An efficiency is a share of the machine's peak.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Efficiencies:
    """Shares of peaks, the same for every model and every system.

    Attributes:
        matmul: large dense products in bf16. peers: 662 TFLOP/s for a dense product of an expert
            layer's operations (0.67); 8192^3 reaches 770 to 800 alone.
        matmul_fp8: in fp8, of the fp8 peak. peers: 1126 TFLOP/s of `torch._scaled_grouped_mm`.
        grouped_matmul: one launch for all experts, bf16, of experts that have no rate of their own.
            peers: 535 forward with uneven loads, 524 and 492 backward; mean 517 TFLOP/s.
        output_matmul: the output layer's products, in bf16. cards: step_8x4096_h200, 72 ms for
            5.16e13 operations (717 TFLOP/s, 0.72).
        output_matmul_fp8: the same in fp8, of the fp8 peak. cards: step_10_layers_8x4096_h200,
            whose dense products take 35 ms less with them in fp8 (1,398 TFLOP/s, 0.71).
        memory: of memory bandwidth, kernels that only move data. peers: `moe_permute` 0.281 ms for
            16,384 tokens in and 98,304 out (2.9 TB/s, 0.60).
        optimizer_memory: the same for the many small kernels of an update. cards: AdamW's 0.061 s
            for 2.51e9 parameters at 46 bytes each (1.89 TB/s of an H100's 3.35, 0.56).
        nvlink: of NVLink's bandwidth, any collective. UCCL-EP: 320 of 450 GB/s in a node (0.71).
        network: of the network's. DeepEP: 43 to 47 of 50 GB/s between nodes (0.9).
        dispatch_hidden: of the time of experts' messages that overlapping them hides. Megatron MoE
            Model Zoo: Qwen3-235B on 256 H100 takes 19.7 s without and 17.6 s with it; the messages
            take 5.7 s as predicted here (0.37).
        host_overlap: exponent p of (host^p + gpu^p)^(1/p), how well launching overlaps with what
            was launched; 1 not at all, infinite perfectly. Fitted to `measured.SLICES`.
    """

    matmul: float = 0.67
    matmul_fp8: float = 0.57
    grouped_matmul: float = 0.52
    output_matmul: float = 0.72
    output_matmul_fp8: float = 0.71
    memory: float = 0.60
    optimizer_memory: float = 0.56
    nvlink: float = 0.71
    network: float = 0.90
    dispatch_hidden: float = 0.37
    host_overlap: float = 4.0


@dataclass(frozen=True)
class Attention:
    """Who computes attention itself, and shares of the bf16 peak that it reaches.

    Attributes:
        name: for reports; a value of `kernels.backend` where it is one of this version's.
        shares: tokens of a sequence, and the shares that causal attention reaches forward (of 2
            products) and backward (of 5) from that length on. Shorter ones take the first.
        second_product: whether a second product finds the largest logits. Where it does not they
            are found inside the kernel, in the time of `shares`, or not at all.
        counts_backward: whether what its backward pass holds for a while is known, and counted.
        in_step: the rate inside a step over that of `shares`, which are measured alone.
    """

    name: str
    shares: tuple[tuple[int, float, float], ...]
    second_product: bool
    counts_backward: bool
    in_step: float = 1.0

    def shares_at(self, sequence_length: int) -> tuple[float, float]:
        """Forward and backward, those of the longest measured sequence that is not longer."""
        reached = [each for each in self.shares if each[0] <= sequence_length]
        _, forward, backward = reached[-1] if reached else self.shares[0]
        return forward, backward


# peers: Transformer Engine's 573 and 401 TFLOP/s.
_FUSED = ((4096, 0.58, 0.405),)

FUSED = Attention("fused", _FUSED, second_product=False, counts_backward=False)
"""That of Transformer Engine, without the largest logits."""

SDPA = Attention("sdpa", _FUSED, second_product=True, counts_backward=False)
"""torch's, taken to be as fast."""

# cards: attention_h100, widths 192 and 128, 32 heads. Forward with the largest logits 673 TFLOP/s
# at 2 x 4,096 tokens and 731 at 8,192; backward 490 and 547, deterministic 408 and 453. Inside a
# step, with its clocks: step_8x4096_h200 102 ms and step_2x4096_h100 25.0, which alone would be
# 93.4 and 23.3 (0.91, 0.93).
CSRC = Attention(
    "csrc",
    ((4096, 0.680, 0.495), (8192, 0.739, 0.553)),
    second_product=False,
    counts_backward=True,
    in_step=0.92,
)
"""This version's kernels for Hopper."""

CSRC_DETERMINISTIC = Attention(
    "csrc, deterministic",
    ((4096, 0.680, 0.412), (8192, 0.739, 0.458)),
    second_product=False,
    counts_backward=True,
    in_step=0.92,
)
"""The same with `kernels.deterministic`."""


@dataclass(frozen=True)
class Experts:
    """Who computes routing and experts, and the bytes that it keeps and needs of a token.

    A visit is a token at one of its experts.

    Attributes:
        name: for reports; a value of `kernels.moe_backend` where it is one of this version's.
        hidden: bytes kept of a visit for each element of the hidden size.
        width: the same for each element of an expert's width.
        shared: bytes kept of a token for each element of the shared experts' width.
        router: bytes kept for each expert of the layer and token, for each visit, and a token.
        passing: bytes that a visit needs for a while, for each element of hidden size and width.
        fused: whether activation functions and weights of the experts are in their products.
        single_launch: whether the host launches as much however many experts there are, and waits
            for their counts only where tokens leave the process.
        share: of the bf16 peak, that products with routed and shared experts reach inside a step,
            the passes through their activation included; None is `Efficiencies.grouped_matmul` for
            routed and `matmul` for shared ones, with those passes apart.
        share_fp8: the same in fp8, of the fp8 peak, but for gradients of weights.
        share_fp8_gradients: that of these, where they are in fp8.
        gradient_memory: of memory bandwidth, adding to fp32 gradients; None is
            `Efficiencies.memory`.
        quantised_inputs: whether, in fp8, what products keep of their inputs is in fp8.
    """

    name: str
    hidden: float
    width: float
    shared: float
    router: tuple[float, float, float]
    passing: tuple[float, float] = (6.0, 0.0)
    fused: bool = False
    single_launch: bool = False
    share: float | None = None
    share_fp8: float | None = None
    share_fp8_gradients: float | None = None
    gradient_memory: float | None = None
    quantised_inputs: bool = False


CSRC_EXPERTS = Experts(
    "csrc",
    hidden=0.0,
    width=4.0,
    shared=4.0,
    router=(4.0, 16.0, 4.0),
    passing=(2.0, 2.0),
    fused=True,
    single_launch=True,
    share=0.55,
    share_fp8=0.47,
    share_fp8_gradients=0.57,
    gradient_memory=0.85,
)
"""This version's kernels: pre-activations alone are kept, in bf16 and in fp8. Beside them a visit
has its activation and its output for a while, or backward the gradient of its hidden state, in
bf16; the gradient of a pre-activation takes its place.

Rates are those of the cards' component 'experts', 9 layers: 131.6 ms in step_8x4096_h200 (bf16),
45.95 ms in step_2x4096_h100, 41.3 ms in step_recompute_h200 (2 x 4096), from which product and
adding to gradients follow together. In fp8 96.6 ms with gradients of weights in bf16,
and 77.1 ms without in step_10_layers_8x4096_h200. Alone, products
are faster: moe_h100 (6.53 ms and 21.2 ms without shared experts, 16,384 and 65,536 tokens) gives
0.63 and 0.62, and the wider experts of moe_155b_h100 (19.0 ms) 0.65, with faster weight gradients
than those steps had."""

PLAIN_EXPERTS = Experts(
    "torch",
    hidden=8.0,
    width=14.0,
    shared=14.0,
    router=(16.0, 16.0, 8.0),
    passing=(12.0, 0.0),
)
"""This version in plain torch, the reference; what passes is counted, not measured."""

GROUPED_EXPERTS = Experts(
    "grouped",
    hidden=2.0,
    width=6.0,
    shared=6.0,
    router=(17.0, 28.0, 12.0),
    fused=True,
    quantised_inputs=True,
)
"""megatron-core's with Transformer Engine."""


@dataclass(frozen=True)
class Implementation:
    """How layers are computed: what is fused, and how long a process takes to launch it.

    Attributes:
        name: for reports.
        fused: whether rotary embedding, cross-entropy, permutation and the addition of weight
            gradients are single kernels.
        fuses_activations: whether activation functions of dense layers are.
        experts: who computes routing and experts.
        attention: who computes attention itself.
        sends_once: to what a token is sent once, however many of its experts lie there: 'expert'
            (megatron-core's all-to-all), 'process' (ours) or 'node' (DeepEP).
        host_layer: seconds to launch a layer's attention and norms, forward and backward.
        host_moe: seconds to launch router, dispatch and shared experts, forward and backward.
        host_expert: seconds for each routed expert of the process, by format of computation, where
            they are not launched together.
        host_stage: seconds for embedding, output layer, loss and the like, forward and backward.
        linear_loss: whether losses are taken from hidden states, a chunk of logits at a time
            (docs/loss.md).
        host_fp8: seconds that fp8 adds to launching a layer whose projections are all in fp8.
        matmul_fp8: share of the fp8 peak of projections in fp8; None is `Efficiencies.matmul_fp8`.
        moving: time of norms, sums, rotary embedding and combination over that of the bytes that
            `layer_times` counts.
    """

    name: str
    fused: bool
    fuses_activations: bool
    experts: Experts
    attention: Attention
    sends_once: str
    host_layer: float
    host_moe: float
    host_expert: dict[str, float] = field(hash=False)
    host_stage: float
    linear_loss: bool = False
    host_fp8: float = 0.0
    matmul_fp8: float | None = None
    moving: float = 1.0


TRANSFORMER_ENGINE = Implementation(
    name="transformer_engine",
    fused=True,
    fuses_activations=True,
    experts=GROUPED_EXPERTS,
    attention=FUSED,
    sends_once="expert",
    # peers: a layer's 128 experts take 22 ms in bf16, and 61 in fp8, whatever the number of tokens
    # below 32K. What of that does not depend on the number of experts is our estimate.
    host_moe=4e-3,
    host_expert={"bf16": 0.14e-3, "fp8": 0.45e-3},
    # Of measured.SLICES, bf16 at 2 x 4096: 30 ms a layer of experts, and 37 ms beside those.
    host_layer=8e-3,
    host_stage=26e-3,
)
"""megatron-core with Transformer Engine at its best: CUTLASS grouped products."""

DEEPEP = Implementation(
    name="transformer_engine_deepep",
    fused=True,
    fuses_activations=True,
    experts=GROUPED_EXPERTS,
    attention=FUSED,
    sends_once="node",
    host_moe=TRANSFORMER_ENGINE.host_moe,
    host_expert=TRANSFORMER_ENGINE.host_expert,
    host_layer=TRANSFORMER_ENGINE.host_layer,
    host_stage=TRANSFORMER_ENGINE.host_stage,
)
"""The same with DeepEP's dispatch, as published large runs have it."""

KANANA = Implementation(
    name="megatron_kanana",
    fused=True,
    fuses_activations=False,
    experts=CSRC_EXPERTS,
    attention=CSRC,
    sends_once="process",
    # Fitted with matmul_fp8 (`tools.plan --errors --fit`) to passes and steps on three hosts, which
    # differ: their part of a step of 10 layers is 88 ms in step_2x4096_h100 and 117 in
    # step_8x4096_h200, of 8 layers 56 in step_8_layers_h100. How it is divided is our estimate.
    host_layer=3.6e-3,
    host_moe=2.1e-3,
    host_stage=4.8e-3,
    host_fp8=4.7e-3,
    # Of an earlier version, whose experts were launched one after another: 0.38 to 0.51 s for 4
    # layers of 128 (cards of commits a845700 and 7cf3adc).
    host_expert={"bf16": 0.91e-3, "fp8": 0.91e-3},
    linear_loss=True,
    # step_8x4096_h200's dense products without the output layer's, 57 ms, alone give 0.54.
    matmul_fp8=0.52,
)
"""This version, its operations compiled and Transformer Engine there. For settings and GPUs
`implementation_of` says who computes what."""

IMPLEMENTATIONS = {each.name: each for each in (KANANA, TRANSFORMER_ENGINE, DEEPEP)}

ORTHOGONALIZATION = {"h100": 0.87, "h200": 0.87, "b200": 0.41}
"""Operations of plain Newton-Schulz a second over the bf16 peak. cards: orthogonalize_h100, 128 x
(768 x 2048) in 4.34 ms (846 TFLOP/s of 989); other GPUs than Hopper take plain products, 8.98 ms
on that card."""

ORTHOGONALIZATION_LAUNCH = 1.0e-3
"""Seconds to launch one batch of matrices of a shape. cards: a single small matrix takes 1 ms."""

QUANTISING_BYTES = 5.5
"""Memory traffic of quantising a number of 16 bits, both orders. cards: step_8x4096_h200, 16 ms of
casts by Transformer Engine for 25,664 numbers a token and layer, at `Efficiencies.memory`."""

FP8_BYTES = 1 + 4 / 128
"""Of a number in fp8 with one fp32 scale for each 128 (blockwise)."""

UPDATE_BYTES = {"adamw": 46.0, "muon": 60.0}
"""Bytes moved for each parameter of a process's share, counted from the update's passes: gradient
norm 4, clipping 8, copy to the model 6; AdamW's 28; Muon's momentum 14, update in 16 bits 12, step
12, and 4 more for casts."""

RESERVED_MEMORY = 0.06
"""Share of a GPU's memory left for CUDA, NCCL's buffers and fragmentation: our choice."""
