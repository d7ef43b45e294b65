"""tools/preprocess_data.py in processes that are killed, and called wrongly."""

from __future__ import annotations

import gzip
import os
import random
import signal
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pyarrow
import pyarrow.parquet
import pytest

from megatron_kanana.data.builtin import BuiltinData, language_samples
from tests.corpora import write_corpus
from tests.launch import run_python, start_python
from tools.preprocess_data import main

TOOL = "tools/preprocess_data.py"
KILLS = 20
SUFFIXES = (".bin", ".idx", ".rejects.jsonl", ".manifest.json")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory, builtin: BuiltinData) -> list[str]:
    """A call over five files, whose work takes about a second."""
    texts = [text.strip() for text in language_samples()]
    documents = [f"{number}: {text}" for number in range(6) for text in texts]
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"), documents)
    inputs = [str(path) for path in corpus.inputs]
    return [TOOL, *inputs, f"--tokenizer={builtin.tokenizer}", "--shard-mb=0.1", "--deduplicate"]


def contents(output: Path) -> dict[str, bytes]:
    """The dataset's files; nothing else may lie beside them."""
    names = {path.name for path in output.parent.iterdir()}
    assert names == {f"{output.name}{suffix}" for suffix in SUFFIXES}
    return {suffix: Path(f"{output}{suffix}").read_bytes() for suffix in SUFFIXES}


def kill_after(seconds: float, *arguments: str) -> bool:
    """Start the tool and kill its first process, and that alone; whether it still ran.

    The others must end by themselves.
    """
    process = start_python(*arguments)
    time.sleep(seconds)
    workers = psutil.Process(process.pid).children() if process.poll() is None else []
    process.kill()
    process.communicate()
    for worker in workers:
        for _ in range(200):
            if not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE:
                break
            time.sleep(0.02)
        else:
            raise AssertionError(f"worker {worker.pid} outlives the process that started it")
    return process.returncode == -signal.SIGKILL


@pytest.mark.timeout(240)
def test_a_run_killed_twenty_times_writes_what_an_undisturbed_one_does(
    arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "undisturbed").mkdir()
    (tmp_path / "killed").mkdir()
    start = time.monotonic()
    whole = (*arguments, f"--output={tmp_path / 'undisturbed/out'}", "--workers=2")
    finished = run_python(*whole, anew=True)
    seconds = time.monotonic() - start
    assert finished.returncode == 0, finished.stderr
    undisturbed = contents(tmp_path / "undisturbed" / "out")

    generator = random.Random(0)
    output = tmp_path / "killed" / "out"
    kills = 0
    while kills < KILLS:
        call = (*arguments, f"--output={output}", f"--workers={generator.choice((1, 2))}")
        if kill_after(generator.uniform(0.2, seconds), *call):
            kills += 1
        else:  # it had finished: begin anew
            assert contents(output) == undisturbed
            for path in output.parent.iterdir():
                path.unlink()
    finished = run_python(*arguments, f"--output={output}", "--workers=2")
    assert finished.returncode == 0, finished.stderr
    assert contents(output) == undisturbed


def test_a_killed_worker_is_told_and_costs_its_shard_only(
    arguments: list[str], tmp_path: Path
) -> None:
    call = (*arguments, f"--output={tmp_path / 'out'}", "--workers=2")
    process = start_python(*call)
    workers: list[psutil.Process] = []
    while process.poll() is None and not workers:
        children = psutil.Process(process.pid).children()
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    os.kill(workers[0].pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a worker process was killed" in errors
    assert "Traceback" not in errors
    assert run_python(*call).returncode == 0
    assert contents(tmp_path / "out")


def test_wrong_calls_and_damaged_files_are_answered_in_a_line(
    builtin: BuiltinData,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.txt").write_text("a document")
    Path("keys.jsonl").write_text('{"body": "x"}\n' * 3)
    Path("blank.txt").write_text("\n \n")
    Path("empty.jsonl").write_text('{"text": ""}\n{"text\n')
    Path("short.txt.gz").write_bytes(gzip.compress(os.urandom(5000))[:-100])
    Path("no.jsonl.zst").write_bytes(b"no zstandard frame")
    Path("no.parquet").write_bytes(b"no parquet file")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1], "body": ["x"]}), "numbers.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), "body.parquet")
    Path("table.csv").write_text("text")
    Path("folder").mkdir()
    cases = {
        ("none.jsonl",): "none.jsonl: no such file",
        ("folder",): "folder: no such file",
        ("table.csv",): "table.csv: cannot read .csv; give .jsonl, .txt, .parquet",
        ("good.txt", "good.txt"): "good.txt is given twice",
        (
            "keys.jsonl",
        ): "no record at the start of any input has 'text'; give the right --text-key",
        ("blank.txt",): "there is no document to write; of 0 records",
        (
            "empty.jsonl",
        ): "1 are empty and 1 cannot be used, the first at line 1 of empty.jsonl: em",
        ("good.txt", "short.txt.gz"): "short.txt.gz is damaged or cut short after 0 bytes of text",
        ("good.txt", "no.jsonl.zst"): "no.jsonl.zst is damaged or cut short",
        ("no.parquet",): "no.parquet is no parquet file",
        ("numbers.parquet",): "column 'text' holds int64, not text",
        ("body.parquet",): "has no column 'text', but ['body']",
        ("good.txt", "--workers=0"): "--workers 0 is below 1",
        ("good.txt", "--shard-mb=0"): "--shard-mb 0 is not above 0",
        ("good.txt", "--output=good.txt/out"): "good.txt is a file",
        ("good.txt", "--tokenizer=none"): "none: no such file or folder",
        ("good.txt", "--tokenizer=good.txt"): "good.txt is not a SentencePiece model",
        ("good.txt", "--tokenizer=folder"): "folder has no tokenizer.json",
    }
    for arguments, message in cases.items():
        options = [f"--tokenizer={builtin.tokenizer}", "--output=out", "--workers=1"]
        assert main([*options, *arguments]) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert not list(tmp_path.glob("out.*[nx]"))
