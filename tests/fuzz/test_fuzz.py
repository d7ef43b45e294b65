"""Random configurations and damaged inputs: always an answer, never damage.

A short form of `python -m benchmarks.fuzz configurations` and `... inputs`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_kanana.data.builtin import BuiltinData
from tests.fuzz.campaign import Outcome, fuzz_configurations, fuzz_inputs
from tests.fuzz.inputs import check_input, make_special_files, readers, write_good_files

CONFIGURATIONS = 300
INPUTS = 400
SEED = 7


@pytest.fixture
def folder(tmp_path: Path, builtin: BuiltinData, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with good files of every kind, which is the current one."""
    write_good_files(tmp_path, builtin.tokenizer)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_sound(outcome: Outcome, examples: int) -> None:
    """All were tried, and none showed a defect."""
    assert not outcome.defects, "\n\n".join(f"{k}\n{v}" for k, v in outcome.defects.items())
    assert outcome.examples == examples


def test_good_files_are_read(folder: Path) -> None:
    for name, reader in readers(folder).items():
        for file in reader.files:
            assert check_input(reader, file, (folder / file).read_bytes(), folder) == "read", name


def test_configurations_are_accepted_or_refused_with_every_problem_told(folder: Path) -> None:
    make_special_files(folder)
    (folder / "saved").mkdir()
    outcome = fuzz_configurations(CONFIGURATIONS, SEED, folder / "saved")
    assert_sound(outcome, CONFIGURATIONS)
    assert min(outcome.results.values()) > 5, outcome.results


def test_damaged_inputs_are_read_or_refused_and_nothing_else_changes(folder: Path) -> None:
    outcome = fuzz_inputs(INPUTS, SEED, folder)
    assert_sound(outcome, INPUTS)
    assert outcome.kinds.keys() == readers(folder).keys()
