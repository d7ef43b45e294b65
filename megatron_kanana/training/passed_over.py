"""The samples that a run passed over when it went back to a checkpoint.

Until the next checkpoint is whole a file in the run's folder keeps them, so that a start in between
passes over the same samples.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run import Run

logger = logging.getLogger(__name__)

ROLLBACK_FILE = "rollback.json"


def keep_rollback(run: Run) -> None:
    """Write what followed from going back to the checkpoint of this step; on one process."""
    content = {
        "step": run.step,
        "consumed_samples": run.consumed_samples,
        "skipped_samples": run.skipped_samples,
        "interventions": run.guards.interventions,
    }
    path = Path(run.settings.run_dir) / ROLLBACK_FILE
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content) + "\n")
    partial.replace(path)


def repeat_rollback(run: Run) -> None:
    """If the run went back to the checkpoint just loaded before, go on as it did then."""
    path = Path(run.settings.run_dir) / ROLLBACK_FILE
    if not path.is_file():
        return
    content = json.loads(path.read_text())
    if content["step"] == run.step:
        run.consumed_samples = content["consumed_samples"]
        run.skipped_samples = [(begin, end) for begin, end in content["skipped_samples"]]
        run.guards.interventions = content["interventions"]
        logger.info("going on at sample %d, after a rollback", run.consumed_samples)
