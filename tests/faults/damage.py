"""Every way to damage a checkpoint's files, and a campaign of them against the loader.

    python -m tests.faults.damage --cases 1000 --restarts 20

makes two checkpoints of a small run, damages the newer one case by case, and lets the loader look
for the newest whole one each time; it must find the older one and name the damaged file. For some
cases the main job itself goes on, and must end with the weights of a run that nothing happened to.
Writes the card damaged_checkpoints_cpu.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megatron_kanana.checkpoint.newest import newest_whole
from megatron_kanana.config import Environment, Settings, load_settings
from megatron_kanana.config.manifest import MANIFEST_FILE
from tests.checkpoints import saved_tensors
from tests.launch import CONFIG_DIR, train_in_turn

OLDER, NEWER, END = 2, 4, 6
"""Steps of the two checkpoints, and where the run ends."""

PAGE = 4096


def _flip(content: bytes, place: int, dice: random.Random) -> bytes:
    return _put(content, place, bytes([content[place] ^ 1 << dice.randrange(8)]))


def _zero_page(content: bytes, place: int, dice: random.Random) -> bytes:
    start = place - place % PAGE
    return _put(content, start, bytes(len(content[start : start + PAGE])))


def _noise(content: bytes, place: int, dice: random.Random) -> bytes:
    return _put(content, place, dice.randbytes(min(64, len(content) - place)))


def _cut(content: bytes, place: int, dice: random.Random) -> bytes:
    return content[:place]


def _take_out(content: bytes, place: int, dice: random.Random) -> bytes:
    return content[:place] + content[place + 1 :]


def _exchange_blocks(content: bytes, place: int, dice: random.Random) -> bytes:
    size = min(512, len(content) // 2)
    first = min(place, len(content) - 2 * size)
    one, two = content[first : first + size], content[first + size : first + 2 * size]
    return _put(content, first, two + one)


def _put(content: bytes, place: int, part: bytes) -> bytes:
    return content[:place] + part + content[place + len(part) :]


IN_PLACES: dict[str, Callable[[bytes, int, random.Random], bytes]] = {
    "bit flipped": _flip,
    "page of zeros": _zero_page,
    "noise": _noise,
    "cut": _cut,
    "byte taken out": _take_out,
    "blocks exchanged": _exchange_blocks,
}
"""Kinds of damage that have a place in the file."""

OF_CONTENT: dict[str, Callable[[bytes], bytes]] = {
    "first bit flipped": lambda content: _put(content, 0, bytes([content[0] ^ 128])),
    "last bit flipped": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "empty": lambda content: b"",
    "last byte cut off": lambda content: content[:-1],
    "byte appended": lambda content: content + b"\0",
    "page appended": lambda content: content + bytes(PAGE),
    "doubled": lambda content: content * 2,
    "all zeros": lambda content: bytes(len(content)),
    "backwards": lambda content: content[::-1],
}
"""Kinds of damage to a file's content as a whole."""

OF_FILE = ("missing", "a folder", "a pipe", "a link to itself", "unreadable")
"""Kinds of damage to what lies at the file's place."""

FROM_ELSEWHERE = ("another file of it", "the older checkpoint's")
"""Kinds of damage by files in each other's place."""


@dataclass(frozen=True)
class Case:
    """One damage.

    Attributes:
        kind: what is done.
        file: name of the file in the checkpoint's folder.
        place: where in it, in bytes; for a damage that has no place, a number to choose by.
    """

    kind: str
    file: str
    place: int = 0

    def __str__(self) -> str:
        return f"{self.file}: {self.kind}" + (f" at {self.place}" if self.place else "")


def all_cases(newer: Path, older: Path, count: int, seed: int) -> list[Case]:
    """At least `count` cases: every kind for every file, and places spread over every file.

    Those that would leave a file as it is are left out.
    """
    dice = random.Random(seed)
    names = sorted(str(path.relative_to(newer)) for path in newer.rglob("*") if path.is_file())
    readable_to_all = os.geteuid() == 0
    whole = [
        Case(kind, name)
        for name in names
        for kind in (*OF_CONTENT, *OF_FILE, *FROM_ELSEWHERE)
        if not (kind == "unreadable" and readable_to_all)
    ]
    regions = -(-max(count - len(whole), len(names)) * 5 // (4 * len(names)))
    in_places: list[Case] = []
    for name in names:
        size = (newer / name).stat().st_size
        for region in range(regions):
            start, end = size * region // regions, size * (region + 1) // regions
            kind = list(IN_PLACES)[(region + len(in_places)) % len(IN_PLACES)]
            in_places.append(Case(kind, name, dice.randrange(start, max(end, start + 1))))
    return [case for case in whole + in_places if _changes_something(case, newer, older)]


def _changes_something(case: Case, newer: Path, older: Path) -> bool:
    if case.kind in OF_FILE:
        return True
    content = (newer / case.file).read_bytes()
    return _changed(case, content, newer, older) != content


def _changed(case: Case, content: bytes, newer: Path, older: Path) -> bytes:
    if case.kind in IN_PLACES:
        return IN_PLACES[case.kind](content, case.place, random.Random(str(case)))
    if case.kind in OF_CONTENT:
        return OF_CONTENT[case.kind](content)
    if case.kind == "the older checkpoint's":
        return (older / case.file).read_bytes()
    files = sorted(path for path in newer.rglob("*") if path.is_file())
    following = files[(files.index(newer / case.file) + 1) % len(files)]
    return following.read_bytes()


@contextmanager
def damaged(case: Case, newer: Path, older: Path) -> Iterator[None]:
    """The newer checkpoint with that damage; it is mended afterwards, wherever it lies then."""
    path = newer / case.file
    content = path.read_bytes()
    do_damage(case, newer, older)
    try:
        yield
    finally:
        _remove(path)
        path.write_bytes(content)


def do_damage(case: Case, newer: Path, older: Path) -> None:
    """Damage the newer checkpoint for good."""
    path = newer / case.file
    if case.kind == "unreadable":
        path.chmod(0)
    elif case.kind in OF_FILE:
        _remove(path)
        if case.kind == "a folder":
            path.mkdir()
        elif case.kind == "a pipe":
            os.mkfifo(path)
        elif case.kind == "a link to itself":
            path.symlink_to(path.name)
    else:
        path.write_bytes(_changed(case, path.read_bytes(), newer, older))


def _remove(path: Path) -> None:
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Answer:
    """How the loader answered a case.

    Attributes:
        named: whether it named the damaged file.
        fell_back: whether it found the older checkpoint, and put the newer one aside.
        seconds: that this took, both verifications together.
    """

    named: bool
    fell_back: bool
    seconds: float


def answer(case: Case, settings: Settings, folder: Path) -> Answer:
    """Let the loader look for the newest whole checkpoint; a process group must exist."""
    older, newer = (folder / f"step_{step:08d}" for step in (OLDER, NEWER))
    with damaged(case, newer, older), told_by_loader() as told:
        started = time.monotonic()
        found = newest_whole(settings)
        seconds = time.monotonic() - started
        aside = newer.with_name(f"{newer.name}.damaged")
        fell_back = found is not None and found.path == older and aside.is_dir()
        if aside.is_dir():
            aside.rename(newer)
    # By another manifest every file is wrong.
    name = case.file if case.file != MANIFEST_FILE else ""
    named = any(f"{newer} is not whole:\n  {name}" in message for message in told)
    return Answer(named, fell_back, seconds)


@contextmanager
def told_by_loader() -> Iterator[list[str]]:
    """What the loader logs, and nobody else is told."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(newest_whole.__module__)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield told
    finally:
        logger.propagate = True
        logger.removeHandler(handler)


@contextmanager
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def run_to_damage(output_dir: Path, cache_dir: Path) -> Path:
    """Make a run of two checkpoints, and one that nothing happens to; where the two are."""
    train_in_turn(
        output_dir,
        cache_dir,
        {
            "undisturbed": (f"stop_after_step={END}",),
            "damaged": (f"stop_after_step={NEWER}", f"checkpoint.save_interval={OLDER}"),
        },
    )
    return output_dir / "damaged" / "checkpoints"


def settings_of_run(output_dir: Path, run_name: str = "damaged") -> Settings:
    """Settings under which the loader looks where the run's checkpoints are."""
    words = ["experiment=small", f"output_dir={output_dir}", f"run_name={run_name}"]
    return load_settings(words, Environment(), str(CONFIG_DIR), with_files=False)


def restarts_end_alike(
    cases: Sequence[Case], output_dir: Path, cache_dir: Path, timeout: float = 600
) -> dict[Case, bool]:
    """Let the main job go on after each damage: whether it ends with the undisturbed weights."""
    source = output_dir / "damaged"
    names = {case: f"restart_{number}" for number, case in enumerate(cases)}
    for case, name in names.items():
        shutil.copytree(source, output_dir / name)
        older, newer = (
            output_dir / name / "checkpoints" / f"step_{step:08d}" for step in (OLDER, NEWER)
        )
        do_damage(case, newer, older)
    runs = dict.fromkeys(names.values(), (f"stop_after_step={END}",))
    train_in_turn(output_dir, cache_dir, runs, timeout=timeout)

    def end(name: str) -> dict[str, torch.Tensor]:
        return saved_tensors(output_dir / name / "checkpoints" / f"step_{END:08d}")

    wanted = end("undisturbed")
    results = {}
    for case, name in names.items():
        found = end(name)
        put_aside = (output_dir / name / "checkpoints" / f"step_{NEWER:08d}.damaged").is_dir()
        results[case] = (
            put_aside
            and found.keys() == wanted.keys()
            and all(torch.equal(found[key], wanted[key]) for key in wanted)
        )
    return results


def main() -> int:
    """The campaign; returns 1 if any case was not answered as it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        answers, restarts, size = campaign(options, Path(folder))
    wrong = [case for case, each in answers.items() if not (each.named and each.fell_back)]
    wrong += [case for case, alike in restarts.items() if not alike]
    for case in wrong:
        print(f"NOT ANSWERED: {case}", file=sys.stderr)
    write_report(answers, restarts, size)
    return 1 if wrong else 0


def campaign(
    options: argparse.Namespace, folder: Path
) -> tuple[dict[Case, Answer], dict[Case, bool], int]:
    """Answers of the loader, ends of the restarted runs, and bytes of a checkpoint."""
    from megatron_kanana.data.builtin import builtin_data, prepare_builtin_data
    from tests.conftest import TEST_VOCAB_SIZE

    cache_dir, output_dir = folder / "data", folder / "runs"
    prepare_builtin_data(builtin_data(cache_dir, TEST_VOCAB_SIZE), TEST_VOCAB_SIZE)
    checkpoints = run_to_damage(output_dir, cache_dir)
    older, newer = (checkpoints / f"step_{step:08d}" for step in (OLDER, NEWER))
    size = sum(path.stat().st_size for path in newer.rglob("*") if path.is_file())
    cases = all_cases(newer, older, options.cases, options.seed)
    settings = settings_of_run(output_dir)
    with alone():
        answers = {case: answer(case, settings, checkpoints) for case in cases}
    chosen = random.Random(options.seed).sample(cases, min(options.restarts, len(cases)))
    return answers, restarts_end_alike(chosen, output_dir, cache_dir, timeout=3000), size


def write_report(answers: dict[Case, Answer], restarts: dict[Case, bool], size: int) -> None:
    """Write the card of the campaign."""
    from benchmarks.card import Row, write_card

    seconds = statistics.median(each.seconds for each in answers.values())
    kinds = sorted({case.kind for case in answers})
    rows = [
        Row("damaged checkpoints", "cases", len(answers)),
        Row("damaged file named", "cases", sum(each.named for each in answers.values())),
        Row("earlier whole checkpoint used", "cases", sum(e.fell_back for e in answers.values())),
        Row("restarts of the main job", "runs", len(restarts)),
        Row("restarts that end bit-identical", "runs", sum(restarts.values())),
        Row("size of a checkpoint", "MB", size / 1e6),
        Row("verifying both checkpoints, one process", "ms", seconds * 1e3, runs=len(answers)),
        *(
            Row(f"kind: {kind}", "cases", sum(case.kind == kind for case in answers))
            for kind in kinds
        ),
    ]
    print(write_card("damaged_checkpoints_cpu", rows))


if __name__ == "__main__":
    sys.exit(main())
