"""Load checkpoints one after another into one model, and print what came of each as JSON.

Arguments: a JSON list of checkpoints, and arguments of the main job.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_kanana import device, train
from megatron_kanana.config import detect_environment, load_settings


def main(checkpoints: list[str], arguments: list[str]) -> None:
    """Load each: "" if it was loaded, else class and text of the error."""
    options = train.parse_arguments(arguments)
    environment = detect_environment()
    settings = load_settings(options.overrides, environment, options.config_dir)
    where = device.prepare_device(settings, environment)
    device.initialize_process_groups(settings, where)

    from megatron_kanana.checkpoint.state import load
    from megatron_kanana.training.run import build_run

    run = build_run(settings, where)
    said = {}
    for checkpoint in checkpoints:
        try:
            load(run, Path(checkpoint))
            said[checkpoint] = ""
        except Exception as error:
            said[checkpoint] = f"{type(error).__name__}: {error}"
    print(json.dumps(said))
    device.destroy_process_groups()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
