"""Saving checkpoints while training goes on, and what follows if one cannot be saved.

Two stages, each in a process of its own on the ranks that have something to do. First every rank
writes its part. When all have, the first rank writes `.metadata` and the manifest and gives the
folder its name. After each step of training the ranks agree on how far all of them are.
"""

from __future__ import annotations

import atexit
import io
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_kanana.config import Settings, write_settings
from megatron_kanana.config.ledger import write_ledger
from megatron_kanana.config.manifest import files_in, sync_files, write_durably, write_manifest
from megatron_kanana.config.saved import whole_path, whole_steps
from megatron_kanana.data.chat import add_chat_template
from megatron_kanana.data.tokenizer import copy_tokenizer

from .background import Work
from .folders import discard_old, discard_partial, partial_path, publish
from .free_space import describe, free_bytes, readable
from .local_tier import LocalWriter, local_directory
from .parts import Plan, WrittenPart, gather_parts, plan, write_buckets
from .stages import POLL_SECONDS, Stages, agree, gathered_errors
from .state import Run, saved_state
from .torch_dist_blocks import COMMON_FILE, FORMAT, FORMAT_FILE
from .verification import on_first_rank

logger = logging.getLogger(__name__)

VISIBLE_SECONDS = 30.0
"""How long a network's file system may take to show on one node what another has made."""

SLOW_SECONDS = 5.0
"""Time that a save may wait for the one before without a word about slow storage."""


class SaveError(Exception):
    """Raised on every rank when a run must not go on, or end, without a checkpoint."""


@dataclass(frozen=True)
class _Save:
    """A checkpoint that is being written: its step, size over all ranks, since when, and how."""

    step: int
    num_bytes: int
    started: float
    stages: Stages


class CheckpointWriter:
    """Writes whole checkpoints, one at a time, and deletes old ones; and the local tier, if any.

    Every rank must make it, and call its methods after the same steps.

    Attributes:
        longest_save_seconds: that a checkpoint took so far, until it was whole; None before one.

    Args:
        settings: of the run.
        device: where the ranks' states are brought together.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.directory = Path(settings.checkpoint_dir)
        self.settings = settings.checkpoint
        self._device = device
        self._save: _Save | None = None
        self._last_saved: int | None = None
        self._failed_in_a_row = 0
        self._failure = ""
        self.longest_save_seconds: float | None = None
        local = local_directory(settings)
        in_background = self.settings.asynchronous
        self._local = LocalWriter(local, device, background=in_background) if local else None
        atexit.register(self._stop)
        if dist.get_rank() == 0:
            discard_partial(self.directory)
        dist.barrier()

    def save_if_due(self, run: Run) -> bool:
        """Save in one of the tiers if the settings say so for `run.step`; whether they did.

        Raises:
            SaveError: as `save`.
        """
        if _is_due(run.step, self.settings.save_interval):
            self.save(run)
            return True
        if self._local is not None and _is_due(run.step, self.settings.local_save_interval):
            self._local.save(run)
            return True
        return False

    def save(self, run: Run) -> None:
        """Save the run's state after `run.step`; returns once it is copied, or written.

        Raises:
            SaveError: it or the one before cannot be saved, and the settings say to stop.
        """
        self.wait()
        step = run.step
        if step == self._last_saved:
            return
        started = time.monotonic()
        partial = partial_path(self.directory, step)
        if on_first_rank(whole_path(self.directory, step).exists):
            # The run has been at this step before; or the process that gave it its name was
            # killed before it could say so.
            self._last_saved = step
            self._failure = ""
            return
        if not self._agreed(step, self._make_folder(partial)):
            return
        if not self._agreed(step, _invisible(partial)):
            return
        planned = plan(saved_state(run), partial)
        (num_bytes,) = agree(self._device, planned.num_bytes)
        if not self._agreed(step, self._lack_of_space(num_bytes)):
            return
        self._last_saved = step
        content = _common_bytes(planned) if dist.get_rank() == 0 else b""
        buckets = planned.take_buckets()
        ledger = run.ledger

        def write_part() -> WrittenPart:
            part = write_buckets(buckets)
            if dist.get_rank() == 0:
                part.entries[COMMON_FILE] = write_durably(partial / COMMON_FILE, content)
                before = set(files_in(partial))
                write_settings(partial, run.settings)
                write_ledger(partial, ledger)
                copy_tokenizer(run.tokenizer.path, partial)
                if run.settings.data.conversations:
                    add_chat_template(partial)
                new = [name for name in files_in(partial) if name not in before]
                part.entries |= sync_files(partial, new)
            return part

        def describe_parts(part: WrittenPart) -> Callable[[], None] | None:
            parts = gather_parts(part)
            if parts is None:
                return None
            return lambda: self._describe_and_publish(step, planned, parts)

        stages = Stages(self._device, self._start, write_part, [describe_parts])
        self._save = _Save(step, num_bytes, started, stages)
        if not self.settings.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Go on with a background save as far as it is; every rank must call this at one step.

        Raises:
            SaveError: it has failed, and the settings say to stop.
        """
        if self._save is not None and self._save.stages.advance():
            self._end(self._save)
        if self._local is not None:
            self._local.poll()

    def finish(self) -> None:
        """Wait for a background save.

        Raises:
            SaveError: the last save has failed.
        """
        self.wait()
        if self._local is not None:
            self._local.wait()
        if self._failure:
            raise SaveError(self._failure)

    def wait(self) -> None:
        """Wait for a background save.

        Raises:
            SaveError: it has failed, and the settings say to stop.
        """
        save = self._save
        if save is None:
            return
        started = time.monotonic()
        save.stages.finish()
        self._end(save)
        waited = time.monotonic() - started
        if waited > SLOW_SECONDS and self.settings.asynchronous and dist.get_rank() == 0:
            logger.warning(
                "waited %.0f s for the checkpoint of step %d: the storage is slow"
                " for this checkpoint.save_interval",
                waited,
                save.step,
            )

    def _end(self, save: _Save) -> None:
        self._save = None
        if save.stages.errors:
            self._last_saved = None
            self._fail(save.step, save.stages.errors)
        else:
            self._succeed(save)

    def _make_folder(self, partial: Path) -> str | None:
        """The first rank makes the folder to write into; returns what hinders it."""
        if dist.get_rank() != 0:
            return None
        try:
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
        except OSError as error:
            return describe(error)
        return None

    def _lack_of_space(self, num_bytes: int) -> str | None:
        """What the first rank finds in the way of that many bytes."""
        free = free_bytes(self.directory) if dist.get_rank() == 0 else None
        if free is None or num_bytes < free:
            return None
        return (
            f"{self.directory} has {readable(free)} free, and the checkpoint takes"
            f" {readable(num_bytes)} and more"
        )

    def _agreed(self, step: int, error: str | None) -> bool:
        """Whether no rank has an error; every rank must call this."""
        (failed,) = agree(self._device, int(error is not None))
        if failed:
            self._fail(step, gathered_errors(error))
        return not failed

    def _start(self, function: Callable[[], Any]) -> Work:
        limit = self.settings.save_time_limit
        seconds = None if limit is None else limit * 60
        return Work(function, background=self.settings.asynchronous, time_limit=seconds)

    def _describe_and_publish(self, step: int, planned: Plan, parts: list[WrittenPart]) -> None:
        """The first rank's second stage: what describes the parts, and the checkpoint's name."""
        partial = partial_path(self.directory, step)
        entries = {name: entry for part in parts for name, entry in part.entries.items()}
        assert planned.metadata is not None
        planned.writer.finish(planned.metadata, [part.results for part in parts])
        (partial / FORMAT_FILE).write_text(json.dumps(FORMAT))
        entries |= sync_files(partial, [".metadata", FORMAT_FILE])
        write_manifest(partial, entries)
        publish(self.directory, step)
        try:
            discard_old(self.directory, self.settings.keep_last, self.settings.keep_every)
        except OSError as error:
            logger.warning("an old checkpoint cannot be deleted: %s", describe(error))

    def _succeed(self, save: _Save) -> None:
        self._failed_in_a_row = 0
        self._failure = ""
        seconds = time.monotonic() - save.started
        self.longest_save_seconds = max(seconds, self.longest_save_seconds or 0.0)
        if dist.get_rank() == 0:
            logger.info(
                "checkpoint of step %d is whole in %s (%s in %.1f s)",
                save.step,
                self.directory,
                readable(save.num_bytes),
                seconds,
            )

    def _fail(self, step: int, errors: list[str]) -> None:
        """Give the space back, tell, and stop if the settings say so; every rank calls this."""
        dist.barrier()  # until nobody writes any more
        left = unharmed = ""
        if dist.get_rank() == 0:
            left = _remove(partial_path(self.directory, step))
            unharmed = _unharmed(self.directory)
        self._failed_in_a_row += 1
        limit = self.settings.max_failed_saves
        stops = self.settings.on_save_failure == "stop" or self._failed_in_a_row >= limit
        self._failure = "\n".join(
            [
                f"The checkpoint of step {step} could not be saved in {self.directory}{left}:",
                *(f"  {error}" for error in errors),
                f"  {unharmed}",
                "  remedy: make room there, or make it writable; or name another folder with"
                " checkpoint.directory and start from the last checkpoint with checkpoint.load",
            ]
        )
        if stops:
            count = f"{self._failed_in_a_row} in a row; " if self._failed_in_a_row > 1 else ""
            raise SaveError(
                f"{self._failure}\n  the run stops ({count}checkpoint.on_save_failure="
                f"{self.settings.on_save_failure}, checkpoint.max_failed_saves={limit})"
            )
        if dist.get_rank() == 0:
            logger.error(
                "%s\n  training goes on (%d of at most %d failed saves in a row)",
                self._failure,
                self._failed_in_a_row,
                limit,
            )

    def _stop(self) -> None:
        if self._save is not None:
            self._save.stages.stop()
        if self._local is not None:
            self._local.stop()


def _remove(partial: Path) -> str:
    """Delete what was written of a checkpoint; what to say if that cannot be done."""
    shutil.rmtree(partial, ignore_errors=True)
    try:
        return f"; {partial} is still there" if partial.exists() else ""
    except OSError:
        return ""


def _unharmed(directory: Path) -> str:
    """What to say of the checkpoints before."""
    try:
        steps = whole_steps(directory)
    except OSError as error:
        return f"earlier checkpoints cannot be seen: {describe(error)}"
    if not steps:
        return "no earlier checkpoint exists"
    return f"the checkpoint before, {whole_path(directory, steps[-1])}, is as it was"


def _invisible(folder: Path) -> str | None:
    """What hinders this rank from seeing a folder that the first one has made."""
    until = time.monotonic() + VISIBLE_SECONDS
    while not folder.is_dir():
        if time.monotonic() > until:
            return f"{folder} is not there: checkpoint.directory must lie on shared storage"
        time.sleep(POLL_SECONDS)
    return None


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _common_bytes(planned: Plan) -> bytes:
    content = io.BytesIO()
    torch.save(planned.common, content)
    return content.getvalue()
