"""Composing settings: groups, experiments, overrides, help, and settings kept in checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path

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
from megatron_kanana.config.help import settings_help
from tests.launch import CONFIG_DIR as TEST_CONFIG_DIR

TWO = Environment(world_size=2, local_world_size=2)
FOUR = Environment(world_size=4, local_world_size=4)


@pytest.mark.parametrize(
    ("group", "choice"), [(group, name) for group in GROUPS for name in available_choices(group)]
)
def test_every_shipped_config_makes_a_good_run(group: str, choice: str) -> None:
    environment = FOUR if choice == "tensor_pipeline" else TWO
    try:
        settings = dataclasses.asdict(load_settings([f"{group}={choice}"], environment))
    except ConfigurationError as error:  # the large models need a tokenizer of one's own
        assert [problem.setting for problem in error.problems] == ["model.vocab_size"]
        assert choice.startswith(("kanana_2_30b", "kanana_2_155b"))
        return
    shipped = yaml.safe_load((CONFIG_DIR / group / f"{choice}.yaml").read_text())
    if group != "experiment":
        assert {name: settings[group][name] for name in shipped} == shipped


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
    loading = load_settings([*words, f"checkpoint.load={other}"], TWO)
    assert checkpoint_to_start_from(loading) == folder / "step_00000005"
    write_settings(folder / "step_00000100", fresh)
    assert checkpoint_to_start_from(loading) == folder / "step_00000100"
    with pytest.raises(ConfigurationError, match="choose another run_name to start anew"):
        load_settings([*words, "checkpoint.resume=false"], TWO)
    anew = [f"output_dir={tmp_path}", "run_name=b", f"checkpoint.load={other}"]
    fresh = load_settings([*anew, "checkpoint.resume=false"], TWO)
    assert checkpoint_to_start_from(fresh) == other
