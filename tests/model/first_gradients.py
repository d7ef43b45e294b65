"""Loss and gradients of a run's first step: OUTPUT ARGUMENTS_OF_THE_MAIN_JOB, on one process.

Writes a file of torch.save: the gradients by parameter, fp32, and 'loss'.
"""

from __future__ import annotations

import sys

import torch

from megatron_kanana import device
from megatron_kanana.config import detect_environment, load_settings


def main(output: str, arguments: list[str]) -> None:
    """One global batch, forward and backward."""
    directory = arguments[arguments.index("--config-dir") + 1]
    words = [word for word in arguments if "=" in word]
    environment = detect_environment()
    settings = load_settings(words, environment, config_dir=directory)
    where = device.prepare_device(settings, environment)
    device.initialize_process_groups(settings, where)

    from megatron_kanana.training.run import build_run, training_data
    from megatron_kanana.training.step import run_schedule

    run = build_run(settings, where)
    iterators, _ = training_data(run)
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    losses = run_schedule(run, iterators, settings.num_microbatches(1), forward_only=False)
    found = {
        name.removeprefix("module.").removeprefix("module."): parameter.main_grad.float().cpu()
        for chunk in run.chunks
        for name, parameter in chunk.named_parameters()
    }
    torch.save({"loss": torch.stack(losses).mean().cpu(), **found}, output)
    device.destroy_process_groups()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
