"""The newest whole checkpoint of a run, in both tiers; damaged ones on the way are put aside."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_kanana.config import Settings
from megatron_kanana.config.manifest import Damage
from megatron_kanana.config.saved import DAMAGED, damaged_folders, whole_path, whole_steps

from .folders import ABANDONED, set_aside
from .local_tier import common_steps, local_directory, verify_parts
from .verification import CheckpointError, on_first_rank, report, verify_together

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A whole checkpoint of the run.

    Attributes:
        path: its folder; in the local tier that of this rank's part.
        step: optimizer steps done when it was saved.
        local: whether it lies in the local tier.
    """

    path: Path
    step: int
    local: bool


def newest_whole(settings: Settings, up_to_step: int | None = None) -> Found | None:
    """Newest checkpoint of the run that is as it was saved; every rank must call this.

    Newer ones that are damaged are renamed to `step_….damaged`, so that their steps can be saved
    again; nothing is renamed if no whole one is left. All ranks get the same answer.

    Args:
        settings: of the run.
        up_to_step: do not look at later ones, which are renamed to `step_….abandoned`.

    Returns:
        None where the run has no checkpoint at all.

    Raises:
        CheckpointError: it has some, and none is whole.
    """
    directory = Path(settings.checkpoint_dir)
    steps = on_first_rank(lambda: whole_steps(directory))
    local_steps = common_steps(settings)
    known = [*((step, False) for step in steps), *((step, True) for step in local_steps)]
    candidates = [
        Found(_path(settings, step, local), step, local)
        for step, local in sorted(known, reverse=True)  # of one step the local one, which is quick
    ]
    too_new = [each for each in candidates if up_to_step is not None and each.step > up_to_step]
    passed: list[tuple[Found, list[Damage]]] = []
    for each in candidates[len(too_new) :]:
        damages = _verify(settings, each)
        if not damages:
            _put_aside(too_new, passed)
            return each
        passed.append((each, damages))
    aside = on_first_rank(lambda: damaged_folders(directory))
    if passed or (aside and not steps):
        raise CheckpointError(_none_left(directory, passed, aside))
    return None


def _path(settings: Settings, step: int, local: bool) -> Path:
    if not local:
        return whole_path(Path(settings.checkpoint_dir), step)
    directory = local_directory(settings)
    assert directory is not None
    return whole_path(directory, step)


def _verify(settings: Settings, each: Found) -> list[Damage]:
    if each.local:
        return verify_parts(each.path, contents=settings.checkpoint.verify)
    return verify_together(each.path, contents=settings.checkpoint.verify)


def _put_aside(too_new: Sequence[Found], passed: Sequence[tuple[Found, list[Damage]]]) -> None:
    for each in too_new:
        _rename(each, ABANDONED)
    for each, damages in passed:
        if dist.get_rank() == 0:
            logger.warning(
                "%s\n  an earlier checkpoint takes its place", report(each.path, damages)
            )
        _rename(each, DAMAGED)
    dist.barrier()


def _rename(each: Found, why: str) -> None:
    if not each.local and dist.get_rank() != 0:
        return
    try:
        target = set_aside(each.path, why)
    except OSError as error:
        logger.warning("%s cannot be renamed: %s", each.path, error.strerror)
        return
    if dist.get_rank() == 0:
        logger.warning("%s is now called %s", each.path, target.name)


def _none_left(
    directory: Path, passed: Sequence[tuple[Found, list[Damage]]], aside: Sequence[Path]
) -> str:
    reports = [report(each.path, damages) for each, damages in passed]
    reports += [f"{path} was found damaged before" for path in aside]
    return "\n".join(
        [
            f"No checkpoint in {directory} is whole, so the run was not started anew either.",
            *reports,
            "  remedy: put a copy of one of them back; or start from another checkpoint with"
            " checkpoint.load, or anew, under another run_name",
        ]
    )
