"""Which checkpoints stay, and that an interruption never leaves half a one under a whole name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_kanana.checkpoint.folders import (
    discard_old,
    discard_partial,
    partial_path,
    publish,
    set_aside,
)
from megatron_kanana.config.saved import whole_path, whole_steps


def save(directory: Path, step: int, content: str = "weights") -> None:
    """Write and publish a checkpoint."""
    partial_path(directory, step).mkdir(parents=True)
    (partial_path(directory, step) / "data").write_text(content)
    publish(directory, step)


def test_a_checkpoint_is_whole_only_once_it_is_published(tmp_path: Path) -> None:
    partial_path(tmp_path, 10).mkdir()
    assert whole_steps(tmp_path) == []
    publish(tmp_path, 10)
    assert whole_steps(tmp_path) == [10]
    assert whole_steps(tmp_path / "nothing") == []


def test_the_newest_and_every_multiple_stay(tmp_path: Path) -> None:
    for step in range(10, 110, 10):
        save(tmp_path, step)
    assert discard_old(tmp_path, keep_last=2, keep_every=30) == [10, 20, 40, 50, 70, 80]
    assert whole_steps(tmp_path) == [30, 60, 90, 100]
    assert discard_old(tmp_path, keep_last=1, keep_every=0) == [30, 60, 90]
    assert whole_steps(tmp_path) == [100]


def test_a_whole_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    save(tmp_path, 10, "old")
    with pytest.raises(OSError, match="not empty"):
        save(tmp_path, 10, "new")
    assert (whole_path(tmp_path, 10) / "data").read_text() == "old"


def test_an_interrupted_deletion_leaves_no_broken_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20):
        save(tmp_path, step)

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        discard_old(tmp_path, keep_last=1, keep_every=0)
    assert whole_steps(tmp_path) == [20]


def test_what_interruptions_left_goes_and_whole_checkpoints_stay(tmp_path: Path) -> None:
    save(tmp_path, 10)
    for step in (15, 20):
        partial_path(tmp_path, step).mkdir()
        (partial_path(tmp_path, step) / "data").write_text("half")
    (tmp_path / "step_00000005.damaged").mkdir()
    discard_partial(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step_00000005.damaged", "step_00000010"]
    discard_partial(tmp_path / "nothing")


def test_each_checkpoint_put_aside_has_a_name_of_its_own(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save(tmp_path, 10, str(number))
        set_aside(whole_path(tmp_path, 10), "damaged")
    found = {path.name: (path / "data").read_text() for path in tmp_path.iterdir()}
    assert found == {
        "step_00000010.damaged": "1",
        "step_00000010.damaged.2": "2",
        "step_00000010.damaged.3": "3",
    }
