"""What a run leaves to look at: metrics.jsonl, TensorBoard events, and a line on the terminal."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from megatron_kanana.config.ledger import Ledger

from .metrics import StepMetrics
from .perplexity import HeldOutLoss

SET_FIGURES = ("loss", "perplexity", "bits_per_byte")
"""What is told of each held-out set: nats a token, exp of it, and bits a byte of its text."""

SECONDS_BETWEEN_LINES = 2.0  # where there is no terminal to redraw a line on


class Recorder:
    """Writes measurements; used on one process only.

    Lines of metrics.jsonl beyond the step a run resumes from are dropped, so the file always
    tells one straight story.

    Args:
        run_dir: folder of the run.
        start_step: step the run starts or goes on from.
        total_steps: steps of the whole run.
        tensorboard: whether to write TensorBoard events.
    """

    def __init__(
        self, run_dir: Path, start_step: int, total_steps: int, *, tensorboard: bool
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / "metrics.jsonl"
        self._total_steps = total_steps
        self._console = Console(highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=False)
        self._last_line = float("-inf")
        self._tensorboard = run_dir / "tensorboard" if tensorboard else None
        self._begin(start_step)
        if self._console.is_terminal:
            self._live.start()

    def _begin(self, step: int) -> None:
        """Keep the lines up to a step, and go on after it."""
        kept = [line for line in read_records(self.path) if line["step"] <= step]
        # A kill in the middle of it must not leave a part of the file.
        whole = self.path.with_suffix(".new")
        whole.write_text("".join(json.dumps(line) + "\n" for line in kept))
        whole.replace(self.path)
        self._file = self.path.open("a")
        self._events: Any = None
        if self._tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self._tensorboard), purge_step=step + 1)
        self._start_step = step
        self._start_time = time.monotonic()

    def go_back(self, step: int) -> None:
        """Drop what was written of the steps after this one, which the run does again."""
        self._close_files()
        self._begin(step)

    def record_step(
        self,
        step: int,
        ledger: Ledger,
        metrics: StepMetrics,
        grad_norm: float,
        learning_rate: float,
        tokens_per_second: float,
    ) -> None:
        """Write one measured step everywhere; the ledger tells the tokens trained on so far."""
        scalars = {
            "loss": metrics.loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens_per_second": tokens_per_second,
            "max_attention_logit": metrics.max_logit,
            "max_violation": metrics.mean_max_violation,
            "clipped_heads": metrics.num_clipped,
        }
        self._write(
            {
                "step": step,
                "tokens": sum(ledger.tokens.values()),
                "source_tokens": ledger.tokens,
                **scalars,
                "mtp_losses": metrics.mtp_losses,
                "max_attention_logits": metrics.max_logits,
                "expert_loads": metrics.expert_loads,
            }
        )
        mtp_losses = {f"mtp_loss_{i}": v for i, v in enumerate(metrics.mtp_losses, 1)}
        layers = {
            **{f"max_attention_logit/layer_{i}": v for i, v in enumerate(metrics.max_logits, 1)},
            **{f"max_violation/layer_{i}": v for i, v in metrics.max_violations.items()},
        }
        tokens = {f"source_tokens/{name}": float(n) for name, n in ledger.tokens.items()}
        train = {f"train/{name}": value for name, value in (scalars | mtp_losses).items()}
        self._scalars(step, train | layers | tokens)
        self._show(step, scalars, metrics.mtp_losses)

    def record_evaluation(
        self,
        step: int,
        tokens: int,
        loss: float,
        averaged_loss: float | None = None,
        sets: Mapping[str, HeldOutLoss] | None = None,
    ) -> None:
        """Write one evaluation, of the weights and perhaps of their average, and of named sets."""
        record: dict[str, Any] = {"evaluation_loss": loss}
        scalars = {"evaluation/loss": loss}
        message = f"step {step}: held-out loss {loss:.4f}"
        if averaged_loss is not None:
            record["averaged_evaluation_loss"] = averaged_loss
            scalars["evaluation/averaged_loss"] = averaged_loss
            message += f", of the averaged weights {averaged_loss:.4f}"
        if sets:
            record["evaluation_sets"] = {
                name: {figure: getattr(held_out, figure) for figure in SET_FIGURES}
                for name, held_out in sets.items()
            }
            for name, figures in record["evaluation_sets"].items():
                scalars |= {f"evaluation_{figure}/{name}": v for figure, v in figures.items()}
            message += "; " + ", ".join(f"{name} {each.loss:.4f}" for name, each in sets.items())
        self._write({"step": step, "tokens": tokens, **record})
        self._scalars(step, scalars)
        self.say(message)

    def record_own_times(
        self, step: int, seconds: Sequence[float], slow: Mapping[int, str]
    ) -> None:
        """Write the processes' own times of a step, in seconds, and hosts of slow ones."""
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        figures = {
            "own_seconds_median": statistics.median(seconds),
            "own_seconds_longest": seconds[slowest],
        }
        named = {str(rank): host for rank, host in slow.items()}
        self._write({"step": step, **figures, "slowest_rank": slowest, "slow_ranks": named})
        self._scalars(step, {f"processes/{name}": value for name, value in figures.items()})

    def say(self, message: str) -> None:
        """Print a line above the progress line."""
        self._console.print(message, markup=False)

    def close(self) -> None:
        """Flush everything."""
        if self._console.is_terminal:
            self._live.stop()
        self._close_files()

    def _close_files(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _scalars(self, step: int, scalars: dict[str, float]) -> None:
        if self._events is not None:
            for name, value in scalars.items():
                self._events.add_scalar(name, value, step)

    def _show(self, step: int, scalars: dict[str, float], mtp_losses: list[float]) -> None:
        now = time.monotonic()
        seconds_a_step = (now - self._start_time) / max(1, step - self._start_step)
        left = int(seconds_a_step * (self._total_steps - step))
        mtp = "  MTP " + " ".join(f"{loss:.4f}" for loss in mtp_losses) if mtp_losses else ""
        line = (
            f"step {step}/{self._total_steps}  loss {scalars['loss']:.4f}{mtp}"
            f"  grad norm {scalars['grad_norm']:.3f}  lr {scalars['learning_rate']:.2e}"
            f"  {scalars['tokens_per_second']:,.0f} tokens/s"
            f"  max logit {scalars['max_attention_logit']:.2f}"
            f"  MaxVio {scalars['max_violation']:.2f}  left {left // 60}:{left % 60:02d}"
        )
        if self._console.is_terminal:
            self._live.update(Text(line), refresh=True)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES or step == self._total_steps:
            self._last_line = now
            self.say(line)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut short by an interruption is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
