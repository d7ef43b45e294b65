"""Which parts of the local tier a run can go on from."""

from __future__ import annotations

from pathlib import Path

import yaml

from megatron_kanana.checkpoint.local_tier import _fits
from megatron_kanana.config import Environment, Settings, load_settings, write_settings
from megatron_kanana.config.manifest import seal
from megatron_kanana.config.saved import SETTINGS_FILE


def part_of(folder: Path, settings: Settings) -> Path:
    """A part with these settings, as far as they are concerned."""
    folder.mkdir()
    write_settings(folder, settings)
    seal(folder)
    return folder


def test_parts_fit_that_were_saved_in_the_same_layout_by_a_version_with_the_same_parameters(
    tmp_path: Path,
) -> None:
    settings = load_settings([], Environment(), with_files=False)
    part = part_of(tmp_path / "same", settings)
    assert _fits(part, settings)
    split = Environment(world_size=2, local_world_size=2)
    other = load_settings(["parallel.expert_parallel_size=2"], split, with_files=False)
    assert not _fits(part, other)
    saved = yaml.safe_load((part / SETTINGS_FILE).read_text())
    del saved["kernels"]["moe_backend"]
    (part / SETTINGS_FILE).write_text(yaml.safe_dump(saved))
    seal(part)
    assert not _fits(part, settings)
