"""tools/plan.py --dry-run: real modules of a job that does not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_kanana.config import Environment, load_settings
from megatron_kanana.config.shipped import shipped_model
from megatron_kanana.planning import count_parameters
from megatron_kanana.planning.architecture import Architecture
from megatron_kanana.planning.holdings import local_parameters, state_bytes
from megatron_kanana.planning.layout import Layout, stages
from tests.launch import CONFIG_DIR, Finished, run_python

SMALL = ("--config-dir", str(CONFIG_DIR), "experiment=small", "optimizer=muon")


def plan(path: Path, processes: int, *arguments: str) -> tuple[Finished, dict[str, Any]]:
    """What the command prints and what it writes."""
    finished = run_python(
        *("-m", "tools.plan", "--dry-run", "--processes", str(processes)),
        *("--json", str(path), *arguments),
    )
    return finished, json.loads(path.read_text()) if path.is_file() else {}


@pytest.mark.parametrize(
    "processes, overrides",
    [
        (
            16,
            (
                "parallel.tensor_parallel_size=2",
                "parallel.pipeline_parallel_size=2",
                "parallel.virtual_pipeline_stages=2",
                "parallel.expert_parallel_size=4",
                "schedule.global_batch_size=16",
            ),
        ),
        (
            12,
            (
                "parallel.tensor_parallel_size=2",
                "parallel.expert_tensor_parallel_size=2",
                "parallel.pipeline_parallel_size=3",
                "parallel.embeddings_count_as_layers=true",
                "++model.num_mtp_layers=1",
            ),
        ),
    ],
)
def test_all_processes_together_hold_the_model_exactly(
    tmp_path: Path, processes: int, overrides: tuple[str, ...]
) -> None:
    finished, found = plan(tmp_path / "plan.json", processes, "--ranks", "all", *SMALL, *overrides)
    assert finished.returncode == 0, finished.stderr
    assert found["problems"] == []
    assert len(found["ranks"]) == processes
    line = next(line for line in finished.stdout.splitlines() if line.startswith("all processes"))
    expected = count_parameters(small_model(*overrides)).total
    assert f"{expected:,} parameters" in line
    assert_formulas_agree(found, processes, *SMALL[2:], *overrides)


def assert_formulas_agree(found: dict[str, Any], processes: int, *overrides: str) -> None:
    """The planner's formulas have the sizes and places of the modules that were built."""
    environment = Environment(world_size=processes, local_world_size=1, cuda_device_count=8)
    settings = load_settings(overrides, environment, str(CONFIG_DIR), with_files=False)
    layout = Layout.of(settings, processes, settings.schedule.global_batch_size)
    architecture = Architecture.of(settings.model)
    ranks = stages(architecture, layout)
    for built in found["ranks"]:
        of_rank = ranks[built["pipeline_rank"]]
        counts = local_parameters(architecture, layout, of_rank, settings.optimizer)
        names = {f"{group}, {optimizer}": count for (group, optimizer), count in counts.items()}
        assert names == built["parameters"]
        size = state_bytes(counts, layout, fp32_gradients=True)
        assert size == pytest.approx(built["bytes"])
        for stage, contents in zip(of_rank, built["stages"], strict=True):
            numbers = [int(name) for name in contents if name.isdecimal()]
            first = stage.first_layer + 1
            assert numbers == list(range(first, first + stage.dense + stage.moe))
            assert stage.embedding == ("embedding" in contents)
            assert stage.output == ("output layer" in contents)
            assert stage.mtp == contents.count("multi-token prediction")


def small_model(*overrides: str) -> Any:
    """The tests' small model, from the shipped tiny one's fields."""
    import yaml

    values = yaml.safe_load((CONFIG_DIR / "model" / "small.yaml").read_text())
    words = [f"++model.{name}={'null' if v is None else v}" for name, v in values.items()]
    mine = [word for word in overrides if "model." in word]
    return shipped_model("kanana_2_tiny", *words, *mine)


def test_155b_on_1024_processes_has_every_layer_once(tmp_path: Path) -> None:
    finished, found = plan(
        tmp_path / "plan.json", 1024, "experiment=kanana_2_155b_a17b", "parallel=h200_1024"
    )
    assert finished.returncode == 0, finished.stderr
    places = [
        name for stage in range(4) for rank in found["ranks"] for name in rank["stages"][stage]
    ]
    assert places == ["embedding", *map(str, range(1, 63)), "output layer"]
    for rank in found["ranks"]:
        experts = rank["parameters"]["experts, muon"]
        layers = sum(name.isdecimal() and name != "1" for stage in rank["stages"] for name in stage)
        assert experts == layers * 128 // 8 * 3 * 4096 * 1536
        assert rank["sharded_over"] == {"dense": 128, "experts": 16}
        assert rank["orthogonalization_imbalance"]["experts"] < 1.01
    assert_formulas_agree(found, 1024, "experiment=kanana_2_155b_a17b", "parallel=h200_1024")


def test_ranks_that_the_job_lacks_are_refused(tmp_path: Path) -> None:
    finished, found = plan(tmp_path / "plan.json", 2, "--ranks", "0,2", *SMALL)
    assert finished.returncode == 2
    assert "--ranks 0,2" in finished.stderr
    assert "below --processes 2" in finished.stderr
    assert found == {}
