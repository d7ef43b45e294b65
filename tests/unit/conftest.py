"""Settings are checked against files of the current folder, so each test gets an empty one."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def empty_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty folder."""
    folder = tmp_path_factory.mktemp("current")
    monkeypatch.chdir(folder)
    return folder
