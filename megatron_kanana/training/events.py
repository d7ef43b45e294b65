"""A run's log of what its guards found: events.jsonl beside metrics.jsonl."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from .guards import Trouble
from .records import Recorder
from .run import Run

EVENTS_FILE = "events.jsonl"


def record_trouble(run: Run, trouble: Trouble, recorder: Recorder | None) -> None:
    """Write one trouble, and print it; on the process that records. Nothing is ever dropped."""
    if recorder is None:
        return
    event = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "step": trouble.step,
        "kind": trouble.kind,
        "action": trouble.action,
        "details": trouble.details,
        "samples": list(trouble.samples),
    }
    with (Path(run.settings.run_dir) / EVENTS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(event, ensure_ascii=False) + "\n")
    recorder.say(str(trouble))
