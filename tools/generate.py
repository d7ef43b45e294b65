"""Continue a text with the model of a checkpoint.

    python tools/generate.py runs/kanana_2_tiny/checkpoints/step_00000120 --prompt "import "

Any layout will do, whatever the checkpoint was made with:

    torchrun --nproc-per-node 2 tools/generate.py CHECKPOINT parallel.tensor_parallel_size=2
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_kanana import device
from megatron_kanana.config import (
    ConfigurationError,
    checkpoint_tokenizer,
    detect_environment,
    read_settings,
    saved_settings,
)

ONE_PROCESS = (
    "parallel.tensor_parallel_size=1",
    "parallel.pipeline_parallel_size=1",
    "parallel.virtual_pipeline_stages=1",
    "parallel.expert_parallel_size=1",
    "parallel.expert_tensor_parallel_size=1",
)


def main() -> int:
    """Load, generate, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a step_… folder")
    parser.add_argument("overrides", nargs="*", help="setting=value, for another layout or device")
    parser.add_argument("--prompt", default="def __init__(self", help="text to continue")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens to generate at most")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    options = parser.parse_intermixed_args()
    try:
        saved = read_settings(options.checkpoint)
    except FileNotFoundError as error:
        print(f"not a whole checkpoint, name a step_… folder: {error}", file=sys.stderr)
        return 2
    environment = detect_environment()
    try:
        settings = saved_settings(
            saved,
            [
                *ONE_PROCESS,
                f"data.tokenizer='{checkpoint_tokenizer(options.checkpoint)}'",
                f"schedule.global_batch_size={environment.world_size}",
                "schedule.micro_batch_size=1",
                *options.overrides,
            ],
            environment,
        )
    except ConfigurationError as error:
        if environment.rank == 0:
            print(error, file=sys.stderr)
        return 2
    where = device.prepare_device(settings, environment)
    device.initialize_process_groups(settings, where)

    from megatron_kanana.checkpoint.state import load_model
    from megatron_kanana.training.generation import generate
    from megatron_kanana.training.run import build_bare_model

    model = build_bare_model(settings, where)
    load_model(model.chunks, options.checkpoint)
    text = generate(model, options.prompt, options.max_tokens, options.seed)
    if environment.rank == 0:
        print(text)
    device.destroy_process_groups()
    return 0


if __name__ == "__main__":
    sys.exit(main())
