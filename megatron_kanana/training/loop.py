"""The training loop: steps, measurements, evaluations, checkpoints, and the report at the end."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

from megatron_kanana.checkpoint.writer import CheckpointWriter
from megatron_kanana.config.saved import whole_path
from megatron_kanana.data.held_out import HeldOutText

from .evaluation import evaluate_both
from .events import record_trouble
from .generation import generate
from .interruption import Interruption
from .metrics import StepMetrics, collect_metrics
from .perplexity import held_out_loss
from .records import Recorder, read_records
from .rollback import stop_or_go_back
from .run import Run, evaluation_sets, training_data
from .sampling import Sampling
from .step import StepResult, train_step
from .stragglers import Stragglers
from .watchdog import Watchdog

logger = logging.getLogger(__name__)


def train(run: Run, interruption: Interruption, watchdog: Watchdog) -> None:
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
    writer = checkpoint_writer(run)
    iterators, evaluation_data = training_data(run)
    sets = evaluation_sets(settings, run.tokenizer) if schedule.evaluation_interval else {}
    pace = Pace(run)
    stragglers = Stragglers(settings.watchdog, watchdog.own_time, run.device.torch_device)
    interruption.listen(run.device.torch_device)
    while run.step < last_step:
        watchdog.enter_step(run.step + 1)
        result = stragglers.timed(train_step, run, iterators)
        for trouble in result.troubles:
            record_trouble(run, trouble, recorder)
        if result.ends_here:
            watchdog.enter("going back to a checkpoint")
            stop_or_go_back(run, result.troubles, writer, recorder)
            writer = checkpoint_writer(run)
            iterators, evaluation_data = training_data(run)
            pace = Pace(run)
            continue
        if result.applied and (run.step % settings.logging.interval == 0 or run.step == last_step):
            measure_and_record(run, result, pace, recorder)
        stragglers.step_done(run.step, recorder)
        interval = schedule.evaluation_interval
        if interval and (run.step % interval == 0 or run.step == schedule.steps):
            with watchdog.longer("evaluation"):
                evaluate_and_record(run, evaluation_data, sets, recorder)
            pace.go_on()
        with watchdog.longer("checkpoint"):
            if writer.save_if_due(run):
                pace.go_on()
        writer.poll()
        if run.step < last_step and interruption.agreed(writer.longest_save_seconds):
            break
    watchdog.enter("the end of the run")
    if not nothing_to_train:
        writer.save(run)
    writer.finish()
    interruption.saved()
    if run.step == schedule.steps and settings.logging.report:
        _report(run, recorder)
    if recorder is not None:
        recorder.close()
    dist.barrier()  # a launcher may end the others with the first that leaves early


def checkpoint_writer(run: Run) -> CheckpointWriter:
    """A writer of the run's checkpoints; every process must call this."""
    return CheckpointWriter(run.settings, run.device.torch_device)


class Pace:
    """Tokens a second of training alone, from one measurement to the next."""

    def __init__(self, run: Run) -> None:
        self._tokens, self._time = run.consumed_tokens, time.monotonic()

    def go_on(self) -> None:
        """Training goes on after something else, whose time is not to count."""
        self._time = time.monotonic()

    def take(self, run: Run) -> float:
        """Tokens a second since the last time."""
        tokens, since = self._tokens, self._time
        self._tokens, self._time = run.consumed_tokens, time.monotonic()
        return (self._tokens - tokens) / (self._time - since)


def measure_and_record(run: Run, result: StepResult, pace: Pace, recorder: Recorder | None) -> None:
    """Measure the step just done, and write it down; every process must call this."""
    metrics = measure(run, result)
    rate = pace.take(run)
    if recorder is not None:
        learning_rate = get_canonical_lr_for_logging(run.optimizer.param_groups)
        recorder.record_step(run.step, run.ledger, metrics, result.grad_norm, learning_rate, rate)


def measure(run: Run, result: StepResult) -> StepMetrics:
    """Measurements over all processes of the step just done; every process must call this."""
    if run.qk_clip is None:  # else every step has done so
        run.attention_logits.reduce()
    return collect_metrics(
        run.chunks,
        run.config,
        result.loss,
        result.mtp_losses,
        run.attention_logits.take(),
        0 if run.qk_clip is None else run.qk_clip.take_num_clipped(),
        run.expert_loads,
    )


def evaluate_and_record(
    run: Run, dataset: Any, sets: Mapping[str, HeldOutText], recorder: Recorder | None
) -> None:
    """Held-out losses of the weights as they are; every process must call this."""
    losses = evaluate_both(run, dataset)
    of_sets = {name: held_out_loss(run, text) for name, text in sets.items()}
    if recorder is not None:
        recorder.record_evaluation(run.step, run.consumed_tokens, *losses, of_sets)


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
