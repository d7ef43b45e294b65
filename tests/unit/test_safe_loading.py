"""Files that are not trusted: what would run code is refused in one message, and nothing ran."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_kanana.checkpoint.torch_dist_blocks import BlockReader
from megatron_kanana.config import (
    ConfigurationError,
    Environment,
    load_settings,
    read_settings,
    saved_settings,
    write_settings,
)
from megatron_kanana.config.saved import SETTINGS_FILE
from megatron_kanana.data.builtin import BuiltinData
from megatron_kanana.data.chat import ChatTemplate
from megatron_kanana.data.epochs import Epochs, SampleOrder
from megatron_kanana.data.tokenizer import load_tokenizer
from megatron_kanana.device.safe_unpickling import RECORDS, UnsafeFileError, load_metadata
from tests.hostile_files import calls, hostile_copies, pickled, saved
from tests.hugging_face_tokenizers import save_byte_level_tokenizer
from tests.indexed_datasets import plain_tokenizer, write_documents
from tests.launch import CONFIG_DIR, run_python, train

CALLS = tuple(calls(Path("x")))


def ordinary() -> Metadata:
    """A description as torch writes one."""
    storage = torch.distributed.checkpoint.filesystem._StorageInfo("__0_0.distcp", 0, 16)
    tensor = TensorStorageMetadata(
        TensorProperties(dtype=torch.bfloat16),
        torch.Size([2, 4]),
        [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 4]))],
    )
    index = MetadataIndex("weight", torch.Size([0, 0]), 0)
    return Metadata({"weight": tensor}, storage_data={index: storage})


def read(content: bytes) -> Metadata:
    """Read as the `.metadata` of a checkpoint."""
    return load_metadata(io.BytesIO(content), "a/.metadata")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", CALLS)
def test_a_description_that_calls_is_refused(name: str, protocol: int, tmp_path: Path) -> None:
    call = calls(tmp_path / "made")[name]
    for hostile in (call, [ordinary(), call], dataclasses.replace(ordinary(), planner_data=call)):
        with pytest.raises(UnsafeFileError, match=r"a/.metadata names .* nothing of it was run"):
            read(pickled(hostile, protocol))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        pickled(ordinary())[:-100],
        b"\x80\x04K\x01r\xff\xff\xff\xff.",  # in C, a table of 2^32 places
        b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",  # an array of a terabyte
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\x00\x00\x00x.",  # a text of a terabyte
        b"cos\nsystem\n",
        pickled(ordinary()).replace(b"properties", b"properthes"),
        pickled(ordinary()).replace(b"relative_path", b"relative_pith"),
    ],
)
def test_a_damaged_description_takes_no_memory_and_is_refused(content: bytes) -> None:
    with pytest.raises((pickle.UnpicklingError, UnsafeFileError), match=r"a/.metadata"):
        read(content)


def test_an_ordinary_description_is_read_as_it_was_written() -> None:
    assert read(pickled(ordinary())) == ordinary()


@pytest.mark.parametrize("place", ["../other/__0_0.distcp", "/etc/passwd", "a/../../b"])
def test_a_description_that_leaves_its_folder_is_refused(place: str) -> None:
    metadata = ordinary()
    assert metadata.storage_data is not None
    for index, info in metadata.storage_data.items():
        metadata.storage_data[index] = dataclasses.replace(info, relative_path=place)
    with pytest.raises(UnsafeFileError, match="outside its folder"):
        read(pickled(metadata))


def test_a_description_that_changes_classes_is_refused() -> None:
    before = [dict(vars(record)) for record in RECORDS]
    # BUILD with (None, {name: value}) sets attributes of what lies on the stack, here a class.
    for attribute in (b"__eq__", b"version", b"new"):
        hostile = b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N(dV%b\nctorch\nSize\nstb."
        with pytest.raises(UnsafeFileError, match="changes what is no record"):
            read(hostile % attribute)
    assert [dict(vars(record)) for record in RECORDS] == before


def test_conversion_refuses_a_hostile_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickled(calls(tmp_path / "made")["a command"]))
    with pytest.raises(ValueError, match=r"names (posix|os)\.system"):
        BlockReader(tmp_path)
    assert not (tmp_path / "made").exists()


def test_hostile_checkpoints_are_refused_and_ordinary_ones_load(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through megatron-core, also where the environment asks torch to trust every file."""
    quick = ("device=cpu", "stop_after_step=1")
    train(tmp_path, cache_dir, "run", *quick)
    good = tmp_path / "run" / "checkpoints" / "step_00000001"
    made = tmp_path / "made"
    hostile = hostile_copies(good, tmp_path, made)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    words = ["--config-dir", str(CONFIG_DIR), "experiment=small", f"data.cache_dir={cache_dir}"]
    words += [f"output_dir={tmp_path}", *quick]
    checkpoints = json.dumps([*map(str, hostile.values()), str(good)])
    finished = run_python("tests/load_checkpoints.py", checkpoints, "run_name=other", *words)
    assert finished.returncode == 0, finished.stderr
    said = json.loads(finished.stdout.splitlines()[-1])
    assert said.pop(str(good)) == ""
    for name, path in hostile.items():
        assert said[str(path)].startswith("UnsafeFileError: "), (name, said)
        assert "nothing of it was run" in said[str(path)], name

    start = (f"checkpoint.load={hostile['.metadata']}", "run_name=refused")
    finished = run_python("-m", "megatron_kanana.train", *words, *start)
    assert finished.returncode == 2
    assert "names posix.system" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not made.exists()


@pytest.mark.parametrize("name", ["objects", "a pickle", "an archive", "nothing"])
def test_index_files_that_hold_code_are_refused(name: str, tmp_path: Path) -> None:
    write_documents(tmp_path / "numbers", [range(2, 40)] * 8)
    order = SampleOrder(plain_tokenizer(), 16, 5, 0.0, tmp_path / "cache")
    epochs = Epochs(tmp_path / "numbers", order)
    epochs.prepare(0)
    assert len(epochs[0]["tokens"]) == 16
    call = calls(tmp_path / "made")["open"]
    for path in (tmp_path / "cache").rglob("*document_index.npy"):
        if name == "objects":
            np.save(path, np.array([call], dtype=object), allow_pickle=True)
        elif name == "an archive":
            with path.open("wb") as file:
                np.savez(file, numbers=np.array([call], dtype=object))
        else:
            path.write_bytes(pickled(call) if name == "a pickle" else b"")
    anew = Epochs(tmp_path / "numbers", order)
    for use in (lambda: anew[0], lambda: anew.is_prepared(0), lambda: anew.prepare(0)):
        with pytest.raises(UnsafeFileError, match=r"is no array of numbers.* delete"):
            use()
    assert not (tmp_path / "made").exists()


def test_settings_of_a_checkpoint_are_plain_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "known to nobody")
    write_settings(tmp_path, load_settings([], Environment()))
    path = tmp_path / SETTINGS_FILE
    text = path.read_text()
    path.write_text(text.replace("run_name: kanana_2_tiny", "run_name: ${oc.env:SECRET}"))
    with pytest.raises(ConfigurationError, match="plain values") as caught:
        saved_settings(read_settings(tmp_path), [], Environment())
    assert "known to nobody" not in str(caught.value)

    bomb = "a0: &a0 [1,1,1,1,1,1,1,1,1]\n"
    bomb += "".join(f"a{n + 1}: &a{n + 1} [{','.join([f'*a{n}'] * 9)}]\n" for n in range(30))
    target = tmp_path / "made"
    call = f"run_name: !!python/object/apply:os.system ['touch {target}']\n"
    for hostile, reason in ((bomb + text, "alias"), (call + text, "could not determine"), *JUNK):
        path.write_text(hostile)
        with pytest.raises(ValueError, match=reason) as refused:
            read_settings(tmp_path)
        assert str(path) in str(refused.value)
        assert "\n" not in str(refused.value)
    assert not target.exists()


JUNK = (
    ("{", "cannot be read"),
    ("- a\n- b\n", "holds no settings"),
    ("model: 3\n", "holds no settings"),
    ("[" * 100_000, "cannot be read"),
    ("model: \x00\n", "cannot be read"),
)


def refused(words: list[str], config_dir: Path | None = None) -> str:
    """What is said about a configuration that must be refused."""
    with pytest.raises(ConfigurationError) as caught:
        load_settings(words, Environment(), str(config_dir) if config_dir else None)
    return str(caught.value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("run_name=${now:%Y}", "calls now"),
        ("run_name=${oc.decode:x}", "calls oc.decode"),
        ("run_name=${python_version:major}", "calls python_version"),
        ("run_name=${hydra:runtime.cwd}", "calls hydra"),
        ("run_name='${${run_name}:x}'", "calls ${run_name}"),
        ("run_name='x${oc.env:HOME,${oc.create:1}}'", "calls oc.create"),
        ("+model={_target_:os.system,_args_:[touch made]}", "is not a config of this group"),
        ("+logging._target_=os.system", "logging._target_"),
        ("+hydra.searchpath=[pkg://antigravity]", "hydra"),
    ],
)
def test_interpolations_and_targets_call_nothing(
    word: str, message: str, empty_folder: Path
) -> None:
    assert message in refused([word])
    assert not list(empty_folder.iterdir())


def test_interpolations_name_settings_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOR_RUNS", "some/where")
    words = ["output_dir=${oc.env:FOR_RUNS}/${run_name}", "run_name=mine"]
    assert load_settings(words, Environment()).output_dir == "some/where/mine"


def test_yaml_files_construct_nothing(tmp_path: Path) -> None:
    made = tmp_path / "made"
    (tmp_path / "model").mkdir()
    hostile = f"name: !!python/object/apply:os.system ['touch {made}']\n"
    (tmp_path / "model" / "hostile.yaml").write_text(hostile)
    assert "mend the YAML file of a group" in refused(["model=hostile"], tmp_path)
    assert not made.exists()


def test_choices_that_lead_to_themselves_end(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "own.yaml"
    path.write_text("defaults:\n  - /model: ${model}\n")
    assert f"defaults of {path}" in refused(["model=own"], tmp_path)
    path.write_text("defaults:\n  - own\n")
    assert "config groups" in refused(["model=own"], tmp_path)


def test_a_tokenizer_with_a_damaged_piece_is_refused(builtin: BuiltinData, tmp_path: Path) -> None:
    path = tmp_path / "damaged.model"
    path.write_bytes(builtin.tokenizer.read_bytes().replace(b"<unk>", b"<\xf5nk>"))
    with pytest.raises(ValueError, match=r"damaged.model is damaged: a piece is not UTF-8"):
        load_tokenizer(path)


TEMPLATES = (
    "{{ cycler.__init__.__globals__.os.system('touch MADE') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['os'].system('touch MADE') }}",
    "{{ strftime_now.__globals__['os'].system('touch MADE') }}",
    "{{ messages.append(1) }}",
    "{% set _ = messages[0].update({'role': 'system'}) %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch MADE') }}",
)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a tokenizer as others publish them, with code beside it."""
    folder = tmp_path_factory.mktemp("foreign")
    save_byte_level_tokenizer(folder, ["some text"], 300)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    path.write_text(json.dumps(config))
    code = f"open({str(folder / 'made')!r}, 'w')\nclass OwnTokenizer: ...\n"
    (folder / "tokenization_own.py").write_text(code)
    return folder


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_run_in_a_sandbox(template: str, foreign: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    (foreign / "chat_template.jinja").write_text(template.replace("MADE", str(made)))
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
    with pytest.raises(ValueError, match="the chat template refuses the conversation"):
        ChatTemplate(load_tokenizer(foreign)).render(messages)
    assert messages == [{"role": "user", "content": "Hi"}]
    assert not made.exists()
    assert not (foreign / "made").exists()


def test_objects_that_were_saved_are_no_weights(tmp_path: Path) -> None:
    """The switch that covers every torch.load of a process, also one that asks to trust a file."""
    (tmp_path / "objects").write_bytes(saved(calls(tmp_path / "made")["open"]))
    script = (
        "import sys, torch; from megatron_kanana.device.patches import apply_patches;"
        " apply_patches('cuda'); torch.load(sys.argv[1], weights_only=False)"
    )
    finished = run_python("-c", script, str(tmp_path / "objects"))
    assert "UnpicklingError" in finished.stderr
    assert not (tmp_path / "made").exists()
