"""Every measured number that predictions rest on, with its source. Nothing else is fitted.

Sources, in short:

- peers: measured on one H200 on 2026-11-23, with torch 2.11, Transformer Engine 2.11, megatron-core
  0.16.1 and CUDA 13.0; whole steps of it are in `measured.py`.
- cards: `benchmarks/results/`, of one H100.
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
        grouped_matmul: one launch for all experts, bf16. peers: 535 forward with uneven loads, 524
            and 492 backward; mean 517 TFLOP/s.
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
    """

    name: str
    shares: tuple[tuple[int, float, float], ...]
    second_product: bool
    counts_backward: bool

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
# at 2 x 4,096 tokens and 731 at 8,192; backward 490 and 547, deterministic 408 and 453.
CSRC = Attention(
    "csrc",
    ((4096, 0.680, 0.495), (8192, 0.739, 0.553)),
    second_product=False,
    counts_backward=True,
)
"""This version's kernels for Hopper."""

CSRC_DETERMINISTIC = Attention(
    "csrc, deterministic",
    ((4096, 0.680, 0.412), (8192, 0.739, 0.458)),
    second_product=False,
    counts_backward=True,
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
    """

    name: str
    hidden: float
    width: float
    shared: float
    router: tuple[float, float, float]
    passing: tuple[float, float] = (6.0, 0.0)
    fused: bool = False
    single_launch: bool = False


CSRC_EXPERTS = Experts(
    "csrc",
    hidden=0.0,
    width=4.0,
    shared=4.0,
    router=(4.0, 16.0, 4.0),
    passing=(2.0, 2.0),
    fused=True,
    single_launch=True,
)
"""This version's kernels: pre-activations alone are kept. Beside them a visit has its activation
and its output for a while, or backward the gradient of its hidden state, in bf16; the gradient of
a pre-activation takes its place."""

PLAIN_EXPERTS = Experts(
    "torch",
    hidden=8.0,
    width=14.0,
    shared=14.0,
    router=(16.0, 16.0, 8.0),
    passing=(12.0, 0.0),
)
"""This version in plain torch, the reference; what passes is counted, not measured."""

SEQUENTIAL_EXPERTS = Experts(
    "one after another", hidden=2.0, width=12.0, shared=10.0, router=(17.0, 32.0, 12.0)
)
"""megatron-core's, which the version had that `measured.OURS` was measured with."""

GROUPED_EXPERTS = Experts(
    "grouped", hidden=2.0, width=6.0, shared=6.0, router=(17.0, 28.0, 12.0), fused=True
)
"""megatron-core's with Transformer Engine."""


@dataclass(frozen=True)
class Implementation:
    """How layers are computed: what is fused, and how long a process takes to launch it.

    Attributes:
        name: for reports.
        fused: whether activation functions, rotary embedding, cross-entropy, permutation and the
            addition of weight gradients are single kernels.
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
    """

    name: str
    fused: bool
    experts: Experts
    attention: Attention
    sends_once: str
    host_layer: float
    host_moe: float
    host_expert: dict[str, float] = field(hash=False)
    host_stage: float
    linear_loss: bool = False


TRANSFORMER_ENGINE = Implementation(
    name="transformer_engine",
    fused=True,
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
    experts=GROUPED_EXPERTS,
    attention=FUSED,
    sends_once="node",
    host_moe=TRANSFORMER_ENGINE.host_moe,
    host_expert=TRANSFORMER_ENGINE.host_expert,
    host_layer=TRANSFORMER_ENGINE.host_layer,
    host_stage=TRANSFORMER_ENGINE.host_stage,
)
"""The same with DeepEP's dispatch, as published large runs have it."""

TORCH = Implementation(
    name="torch",
    fused=False,
    experts=SEQUENTIAL_EXPERTS,
    attention=SDPA,
    sends_once="process",
    host_moe=TRANSFORMER_ENGINE.host_moe,
    # cards: the least squares of log errors of what measured.OURS has of time, which are 0.45 s
    # (Muon) and 0.51 s (AdamW) a microbatch in optimizer_step_h100, with SDPA's attention, and 0.38
    # s in planner_calibration_h100, with csrc's. The first alone gives 1.01 ms, the second 0.81.
    host_expert={"bf16": 0.91e-3, "fp8": 0.91e-3},
    host_layer=TRANSFORMER_ENGINE.host_layer,
    host_stage=TRANSFORMER_ENGINE.host_stage,
)
"""This version as `measured.OURS` has it, plain torch and experts one after another. For settings
and GPUs `attention.attention_of` and `experts.experts_of` say who computes those."""

IMPLEMENTATIONS = {each.name: each for each in (TORCH, TRANSFORMER_ENGINE, DEEPEP)}

ORTHOGONALIZATION = {"h100": 0.87, "h200": 0.87, "b200": 0.41}
"""Operations of plain Newton-Schulz a second over the bf16 peak. cards: orthogonalize_h100, 128 x
(768 x 2048) in 4.34 ms (846 TFLOP/s of 989); other GPUs than Hopper take plain products, 8.98 ms
on that card."""

ORTHOGONALIZATION_LAUNCH = 1.0e-3
"""Seconds to launch one batch of matrices of a shape. cards: a single small matrix takes 1 ms."""

UPDATE_BYTES = {"adamw": 46.0, "muon": 60.0}
"""Bytes moved for each parameter of a process's share, counted from the update's passes: gradient
norm 4, clipping 8, copy to the model 6; AdamW's 28; Muon's momentum 14, update in 16 bits 12, step
12, and 4 more for casts."""

RESERVED_MEMORY = 0.06
"""Share of a GPU's memory left for CUDA, NCCL's buffers and fragmentation: our choice."""
