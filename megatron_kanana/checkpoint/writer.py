"""Saving checkpoints while training goes on."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest

from megatron_kanana.config import write_settings
from megatron_kanana.config.ledger import write_ledger
from megatron_kanana.config.schema import CheckpointSettings
from megatron_kanana.data.chat import add_chat_template
from megatron_kanana.data.tokenizer import copy_tokenizer

from .folders import discard_old, partial_path, publish
from .state import Run, saved_state

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes whole checkpoints, one at a time, and deletes old ones.

    Args:
        directory: folder of the run's checkpoints.
        settings: interval, retention, and whether to write in the background.
    """

    def __init__(self, directory: Path, settings: CheckpointSettings) -> None:
        self.directory = directory
        self.settings = settings
        self._queue = AsyncCallsQueue()
        self._last_saved: int | None = None

    def save(self, run: Run) -> None:
        """Save the run's state after `run.step`; returns once it is copied, or written."""
        if run.step == self._last_saved:
            return
        self._queue.maybe_finalize_async_calls(blocking=True)
        step = self._last_saved = run.step
        partial = partial_path(self.directory, step)
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write_settings(partial, run.settings)
            write_ledger(partial, run.ledger)
            copy_tokenizer(run.tokenizer.path, partial)
            if run.settings.data.conversations:
                add_chat_template(partial)
        dist.barrier()
        request = dist_checkpointing.save(saved_state(run), str(partial), async_sharded_save=True)
        assert isinstance(request, AsyncRequest)
        request.add_finalize_fn(lambda: self._publish(step))
        if self.settings.asynchronous:
            self._queue.schedule_async_request(request)
        else:
            request.execute_sync()

    def poll(self) -> None:
        """Finish a background save that is done; every rank must call this at the same step."""
        self._queue.maybe_finalize_async_calls(blocking=False)

    def finish(self) -> None:
        """Wait for a background save."""
        self._queue.maybe_finalize_async_calls(blocking=True)
        self._queue.close()

    def _publish(self, step: int) -> None:
        if dist.get_rank() == 0:
            publish(self.directory, step)
            discard_old(self.directory, self.settings.keep_last, self.settings.keep_every)
            logger.info("checkpoint of step %d is whole in %s", step, self.directory)
        dist.barrier()
