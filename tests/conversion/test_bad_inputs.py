"""Bad inputs of the conversion: each is answered in a clear line, and nothing whole is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_kanana.config.manifest import seal
from tests.conversion.folders import CONFIG, Tensors, random_tensors, write_folder
from tests.launch import ROOT
from tools.convert_checkpoint import main

SHARD = "model-00002-of-00003.safetensors"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


def changed_config(**changes: Any) -> Callable[[Path], None]:
    """Write config.json anew with some fields changed; None deletes a field."""

    def change(folder: Path) -> None:
        config = {**CONFIG, **changes}
        config = {name: value for name, value in config.items() if value != "deleted"}
        (folder / "config.json").write_text(json.dumps(config))

    return change


def changed_tensors(change: Callable[[Tensors], Any], **config: Any) -> Callable[[Path], None]:
    """Write all weights anew after a change."""

    def rewrite(folder: Path) -> None:
        tensors = random_tensors()
        change(tensors)
        write_folder(folder, tensors, {**CONFIG, **config})

    return rewrite


def cut_short(folder: Path) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 100)


def damage_header(folder: Path) -> None:
    with (folder / SHARD).open("r+b") as file:
        file.write(b"\xff" * 16)


def without_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def only_pickles(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def empty_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def wrong_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = SHARD
    path.write_text(json.dumps(index))


def twice(folder: Path) -> None:
    file = folder / "model-00001-of-00003.safetensors"
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = random_tensors()
    part = {name: tensors[name] for name, place in names.items() if place == file.name}
    other = next(name for name, place in names.items() if place == SHARD)
    save_file({**part, other: tensors[other]}, file)


def mtp_layers(folder: Path) -> None:
    write_folder(folder, random_tensors(mtp=True))


def own_mtp_head(folder: Path) -> None:
    tensors = random_tensors(mtp=True)
    tensors["model.layers.2.shared_head.head.weight"][0, 0] += 1
    write_folder(folder, tensors)


def stacked_experts(tensors: Tensors) -> None:
    gate_up = [
        torch.cat([tensors.pop(f"{prefix}.{name}_proj.weight") for name in ("gate", "up")])
        for prefix in (f"model.layers.1.mlp.experts.{expert}" for expert in range(4))
    ]
    tensors["model.layers.1.mlp.experts.gate_up_proj"] = torch.stack(gate_up)


FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "mscale": 1.0}

# what is done to a good folder; what the message must say
BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config.json": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "config.json cut short": (
        lambda f: (f / "config.json").write_text('{"model_type": '),
        "config.json is not JSON",
    ),
    "config.json of a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "config.json holds no JSON object",
    ),
    "another architecture": (changed_config(model_type="llama"), "model_type = 'llama'"),
    "a missing field": (changed_config(kv_lora_rank="deleted"), "kv_lora_rank is missing"),
    "a number for the rotary embedding": (
        changed_config(rope_scaling=4.9),
        "the rotary embedding 4.9 is no JSON object",
    ),
    "text for a number": (changed_config(hidden_size="wide"), "model.hidden_size = wide"),
    "text for the number of layers": (
        changed_config(num_hidden_layers="two"),
        "model.num_layers = two",
    ),
    "text for the context": (
        changed_config(max_position_embeddings="long"),
        "yarn original context = 'long' is no number",
    ),
    "text for the rotary base": (
        changed_config(rope_theta="large"),
        "rotary base = 'large' is no number",
    ),
    "tied embeddings": (changed_config(tie_word_embeddings=True), "tie_word_embeddings = True"),
    "another activation": (changed_config(hidden_act="gelu"), "hidden_act = 'gelu'"),
    "softmax router": (changed_config(scoring_func="softmax"), "scoring_func = 'softmax'"),
    "grouped queries": (changed_config(num_key_value_heads=1), "num_key_value_heads = 1"),
    "another rotary scaling": (
        changed_config(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        "rope type = 'llama3'",
    ),
    "half of YaRN": (changed_config(rope_scaling=YARN), "YaRN's mscale_all_dim is missing"),
    "groups that megatron-core cannot have": (
        changed_config(n_group=2, topk_group=2),
        "model.num_expert_groups_per_token = 2",
    ),
    "another quantisation": (
        changed_config(quantization_config={"quant_method": "awq"}),
        "method 'awq'",
    ),
    "missing shard": (lambda f: (f / SHARD).unlink(), f"{SHARD} does not exist"),
    "shard cut short": (cut_short, f"{SHARD} is cut short"),
    "damaged header": (damage_header, f"{SHARD} is cut short or damaged"),
    "missing index": (without_index, "index.json does not exist"),
    "index without a map": (empty_index, "index.json holds no weight_map"),
    "index that is wrong": (wrong_index, f"lm_head.weight is not in {SHARD}"),
    "tensor in two shards": (twice, "is in both model-00001-of-00003"),
    "pickles": (only_pickles, "pickles, which could run code"),
    "missing tensor": (changed_tensors(lambda t: t.pop(EXPERT)), f"{EXPERT} is missing"),
    "extra tensor": (
        changed_tensors(lambda t: t.update({"model.extra.weight": torch.ones(3)})),
        "model.extra.weight has no place",
    ),
    "wrong shape": (
        changed_tensors(lambda t: t.update({EXPERT: torch.ones(32, 16)})),
        f"{EXPERT} has shape [32, 16], but config.json gives [16, 32]",
    ),
    "fewer layers than config.json says": (
        changed_config(num_hidden_layers=3),
        "model.layers.2.input_layernorm.weight is missing",
    ),
    "whole numbers for weights": (
        changed_tensors(lambda t: t.update({EXPERT: torch.ones(16, 32, dtype=torch.int8)})),
        f"{EXPERT} has format I8",
    ),
    "gate and up in different formats": (
        changed_tensors(lambda t: t.update({EXPERT: t[EXPERT].float()})),
        "save in one format",
    ),
    "stacked experts": (changed_tensors(stacked_experts), "the experts are stacked"),
    "fp8 without scales": (
        changed_tensors(
            lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)}),
            quantization_config=FP8,
        ),
        f"{EXPERT} is fp8 without",
    ),
    "scales of another shape": (
        changed_tensors(
            lambda t: t.update(
                {
                    EXPERT: t[EXPERT].to(torch.float8_e4m3fn),
                    f"{EXPERT}_scale_inv": torch.ones(2, 2),
                }
            ),
            quantization_config=FP8,
        ),
        "_scale_inv has shape [2, 2], not [1, 2]",
    ),
    "fp8 vector": (
        changed_tensors(
            lambda t: t.update(
                {
                    "model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn),
                    "model.norm.weight_scale_inv": torch.ones(2),
                }
            ),
            quantization_config=FP8,
        ),
        "model.norm.weight is fp8 of shape [32], no matrix",
    ),
    "scales of nothing": (
        changed_tensors(
            lambda t: t.update({"model.other.weight_scale_inv": torch.ones(2, 2)}),
            quantization_config=FP8,
        ),
        "there is no weight that it scales",
    ),
    "multi-token prediction without a word": (mtp_layers, "say --mtp keep or --mtp drop"),
}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run the tool, which must refuse; returns what it said."""
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folder_is_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = BAD_FOLDERS[case]
    source, out = write_folder(tmp_path / "source", random_tensors()), tmp_path / "out"
    damage(source)
    said = refused(capsys, "to-megatron", "--hf", source, "--out", out)
    assert message in said
    assert len(said.splitlines()) < 30
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_mtp_layer_with_a_head_of_its_own_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    own_mtp_head(source)
    said = refused(capsys, "to-megatron", "--hf", source, "--out", out, "--mtp", "keep")
    assert "shared_head.head.weight differs from lm_head.weight" in said
    assert not out.exists()


def test_layout_that_does_not_divide_the_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_folder(tmp_path / "source", random_tensors())
    command = ("to-megatron", "--hf", source, "--out", tmp_path / "out")
    said = refused(capsys, *command, "--expert-parallel-size", "3")
    assert "parallel.expert_parallel_size = 3" in said
    assert "choose one of 1, 2, 4" in said


def test_existing_output_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_folder(tmp_path / "source", random_tensors()), tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    said = refused(capsys, "to-megatron", "--hf", source, "--out", out)
    assert "give another --out, or --force" in said
    assert (out / "precious").read_text() == "kept"


def test_output_that_cannot_be_made_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_folder(tmp_path / "source", random_tensors())
    (tmp_path / "file").write_text("")
    said = refused(capsys, "to-megatron", "--hf", source, "--out", tmp_path / "file" / "out")
    assert "cannot be made (Not a directory)" in said


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no settings": (lambda c: (c / "settings.yaml").unlink(), "name a whole checkpoint's"),
    "no .metadata": (lambda c: (c / ".metadata").unlink(), ".metadata does not exist"),
    "damaged .metadata": (
        lambda c: (c / ".metadata").write_bytes(b"\x80\x04damaged"),
        ".metadata cannot be read",
    ),
    "missing file": (lambda c: (c / "__0_0.distcp").unlink(), "__0_0.distcp does not exist"),
    "file cut short": (
        lambda c: os.truncate(c / "__0_0.distcp", 5000),
        "__0_0.distcp is cut short: 5000 bytes",
    ),
    "zeros in a file": (
        lambda c: (c / "__0_0.distcp").write_bytes(bytes((c / "__0_0.distcp").stat().st_size)),
        "cannot be read",
    ),
    "settings of another model": (
        lambda c: (c / "settings.yaml").write_text(
            (c / "settings.yaml").read_text().replace("num_layers: 2", "num_layers: 3")
        ),
        "decoder.layers.2.input_layernorm.weight is missing",
    ),
    "settings of another width": (
        lambda c: (c / "settings.yaml").write_text(
            (c / "settings.yaml").read_text().replace("hidden_size: 48", "hidden_size: 64")
        ),
        "decoder.layers.0.mlp.linear_fc1.weight has shape [96, 32]",
    ),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoint_is_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = BAD_CHECKPOINTS[case]
    source = write_folder(tmp_path / "source", random_tensors())
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    assert main(["to-megatron", "--hf", str(source), "--out", str(checkpoint)]) == 0
    damage(checkpoint)
    seal(checkpoint)  # as if it had been made like this
    assert message in refused(capsys, "to-hf", "--megatron", checkpoint, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("command", ["to-hf", "verify"])
def test_checkpoint_that_differs_from_its_checksums_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, checkpoint = write_folder(tmp_path / "source", random_tensors()), tmp_path / "out"
    assert main(["to-megatron", "--hf", str(source), "--out", str(checkpoint)]) == 0
    path = checkpoint / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    other = ("--out", tmp_path / "new") if command == "to-hf" else ("--hf", source)
    said = refused(capsys, command, "--megatron", checkpoint, *other)
    assert "__0_0.distcp has another content than what was saved" in said
    arguments = [command, "--no-verify", "--megatron", str(checkpoint), *map(str, other)]
    main(arguments)
    assert "than what was saved" not in capsys.readouterr().err


def test_changed_numbers_are_told_by_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, checkpoint = write_folder(tmp_path / "source", random_tensors()), tmp_path / "out"
    assert main(["to-megatron", "--hf", str(source), "--out", str(checkpoint)]) == 0
    tensors = random_tensors()
    tensors[EXPERT][3, 4] += 1
    write_folder(source, tensors)
    capsys.readouterr()
    assert main(["verify", "--hf", str(source), "--megatron", str(checkpoint)]) == 1
    assert f"{EXPERT} differs in 1 of 512 numbers" in capsys.readouterr().err


def test_full_disk_is_told_and_what_was_there_stays(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; it ends a write in the middle."""
    source, out = write_folder(tmp_path / "source", random_tensors()), tmp_path / "out"
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000));"
        "from tools.convert_checkpoint import main;"
        f"sys.exit(main(['to-megatron', '--hf', {str(source)!r}, '--out', {str(out)!r}]))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 2, finished.stderr
    assert "File too large" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not out.exists()
