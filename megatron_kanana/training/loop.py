"""The training loop: steps, measurements, evaluations, checkpoints, and the report at the end."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path

import torch.distributed as dist
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

from megatron_kanana.checkpoint.writer import CheckpointWriter
from megatron_kanana.config.saved import whole_path

from .evaluation import evaluate_both
from .generation import generate
from .interruption import Interruption
from .metrics import StepMetrics, collect_metrics
from .perplexity import held_out_loss
from .records import Recorder, read_records
from .run import Run, evaluation_sets, training_data
from .sampling import Sampling
from .step import StepResult, train_step

logger = logging.getLogger(__name__)


def train(run: Run, interruption: Interruption) -> None:
    """Train from `run.step` to the end of the schedule, to `stop_after_step`, or to a signal."""
    settings = run.settings
    schedule = settings.schedule
    last_step = min(schedule.steps, settings.stop_after_step or schedule.steps)
    nothing_to_train = run.step >= last_step
    if nothing_to_train:
        logger.info("nothing to train: the run is at step %d of %d", run.step, last_step)
    run_dir = Path(settings.run_dir)
    recorder = (
        Recorder(run_dir, run.step, schedule.steps, tensorboard=settings.logging.tensorboard)
        if dist.get_rank() == 0
        else None
    )
    writer = CheckpointWriter(Path(settings.checkpoint_dir), settings.checkpoint)
    iterators, evaluation_data = training_data(run)
    sets = evaluation_sets(settings, run.tokenizer) if schedule.evaluation_interval else {}
    measured_tokens, measured_time = run.consumed_tokens, time.monotonic()
    while run.step < last_step:
        result = train_step(run, iterators)
        if run.step % settings.logging.interval == 0 or run.step == last_step:
            metrics = measure(run, result)
            now = time.monotonic()
            if recorder is not None:
                rate = (run.consumed_tokens - measured_tokens) / (now - measured_time)
                learning_rate = get_canonical_lr_for_logging(run.optimizer.param_groups)
                recorder.record_step(
                    run.step, run.ledger, metrics, result.grad_norm, learning_rate, rate
                )
            measured_tokens, measured_time = run.consumed_tokens, now
        interval = schedule.evaluation_interval
        if interval and (run.step % interval == 0 or run.step == schedule.steps):
            losses = evaluate_both(run, evaluation_data)
            of_sets = {name: held_out_loss(run, text) for name, text in sets.items()}
            if recorder is not None:
                recorder.record_evaluation(run.step, run.consumed_tokens, *losses, of_sets)
            measured_time = time.monotonic()
        if settings.checkpoint.save_interval and run.step % settings.checkpoint.save_interval == 0:
            writer.save(run)
            measured_time = time.monotonic()
        writer.poll()
        if run.step < last_step and interruption.agreed():
            break
    if not nothing_to_train:
        writer.save(run)
    writer.finish()
    if run.step == schedule.steps and settings.logging.report:
        _report(run, recorder)
    if recorder is not None:
        recorder.close()
    dist.barrier()  # a launcher may end the others with the first that leaves early


def measure(run: Run, result: StepResult) -> StepMetrics:
    """Measurements over all processes of the step just done; every process must call this."""
    if run.qk_clip is None:  # else every step has done so
        run.attention_logits.reduce()
    return collect_metrics(
        run.chunks,
        run.config,
        result.losses,
        result.mtp_losses,
        run.attention_logits.take(),
        0 if run.qk_clip is None else run.qk_clip.take_num_clipped(),
        run.expert_loads,
    )


def _report(run: Run, recorder: Recorder | None) -> None:
    settings = run.settings
    tokenizer = run.tokenizer
    prompt = tokenizer.encode_prompt(settings.logging.sample_prompt) or [tokenizer.eod]
    prompt = prompt[: settings.data.sequence_length - 1]
    continuation = generate(run, prompt, settings.logging.sample_tokens, Sampling())
    sample = tokenizer.decode([*prompt, *continuation.tokens])
    if recorder is None:
        return
    from .report import write_report  # with matplotlib, which most processes never need

    checkpoint = whole_path(Path(settings.checkpoint_dir), run.step)
    report = Path(settings.run_dir) / "report.html"
    write_report(
        report,
        read_records(recorder.path),
        dataclasses.asdict(settings),
        sample,
        str(checkpoint),
        run.ledger,
    )
    recorder.say(f"text sample:\n{sample}\n\ncheckpoint: {checkpoint}\nreport: {report}")
