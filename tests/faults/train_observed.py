"""The main job, which tells in files what it is doing and what it feeds to the model.

Arguments: a folder, and those of the main job. The folder gets for each rank

- `state_RANK`: process number, phase and step, overwritten all the time. Phases: starting, step,
  saving (the part of a save that training waits for), evaluation, ending;
- `fed_RANK.jsonl`: for each training microbatch the process, the step, and a hash of each sample.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_kanana import device, train

_WIDTH = 64


def read_state(folder: Path, rank: int) -> tuple[int, str, int] | None:
    """Process number, phase and step of a rank; None before it has started."""
    try:
        pid, phase, step = (folder / f"state_{rank}").read_text().split()
    except (FileNotFoundError, ValueError):
        return None
    return int(pid), phase, int(step)


class Observer:
    """Writes the state of this process."""

    def __init__(self, folder: Path) -> None:
        self.rank = int(os.environ["RANK"])
        self.folder = folder
        self._state = os.open(folder / f"state_{self.rank}", os.O_WRONLY | os.O_CREAT)
        self._fed = (folder / f"fed_{self.rank}.jsonl").open("a")
        self._step = 0
        self.enter("starting")

    def enter(self, phase: str) -> None:
        """Note what begins."""
        os.pwrite(self._state, f"{os.getpid()} {phase} {self._step}".ljust(_WIDTH).encode(), 0)

    def watch(self) -> None:
        """Put notes before and after what the training loop calls."""
        from megatron_kanana.checkpoint.writer import CheckpointWriter
        from megatron_kanana.training import loop, step

        train_step, forward_step = vars(loop)["train_step"], vars(step)["_forward_step"]
        save, finish = CheckpointWriter.save, CheckpointWriter.finish

        def noting(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*arguments: Any, **named: Any) -> Any:
                self.enter(phase)
                result = function(*arguments, **named)
                self.enter("step")
                return result

            return noted

        def noted_step(run: Any, *arguments: Any, **named: Any) -> Any:
            self._step = run.step + 1
            self.enter("step")
            return train_step(run, *arguments, **named)

        def noted_forward_step(run: Any, iterator: Any, chunk: Any) -> Any:
            if iterator is None or not chunk.training:
                return forward_step(run, iterator, chunk)
            batch = next(iterator)
            rows = [row.numpy().tobytes() for row in batch["tokens"]]
            hashes = [hashlib.sha256(row).hexdigest()[:16] for row in rows]
            line = {"pid": os.getpid(), "step": run.step + 1, "hashes": hashes}
            self._fed.write(json.dumps(line) + "\n")
            self._fed.flush()
            return forward_step(run, iter([batch]), chunk)

        vars(loop)["train_step"] = noted_step
        vars(loop)["evaluate_and_record"] = noting("evaluation", vars(loop)["evaluate_and_record"])
        vars(step)["_forward_step"] = noted_forward_step
        patched: Any = CheckpointWriter
        patched.save = noting("saving", save)
        patched.finish = noting("ending", finish)


def main(folder: Path, arguments: list[str]) -> int:
    """Run the main job under observation."""
    observer = Observer(folder)
    initialize = device.initialize_process_groups

    def initialize_and_watch(*initial: Any) -> None:
        initialize(*initial)
        observer.watch()

    vars(device)["initialize_process_groups"] = initialize_and_watch
    return train.main(arguments)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
