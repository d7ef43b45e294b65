"""Composing settings: groups, experiments, overrides, help, and settings kept in checkpoints."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_kanana import train
from megatron_kanana.config import (
    ConfigurationError,
    Environment,
    checkpoint_to_start_from,
    load_settings,
    read_settings,
    saved_settings,
    write_settings,
)
from megatron_kanana.config.compose import CONFIG_DIR, GROUPS, available_choices
from megatron_kanana.config.data_settings import DataSettings
from megatron_kanana.config.fields import build
from megatron_kanana.config.help import settings_help
from megatron_kanana.config.manifest import seal
from megatron_kanana.config.mixture import mixture
from megatron_kanana.config.problems import Problem
from tests.launch import CONFIG_DIR as TEST_CONFIG_DIR

TWO = Environment(world_size=2, local_world_size=2)
FOUR = Environment(world_size=4, local_world_size=4)
PROCESSES = {
    "tensor_pipeline": 4,
    "kanana_2_30b_midtraining": 8,
    "kanana_2_30b_sft": 8,
    "experts_in_node": 8,
    "kanana_2_155b_proxy": 64,
    "kanana_2_155b_a17b": 256,
    "kanana_2_155b_midtraining": 256,
    "kanana_2_155b_long_context": 256,
    "kanana_2_155b_sft": 64,
    "h200_256": 256,
    "h200_512": 512,
    "h200_1024": 1024,
}
"""Those of the job that a shipped config is for, where two are not enough."""
BESIDE = {
    "experts_in_node": ("schedule.micro_batch_size=1",),
    **{name: ("experiment=kanana_2_155b_a17b",) for name in PROCESSES if "h200" in name},
}
"""What a group that does not fit the default run is chosen with."""
TO_FILL_IN = (
    "model.vocab_size",  # needs a tokenizer of one's own
    "data.tokenizer",
    "data.blend[",
    "data.evaluation_sets[",
    "data.conversations[",
    "data.held_out_conversations[",
    "checkpoint.load",
)


def contains(values: Any, part: Any) -> bool:
    """Whether `part` is in nested plain values; defaults may stand beside it."""
    if isinstance(part, dict):
        return all(contains(values[name], each) for name, each in part.items())
    if isinstance(part, list):
        return len(values) == len(part) and all(map(contains, values, part))
    return bool(values == part)


@pytest.mark.parametrize(
    ("group", "choice"), [(group, name) for group in GROUPS for name in available_choices(group)]
)
def test_every_shipped_config_makes_a_good_run(group: str, choice: str) -> None:
    processes = 2 if group == "model" else PROCESSES.get(choice, 2)
    environment = Environment(world_size=processes, local_world_size=min(processes, 8))
    words = [*BESIDE.get(choice, ()), f"{group}={choice}"]
    try:
        settings = dataclasses.asdict(load_settings(words, environment))
    except ConfigurationError as error:  # some name files to be made or filled in
        for problem in error.problems:
            assert problem.setting.startswith(TO_FILL_IN)
        assert choice not in ("kanana_2_tiny", "builtin", "builtin_midtraining")
        return
    shipped = yaml.safe_load((CONFIG_DIR / group / f"{choice}.yaml").read_text())
    if group != "experiment":
        assert contains(settings[group], shipped)


def test_kanana_2s_pretraining_mixture_is_the_published_one() -> None:
    values = yaml.safe_load((CONFIG_DIR / "data" / "kanana_2_pretraining.yaml").read_text())
    problems: list[Problem] = []
    data = build(DataSettings, values, problems)
    assert data is not None and not problems
    of_run = mixture(data)
    assert of_run.names == ("english", "math_stem", "code", "multilingual")
    switch = math.ceil(6e12 / 4096)
    shares = of_run.counts(switch) / switch
    assert shares == pytest.approx([0.45, 0.125, 0.275, 0.15], abs=1e-6)
    later = of_run.counts(2 * switch) - of_run.counts(switch)
    assert later / switch == pytest.approx([0.225, 0.275, 0.25, 0.25], abs=1e-6)


def test_midtraining_of_250_billion_tokens_replays_a_fifth() -> None:
    data = yaml.safe_load((CONFIG_DIR / "data" / "kanana_2_midtraining.yaml").read_text())
    weights = {entry["source"]: entry["weight"] for entry in data["blend"]}
    assert weights["reasoning"] / sum(weights.values()) == pytest.approx(200 / 250)
    schedule = yaml.safe_load((CONFIG_DIR / "schedule" / "kanana_2_midtraining.yaml").read_text())
    tokens = schedule["steps"] * schedule["global_batch_size"] * data["sequence_length"]
    assert tokens == pytest.approx(250e9, rel=1e-4)


def test_an_experiment_overrides_groups_and_the_command_line_overrides_it() -> None:
    words = ["experiment=small", "schedule.steps=7", "schedule.decay_steps=1"]
    settings = load_settings(words, TWO, str(TEST_CONFIG_DIR))
    assert settings.model.hidden_size == 64
    assert settings.precision.compute == "fp32"
    assert settings.schedule.warmup_steps == 2
    assert settings.schedule.steps == 7
    assert settings.optimizer.learning_rate == 1e-3
    assert settings.optimizer.beta2 == load_settings([], TWO).optimizer.beta2


def test_help_names_every_setting_with_its_meaning() -> None:
    def names(values: dict[str, object], prefix: str = "") -> list[str]:
        return [
            name
            for key, value in values.items()
            for name in (
                names(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
            )
        ]

    lines = [line.strip() for line in settings_help().splitlines()]
    for name in names(dataclasses.asdict(load_settings([], TWO))):
        assert any(line.startswith(f"{name}: ") and len(line) > len(name) + 5 for line in lines)


def test_the_printed_configuration_is_the_checked_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "detect_environment", lambda: FOUR)
    assert train.main(["--print-config", "parallel=tensor_pipeline", "seed=5"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    settings = load_settings(["parallel=tensor_pipeline", "seed=5"], FOUR)
    assert printed == dataclasses.asdict(settings)


def test_saved_settings_come_back_with_overrides_and_checks(tmp_path: Path) -> None:
    settings = load_settings(["seed=5", f"output_dir={tmp_path}"], TWO)
    write_settings(tmp_path, settings)
    assert saved_settings(read_settings(tmp_path), [], TWO) == settings
    layout = ["parallel.tensor_parallel_size=2"]
    changed = saved_settings(read_settings(tmp_path), layout, TWO)
    assert changed.parallel.tensor_parallel_size == 2
    assert dataclasses.replace(changed, parallel=settings.parallel) == settings
    with pytest.raises(ConfigurationError, match="name a setting"):
        saved_settings(read_settings(tmp_path), ["model=kanana_2_tiny"], TWO)
    with pytest.raises(ConfigurationError, match="does not divide"):
        saved_settings(read_settings(tmp_path), ["parallel.tensor_parallel_size=3"], TWO)


def test_saved_settings_without_later_ones_get_their_defaults(tmp_path: Path) -> None:
    settings = load_settings([f"output_dir={tmp_path}"], TWO)
    write_settings(tmp_path, settings)
    saved = read_settings(tmp_path)
    for name in ("num_mtp_layers", "mtp_loss_coefficient"):
        del saved["model"][name]
    assert saved_settings(saved, [], TWO) == settings


def test_a_run_starts_from_its_newest_whole_checkpoint_before_any_other(tmp_path: Path) -> None:
    words = [f"output_dir={tmp_path}", "run_name=run"]
    fresh = load_settings(words, TWO)
    assert checkpoint_to_start_from(fresh) is None

    folder = tmp_path / "run" / "checkpoints"
    for name in ("step_00000005", "step_00000100", "step_00000200.partial", "step_00000300"):
        (folder / name).mkdir(parents=True)
    other = tmp_path / "other"
    other.mkdir()
    for checkpoint in (folder / "step_00000005", folder / "step_00000200.partial", other):
        write_settings(checkpoint, fresh)
        seal(checkpoint)
    loading = load_settings([*words, f"checkpoint.load={other}"], TWO)
    assert checkpoint_to_start_from(loading) == folder / "step_00000005"
    write_settings(folder / "step_00000100", fresh)
    assert checkpoint_to_start_from(loading) == folder / "step_00000005"
    seal(folder / "step_00000100")
    assert checkpoint_to_start_from(loading) == folder / "step_00000100"
    with pytest.raises(ConfigurationError, match="choose another run_name to start anew"):
        load_settings([*words, "checkpoint.resume=false"], TWO)
    anew = [f"output_dir={tmp_path}", "run_name=b", f"checkpoint.load={other}"]
    fresh = load_settings([*anew, "checkpoint.resume=false"], TWO)
    assert checkpoint_to_start_from(fresh) == other
