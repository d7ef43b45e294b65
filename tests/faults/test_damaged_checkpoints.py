"""No damage to a checkpoint's files is loaded; the newest whole checkpoint takes its place."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from megatron_kanana.checkpoint.newest import newest_whole
from megatron_kanana.checkpoint.verification import CheckpointError, ensure_whole, verify_alone
from megatron_kanana.config import Settings
from megatron_kanana.config.manifest import MANIFEST_FILE, seal
from megatron_kanana.config.saved import damaged_folders, read_settings, whole_steps
from tests.faults import damage
from tests.faults.damage import Case
from tools.verify_checkpoint import main as verify_checkpoint

OLDER, NEWER = (f"step_{step:08d}" for step in (damage.OLDER, damage.NEWER))


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """Folder of a run with two checkpoints, and of the same run that nothing happens to."""
    folder = tmp_path_factory.mktemp("runs")
    damage.run_to_damage(folder, cache_dir)
    return folder


@pytest.fixture
def run(output_dir: Path, tmp_path: Path) -> tuple[Settings, Path]:
    """A copy of the run with two checkpoints: its settings and their folder."""
    shutil.copytree(output_dir / "damaged", tmp_path / "damaged")
    return damage.settings_of_run(tmp_path), tmp_path / "damaged" / "checkpoints"


def test_every_damage_to_every_file_is_found_and_the_older_checkpoint_used(
    run: tuple[Settings, Path],
) -> None:
    settings, folder = run
    cases = damage.all_cases(folder / NEWER, folder / OLDER, count=520, seed=3)
    assert len(cases) >= 500
    assert len({case.file for case in cases}) == len(list((folder / NEWER).iterdir()))
    with damage.alone():
        answers = {case: damage.answer(case, settings, folder) for case in cases}
        assert [str(case) for case, each in answers.items() if not each.named] == []
        assert [str(case) for case, each in answers.items() if not each.fell_back] == []
        found = newest_whole(settings)  # every damage has been mended
    assert found is not None
    assert found.path == folder / NEWER


def test_restarted_run_ends_as_if_nothing_had_happened(output_dir: Path, cache_dir: Path) -> None:
    cases = [
        Case("bit flipped", "__0_0.distcp", 1_000_000),
        Case("missing", MANIFEST_FILE),
        Case("the older checkpoint's", "common.pt"),
    ]
    assert all(damage.restarts_end_alike(cases, output_dir, cache_dir).values())


def test_report_names_the_checkpoint_the_file_and_what_takes_its_place(
    run: tuple[Settings, Path], caplog: pytest.LogCaptureFixture
) -> None:
    settings, folder = run
    damage.do_damage(Case("cut", "common.pt", 100), folder / NEWER, folder / OLDER)
    size = (folder / OLDER / "common.pt").stat().st_size
    with damage.alone(), caplog.at_level(logging.WARNING):
        found = newest_whole(settings)
    assert found is not None
    assert found.step == damage.OLDER
    assert f"{NEWER} is not whole:\n  common.pt has 100 bytes instead of {size:,}" in caplog.text
    assert [path.name for path in damaged_folders(folder)] == [f"{NEWER}.damaged"]
    assert whole_steps(folder) == [damage.OLDER]


def test_without_a_whole_checkpoint_nothing_is_renamed(run: tuple[Settings, Path]) -> None:
    settings, folder = run
    for name in (OLDER, NEWER):
        damage.do_damage(Case("bit flipped", "__0_1.distcp", 70_000), folder / name, folder)
    with damage.alone(), pytest.raises(CheckpointError) as raised:
        newest_whole(settings)
    assert f"No checkpoint in {folder} is whole" in str(raised.value)
    assert str(raised.value).count("__0_1.distcp has another content") == 2
    assert "remedy: put a copy of one of them back" in str(raised.value)
    assert whole_steps(folder) == [damage.OLDER, damage.NEWER]


def test_checkpoint_that_was_asked_for_has_no_substitute(run: tuple[Settings, Path]) -> None:
    folder = run[1]
    checkpoint = folder / NEWER
    with damage.alone():
        ensure_whole(checkpoint)
        damage.do_damage(Case("bit flipped", "__0_0.distcp", 9_000), checkpoint, folder)
        ensure_whole(checkpoint, contents=False)
        with pytest.raises(CheckpointError, match=r"__0_0\.distcp has another content"):
            ensure_whole(checkpoint)
    assert checkpoint.is_dir()


def test_run_whose_checkpoints_were_all_put_aside_does_not_start_anew(
    run: tuple[Settings, Path],
) -> None:
    settings, folder = run
    for name in (OLDER, NEWER):
        (folder / name).rename(folder / f"{name}.damaged")
    with damage.alone(), pytest.raises(CheckpointError, match="was found damaged before"):
        newest_whole(settings)


def test_going_back_puts_newer_checkpoints_aside(run: tuple[Settings, Path]) -> None:
    settings, folder = run
    with damage.alone():
        found = newest_whole(settings, up_to_step=3)
    assert found is not None
    assert found.step == damage.OLDER
    assert sorted(path.name for path in folder.iterdir()) == [OLDER, f"{NEWER}.abandoned"]


def test_second_damaged_checkpoint_of_a_step_gets_a_name_of_its_own(
    run: tuple[Settings, Path],
) -> None:
    settings, folder = run
    shutil.copytree(folder / NEWER, folder / f"{NEWER}.damaged")
    damage.do_damage(Case("missing", ".metadata"), folder / NEWER, folder)
    with damage.alone():
        newest_whole(settings)
    assert [path.name for path in damaged_folders(folder)] == [
        f"{NEWER}.damaged",
        f"{NEWER}.damaged.2",
    ]


def test_only_files_that_would_be_read_are_strangers(run: tuple[Settings, Path]) -> None:
    checkpoint = run[1] / NEWER
    (checkpoint / "notes.txt").write_text("the good one")
    assert verify_alone(checkpoint) == []
    (checkpoint / "__7_0.distcp").write_bytes(b"")
    (checkpoint / "tokenizer").mkdir()
    (checkpoint / "tokenizer" / "tokenizer.json").write_text("{}")
    found = sorted(each.file for each in verify_alone(checkpoint))
    assert found == ["__7_0.distcp", "tokenizer/tokenizer.json"]


def test_checkpoint_of_an_earlier_version_is_whole_if_its_files_are_there(
    run: tuple[Settings, Path],
) -> None:
    checkpoint = run[1] / NEWER
    (checkpoint / MANIFEST_FILE).unlink()
    assert [str(each) for each in verify_alone(checkpoint)] == [f"{MANIFEST_FILE} is missing"]
    settings = (checkpoint / "settings.yaml").read_text()
    (checkpoint / "settings.yaml").write_text(settings.replace("  verify: true\n", ""))
    assert "verify" not in read_settings(checkpoint)["checkpoint"]
    assert verify_alone(checkpoint) == []
    damage.do_damage(Case("cut", "__0_1.distcp", 70_000), checkpoint, checkpoint)
    assert "is cut short" in str(verify_alone(checkpoint)[0])
    (checkpoint / "common.pt").unlink()
    assert [str(each) for each in verify_alone(checkpoint)] == ["common.pt is missing"]


def test_tool_says_which_checkpoints_are_whole(
    run: tuple[Settings, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run[1]
    assert verify_checkpoint([str(folder), "--from-disk"]) == 0
    assert capsys.readouterr().out.count(": whole, 8 files") == 2
    damage.do_damage(Case("noise", "__0_0.distcp", 5_000), folder / OLDER, folder)
    assert verify_checkpoint([str(folder), "--sizes"]) == 0
    assert verify_checkpoint([str(folder)]) == 1
    said = capsys.readouterr().out
    assert f"{OLDER} is not whole:\n  __0_0.distcp has another content" in said
    assert f"{NEWER}: whole" in said
    seal(folder / OLDER)
    assert verify_checkpoint([str(folder / OLDER)]) == 0
    assert verify_checkpoint([str(folder / "nothing")]) == 2
