"""What two versions of megatron-core train: tiny models in several layouts on a CPU, and on a GPU
one of a size that all kernels take, with Transformer Engine's layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from .loss_parity import MODEL
from .step_bench import BUILTIN_VOCABULARY

SIZES = ("schedule.global_batch_size=8", "schedule.micro_batch_size=2")
CPU_SIZES = (*SIZES, "data.sequence_length=128")
GPU_SIZES = (
    *SIZES,
    *("model=kanana_2_30b_a3b", "model.num_layers=4", f"model.vocab_size={BUILTIN_VOCABULARY}"),
    *MODEL,
    *(
        "data.sequence_length=1024",
        "optimizer.learning_rate=4e-4",
        "schedule.evaluation_interval=0",
    ),
)
NORMS_AND_UP_PROJECTIONS = (
    "parallel.recompute=selective",
    "parallel.recompute_parts=[norms,up_projections]",
)
ANOTHER_ORDER = ("schedule.micro_batch_size=1",)


@dataclass(frozen=True)
class Case:
    """One layout and what is trained in it.

    Attributes:
        name: of the case in the card.
        overrides: of the default run.
        processes: of the run.
    """

    name: str
    overrides: tuple[str, ...]
    processes: int = 1


CPU_CASES = (
    Case("fp32, AdamW", ()),
    Case("bf16, AdamW", ("precision=bf16",)),
    Case(
        "bf16, Muon, low-rank queries", ("precision=bf16", "optimizer=muon", "model.q_lora_rank=48")
    ),
    Case("full recompute, two MTP layers", ("parallel.recompute=full", "model.num_mtp_layers=2")),
    Case(
        "tensor parallel, one MTP layer",
        ("parallel.tensor_parallel_size=2", "model.num_mtp_layers=1"),
        processes=2,
    ),
    Case(
        "supervised fine-tuning, one MTP layer",
        ("experiment=kanana_2_tiny_sft", "model.num_mtp_layers=1", "data.sequence_length=512"),
    ),
    Case(
        "pipeline of two, each in two stages",
        ("parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_stages=2"),
        processes=2,
    ),
    Case(
        "experts over two, Muon",
        ("parallel.expert_parallel_size=2", "optimizer=muon"),
        processes=2,
    ),
)

GPU_CASES = (
    Case("bf16, AdamW", ("precision=bf16",)),
    Case("bf16, AdamW, the same bits each time", ("precision=bf16", "kernels.deterministic=true")),
    Case(
        "bf16, Muon, low-rank queries, one MTP layer, full recompute",
        (
            *("precision=bf16", "optimizer=muon", "model.q_lora_rank=512"),
            *("model.num_mtp_layers=1", "parallel.recompute=full"),
        ),
    ),
    Case(
        "bf16, Muon, norms and up-projections recomputed",
        ("precision=bf16", "optimizer=muon", *NORMS_AND_UP_PROJECTIONS),
    ),
    Case("layers and experts in fp8, Muon", ("precision=fp8_blockwise_experts", "optimizer=muon")),
    Case(
        "layers in fp8, AdamW, norms and up-projections recomputed",
        ("precision=fp8_blockwise", *NORMS_AND_UP_PROJECTIONS),
    ),
)
