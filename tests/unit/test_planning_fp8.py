"""What precision.fp8, its experts and its output layer change in a plan."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from megatron_kanana.config import Environment, Settings, load_settings
from megatron_kanana.config.shipped import shipped_model
from megatron_kanana.planning.architecture import ALL_FP8, EXPERTS, Architecture
from megatron_kanana.planning.calibration import KANANA, TRANSFORMER_ENGINE
from megatron_kanana.planning.layer_times import Job, stage_parts
from megatron_kanana.planning.layout import Layout, Stage, stages
from megatron_kanana.planning.machines import MACHINES
from megatron_kanana.planning.own_cards import GRADIENTS, PRECISIONS
from megatron_kanana.planning.plan import Plan, job_of, plan
from tools.plan import main

GPU = Environment(
    cuda_device_count=8,
    cuda_version="13.0",
    gpu_name="h200",
    compute_capability=(9, 0),
    has_native_library=True,
    transformer_engine_version="2.11.0",
)
WORDS = (
    *("experiment=kanana_2_tiny", "model=kanana_2_30b_a3b", "model.num_layers=4"),
    *("optimizer=muon", "data.sequence_length=4096"),
    *("schedule.micro_batch_size=2", "schedule.global_batch_size=8"),
)
PROJECTIONS = 2048 * 32 * 192 + 32 * 128 * 2048  # of queries and outputs
KEYS = 2048 * (512 + 64) + 512 * 32 * (128 + 128)
DENSE = 3 * 2048 * 6144
OF_EXPERTS = 3 * 2048 * 768 * (128 + 2)


def load(*overrides: str) -> Settings:
    """Settings of 4 layers on one GPU."""
    return load_settings([*WORDS, *overrides], GPU, with_files=False)


def planned(*overrides: str) -> Plan:
    """On an H200."""
    settings = load(*overrides)
    return plan(job_of(settings, 1, MACHINES["h200"], KANANA), settings.optimizer)


@pytest.mark.parametrize(
    "words, expected, weights",
    [
        (("precision=bf16",), PRECISIONS["bf16"], 0),
        (
            ("precision=fp8_blockwise",),
            PRECISIONS["fp8_blockwise"],
            4 * PROJECTIONS + DENSE,
        ),
        (
            ("precision=fp8_blockwise_experts",),
            PRECISIONS["fp8_blockwise_experts"] | GRADIENTS,
            4 * PROJECTIONS + DENSE + 3 * OF_EXPERTS,
        ),
        (
            ("precision=fp8_blockwise_experts", "precision.bf16_weights=[]"),
            ALL_FP8 | GRADIENTS,
            4 * (PROJECTIONS + KEYS) + DENSE + 3 * OF_EXPERTS,
        ),
        (
            ("precision=fp8_blockwise_output_layer",),
            PRECISIONS["fp8_blockwise_output_layer"] | GRADIENTS,
            4 * PROJECTIONS + DENSE + 3 * OF_EXPERTS,
        ),
    ],
)
def test_a_plan_has_the_formats_of_the_recipe_and_their_copies_of_weights(
    words: tuple[str, ...], expected: frozenset[str], weights: int
) -> None:
    """A byte in each order for every weight of those products; router and embeddings have none."""
    found = planned(*words)
    assert found.job.fp8 == expected
    assert found.memory[0].copies == 2 * weights
    rank = found.memory[0]
    held = rank.weights + rank.gradients + rank.optimizer + rank.copies
    assert rank.held == held < rank.peak


def test_layers_that_stay_in_bf16_have_no_copies() -> None:
    whole, part = (
        planned("precision=fp8_blockwise_experts", f"precision.bf16_layers_at_start={start}")
        for start in (0, 2)
    )
    assert part.job.bf16_layers == (2, 0)
    left_out = 2 * PROJECTIONS + DENSE + OF_EXPERTS
    assert whole.memory[0].copies - part.memory[0].copies == 2 * left_out


def test_layers_by_format_are_those_that_megatron_core_leaves_out() -> None:
    """Counted one by one, as `fp8_utils.is_first_last_bf16_layer` says it."""
    architecture = dataclasses.replace(
        Architecture.of(shipped_model("kanana_2_30b_a3b", "model.num_layers=12")),
        num_dense_layers=3,
        num_mtp_layers=1,
    )
    layout = Layout(8, 1, 2, 3, 1, 1, False, 1, 1, 8)
    placed = [stage for of_rank in stages(architecture, layout) for stage in of_rank]
    for start, end in itertools.product(range(7), repeat=2):
        counts: dict[tuple[bool, bool], int] = {}
        for stage in placed:
            for is_moe, in_fp8, layers in stage.layers_by_format(12, (start, end)):
                counts[is_moe, in_fp8] = counts.get((is_moe, in_fp8), 0) + layers
        expected = {(True, True): 1}  # multi-token prediction
        for number in range(12):
            key = (number >= 3, not (number < start or number >= 12 - end))
            expected[key] = expected.get(key, 0) + 1
        assert counts == expected


def gpu_parts(fp8: frozenset[str], implementation: str = "ours") -> dict[str, float]:
    """Seconds by part, both passes of an expert layer of the 30B, 32,768 tokens, H200."""
    chosen = KANANA if implementation == "ours" else TRANSFORMER_ENGINE
    layout = Layout(1, 1, 1, 1, 1, 1, False, 4096, 8, 8)
    architecture = Architecture.of(shipped_model("kanana_2_30b_a3b"))
    job = Job(architecture, layout, MACHINES["h200"], chosen, fp8)
    forward, backward = stage_parts(job, Stage(False, False, 1, 0, 1, 0))
    return {part: forward[part] + backward[part] for part in forward}


def test_fp8_makes_products_faster_and_adds_quantising() -> None:
    bf16, dense, all_of_it = map(gpu_parts, (frozenset[str](), ALL_FP8 - {EXPERTS}, ALL_FP8))
    assert dense["attention projections"] < 0.8 * bf16["attention projections"]
    assert dense["routed experts"] == bf16["routed experts"]
    # Two of an expert's three products: the gradients of weights stay in bf16.
    assert 0.75 < all_of_it["routed experts"] / bf16["routed experts"] < 0.95
    assert bf16["moving data"] < dense["moving data"] < all_of_it["moving data"]
    assert bf16["core attention"] == all_of_it["core attention"]
    assert bf16["host"] < dense["host"] == all_of_it["host"]


def test_megatron_cores_experts_have_all_their_products_in_fp8() -> None:
    bf16, fp8 = (gpu_parts(form, "theirs") for form in (frozenset[str](), ALL_FP8))
    assert fp8["routed experts"] < 0.7 * bf16["routed experts"]


def test_fp8_keeps_less_of_projections_and_the_same_of_experts() -> None:
    """Where one of two projections of an input is in bf16, that input is kept in both formats."""
    fp8 = ("precision=fp8_blockwise_experts", "precision.bf16_weights=[]")
    bf16, mixed, mixed_experts, whole = (
        planned(*words).memory[0].activations
        for words in (
            ("precision=bf16",),
            ("precision=fp8_blockwise",),
            ("precision=fp8_blockwise_experts",),
            fp8,
        )
    )
    assert mixed == mixed_experts
    tokens, layers, of_number = 2 * 4096, 4, 1 + 1 / 32
    # Key-value down- and up-projections keep 2048 and 512 numbers a token, in 2 bytes or in fp8.
    assert mixed - whole == pytest.approx(tokens * layers * (2 - of_number) * (2048 + 512))
    assert 0.85 * bf16 < whole < bf16


def test_activations_kept_in_fp8_are_half_of_those_in_bf16() -> None:
    """Gate and up of six routed and two shared experts in 3 layers."""
    words = ("precision=fp8_blockwise_experts",)
    bf16, fp8 = (
        planned(*words, f"precision.kept_activations={form}").memory[0].activations
        for form in ("bf16", "fp8")
    )
    tokens, layers, of_number = 2 * 4096, 3, 1 + 1 / 32
    numbers = 2 * (6 + 2) * 768
    assert bf16 - fp8 == pytest.approx(tokens * layers * (2 - of_number) * numbers)


def test_experts_gradients_in_fp8_take_less_time_and_as_much_memory() -> None:
    words = ("precision=fp8_blockwise_experts",)
    bf16, fp8 = (
        planned(*words, f"precision.expert_weight_gradients={form}") for form in ("bf16", "fp8")
    )
    assert fp8.step < bf16.step
    assert fp8.memory == bf16.memory


def test_an_output_layer_in_fp8_is_faster_and_needs_other_memory() -> None:
    """8,192 tokens in two chunks: logits in bf16, or what fp8 makes of them and of the weight."""
    bf16, fp8 = (
        planned("precision=fp8_blockwise_experts", f"precision.output_layer={form}")
        for form in ("bf16", "fp8")
    )
    part = "output layer and loss"
    assert 0.5 < fp8.parts[part] / bf16.parts[part] < 0.7
    for name in bf16.parts.keys() - {part, "launching"}:
        assert fp8.parts[name] == pytest.approx(bf16.parts[name], abs=1e-12), name
    more = (1.75 - 2) * 4096 * 128256 + 2 * 128256 * 2048  # the weight has copies in both orders
    assert fp8.memory[0].activations - bf16.memory[0].activations == pytest.approx(more)


def test_weights_are_quantised_once_a_step() -> None:
    few = planned("precision=fp8_blockwise_experts")
    many = planned("precision=fp8_blockwise_experts", "schedule.global_batch_size=16")
    assert few.parts["quantising weights"] == many.parts["quantising weights"] > 0
    assert many.parts["routed experts"] == pytest.approx(2 * few.parts["routed experts"])


def test_command_says_what_is_in_fp8(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--processes", "1", *WORDS, "precision=fp8_blockwise_experts", "--tokens", "1e9"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    left_out = "key_value_down, key_value_up"
    assert f"megatron_kanana with projections (without {left_out}) and experts in fp8" in printed


def test_command_says_that_the_output_layer_is_in_fp8(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--processes", "1", *WORDS, "precision=fp8_blockwise_output_layer", "--tokens", "1e9"]
    assert main(words) == 0
    assert ", experts and output layer in fp8" in capsys.readouterr().out


def test_fp8_of_this_version_is_asked_for_by_its_settings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--processes", "1", *WORDS, "--fp8"]) == 2
    assert "set precision=fp8_blockwise" in capsys.readouterr().err
