"""Guards over each step: is the loss right, are the gradients finite, and if not, what then."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_kanana.config.guard_settings import GuardSettings
from megatron_kanana.config.ledger import SampleRange
from megatron_kanana.config.saved import whole_steps
from megatron_kanana.optimizer.update import gradient_norm_and_loss

from .layer_trace import LayerTrace
from .locate import locate, transient_origin
from .metrics import local_loss_share
from .recheck import processes_that_differ
from .replay import Replay, RouterBiases, forget_pass
from .spikes import SpikeDetector

if TYPE_CHECKING:
    from .run import DataIterators, Run

NONFINITE, SPIKE, MISMATCH = "not finite", "loss spike", "silent corruption"
SKIP, ROLLBACK, STOP, REPORT, IGNORE = "skip", "rollback", "stop", "report", "ignore"


@dataclass(frozen=True)
class Trouble:
    """What a guard found in a step; the same on every process.

    Attributes:
        kind: NONFINITE, SPIKE or MISMATCH.
        step: number of the step.
        action: what is done about it: SKIP, ROLLBACK, STOP or REPORT.
        details: what was found, in words.
        samples: the step's, from the first up to but without the second.
    """

    kind: str
    step: int
    action: str
    details: str
    samples: SampleRange

    @property
    def applies(self) -> bool:
        """Whether the step updates the weights all the same."""
        return self.action == REPORT

    def __str__(self) -> str:
        return f"step {self.step}: {self.kind} ({self.action}): {self.details}"


@dataclass(frozen=True)
class Pass:
    """Forward and backward passes of a step, looked at.

    Attributes:
        grad_norm: global norm of the gradients.
        loss: mean over the global batch, of the next token alone.
        troubles: what the guards found.
    """

    grad_norm: float
    loss: float
    troubles: list[Trouble] = field(default_factory=list)

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradients are."""
        return math.isfinite(self.grad_norm) and math.isfinite(self.loss)

    @property
    def applies(self) -> bool:
        """Whether the step may update the weights."""
        return all(trouble.applies for trouble in self.troubles)


class Guards:
    """Looks at every step before it changes the weights.

    Attributes:
        interventions: steps that were skipped or rolled back.

    Args:
        chunks: the model's chunks on this process.
        settings: what to look for, and what to do.
    """

    def __init__(self, chunks: Sequence[Any], settings: GuardSettings) -> None:
        self.interventions: list[int] = []
        self.settings = settings
        self._spikes = SpikeDetector(
            settings.spike_window, settings.spike_threshold, settings.spike_minimum_rise
        )
        self._trace = LayerTrace(chunks) if settings.trace_layers else None
        self._biases = RouterBiases(chunks)

    def run_pass(
        self,
        run: Run,
        sources: DataIterators,
        forward_backward: Callable[[DataIterators], list[torch.Tensor]],
    ) -> Pass:
        """A step's forward and backward passes, looked at before anything follows from them.

        A fault that does not come again when the microbatches are repeated costs nothing else: the
        repetition counts. Where the step must not update the weights, gradients, counters and the
        routers' biases are left as before it.

        Args:
            sources: iterators over microbatches, one a model chunk.
            forward_backward: runs a step's microbatches; returns this process's losses.
        """
        replay = Replay(sources)

        def one_pass() -> list[torch.Tensor]:
            if self._trace is not None:
                self._trace.clear()
            return forward_backward(replay.iterators())

        self._biases.keep()
        troubles = self._recheck(run, one_pass)
        result = self._measured(run, one_pass())
        if self.settings.on_nonfinite != IGNORE and not result.is_finite:
            sighting = None if self._trace is None else self._trace.first()
            place = locate(run, one_pass)
            self._biases.put_back()
            if place is not None:
                action = self._bounded(run, self.settings.on_nonfinite)
                troubles.append(self._trouble(run, NONFINITE, action, str(place)))
            else:
                place = transient_origin(sighting)
                details = f"{place or 'of unknown origin'}; it did not come again"
                result = self._measured(run, one_pass())
                action = REPORT if result.is_finite else self._bounded(run, SKIP)
                troubles.append(self._trouble(run, NONFINITE, action, details))
        if result.is_finite:
            troubles += self._spike(run, result.loss)
        result.troubles.extend(troubles)
        if not result.applies:
            forget_pass(run)
            self._biases.put_back()
        elif math.isfinite(result.loss):
            self._spikes.remember(result.loss)
        return result

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"losses": self._spikes.values, "interventions": self.interventions}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; steps that were skipped since it was made are not forgotten."""
        self._spikes.restore(state["losses"])
        self.interventions = sorted({*self.interventions, *state["interventions"]})

    def _measured(self, run: Run, losses: list[torch.Tensor]) -> Pass:
        share = local_loss_share(losses, run.device.torch_device)
        norm, loss = gradient_norm_and_loss(run.optimizer, share)
        return Pass(norm, loss)

    def _recheck(self, run: Run, one_pass: Callable[[], Any]) -> list[Trouble]:
        interval = self.settings.recheck_interval
        if not interval or (run.step + 1) % interval:
            return []
        ranks = processes_that_differ(run, one_pass, self.settings.recheck_tolerance)
        if not ranks:
            return []
        details = f"rank {', '.join(map(str, ranks))} computed other gradients the second time"
        return [self._trouble(run, MISMATCH, self.settings.on_mismatch, details)]

    def _spike(self, run: Run, loss: float) -> list[Trouble]:
        if self.settings.on_spike == IGNORE:
            return []
        limit = self._spikes.limit()
        if not loss > limit:
            return []
        action = self._bounded(run, self.settings.on_spike)
        return [self._trouble(run, SPIKE, action, f"loss {loss:.4f} is above {limit:.4f}")]

    def _bounded(self, run: Run, action: str) -> str:
        """The action, or STOP where too many steps were skipped or rolled back lately.

        Without a checkpoint that is old enough, the step is skipped instead of going back.
        """
        if action not in (SKIP, ROLLBACK):
            return action
        if action == ROLLBACK and not self._can_go_back(run):
            action = SKIP
        step = run.step + 1
        since = step - self.settings.intervention_window
        if sum(each > since for each in self.interventions) >= self.settings.max_interventions:
            return STOP
        self.interventions.append(step)
        return action

    def _can_go_back(self, run: Run) -> bool:
        steps = whole_steps(Path(run.settings.checkpoint_dir))
        return any(step <= run.step - self.settings.rollback_steps for step in steps)

    def _trouble(self, run: Run, kind: str, action: str, details: str) -> Trouble:
        if action == STOP and self.interventions:
            details += f"; steps {self.interventions} were skipped or rolled back before"
        begin = run.consumed_samples
        return Trouble(kind, run.step + 1, action, details, (begin, begin + run.global_batch_size))
