"""What the processes feed is one sequence of samples over resuming, layouts, ramps, mixtures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_kanana.data.builtin import BuiltinData
from tests.indexed_datasets import END_OF_DOCUMENT, write_documents
from tests.launch import CONFIG_DIR, run_python, train_in_turn

LENGTH = 16
SOURCES = {"web": range(10, 600), "code": range(600, 1300), "korean": range(1300, 2048)}
SIZES = (4, 4, 4, 8, 8, 8)  # of the steps; 10 samples into the run the batch doubles
SWITCH = 17  # samples, in the middle of a step
STOP = 2


@pytest.fixture
def overrides(tmp_path: Path, builtin: BuiltinData) -> list[str]:
    """A run on three sources of random tokens, each from a range of its own."""
    generator = np.random.default_rng(0)
    for name, tokens in SOURCES.items():
        lengths = generator.integers(3, 60, 80)
        documents = [list(map(int, generator.choice(tokens, n))) for n in lengths]
        write_documents(tmp_path / name, documents)
    weights = {"web": 5, "code": 2, "korean": 1}
    blend = ",".join(f"{{path:{tmp_path / name},weight:{w}}}" for name, w in weights.items())
    later = "{web:1,code:0,korean:3}"
    return [
        f"data.sequence_length={LENGTH}",
        f"data.blend=[{blend}]",
        f"data.blend_changes=[{{tokens:{SWITCH * LENGTH - 1},weights:{later}}}]",
        f"data.tokenizer={builtin.tokenizer}",
        "schedule.global_batch_size=4",
        f"schedule.batch_size_changes=[{{tokens:{10 * LENGTH},global_batch_size:8}}]",
    ]


class Fed:
    """What the runs fed, from the files of train_recording_samples.py."""

    def __init__(self, folder: Path, name: str) -> None:
        lines = [
            json.loads(line) for file in folder.iterdir() for line in file.read_text().splitlines()
        ]
        lines = [line for line in lines if line["run"] == name]
        self.steps = {step: self._in_order(lines, step) for step in {li["step"] for li in lines}}
        self.ranks = {line["rank"] for line in lines}

    def _in_order(self, lines: list[dict[str, Any]], step: int) -> list[tuple[str, list[int]]]:
        """Hash and tokens of a step's samples: microbatch by microbatch, rank by rank."""
        by_rank: dict[int, list[dict[str, Any]]] = {}
        for line in lines:
            if line["step"] == step:
                by_rank.setdefault(line["rank"], []).append(line)
        return [
            (digest, tokens)
            for together in zip(*(by_rank[rank] for rank in sorted(by_rank)), strict=True)
            for line in together
            for digest, tokens in zip(line["hashes"], line["tokens"], strict=True)
        ]

    def hashes(self) -> list[str]:
        """Of all samples in order."""
        return [digest for step in sorted(self.steps) for digest, _ in self.steps[step]]

    def tokens_by_source(self, last_step: int) -> dict[str, int]:
        """Counted from the samples up to a step; every sample has one source."""
        counts: Counter[str] = Counter()
        for step, samples in self.steps.items():
            for _, tokens in samples if step <= last_step else ():
                of = {n for n, r in SOURCES.items() for t in tokens if t in r}
                assert len(of) == 1 and len(tokens) == LENGTH
                assert all(t == END_OF_DOCUMENT or t >= 10 for t in tokens)
                counts[of.pop()] += LENGTH
        return dict(counts)


def ledger(output_dir: Path, name: str, step: int) -> dict[str, Any]:
    """The ledger in a checkpoint."""
    path = output_dir / name / "checkpoints" / f"step_{step:08d}" / "ledger.json"
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def index_folders(cache_dir: Path) -> Iterator[Path]:
    """Index files of this test's datasets."""
    return (
        path for path in (cache_dir / "index").iterdir() if path.name.startswith(tuple(SOURCES))
    )


def prepare_ahead(folder: Path, cache_dir: Path, overrides: tuple[str, ...]) -> set[Path]:
    """Write the order of samples before the runs, as for large datasets; the folders made."""
    finished = run_python(
        *("tools/prepare_samples.py", "--workers", "1"),
        *(f"--config-dir={CONFIG_DIR}", "experiment=small", f"output_dir={folder}"),
        *(f"data.cache_dir={cache_dir}", *overrides),
    )
    assert finished.returncode == 0, finished.stderr
    assert "wrote 3 passes" in finished.stdout
    return set(index_folders(cache_dir))


def test_resuming_on_two_processes_in_a_ramp_and_a_mixture_feeds_the_same_samples(
    overrides: list[str], tmp_path: Path, cache_dir: Path
) -> None:
    fed = tmp_path / "fed"
    fed.mkdir()
    script = ("tests/parallel/train_recording_samples.py", str(fed))
    last = f"stop_after_step={len(SIZES)}"
    straight_runs = {
        "straight": (*overrides, last),
        "half": (*overrides, f"stop_after_step={STOP}", "schedule.steps=9"),
    }
    prepared = prepare_ahead(tmp_path, cache_dir, (*overrides, last, "schedule.steps=6"))
    half = f"checkpoint.load={tmp_path}/half/checkpoints/step_{STOP:08d}"
    records = train_in_turn(tmp_path, cache_dir, straight_runs, script=script)
    records |= train_in_turn(
        *(tmp_path, cache_dir, {"resumed": (*overrides, last, half)}), processes=2, script=script
    )
    assert set(index_folders(cache_dir)) == prepared  # the runs had nothing left to write
    straight, first, rest = (Fed(fed, name) for name in ("straight", "half", "resumed"))
    assert [len(straight.steps[step]) for step in sorted(straight.steps)] == list(SIZES)
    assert (straight.ranks, first.ranks, rest.ranks) == ({0}, {0}, {0, 1})
    assert first.hashes() + rest.hashes() == straight.hashes()
    assert len(set(straight.hashes())) == sum(SIZES)  # no sample twice

    for record in [*records["straight"], *records["half"]]:
        counted = straight.tokens_by_source(record["step"])
        assert record["source_tokens"] == {name: counted.get(name, 0) for name in SOURCES}
        assert record["tokens"] == sum(counted.values())
    assert records["resumed"][-1]["source_tokens"] == records["straight"][-1]["source_tokens"]
    for name, step in (("half", STOP), ("resumed", len(SIZES)), ("straight", len(SIZES))):
        saved = ledger(tmp_path, name, step)
        assert saved["tokens"] == {**dict.fromkeys(SOURCES, 0), **straight.tokens_by_source(step)}
        assert saved["earlier_tokens"] == {}
        assert saved["consumed_samples"] == sum(SIZES[:step])
    samples = [tokens for step in sorted(straight.steps) for _, tokens in straight.steps[step]]
    is_code = [any(token in SOURCES["code"] for token in tokens) for tokens in samples]
    assert any(is_code[SWITCH - 4 : SWITCH]) and not any(is_code[SWITCH:])
