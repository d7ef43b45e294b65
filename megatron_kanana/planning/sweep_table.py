"""Losses of a sweep by learning rate and tokens, from tables and from run folders."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .learning_rate_law import Measurement

FIELDS = ("learning_rate", "tokens", "loss")
METRICS = ("averaged_evaluation_loss", "evaluation_loss")
"""Losses of a run's metrics.jsonl, the first that it has: of averaged weights, of the weights."""


class TableError(Exception):
    """Raised for what cannot be read as measurements; says where and why."""


def read_measurements(paths: Sequence[Path]) -> list[Measurement]:
    """Measurements in tables (.csv, .json, .jsonl) and run folders.

    A table has the columns or keys learning_rate, tokens and loss; JSON is a list of such objects,
    or has one under 'runs'. Of a run folder the held-out losses of the stable phase are read.

    Raises:
        TableError: nothing can be read, a field is missing, or a value is not a number.
    """
    readers = {".csv": _csv_rows, ".json": _json_rows, ".jsonl": _jsonl_rows}
    measurements: list[Measurement] = []
    for path in paths:
        if path.is_dir():
            measurements += _of_run(path)
        elif not path.is_file():
            raise TableError(f"{path}: there is no such file or folder")
        elif path.suffix not in readers:
            known = ", ".join(readers)
            raise TableError(f"{path}: is not a run folder or one of {known}")
        else:
            measurements += _of_rows(readers[path.suffix](path))
    if not measurements:
        raise TableError("there is no measurement in what was given")
    return measurements


def choose_tokens(
    measurements: Sequence[Measurement],
    first: float = 0.0,
    last: float = math.inf,
    every: float | None = None,
) -> list[Measurement]:
    """Measurements at some of the token counts.

    Args:
        measurements: all of them.
        first, last: smallest and largest token count.
        every: at most one token count for each multiple of this, the one closest to it.
    """
    counts = sorted({m.tokens for m in measurements if first <= m.tokens <= last})
    if every is not None:
        closest: dict[int, float] = {}
        for tokens in counts:
            multiple = round(tokens / every)
            other = closest.get(multiple)
            if multiple > 0 and (
                other is None or abs(tokens - multiple * every) < abs(other - multiple * every)
            ):
                closest[multiple] = tokens
        counts = list(closest.values())
    chosen = set(counts)
    return [m for m in measurements if m.tokens in chosen]


Row = tuple[str, Mapping[str, Any]]
"""Where it stands, and its fields."""


def _csv_rows(path: Path) -> Iterator[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            yield f"{path}:{number}", row


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            yield f"{path}:{number}", _object(_parse(line, f"{path}:{number}"), f"{path}:{number}")


def _json_rows(path: Path) -> Iterator[Row]:
    content = _parse(path.read_text(encoding="utf-8"), str(path))
    rows = content.get("runs") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise TableError(f"{path}: is neither a list nor an object with a list under 'runs'")
    for index, row in enumerate(rows):
        yield f"{path}[{index}]", _object(row, f"{path}[{index}]")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TableError(f"{where}: is not JSON ({error})") from error


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TableError(f"{where}: is not an object with {', '.join(FIELDS)}")
    return value


def _of_rows(rows: Iterable[Row]) -> Iterator[Measurement]:
    for where, row in rows:
        values = []
        for name in FIELDS:
            if row.get(name) in (None, "") and name == "loss" and name in row:
                values.append(math.nan)  # how JSON and CSV say that a run has diverged
                continue
            if name not in row:
                raise TableError(f"{where}: has no {name}; found {', '.join(row) or 'nothing'}")
            try:
                values.append(float(row[name]))
            except (TypeError, ValueError) as error:
                raise TableError(f"{where}: {name} = {row[name]!r} is not a number") from error
        learning_rate, tokens, loss = values
        if not (learning_rate > 0 and tokens > 0):
            raise TableError(f"{where}: learning_rate and tokens must be above 0")
        yield Measurement(learning_rate, tokens, loss)


def _of_run(folder: Path) -> Iterator[Measurement]:
    """Held-out losses at the peak learning rate: before the decay, after the warm-up."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise TableError(f"{folder}: has no metrics.jsonl, and so is not the folder of a run")
    records = [_parse(line, str(path)) for line in path.read_text().splitlines() if line.strip()]
    rates = [record["learning_rate"] for record in records if "learning_rate" in record]
    metric = next((name for name in METRICS if any(name in record for record in records)), None)
    if not rates or metric is None:
        raise TableError(
            f"{path}: has no held-out losses; set schedule.evaluation_interval for the runs"
        )
    peak, rate = max(rates), 0.0
    for record in records:
        rate = record.get("learning_rate", rate)
        if metric in record and math.isclose(rate, peak, rel_tol=1e-6):
            if "tokens" not in record:
                raise TableError(f"{path}: step {record['step']} does not say its tokens")
            yield Measurement(peak, float(record["tokens"]), float(record[metric]))
