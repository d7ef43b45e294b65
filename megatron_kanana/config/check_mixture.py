"""Sources of the mixture, their shares, and the sets that are evaluated."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from .check_order import check_growing_tokens
from .data_settings import BlendEntry, DataSettings
from .dataset_files import sequence_count, tokens_before, training_sequences
from .ledger import read_ledger
from .mixture import BUILTIN_WEIGHTS, entry_paths, source_name, sources, tokens_by_source
from .problems import Problem
from .schema import Settings


def check_mixture(settings: Settings) -> Iterator[Problem]:
    """The sources are there, and each part of the run draws from them."""
    data = settings.data
    taken: dict[str, str] = {}
    for index, entry in enumerate(data.blend):
        yield from _check_entry(f"data.blend[{index}]", entry, data, taken)
    made = {bool(entry_paths(entry)) for entry in data.blend}
    if len(made) == 2:
        yield Problem(
            "data.blend",
            ", ".join(source_name(entry) for entry in data.blend),
            "the built-in text has a tokenizer of its own, the datasets have another",
            "give every source a path, or none",
        )
    yield from _check_weights(data)


def _check_entry(
    setting: str, entry: BlendEntry, data: DataSettings, taken: dict[str, str]
) -> Iterator[Problem]:
    """One source; `taken` holds the names and paths of those before it."""
    builtin = " or ".join(BUILTIN_WEIGHTS)
    name, paths = source_name(entry), entry_paths(entry)
    if not name:
        yield Problem(
            f"{setting}.path",
            "null",
            "the source has neither a dataset nor a name",
            f"give path or paths, or a source of the built-in text: {builtin}",
        )
        return
    if not paths and name not in BUILTIN_WEIGHTS:
        yield Problem(
            f"{setting}.source",
            name,
            "has no path, and is no source of the built-in text",
            f"give path or paths, or choose {builtin}",
        )
    if f"source {name}" in taken:
        yield Problem(
            f"{setting}.source",
            name,
            f"is the name of {taken[f'source {name}']} too",
            "give each source a name of its own, or put its datasets into one entry's paths",
        )
    taken.setdefault(f"source {name}", setting)
    for path in paths:
        place = "path" if path == entry.path else f"paths[{entry.paths.index(path)}]"
        if path in taken:
            yield Problem(
                f"{setting}.{place}",
                path,
                f"is a dataset of {taken[path]} already, and would be read twice",
                "name it once",
            )
        taken.setdefault(path, setting)
        yield from check_dataset(f"{setting}.{place}", path, data)


def check_dataset(setting: str, path: str, data: DataSettings) -> Iterator[Problem]:
    """A dataset's files are whole, and large enough to train on and to hold some documents out."""
    held_out_percent = data.held_out_percent
    try:
        count = sequence_count(path)
    except ValueError as error:
        yield Problem(setting, path, str(error), "make it with tools/preprocess_data.py")
        return
    training = training_sequences(count, held_out_percent)
    if training == 0 or (training == count and held_out_percent):
        kept = "training" if training == 0 else "evaluation"
        yield Problem(
            setting,
            path,
            f"data.held_out_percent = {held_out_percent} of its {count} documents leaves none"
            f" for {kept}",
            "choose another data.held_out_percent (0 holds nothing out), or a larger dataset",
        )
    elif (tokens := tokens_before(path, training)) <= data.sequence_length:
        yield Problem(
            setting,
            path,
            f"has {tokens} tokens to train on, and a sample takes {data.sequence_length + 1}",
            f"choose data.sequence_length={tokens - 1} or less, or a larger dataset",
        )


def _check_weights(data: DataSettings) -> Iterator[Problem]:
    """Each part of the run draws from some source, each source is drawn from in some part."""
    names = [source.name for source in sources(data)]
    changes = [change.tokens for change in data.blend_changes]
    yield from check_growing_tokens("data.blend_changes", changes)
    for index, change in enumerate(data.blend_changes):
        setting = f"data.blend_changes[{index}].weights"
        for name in change.weights:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1) or names
                yield Problem(
                    f"{setting}.{name}",
                    change.weights[name],
                    "data.blend has no such source",
                    f"did you mean {' or '.join(close)}?",
                )
        yield from _check_total(setting, change.weights)
    if data.blend:
        weights = {source.name: source.weight for source in sources(data)}
        yield from _check_total("data.blend", weights)
    for index, entry in enumerate(data.blend):
        later = [change.weights.get(source_name(entry), 0.0) for change in data.blend_changes]
        if not any([entry.weight, *later]):
            yield Problem(
                f"data.blend[{index}].weight",
                entry.weight,
                "no part of the run draws from the source",
                "choose above 0, give it a weight in data.blend_changes, or leave it out",
            )


def _check_total(setting: str, weights: Mapping[str, float]) -> Iterator[Problem]:
    total = sum(weights.values())
    if not (total > 0 and math.isfinite(total)):
        yield Problem(
            setting,
            ", ".join(f"{name}: {weight}" for name, weight in weights.items()) or "{}",
            f"the weights add up to {total}",
            "give at least one source a weight above 0, and none an infinite one",
        )


def check_evaluation_sets(settings: Settings) -> Iterator[Problem]:
    """The sets have names of their own and can be found."""
    names = [each.name for each in settings.data.evaluation_sets]
    for index, each in enumerate(settings.data.evaluation_sets):
        setting = f"data.evaluation_sets[{index}]"
        if each.name in names[:index]:
            yield Problem(
                f"{setting}.name",
                each.name,
                f"is the name of data.evaluation_sets[{names.index(each.name)}] too",
                "give each set a name of its own",
            )
        if Path(each.path).is_file():
            continue
        try:
            sequence_count(each.path)
        except ValueError as error:
            yield Problem(
                f"{setting}.path",
                each.path,
                str(error),
                "give a .jsonl, .txt or .parquet file, or an indexed dataset without its suffix",
            )


def check_position(settings: Settings, path: Path) -> Iterator[Problem]:
    """A run goes on where the checkpoint at `path` stopped in every source."""
    if (ledger := read_ledger(path)) is None:
        return
    data = settings.data
    if any(_check_weights(data)):  # told already; such weights give no place in the data
        return
    remedy = "or begin a run of its own at step 0 with checkpoint.load_what=weights"
    if data.sequence_length != ledger.sequence_length:
        yield Problem(
            "data.sequence_length",
            data.sequence_length,
            f"the checkpoint {path} counts its place in the data in samples of"
            f" {ledger.sequence_length} tokens",
            f"choose {ledger.sequence_length}, {remedy}",
        )
        return
    now = tokens_by_source(data, ledger.consumed_samples)
    for name in {**now, **ledger.tokens}:
        if now.get(name, 0) != ledger.tokens.get(name, 0):
            yield Problem(
                "data.blend" if data.blend else "data.blend_changes",
                ", ".join(now),
                f"the checkpoint {path} was trained on {ledger.tokens.get(name, 0):,} tokens of"
                f" {name}, which these weights make {now.get(name, 0):,}: samples would be left"
                " out or repeated",
                "keep the weights of what is done, and say from which tokens on there are others"
                f" with data.blend_changes, {remedy}",
            )
            return
