"""What follows when a step must not stand: the run goes back to a checkpoint, or ends."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from megatron_kanana.checkpoint.writer import CheckpointWriter
from megatron_kanana.config.ledger import SampleRange
from megatron_kanana.optimizer.schedule import build_scheduler

from .guards import STOP, Trouble
from .passed_over import keep_rollback
from .records import Recorder
from .run import Run, restore


class RunStoppedError(Exception):
    """The guards ended the run, after saving it as it was before the step at fault."""


def stop_or_go_back(
    run: Run, troubles: Sequence[Trouble], writer: CheckpointWriter, recorder: Recorder | None
) -> None:
    """End the run if a trouble asks for it, else load the newest checkpoint and pass on from there.

    Args:
        writer: is finished, and not to be used again.

    Raises:
        RunStoppedError: the run is saved, and is to end.
    """
    stops = [trouble for trouble in troubles if trouble.action == STOP]
    if stops and run.step:
        writer.save(run)
    writer.finish()
    if stops:
        found = "\n  ".join(map(str, stops))
        remedy = (
            "look at what is named above; the same command goes on from the last checkpoint, with"
            " guards.on_nonfinite or guards.on_spike set to skip past this step's samples"
        )
        raise RunStoppedError(
            f"The run was stopped by its guards.\n  {found}\n      remedy: {remedy}"
        )
    begin, end = roll_back(run)
    if recorder is not None:
        recorder.go_back(run.step)
        recorder.say(f"back at step {run.step}; samples {begin} to {end} are passed over")


def roll_back(run: Run) -> SampleRange:
    """Load the run's newest whole checkpoint, and go on after the samples of the step at hand.

    One that is not `guards.rollback_steps` old does not count, and is put aside. Every process must
    call this. There must be a checkpoint.

    Returns:
        the samples passed over.
    """
    end = run.consumed_samples + run.global_batch_size
    interventions = run.guards.interventions
    run.scheduler = build_scheduler(run.optimizer, run.settings)
    run.attention_logits.take()
    restore(run, up_to_step=run.step - run.settings.guards.rollback_steps)
    begin = run.consumed_samples
    run.consumed_samples = end
    run.skipped_samples.append((begin, end))
    run.guards.interventions = interventions
    if dist.get_rank() == 0:
        keep_rollback(run)
    dist.barrier()
    return begin, end
