"""The fast tier: each process keeps its own state on a disk of its node, between checkpoints.

A restart of the same processes on the same nodes goes on from there without the shared storage.
What a process keeps is all it needs itself, also where other processes hold the same, so that
nothing has to come from another node. A checkpoint proper lets each tensor be written once, and
read under any layout, and cannot do this.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)

from megatron_kanana.config import Settings, write_settings
from megatron_kanana.config.ledger import write_ledger
from megatron_kanana.config.manifest import (
    Damage,
    FileEntry,
    files_in,
    sync_files,
    write_manifest,
)
from megatron_kanana.config.saved import glance, read_settings, whole_path, whole_steps
from megatron_kanana.optimizer.whole_state import Entry

from .background import Work
from .folders import discard_old, discard_partial, partial_path, publish
from .free_space import describe
from .parts import ChecksummedFile
from .stages import Stages, agree, gathered_errors
from .state import Run, put_back, saved_state
from .verification import verify_alone

logger = logging.getLogger(__name__)

STATE_FILE = "state.pt"


def local_directory(settings: Settings) -> Path | None:
    """This rank's folder of local checkpoints; None where the settings name none."""
    if settings.checkpoint.local_directory is None:
        return None
    rank = f"rank_{dist.get_rank():05d}_of_{dist.get_world_size():05d}"
    return run_folder(settings.checkpoint.local_directory, settings) / rank


def run_folder(local: str, settings: Settings) -> Path:
    """The run's folder in the local tier; runs of one name in different places have different ones.

    Args:
        local: folder of the tier on a node.
        settings: of the run.
    """
    place = hashlib.sha256(str(Path(settings.checkpoint_dir).resolve()).encode()).hexdigest()
    return Path(local) / f"{settings.run_name}_{place[:8]}"


def common_steps(settings: Settings) -> list[int]:
    """Steps of which every rank has its part, saved in this layout; every rank must call this."""
    if settings.checkpoint.local_directory is None:
        return []
    directory = local_directory(settings)
    assert directory is not None
    mine = {step for step in whole_steps(directory) if _fits(whole_path(directory, step), settings)}
    of_ranks: list[set[int]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, mine)
    everywhere = set.intersection(*of_ranks)
    anywhere = set.union(*of_ranks)
    if dist.get_rank() == 0 and anywhere - everywhere:
        step = max(anywhere - everywhere)
        lacking = [rank for rank, steps in enumerate(of_ranks) if step not in steps]
        logger.info(
            "the local checkpoint of step %d is not used: rank %s has no part of it",
            step,
            ", ".join(map(str, lacking[:10])),
        )
    return sorted(everywhere)


def _fits(part: Path, settings: Settings) -> bool:
    """Whether a part holds what the run has in its present layout."""
    if glance(part):
        return True  # its damage is told when its turn comes
    saved = read_settings(part)
    now = dataclasses.asdict(settings)
    optimizer = ("name", "muon_kinds", "adamw_kinds")
    return bool(
        "moe_backend" in saved["kernels"]  # before, each expert was a parameter of its own
        and saved["parallel"] == now["parallel"]
        and all(saved["optimizer"][name] == now["optimizer"][name] for name in optimizer)
    )


def verify_parts(part: Path, *, contents: bool) -> list[Damage]:
    """What is wrong with any rank's part; every rank must call this."""
    damages: list[list[Damage]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(damages, verify_alone(part, contents=contents))
    return [
        Damage(f"rank {rank}'s {damage.file}", damage.reason)
        for rank, found in enumerate(damages)
        for damage in found
    ]


def load_part(run: Run, part: Path) -> None:
    """Restore everything from this rank's part; every rank must call this."""
    stored = torch.load(part / STATE_FILE, map_location="cpu", weights_only=True)
    put_back(run, _from_plain(stored), same_layout=True)


class LocalWriter:
    """Writes each rank's own state to its node's disk; keeps the newest that every rank has.

    A failure is told and nothing else: the checkpoints of the run do not depend on it.

    Args:
        directory: this rank's folder.
        device: where the ranks' states are brought together.
        background: whether to write while training goes on.
    """

    def __init__(self, directory: Path, device: torch.device, *, background: bool) -> None:
        self.directory = directory
        self._device = device
        self._background = background
        self._stages: Stages | None = None
        self._step = 0
        discard_partial(directory)

    def save(self, run: Run) -> None:
        """Save the run's state after `run.step`; every rank must call this."""
        self.wait()
        step = self._step = run.step
        folder = partial_path(self.directory, step)
        error = self._make_folder(folder)
        (failed,) = agree(self._device, int(error is not None))
        if failed:
            self._tell(gathered_errors(error))
            return
        state = _on_cpu(saved_state(run), copied=self._device.type != "cpu")
        settings, ledger = run.settings, run.ledger

        def write() -> None:
            with ChecksummedFile(folder / STATE_FILE) as file:
                file.save(_without_views(state))
            entries: dict[str, FileEntry] = {STATE_FILE: file.entry}
            write_settings(folder, settings)
            write_ledger(folder, ledger)
            others = [name for name in files_in(folder) if name != STATE_FILE]
            write_manifest(folder, entries | sync_files(folder, others))

        # An older one goes only when every rank has this one under its name.
        stages = [self._step_of_all(publish, step), self._step_of_all(discard_old, 1, 0)]
        self._stages = Stages(self._device, self._start, write, stages)
        if not self._background:
            self.wait()

    def poll(self) -> None:
        """Go on as far as all ranks are; every rank must call this at one step."""
        if self._stages is not None and self._stages.advance():
            self._end(self._stages)

    def wait(self) -> None:
        """Wait for the last save; every rank must call this."""
        if self._stages is not None:
            self._stages.finish()
            self._end(self._stages)

    def stop(self) -> None:
        """End the process of this rank that writes."""
        if self._stages is not None:
            self._stages.stop()

    def _step_of_all(self, function: Callable[..., Any], *arguments: Any) -> Callable[[Any], Any]:
        return lambda _: lambda: function(self.directory, *arguments) and None

    def _start(self, function: Callable[[], Any]) -> Work:
        return Work(function, background=self._background)

    def _make_folder(self, folder: Path) -> str | None:
        try:
            for existing in (folder, whole_path(self.directory, self._step)):
                if existing.exists():  # the run is at this step for the second time
                    shutil.rmtree(existing)
            folder.mkdir(parents=True)
        except OSError as error:
            return describe(error)
        return None

    def _end(self, stages: Stages) -> None:
        self._stages = None
        if stages.errors:
            shutil.rmtree(partial_path(self.directory, self._step), ignore_errors=True)
            self._tell(stages.errors)
        elif dist.get_rank() == 0:
            logger.info("every rank has its part of step %d in its local tier", self._step)

    def _tell(self, errors: list[str]) -> None:
        if dist.get_rank() == 0:
            logger.error(
                "The state after step %d could not be saved in checkpoint.local_directory:\n%s\n"
                "  training goes on; checkpoints are not concerned",
                self._step,
                "\n".join(f"  {error}" for error in errors),
            )


def _on_cpu(state: Mapping[Any, Any], *, copied: bool) -> dict[Any, Any]:
    """This process's own part of a sharded state dict, of plain values.

    Args:
        state: megatron-core's.
        copied: whether the tensors lie elsewhere and are brought to the CPU.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, (ShardedTensor, ShardedTensorFactory, ShardedObject)):
            value = value.data
        if isinstance(value, torch.Tensor):
            return value.detach().to("cpu", copy=copied)
        if isinstance(value, io.BytesIO):
            return value.getvalue()
        if isinstance(value, dict):
            return {_plain_key(key): plain(each) for key, each in value.items()}
        return value

    return {key: plain(value) for key, value in state.items()}


def _plain_key(key: Any) -> Any:
    return dataclasses.astuple(key) if isinstance(key, Entry) else key


def _without_views(value: Any) -> Any:
    """Tensors that are parts of larger ones, copied: torch.save would write the larger ones."""
    if isinstance(value, torch.Tensor):
        is_part = value.untyped_storage().nbytes() != value.nbytes
        return value.clone() if is_part else value
    if isinstance(value, dict):
        return {key: _without_views(each) for key, each in value.items()}
    return value


def _from_plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return io.BytesIO(value)
    if isinstance(value, dict):
        return {
            Entry(*key) if isinstance(key, tuple) else key: _from_plain(each)
            for key, each in value.items()
        }
    return value
