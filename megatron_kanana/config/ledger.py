"""Tokens by source, as a file in each checkpoint's folder."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from .mixture import add_tokens

LEDGER_FILE = "ledger.json"

SampleRange = tuple[int, int]
"""Numbers of samples in a run, from the first up to but without the second."""


@dataclass(frozen=True)
class Ledger:
    """What the weights of a checkpoint were trained on.

    Attributes:
        consumed_samples: samples of the run that made the checkpoint, with those passed over.
        sequence_length: tokens of one of them.
        tokens: tokens that the run was trained on, by source.
        earlier_tokens: those of the runs before it whose weights it began with.
        skipped_samples: ranges that the run's guards passed over.
    """

    consumed_samples: int
    sequence_length: int
    tokens: dict[str, int]
    earlier_tokens: dict[str, int]
    skipped_samples: list[SampleRange] = field(default_factory=list)

    @property
    def all_tokens(self) -> dict[str, int]:
        """Tokens by source over all the runs."""
        return add_tokens(self.earlier_tokens, self.tokens)


def write_ledger(checkpoint: Path, ledger: Ledger) -> None:
    """Keep the ledger in a checkpoint's folder."""
    text = json.dumps(dataclasses.asdict(ledger), indent=2, ensure_ascii=False)
    (checkpoint / LEDGER_FILE).write_text(text + "\n", encoding="utf-8")


def read_ledger(checkpoint: Path) -> Ledger | None:
    """The ledger in a checkpoint's folder; None where there is none, as after a conversion."""
    path = checkpoint / LEDGER_FILE
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    skipped = [(begin, end) for begin, end in content.pop("skipped_samples", [])]
    return Ledger(**content, skipped_samples=skipped)
