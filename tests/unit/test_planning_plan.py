"""Parameters, operations, memory and time of plans, and the command that prints them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_kanana.config import ConfigurationError, Environment, Settings, load_settings
from megatron_kanana.config.checks import check
from megatron_kanana.config.schema import OptimizerSettings
from megatron_kanana.config.shipped import shipped_model
from megatron_kanana.planning import count_parameters
from megatron_kanana.planning.architecture import Architecture
from megatron_kanana.planning.calibration import KANANA, RESERVED_MEMORY, TRANSFORMER_ENGINE
from megatron_kanana.planning.flops import flops_per_token
from megatron_kanana.planning.holdings import local_parameters
from megatron_kanana.planning.layout import Layout, stages
from megatron_kanana.planning.machines import MACHINES, machine_named
from megatron_kanana.planning.plan import job_of, plan, plan_run, predict_memory
from megatron_kanana.planning.search import search, valid_layouts
from tests.launch import CONFIG_DIR
from tools.plan import main

RECIPE = ("experiment=kanana_2_155b_a17b", "parallel=h200_512")
SMALL = ("--config-dir", str(CONFIG_DIR), "experiment=small", "optimizer=muon")
MODELS = [
    "kanana_2_tiny",
    "kanana_2_30b_a3b",
    "kanana_2_155b_a17b",
    "kanana_2_155b_a17b_q_lora_1536",
]


def environment(processes: int) -> Environment:
    """A job of GPUs, eight a node."""
    return Environment(
        world_size=processes, local_world_size=min(8, processes), cuda_device_count=8
    )


def load(processes: int, *overrides: str) -> Settings:
    """Checked settings."""
    return load_settings(overrides, environment(processes), with_files=False)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_mtp_layers", [0, 1])
def test_parameters_of_all_stages_are_the_models(name: str, num_mtp_layers: int) -> None:
    model = shipped_model(name, f"++model.num_mtp_layers={num_mtp_layers}")
    architecture = Architecture.of(model)
    alone = Layout(1, 1, 1, 1, 1, 1, False, 1, 1, 1)
    [[everything]] = stages(architecture, alone)
    for optimizer in ("adamw", "muon"):
        settings = OptimizerSettings(name=optimizer, learning_rate=1.0)
        counts = local_parameters(architecture, alone, [everything], settings)
        assert sum(counts.values()) == count_parameters(model).total


def test_stages_hold_every_layer_once() -> None:
    architecture = Architecture.of(shipped_model("kanana_2_155b_a17b"))
    chosen = Layout(512, 1, 8, 4, 8, 1, True, 4096, 1, 512)
    ranks = stages(architecture, chosen)
    placed = [ranks[rank][chunk] for chunk in range(4) for rank in range(8)]
    numbers = [
        stage.first_layer + index for stage in placed for index in range(stage.dense + stage.moe)
    ]
    assert numbers == list(range(62))
    assert sum(stage.dense for stage in placed) == 1
    assert placed[0].embedding and placed[-1].output


def test_operations_are_those_that_others_count() -> None:
    """TFLOP/s over tokens/s of published rows, which come from other programs."""
    from megatron_kanana.planning.measured import DEEPSEEK_V3, KIMI_K2, QWEN3_30B, QWEN3_235B

    with_mtp = dataclasses.replace(DEEPSEEK_V3, num_mtp_layers=1)
    assert flops_per_token(with_mtp, 4096) == pytest.approx(338e12 / 1297, rel=0.002)
    assert flops_per_token(DEEPSEEK_V3, 4096) == pytest.approx(250e12 / 1002, rel=0.005)
    assert flops_per_token(QWEN3_30B, 4096) == pytest.approx(277e12 / 12040, rel=0.005)
    assert flops_per_token(QWEN3_235B, 4096) == pytest.approx(178e12 / 1204, rel=0.005)
    assert flops_per_token(KIMI_K2, 4096) == pytest.approx(189e12 / 924, rel=0.005)


def test_operations_are_those_of_a_products_shapes() -> None:
    """Written out for one layer: each product's rows, columns and the causal half of attention."""
    model = shipped_model("kanana_2_30b_a3b", "model.num_layers=1", "model.num_dense_layers=0")
    length, heads = 1024, 32
    products = [
        *((2048, heads * 192), (2048, 512 + 64), (512, heads * 256), (heads * 128, 2048)),
        *[(2048, 768), (2048, 768), (768, 2048)] * (6 + 2),
        *((2048, 128), (2048, 128256)),
    ]
    forward = float(sum(2 * rows * columns for rows, columns in products))
    forward += 2 * heads * (length / 2) * (192 + 128)
    assert flops_per_token(Architecture.of(model), length) == pytest.approx(3 * forward)


def test_optimizer_state_is_sharded_and_weights_are_not() -> None:
    settings = load(512, *RECIPE)
    found = plan(job_of(settings, 512, MACHINES["h200"], KANANA), settings.optimizer)
    for rank in found.memory:
        count = sum(rank.parameters.values())
        assert rank.weights == 2 * count
        assert rank.gradients == 4 * count
        muon, adamw = rank.parameters["dense", "muon"], rank.parameters["dense", "adamw"]
        experts = rank.parameters["experts", "muon"]
        assert rank.optimizer == pytest.approx((8 * muon + 12 * adamw) / 64 + 8 * experts / 8)


@pytest.mark.parametrize(
    "processes, overrides",
    [
        (256, ("experiment=kanana_2_155b_a17b",)),
        (512, RECIPE),
        (1024, ("experiment=kanana_2_155b_a17b", "parallel=h200_1024")),
        (256, ("experiment=kanana_2_155b_long_context",)),
        (64, ("experiment=kanana_2_155b_sft",)),
        (64, ("experiment=kanana_2_155b_proxy",)),
        (64, ("experiment=kanana_2_155b_proxy", "model=kanana_2_155b_proxy_1536")),
        (128, ("experiment=kanana_2_155b_proxy", "model=kanana_2_155b_proxy_2048")),
    ],
)
def test_recipe_has_room_on_h200s_with_a_quarter_more_tokens_for_some_experts(
    processes: int, overrides: tuple[str, ...]
) -> None:
    settings, machine = load(processes, *overrides), MACHINES["h200"]
    job = job_of(settings, processes, machine, KANANA, expert_load=1.25)
    peak = max(rank.peak for rank in predict_memory(job, settings.optimizer))
    assert peak <= (1 - RESERVED_MEMORY) * machine.memory_bytes


def test_parts_of_a_step_sum_to_it() -> None:
    settings = load(512, *RECIPE)
    for implementation in (KANANA, TRANSFORMER_ENGINE):
        job = job_of(settings, 512, MACHINES["h200"], implementation)
        found = plan(job, settings.optimizer)
        assert sum(found.parts.values()) == pytest.approx(found.step)
        assert all(seconds >= 0 for seconds in found.parts.values())
        tokens = found.tokens_per_second * found.step
        assert tokens == pytest.approx(settings.schedule.global_batch_size * 4096)


def test_run_is_the_sum_over_its_batch_sizes() -> None:
    settings = load(512, *RECIPE)
    run = plan_run(settings, 512, MACHINES["h200"], KANANA, tokens=1e12)
    assert [tokens for tokens, _ in run.plans] == [200e9, 800e9]
    seconds = sum(
        tokens / (size * 4096) * each.step
        for (tokens, each), size in zip(run.plans, (2048, 8192), strict=True)
    )
    assert run.days == pytest.approx(seconds / 86400)
    assert run.gpu_hours == pytest.approx(seconds / 3600 * 512)


def test_everything_slower_makes_a_step_longer() -> None:
    settings = load(512, *RECIPE)
    machine = MACHINES["h200"]
    usual = plan(job_of(settings, 512, machine, TRANSFORMER_ENGINE), settings.optimizer).step
    for name in (
        *("bf16_flops", "memory_bandwidth", "nvlink_bandwidth", "network_bandwidth"),
        "host_time",
    ):
        factor = 2 if name == "host_time" else 0.5
        slower = machine_named("h200", {name: getattr(machine, name) * factor})
        job = job_of(settings, 512, slower, TRANSFORMER_ENGINE)
        assert plan(job, settings.optimizer).step > usual, name


def test_search_finds_only_layouts_that_start_and_fit() -> None:
    where = environment(16)
    settings = load_settings(
        ["experiment=small", "schedule.global_batch_size=64", "precision=bf16"],
        where,
        str(CONFIG_DIR),
        with_files=False,
    )
    candidates = list(valid_layouts(settings, where))
    assert len({repr(candidate) for candidate in candidates}) == len(candidates) > 50
    assert not any(check(candidate, where, with_files=False) for candidate in candidates)
    largest = max(
        max(rank.peak for rank in plan(job_of(c, 16, MACHINES["h200"], KANANA), c.optimizer).memory)
        for c in candidates
    )
    machine = machine_named("h200", {"memory_bytes": 0.6 * largest})
    found = search(settings, where, machine, KANANA)
    assert 0 < len(found) < len(candidates)
    assert all(
        each.plan.peak_memory <= machine.memory_bytes * (1 - RESERVED_MEMORY) for each in found
    )
    steps = [each.plan.step for each in found]
    assert steps == sorted(steps)
    words = found[0].overrides
    again = load_settings(
        ["experiment=small", "schedule.global_batch_size=64", "precision=bf16", *words],
        where,
        str(CONFIG_DIR),
        with_files=False,
    )
    assert again == found[0].settings


def test_command_predicts_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    arguments = ["--processes", "512", "--json", str(path), "--tokens", "1e12", *RECIPE]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    found: dict[str, Any] = json.loads(path.read_text())
    assert f"1T tokens: {found['days']:.1f} days" in printed
    assert [batch["layout"]["global_batch_size"] for batch in found["batches"]] == [2048, 8192]
    assert len(found["batches"][0]["memory"]) == 8


def test_command_searches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "found.json", tmp_path / "found.png"
    arguments = ["--search", "--processes", "4", "--top", "3", *SMALL, "precision=bf16"]
    assert main([*arguments, "--json", str(path), "--plot", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(path.read_text())
    assert lines[0] == f"{len(found)} layouts fit; the fastest:"
    assert lines[-1] == "the first: " + " ".join(found[0]["overrides"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_job_that_does_not_fit_is_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--processes", "512", *RECIPE, "--machine-value", "memory_bytes=1e9"]) == 1
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, own, remedy",
    [
        ("a100", {}, "choose h100 or h200 or b200"),
        ("h100", {"bandwidth": 1.0}, "choose bf16_flops or"),
        ("h100", {"network_bandwidth": 0.0}, "give its size"),
    ],
)
def test_machine_that_is_not_described_is_refused(
    name: str, own: dict[str, float], remedy: str
) -> None:
    with pytest.raises(ConfigurationError) as raised:
        machine_named(name, own)
    assert remedy in str(raised.value)


def test_value_that_is_no_number_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--processes", "512", *RECIPE, "--machine-value", "network_bandwidth=fast"]) == 2
    assert "write NAME=NUMBER" in capsys.readouterr().err
