"""Formulas of activations against what autograd really keeps of tiny models on the CPU."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch

from megatron_kanana.config import Environment, Settings, load_settings
from megatron_kanana.planning.activations import (
    arrived_bytes,
    attention_backward_bytes,
    feed_forward_bytes,
    output_bytes,
    stage_bytes,
)
from megatron_kanana.planning.architecture import Architecture
from megatron_kanana.planning.calibration import (
    CSRC,
    CSRC_EXPERTS,
    KANANA,
    PLAIN_EXPERTS,
    SDPA,
    TRANSFORMER_ENGINE,
    Implementation,
)
from megatron_kanana.planning.implementation import fp8_of
from megatron_kanana.planning.layout import Layout, stages
from tests.launch import CONFIG_DIR, run_python

FP8 = ["precision.fp8=blockwise"]
KEYS_IN_BF16 = "precision.bf16_weights=[key_value_down,key_value_up]"
CASES: dict[str, list[str]] = {
    "recompute none": [],
    "recompute full": ["parallel.recompute=full"],
    "norms computed again": ["parallel.recompute=selective", "parallel.recompute_parts=[norms]"],
    "up-projections computed again": [
        "parallel.recompute=selective",
        "parallel.recompute_parts=[up_projections]",
    ],
    "all parts computed again, queries projected directly": [
        "parallel.recompute=selective",
        "parallel.recompute_parts=[norms,up_projections,dense_feed_forward]",
        "++model.q_lora_rank=null",
    ],
    "queries projected directly": ["++model.q_lora_rank=null"],
    "dense layers": ["model.num_dense_layers=4"],
    "no shared experts": ["model.num_shared_experts=0"],
    "tensor parallel": ["parallel.tensor_parallel_size=2"],
    "tensor parallel, recompute full": [
        "parallel.tensor_parallel_size=2",
        "parallel.recompute=full",
    ],
    "fp8": FP8,
    "fp8, queries projected directly": [*FP8, "++model.q_lora_rank=null"],
    "fp8, dense layers": [*FP8, "model.num_dense_layers=4"],
    "fp8, recompute full": [*FP8, "parallel.recompute=full"],
    "fp8, norms computed again": [
        *FP8,
        "parallel.recompute=selective",
        "parallel.recompute_parts=[norms]",
        "model.num_dense_layers=2",
    ],
    "fp8, norms computed again, queries projected directly": [
        *FP8,
        "parallel.recompute=selective",
        "parallel.recompute_parts=[norms]",
        "++model.q_lora_rank=null",
    ],
    "fp8, up-projections computed again": [
        *FP8,
        "parallel.recompute=selective",
        "parallel.recompute_parts=[up_projections]",
    ],
    "fp8, up-projections computed again, queries projected directly": [
        *FP8,
        "parallel.recompute=selective",
        "parallel.recompute_parts=[up_projections]",
        "++model.q_lora_rank=null",
    ],
    "fp8, keys and values in bf16": [*FP8, KEYS_IN_BF16],
    "fp8, keys and values in bf16, queries projected directly": [
        *(*FP8, KEYS_IN_BF16),
        "++model.q_lora_rank=null",
    ],
    "fp8, query and gate in bf16, up-projections computed again": [
        *(*FP8, "precision.bf16_weights=[query,query_down,query_up,gate_up]"),
        "parallel.recompute=selective",
        "parallel.recompute_parts=[up_projections]",
    ],
    "fp8, dense feed-forward computed again": [
        *FP8,
        "parallel.recompute=selective",
        "parallel.recompute_parts=[dense_feed_forward]",
        "model.num_dense_layers=4",
    ],
    "multi-token prediction": ["++model.num_mtp_layers=1"],
    "attention of csrc": ["kernels.backend=csrc"],
    "experts of csrc": ["kernels.moe_backend=csrc"],
    "experts of csrc, without shared ones": [
        "kernels.moe_backend=csrc",
        "model.num_shared_experts=0",
    ],
    "experts of csrc, tensor parallel": [
        "kernels.moe_backend=csrc",
        "parallel.tensor_parallel_size=2",
    ],
}
BATCH = [
    "schedule.micro_batch_size=4",
    "schedule.global_batch_size=4",
    "data.sequence_length=128",
]


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, int]]:
    """What the models of all cases keep, and their peaks."""
    cases = {name: [*overrides, *BATCH] for name, overrides in CASES.items()}
    finished = run_python("-m", "tests.unit.planning_saved_tensors", json.dumps(cases))
    assert finished.returncode == 0, finished.stderr
    values: dict[str, dict[str, int]] = json.loads(finished.stdout.splitlines()[-1])
    return values


def load(name: str) -> tuple[Settings, Layout]:
    """Settings and layout of a case."""
    words = ["experiment=small", "device=cpu", "precision=bf16", *CASES[name], *BATCH]
    world = 2 if "tensor" in name else 1
    environment = Environment(world_size=world, local_world_size=world)
    settings = load_settings(words, environment, str(CONFIG_DIR), with_files=False)
    return settings, Layout.of(settings, world, 4)


def implementation_of(name: str) -> Implementation:
    """That of a case."""
    return dataclasses.replace(
        KANANA,
        attention=CSRC if "attention of csrc" in name else SDPA,
        experts=CSRC_EXPERTS if "experts of csrc" in name else PLAIN_EXPERTS,
    )


def norms_of_a_cpu(settings: Settings, layout: Layout) -> float:
    """Bytes that torch's composite RMSNorm keeps more than the fused one of a GPU.

    It keeps its input and the normalised input in fp32, 8 bytes an element, in place of the bf16
    input.
    """
    model = settings.model
    layers = 0 if layout.has_full_recompute else model.num_layers + model.num_mtp_layers
    latents = model.kv_lora_rank + (model.q_lora_rank or 0)
    hidden = 0 if "norms" in layout.recompute else 2 * model.hidden_size
    elements = layers * (hidden + latents) + model.hidden_size
    more = 6.0 * elements
    if "up_projections" in layout.recompute:  # keys' part of the latents' tensor keeps all of it
        more += 2.0 * layers * model.kv_lora_rank
    # Two norms and the last one; the input of one of them is kept in bf16 for the output layer too.
    more += model.num_mtp_layers * (6 + 6 + 8) * model.hidden_size
    return more * layout.tokens / layout.tensor


@pytest.mark.parametrize("name", CASES)
def test_kept_bytes_are_those_that_autograd_keeps(
    name: str, found: dict[str, dict[str, int]]
) -> None:
    settings, layout = load(name)
    architecture = Architecture.of(settings.model)
    [[stage]] = stages(architecture, layout)
    form = fp8_of(settings)
    kept, _ = stage_bytes(architecture, layout, implementation_of(name), stage, fp8=form)
    expected = found[name]["saved"]
    assert kept + norms_of_a_cpu(settings, layout) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("name", [name for name in CASES if name != "multi-token prediction"])
def test_peak_is_that_of_the_allocator(name: str, found: dict[str, dict[str, int]]) -> None:
    settings, layout = load(name)
    architecture = Architecture.of(settings.model)
    [[stage]] = stages(architecture, layout)
    implementation = implementation_of(name)
    form = fp8_of(settings)
    kept, transient = stage_bytes(architecture, layout, implementation, stage, fp8=form)
    _, passing = output_bytes(architecture, layout, implementation)
    # A CPU takes the output layer's weight gradient from fp32 copies of both factors.
    model = settings.model
    passing += 4 * (model.padded_vocab_size / layout.tensor + model.hidden_size) * layout.tokens
    predicted = kept + max(transient, passing) + norms_of_a_cpu(settings, layout)
    assert predicted == pytest.approx(found[name]["peak"], rel=0.05)


def test_experts_keep_what_is_published_for_megatron_core() -> None:
    """2d + 2Kd + 6Kn bytes a token with probabilities inside SwiGLU (SonicMoE's comparison)."""
    from megatron_kanana.config.shipped import shipped_model

    architecture = Architecture.of(shipped_model("kanana_2_30b_a3b"))
    parts = feed_forward_bytes(architecture, TRANSFORMER_ENGINE, is_moe=True)
    kept = sum(parts[part] for part in ("projection input", "gathered tokens", "experts"))
    assert kept == 56_320


def test_csrcs_experts_keep_the_layers_input_and_pre_activations() -> None:
    """2d + 4Kn bytes a token beside routing, on one process; with others what comes from them."""
    from megatron_kanana.config.shipped import shipped_model

    architecture = Architecture.of(shipped_model("kanana_2_30b_a3b"))
    parts = feed_forward_bytes(
        architecture, dataclasses.replace(KANANA, experts=CSRC_EXPERTS), is_moe=True
    )
    kept = sum(parts[part] for part in ("projection input", "gathered tokens", "experts"))
    assert kept == 2 * 2048 + 4 * 6 * 768
    _, alone = load("recompute none")
    assert arrived_bytes(architecture, alone) == 0
    # With as many processes as experts, nearly each of a token's experts is another's.
    spread = arrived_bytes(architecture, dataclasses.replace(alone, expert=128))
    assert spread == pytest.approx(6 * (2 * 2048 + 80), rel=0.03)


def test_more_tokens_for_some_experts_take_more_memory() -> None:
    settings, layout = load("recompute none")
    architecture = Architecture.of(settings.model)
    [[stage]] = stages(architecture, layout)
    implementation = dataclasses.replace(KANANA, experts=CSRC_EXPERTS)
    even, _ = stage_bytes(architecture, layout, implementation, stage)
    loaded = dataclasses.replace(layout, expert_load=1.5)
    uneven, _ = stage_bytes(architecture, loaded, implementation, stage)
    model = settings.model
    of_experts = model.num_experts_per_token * 4 * model.moe_ffn_hidden_size
    layers = model.num_layers - model.num_dense_layers
    assert uneven - even == pytest.approx(0.5 * of_experts * layers * layout.tokens)


def test_backward_of_csrcs_attention_holds_the_tensors_that_its_documentation_lists() -> None:
    """docs/attention.md, Memory, and the gradient it is given: 128 tokens of the 30B's heads."""
    from megatron_kanana.config.shipped import shipped_model

    tokens, heads = 128, 32

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    held = [
        *(empty(tokens, heads, width, dtype=torch.bfloat16) for width in (192, 192, 128, 128)),
        empty(heads, tokens, 192, dtype=torch.float32),
        *(empty(heads, tokens, dtype=torch.float32) for _ in range(2)),
        empty(heads, tokens // 8, dtype=torch.uint8),  # a bit a query and head
    ]
    expected = sum(tensor.nbytes for tensor in held)
    found = tokens * attention_backward_bytes(Architecture.of(shipped_model("kanana_2_30b_a3b")))
    assert found == expected


def test_csrcs_attention_holds_no_logits() -> None:
    """Dense layers alone, where nothing else passes: SDPA's 1,024 rows, and csrc's tensors."""
    settings, layout = load("dense layers")
    architecture = Architecture.of(settings.model)
    length = 8192
    layout = dataclasses.replace(layout, sequence_length=length, micro_batch_size=1)
    [[whole]] = stages(architecture, layout)
    stage = dataclasses.replace(whole, embedding=False, output=False)
    assert stage.moe == 0
    of_sdpa, of_csrc = (
        stage_bytes(architecture, layout, dataclasses.replace(KANANA, attention=each), stage)
        for each in (SDPA, CSRC)
    )
    assert of_csrc[0] == of_sdpa[0]
    assert of_sdpa[1] == 6 * settings.model.num_attention_heads * 1024 * length
    assert of_csrc[1] == attention_backward_bytes(architecture) * length


@pytest.mark.parametrize(
    ("tokens", "kept", "passing"),
    [
        # Few tokens: their logits, and hidden states, labels and statistics.
        (4096, 2 * 128256 * 4096, 0),
        # Many: the weight's gradient in fp32, and chunks of logits for a while.
        (4097, 4 * 128256 * 2048, 2 * 128256 * 4097),
        (32768, 4 * 128256 * 2048, 2 * 128256 * 4096),
    ],
)
def test_a_loss_keeps_the_smaller_of_logits_and_gradient(
    tokens: int, kept: int, passing: int
) -> None:
    from megatron_kanana.config.shipped import shipped_model

    architecture = Architecture.of(shipped_model("kanana_2_30b_a3b"))
    _, layout = load("recompute none")
    layout = dataclasses.replace(layout, sequence_length=tokens, micro_batch_size=1)
    found = output_bytes(architecture, layout, KANANA)
    assert found[0] == pytest.approx(kept, rel=0.3) and found[0] > kept
    assert found[1] == passing


def test_a_chunk_of_logits_is_gone_before_the_next_one_is_there() -> None:
    from megatron_kanana.kernels.linear_cross_entropy import linear_cross_entropy

    words, tokens, chunk = 4096, 2048, 2**23  # four chunks of 8 MiB, in fp32
    hidden = torch.randn(tokens, 64, requires_grad=True)
    weight = torch.randn(words, 64, requires_grad=True)
    labels = torch.randint(0, words, (tokens,))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        linear_cross_entropy(
            hidden, weight, labels, torch.ones(tokens), backend="csrc", chunk_bytes=chunk
        )
    events = profile.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = list(itertools.accumulate(change for _, change in sorted(changes)))
    assert max(held) / chunk == pytest.approx(1, abs=0.4)
