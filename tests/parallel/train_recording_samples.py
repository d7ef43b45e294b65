"""As train_in_turn.py, and writes down what each process feeds to the model.

Arguments: a folder, and the JSON of train_in_turn.py. The folder gets a file for each process, with
a line for each training microbatch: run, step, rank, and a hash and the tokens of each sample.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from megatron_kanana import device
from tests import train_in_turn


def main(folder: Path, jobs: list[tuple[int, list[str]]]) -> int:
    """Run the jobs, recording from where megatron-core is imported."""
    initialize = device.initialize_process_groups

    def initialize_and_record(*arguments: Any) -> None:
        initialize(*arguments)
        record(folder)

    vars(device)["initialize_process_groups"] = initialize_and_record
    return train_in_turn.main(jobs)


def record(folder: Path) -> None:
    """Put a writer of batches before the model's forward step."""
    import torch.distributed as dist

    from megatron_kanana.training import step

    forward_step = vars(step)["_forward_step"]
    if hasattr(forward_step, "records"):
        return

    def recording(run: Any, iterator: Any, chunk: Any) -> Any:
        batch = next(iterator)
        if chunk.training:
            rows = [row.numpy().tobytes() for row in batch["tokens"]]
            line = {
                "run": run.settings.run_name,
                "step": run.step + 1,
                "rank": dist.get_rank(),
                "hashes": [hashlib.sha256(row).hexdigest() for row in rows],
                "tokens": batch["tokens"].tolist(),
            }
            with (folder / f"rank_{dist.get_rank()}.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        return forward_step(run, iter([batch]), chunk)

    vars(recording)["records"] = True
    vars(step)["_forward_step"] = recording


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
