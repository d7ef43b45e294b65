"""Many random examples through one check, with everything that was found."""

from __future__ import annotations

import functools
import logging
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from unittest import mock

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from omegaconf import DictConfig

from megatron_kanana.config import compose
from megatron_kanana.config.problems import Problem
from tests.fuzz import configurations, inputs
from tests.fuzz.limits import time_limit

T = TypeVar("T")
PACKAGE = "megatron_kanana"


@dataclass
class Outcome:
    """What became of the examples.

    Attributes:
        results: how many ended how.
        kinds: how many there were of each kind.
        defects: for each place in the code where an example failed, the example and the error.
        slowest: seconds of the slowest example.
        cpu_seconds: of all together.
    """

    results: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    defects: dict[str, str] = field(default_factory=dict)
    slowest: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def examples(self) -> int:
        """How many there were."""
        return self.results.total()

    def __add__(self, other: Outcome) -> Outcome:
        """Both together."""
        return Outcome(
            self.results + other.results,
            self.kinds + other.kinds,
            {**self.defects, **other.defects},
            max(self.slowest, other.slowest),
            self.cpu_seconds + other.cpu_seconds,
        )


def fuzz_configurations(examples: int, number: int, folder: Path) -> Outcome:
    """Compose and check random configurations, in the current folder.

    Args:
        examples: how many.
        number: of the random sequence.
        folder: for the files that the configurations name.
    """

    def check(example: configurations.Configuration) -> tuple[str, str]:
        kind = "with files of one's own" if example.files else "of words"
        return kind, configurations.check_configuration(example, folder)

    strategy = configurations.configurations()
    # Hydra takes most of the time; over the shipped files alone its answers are always the same.
    composed = compose._compose

    @functools.cache
    def remembered(choices: tuple[str, ...]) -> tuple[DictConfig | None, list[Problem]]:
        found: list[Problem] = []
        return composed(choices, None, found), found

    def compose_once(
        choices: Sequence[str], config_dir: str | None, problems: list[Problem]
    ) -> DictConfig | None:
        if any(word.endswith(f"={configurations.FILE_NAME}") for word in choices):
            return composed(choices, config_dir, problems)
        config, found = remembered(tuple(choices))
        problems += found
        return config

    with mock.patch.object(compose, "_compose", compose_once):
        return _run(examples, number, strategy, check, configurations.SECONDS)


def fuzz_inputs(examples: int, number: int, folder: Path) -> Outcome:
    """Read random damaged inputs, as many of each kind.

    Args:
        examples: how many.
        number: of the random sequence.
        folder: with good files, see `inputs.write_good_files`.
    """
    readers = inputs.readers(folder)

    def damaged(place: tuple[str, str]) -> st.SearchStrategy[tuple[str, str, bytes]]:
        name, file = place
        return readers[name].files[file].map(lambda content: (name, file, content))

    def check(example: tuple[str, str, bytes]) -> tuple[str, str]:
        name, file, content = example
        return name, inputs.check_input(readers[name], file, content, folder)

    outcome = Outcome()
    logger = logging.getLogger("megatron_kanana")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what readers say of damaged inputs
    try:
        for turn, (name, reader) in enumerate(readers.items()):
            share = examples // len(readers) + (turn < examples % len(readers))
            strategy = st.sampled_from([(name, file) for file in reader.files]).flatmap(damaged)
            outcome += _run(share, number, strategy, check, inputs.SECONDS)
    finally:
        logger.setLevel(level)
    return outcome


def _run(
    examples: int,
    number: int,
    strategy: st.SearchStrategy[T],
    check: Callable[[T], tuple[str, str]],
    seconds: float,
) -> Outcome:
    outcome = Outcome()

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(strategy)
    def run(example: T) -> None:
        start = time.monotonic()
        try:
            with time_limit(seconds):
                kind, result = check(example)
            outcome.kinds[kind] += 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also what a library in Rust ends with
            result = "defect"
            outcome.defects.setdefault(_place(error), f"{example!r:.2000}\n{error!r:.2000}")
        outcome.results[result] += 1
        outcome.slowest = max(outcome.slowest, time.monotonic() - start)

    start = time.process_time()
    run()
    outcome.cpu_seconds = time.process_time() - start
    return outcome


def _place(error: BaseException) -> str:
    """Where an error came from: the innermost line of the package."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"/{PACKAGE}/" in frame.filename] or frames
    return f"{type(error).__name__} at {ours[-1].filename}:{ours[-1].lineno}"
