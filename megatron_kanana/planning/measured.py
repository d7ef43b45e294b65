"""Measured and published figures that predictions are compared with, each with its source.

`OURS`, `SLICES` and `PUBLISHED` say what was run; `python -m tools.plan --errors` puts predictions
beside them. What calibration has used is marked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .architecture import ALL_FP8, Architecture
from .calibration import DEEPEP
from .layer_times import Job
from .layout import Layout
from .machines import MACHINES
from .observation import Observation, slice_of_30b
from .own_cards import OURS

_PEERS = "peers: megatron-core 0.16.1 and Transformer Engine 2.11, one H200, 2026-11-23"
_HOST = ("host_layer", "host_stage", "host_expert", "host_overlap")


def _peer(
    layers: int, sequences: int, quantity: str, measured: float, *, fp8: bool = False
) -> Observation:
    form = "fp8 blockwise" if fp8 else "bf16"
    name = f"megatron-core + TE, {layers} layers, {sequences} x 4096, {form}"
    calibrated = _HOST if quantity == "passes" else ()
    job = slice_of_30b(layers, sequences, fp8=ALL_FP8 if fp8 else frozenset())
    return Observation(name, quantity, measured, _PEERS, job, calibrated=calibrated)


SLICES: Sequence[Observation] = (
    _peer(4, 2, "passes", 0.127),
    _peer(4, 8, "passes", 0.256),
    _peer(10, 2, "passes", 0.307),
    _peer(10, 8, "passes", 0.516),
    _peer(4, 2, "passes", 0.217, fp8=True),
    _peer(4, 8, "passes", 0.287, fp8=True),
    _peer(4, 2, "activations", 6.1),
    _peer(4, 8, "activations", 22.8),
    _peer(10, 2, "activations", 11.7),
    _peer(10, 8, "activations", 45.2),
)

DEEPSEEK_V3 = Architecture(
    *(61, 3, 7168, 129280, 128, 192, 128, 18432, 256, 8, 2048, 2048),
    kv_lora_rank=512,
    q_lora_rank=1536,
    rope_dim=64,
)
"""Technical report, section 4.2 (arXiv 2412.19437)."""
KIMI_K2 = dataclasses.replace(
    DEEPSEEK_V3, num_dense_layers=1, vocab_size=163840, num_heads=64, num_experts=384
)
"""arXiv 2507.20534, table 2."""
QWEN3_30B = Architecture(
    *(48, 0, 2048, 151936, 32, 128, 128, 0, 128, 8, 768, 0), num_key_value_heads=4
)
QWEN3_235B = Architecture(
    *(94, 0, 4096, 151936, 64, 128, 128, 0, 128, 8, 1536, 0), num_key_value_heads=4
)
"""Their config.json on Hugging Face."""

_BRIDGE = (
    "Megatron-Bridge, performance summary, 25.09: 1024 GPUs, GBS 8192, TP2 PP8 VP4 EP64, 1,297"
    " tokens/s; recompute, pipeline layout, multi-token prediction and overlap by"
    " Megatron-MoE-ModelZoo, best_practice/DeepSeekV3"
)
_AUTOMODEL = (
    "NeMo Automodel, performance summary, and examples/benchmark/configs for recompute, gate, FSDP"
)
_ZOO = "Megatron-MoE-ModelZoo, best_practice/Qwen3/readme.md"


def _published(
    name: str,
    measured: float,
    source: str,
    architecture: Architecture,
    layout: Layout,
    *,
    fp8: bool = False,
    calibrated: tuple[str, ...] = (),
) -> Observation:
    form = ALL_FP8 if fp8 else frozenset[str]()
    job = Job(architecture, layout, MACHINES["h100"], DEEPEP, form)
    return Observation(
        name,
        "throughput",
        measured,
        source,
        job,
        fp32_gradients=False,
        calibrated=calibrated,
    )


def _megatron(
    world: int, tensor: int, expert: int, batch: int, recompute: tuple[str, ...], *, overlaps: bool
) -> Layout:
    """A layout of PP8 VP4, embedding and output layer counted, one sequence a microbatch."""
    return Layout(
        *(world, tensor, 8, 4, expert, 1, True, 4096, 1, batch),
        recompute=frozenset(recompute),
        overlaps_dispatch=overlaps,
    )


def _automodel(
    world: int, pipeline: int, virtual: int, expert: int, sequences: int, batch: int, flush: int
) -> Layout:
    """A layout with FSDP, everything computed again, and consecutive experts."""
    return Layout(
        *(world, 1, pipeline, virtual, expert, 1, False, 4096, sequences, batch),
        recompute=frozenset({"full"}),
        overlaps_gradients=True,
        microbatches_per_flush=flush,
        shards_weights=True,
        consecutive_experts=True,
    )


PUBLISHED: Sequence[Observation] = (
    _published(
        "DeepSeek-V3, 1024 H100, TP2 PP8 VP4 EP64, fp8",
        338,
        _BRIDGE,
        dataclasses.replace(DEEPSEEK_V3, num_mtp_layers=1, num_routing_nodes=4),
        _megatron(1024, 2, 64, 8192, ("up_projections", "dense_feed_forward"), overlaps=True),
        fp8=True,
    ),
    _published(
        "Qwen3-30B-A3B, 8 H100, EP8 FSDP8, bf16",
        277,
        _AUTOMODEL,
        QWEN3_30B,
        _automodel(8, 1, 1, 8, 4, 512, 1),
    ),
    _published(
        "Qwen3-235B, 256 H100, TP2 PP8 VP4 EP32, bf16, dispatch overlapped",
        276,
        _ZOO,
        QWEN3_235B,
        _megatron(256, 2, 32, 2048, ("norms", "activations"), overlaps=True),
        calibrated=("dispatch_hidden",),
    ),
    _published(
        "the same, not overlapped",
        245,
        _ZOO,
        QWEN3_235B,
        _megatron(256, 2, 32, 2048, ("norms", "activations"), overlaps=False),
        calibrated=("dispatch_hidden",),
    ),
    _published(
        "Qwen3-235B, 256 H100, TP4 PP8 VP4 EP8, bf16",
        167,
        _ZOO,
        QWEN3_235B,
        _megatron(256, 4, 8, 2048, (), overlaps=False),
        calibrated=("host_time",),
    ),
    _published(
        "DeepSeek-V3, 256 H100, PP4 VP8 EP64 FSDP64, bf16",
        250,
        _AUTOMODEL,
        DEEPSEEK_V3,
        _automodel(256, 4, 8, 64, 1, 512, 8),
    ),
    _published(
        "DeepSeek-V3, 1024 H100, PP4 VP8 EP64 FSDP256, bf16",
        216,
        _AUTOMODEL,
        DEEPSEEK_V3,
        _automodel(1024, 4, 8, 64, 1, 8192, 8),
    ),
    _published(
        "Kimi K2, 256 H100, PP8 VP4 EP32 FSDP32, bf16",
        189,
        _AUTOMODEL,
        KIMI_K2,
        _automodel(256, 8, 4, 32, 1, 512, 8),
    ),
)

ALL: Sequence[Observation] = (*OURS, *SLICES, *PUBLISHED)
