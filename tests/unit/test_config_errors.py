"""Bad configurations: every one is answered before anything starts, with setting and remedy."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_kanana import device, train
from megatron_kanana.config import (
    ConfigurationError,
    Environment,
    Settings,
    load_settings,
    write_settings,
)
from megatron_kanana.config.ledger import Ledger, write_ledger
from megatron_kanana.config.manifest import seal
from megatron_kanana.config.saved import SETTINGS_FILE
from tests.hugging_face_tokenizers import save_byte_level_tokenizer
from tests.launch import run_python

from .bad_configurations import BAD, ONE_CPU, world


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of Hugging Face's files: a good one, one without an end of text, and a broken one."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for name in ("published", "endless"):
        save_byte_level_tokenizer(folder / name, [str(BAD)], 500)
    for file in ("tokenizer_config.json", "generation_config.json"):
        (folder / "endless" / file).unlink()
    (folder / "broken").mkdir()
    (folder / "broken" / "tokenizer.json").write_text("{")
    return folder


@functools.cache
def settings_to_save(*overrides: str) -> Settings:
    """Settings of a run, composed once."""
    return load_settings(overrides, ONE_CPU)


@pytest.fixture
def folder(tmp_path: Path, tokenizers: Path) -> Path:
    """A folder with a text file and a checkpoint's settings."""
    for suffix in ("txt", "bin", "idx"):
        (tmp_path / f"notes.{suffix}").write_text("neither tokenizer nor dataset " * 3)
    (tmp_path / "chat.jsonl").write_text("")
    for name in ("small", "short"):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=numpy.uint16)
        for _ in range(12):
            builder.add_document(torch.arange(5), [5])
        builder.finalize(str(tmp_path / f"{name}.idx"))
    with (tmp_path / "short.bin").open("ab") as file:
        file.truncate(100)
    shutil.copytree(tokenizers, tmp_path, dirs_exist_ok=True)
    for step, overrides in {6: [], 7: [], 8: ["model.num_mtp_layers=1"]}.items():
        checkpoint = tmp_path / f"step_{step:08d}"
        checkpoint.mkdir()
        write_settings(checkpoint, settings_to_save(*overrides))
    tokens = {"python_standard_library": 90 * 128, "six_languages": 10 * 128}
    write_ledger(tmp_path / "step_00000007", Ledger(100, 128, tokens, {}))
    oldest = tmp_path / "step_00000006" / SETTINGS_FILE
    oldest.write_text(re.sub(r"  \w*mtp\w*: .*\n", "", oldest.read_text()))
    for checkpoint in tmp_path.glob("step_*"):
        seal(checkpoint)
    (tmp_path / "step_00000005").mkdir()
    (tmp_path / "step_00000005" / SETTINGS_FILE).write_text("model: [half")
    lost = tmp_path / "lost" / "checkpoints" / "step_00000003"
    shutil.copytree(tmp_path / "step_00000007", lost)
    (lost / "manifest.json").unlink()
    return tmp_path


Answer = Callable[..., str]


@pytest.fixture
def answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Answer:
    """What the main job prints on standard error; fails if it starts anything."""

    def start(*_: object) -> None:
        pytest.fail("the job was started")

    monkeypatch.setattr(device, "prepare_device", start)
    monkeypatch.chdir(folder)

    def run(overrides: tuple[str, ...], environment: Environment) -> str:
        monkeypatch.setattr(train, "detect_environment", lambda: environment)
        before = set(folder.rglob("*"))
        assert train.main([word.replace("{tmp}", str(folder)) for word in overrides]) == 2
        assert set(folder.rglob("*")) == before
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize("name", BAD)
def test_bad_configuration_is_answered_with_setting_value_and_remedy(
    name: str, answer: Answer
) -> None:
    bad = BAD[name]
    message = answer(bad.overrides, bad.environment)
    blocks = message.split("\n\n")[1:]
    assert any(
        block.startswith(f"  {bad.setting} = ")
        and bad.value in block.splitlines()[0]
        and bad.remedy in block.split("remedy: ")[1]
        for block in blocks
    ), message
    assert "Traceback" not in message


def test_all_problems_are_told_together(answer: Answer) -> None:
    """Faults of words, of types, of limits and of combinations, in one run."""
    overrides = (
        "optimzer.learning_rate=1",
        "model=gpt",
        "schedule.steps=many",
        "optimizer.beta1=2",
        "precision.compute=fp16",
        "parallel.tensor_parallel_size=3",
        "data.tokenizer=none.model",
    )
    message = answer(overrides, world(4))
    assert message.startswith("The configuration has 12 problems; nothing was started.")
    assert message.count("does not divide") == 6  # TP 3: five sizes, and the world of 4
    for setting in (
        "optimzer",
        "model",
        "schedule.steps",
        "optimizer.beta1",
        "precision.compute",
        "parallel.tensor_parallel_size",
        "parallel.tensor_parallel_size x parallel.context_parallel_size"
        " x parallel.pipeline_parallel_size",
        "data.tokenizer",
    ):
        assert f"\n  {setting} = " in message, message


def test_a_good_configuration_has_no_problems() -> None:
    for overrides, size in ((), 1), (("parallel=expert_parallel",), 2), ((), 2):
        assert load_settings(overrides, world(size)).model.num_experts == 16
    tensor_pipeline = ["parallel=tensor_pipeline", "device=cpu"]
    assert load_settings(tensor_pipeline, world(4)).num_microbatches(4) == 2


def test_a_run_may_change_its_mixture_from_where_it_is_and_begin_another_stage(
    folder: Path,
) -> None:
    checkpoint = f"checkpoint.load={folder}/step_00000007"
    change = "data.blend_changes=[{tokens:12800,weights:{six_languages:1}}]"
    for words in (
        [checkpoint],
        [checkpoint, change],
        [checkpoint, "checkpoint.load_what=weights", "data.sequence_length=64"],
        [checkpoint, "checkpoint.load_what=weights", "data.blend=[{source:six_languages}]"],
    ):
        assert load_settings(words, Environment()).checkpoint.load is not None


def test_folders_that_cannot_be_written_to_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigurationError) as caught:
        load_settings([], Environment())
    assert {problem.setting for problem in caught.value.problems} == {
        "output_dir",
        "checkpoint.directory",
        "data.cache_dir",
    }


def test_under_torchrun_one_process_speaks_and_all_end_with_code_2(tmp_path: Path) -> None:
    finished = run_python(
        "-m",
        "megatron_kanana.train",
        "parallel=tensor_pipeline",
        f"output_dir={tmp_path}",
        processes=2,
        anew=True,
    )
    assert finished.returncode != 0
    assert finished.stderr.count("nothing was started") == 1
    assert "exitcode  : 2" in finished.stderr
    assert "exitcode  : 1" not in finished.stderr
    assert not list(tmp_path.iterdir())
