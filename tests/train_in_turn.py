"""The main job several times in the same processes.

Argument: JSON, a list of [port for the processes to meet at, arguments of the main job].
"""

from __future__ import annotations

import json
import os
import sys

from megatron_kanana import train


def main(jobs: list[tuple[int, list[str]]]) -> int:
    """Run the jobs until one fails; returns its exit code, or 0."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # it remembers the job before
    for port, arguments in jobs:
        os.environ["MASTER_PORT"] = str(port)
        if code := train.main(arguments):
            return code
        from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

        unset_num_microbatches_calculator()
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
