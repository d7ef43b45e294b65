"""The shipped recipes of the 155B run: complete, and true to what is published."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_kanana.config import (
    ConfigurationError,
    Environment,
    Settings,
    load_settings,
    write_settings,
)
from megatron_kanana.config.batch_sizes import samples_of_steps
from megatron_kanana.config.environment import TESTED_MEGATRON_CORE
from megatron_kanana.config.manifest import seal
from megatron_kanana.config.mixture import tokens_by_source
from megatron_kanana.config.saved_model import settings_of_saved_model
from tests.hugging_face_tokenizers import save_byte_level_tokenizer

EXPERIMENT = "experiment=kanana_2_155b_a17b"
RECIPES = {
    "155B on 256": (256, (EXPERIMENT,)),
    "155B on 512": (512, (EXPERIMENT, "parallel=h200_512")),
    "155B on 1024": (1024, (EXPERIMENT, "parallel=h200_1024")),
    "proxy 1024": (64, ("experiment=kanana_2_155b_proxy",)),
    "proxy 1536": (64, ("experiment=kanana_2_155b_proxy", "model=kanana_2_155b_proxy_1536")),
    "proxy 2048": (128, ("experiment=kanana_2_155b_proxy", "model=kanana_2_155b_proxy_2048")),
}
WRONG = {
    "stages that divide 62 layers alone": (
        ("parallel.embeddings_count_as_layers=false",),
        "or parallel.embeddings_count_as_layers=true",
    ),
    "too many stages": (("parallel.virtual_pipeline_stages=8",), "below 64"),
    "tensor parallelism that divides no head": (
        ("parallel.tensor_parallel_size=3",),
        "choose one of 1, 2, 4, 8, 16, 32, 64",
    ),
    "tensor x pipeline larger than a part of the world": (
        ("parallel.tensor_parallel_size=128",),
        "start a multiple of 1024 processes",
    ),
    "experts over more than there are": (
        ("parallel.expert_parallel_size=256",),
        "choose one of 1, 2, 4, 8, 16, 32, 64, 128",
    ),
    "experts over more than a stage's processes": (
        ("parallel.expert_parallel_size=128",),
        "start a multiple of 1024 processes",
    ),
    "experts split further than the layers": (
        ("parallel.tensor_parallel_size=2", "parallel.expert_tensor_parallel_size=4"),
        "choose at most 2",
    ),
    "batch that cannot be dealt": (
        ("schedule.global_batch_size=2000",),
        "choose a multiple of 64",
    ),
    "microbatches that do not fill the pipeline": (
        ("schedule.global_batch_size=256",),
        "choose a multiple of 512",
    ),
    "later batch that cannot be dealt": (
        ("schedule.batch_size_changes=[{tokens: 2e11, global_batch_size: 8200}]",),
        "choose a multiple of 64",
    ),
    "virtual stages without a pipeline": (
        ("parallel.pipeline_parallel_size=1", "parallel.embeddings_count_as_layers=false"),
        "or parallel.pipeline_parallel_size above 1",
    ),
}


def load(processes: int, *overrides: str) -> Settings:
    """Settings checked for a job of so many GPUs, eight a node."""
    environment = Environment(
        world_size=processes,
        local_world_size=8,
        cuda_device_count=8,
        megatron_core_version=TESTED_MEGATRON_CORE[0],
    )
    return load_settings(overrides, environment, with_files=False)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_can_run_on_its_machines(name: str) -> None:
    processes, overrides = RECIPES[name]
    settings = load(processes, *overrides)
    parallel = settings.parallel
    assert parallel.expert_parallel_size <= 8, "experts leave the node"
    if parallel.pipeline_parallel_size > 1:
        assert settings.num_microbatches(processes) % parallel.pipeline_parallel_size == 0


def test_155b_recipe_has_the_published_values() -> None:
    settings = load(256, EXPERIMENT)
    optimizer, schedule = settings.optimizer, settings.schedule
    assert (optimizer.learning_rate, optimizer.weight_decay) == (3.85e-4, 0.1)
    assert (optimizer.orthogonalization, optimizer.update_scale) == ("polar_express", "match_adamw")
    assert optimizer.qk_clip_threshold == 100
    assert settings.model.z_loss_coefficient == 5e-6
    assert settings.transfer.base_hidden_size == 1024
    length = settings.data.sequence_length
    assert length == 4096
    assert schedule.global_batch_size * length == pytest.approx(8e6, rel=0.05)
    [change] = schedule.batch_size_changes
    assert change.tokens == 200e9
    assert change.global_batch_size * length == pytest.approx(32e6, rel=0.05)


def test_155b_recipe_trains_on_10t_tokens_and_decays_over_the_second_mixture() -> None:
    settings = load(256, EXPERIMENT)
    schedule, length = settings.schedule, settings.data.sequence_length
    largest_step = schedule.batch_size_changes[0].global_batch_size * length
    samples = samples_of_steps(settings, schedule.steps, 0)
    assert 0 <= samples * length - 10e12 < largest_step
    before_decay = samples_of_steps(settings, schedule.steps - schedule.decay_steps, 0)
    assert abs(before_decay * length - 6e12) < largest_step
    first = tokens_by_source(settings.data, before_decay)
    later = tokens_by_source(settings.data, samples)
    shares = {name: count / sum(first.values()) for name, count in first.items()}
    assert shares == pytest.approx(
        {"english": 0.45, "math_stem": 0.125, "code": 0.275, "multilingual": 0.15}, abs=1e-5
    )
    rest = {name: later[name] - first[name] for name in later}
    shares = {name: count / sum(rest.values()) for name, count in rest.items()}
    assert shares == pytest.approx(
        {"english": 0.225, "math_stem": 0.275, "code": 0.25, "multilingual": 0.25}, abs=1e-4
    )


@pytest.mark.parametrize("name", WRONG)
def test_layout_the_cluster_would_refuse_is_refused_with_a_remedy(name: str) -> None:
    overrides, remedy = WRONG[name]
    with pytest.raises(ConfigurationError) as raised:
        load(512, EXPERIMENT, "parallel=h200_512", *overrides)
    assert remedy in str(raised.value)


@pytest.mark.parametrize(
    "precision",
    ["bf16", "fp8_blockwise", "fp8_blockwise_experts", "fp8_blockwise_output_layer"],
)
def test_checkpoint_of_the_recipe_can_be_looked_at_on_one_process(
    precision: str, tmp_path: Path
) -> None:
    write_settings(tmp_path, load(512, EXPERIMENT, "parallel=h200_512", f"precision={precision}"))
    save_byte_level_tokenizer(tmp_path / "tokenizer", ["some text"], 300)
    seal(tmp_path)
    environment = Environment(megatron_core_version=TESTED_MEGATRON_CORE[0])
    settings = settings_of_saved_model(
        tmp_path, ["device=cpu", "precision.compute=fp32"], environment
    )
    assert settings.parallel.pipeline_parallel_size == 1
    assert settings.model.num_layers == 62
