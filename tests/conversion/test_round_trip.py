"""What goes into a checkpoint comes out again, bit by bit, also after an interruption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_kanana.checkpoint.hugging_face import to_hugging_face, to_megatron
from megatron_kanana.checkpoint.hugging_face.safetensors_source import dequantize
from megatron_kanana.config.manifest import seal
from tests.checkpoints import saved_tensors
from tests.conversion.folders import CONFIG, Tensors, random_tensors, write_folder
from tools.convert_checkpoint import main


def convert(*arguments: str | Path) -> int:
    """Run the tool in this process."""
    return main([str(argument) for argument in arguments])


def loaded(folder: Path) -> Tensors:
    """Every tensor of a Hugging Face folder, read by the library."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_identical(first: Tensors, second: Tensors) -> None:
    """Same names, formats and bits."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name


def test_round_trip_is_bit_identical(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = random_tensors()
    tensors["model.norm.weight"][3] = float("nan")  # bits are kept whatever they mean
    source = write_folder(tmp_path / "source", tensors)
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    assert convert("to-megatron", "--hf", source, "--out", checkpoint) == 0
    assert convert("to-hf", "--megatron", checkpoint, "--out", back, "--max-shard-gb", "2e-5") == 0
    assert len(list(back.glob("*.safetensors"))) > 3
    assert_identical(loaded(back), tensors)
    assert convert("verify", "--hf", back, "--megatron", checkpoint) == 0
    assert "the same, bit by bit" in capsys.readouterr().out
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["back", "checkpoint", "source"]


def test_gate_up_and_experts_lie_where_megatron_core_has_them(tmp_path: Path) -> None:
    tensors = random_tensors()
    source = write_folder(tmp_path / "source", tensors)
    assert convert("to-megatron", "--hf", source, "--out", tmp_path / "checkpoint") == 0
    ours = saved_tensors(tmp_path / "checkpoint")
    dense = [tensors[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(ours["decoder.layers.0.mlp.linear_fc1.weight"], torch.cat(dense))
    expert = [
        tensors[f"model.layers.1.mlp.experts.3.{name}_proj.weight"] for name in ("gate", "up")
    ]
    stacked = ours["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"]
    assert torch.equal(stacked[3], torch.cat(expert))
    embedding = ours["embedding.word_embeddings.weight"]
    assert embedding.shape == (384, 32)  # 300 rows, padded to a multiple of 128
    assert torch.equal(embedding[:300], tensors["model.embed_tokens.weight"])
    assert not embedding[300:].any()


def test_multi_token_prediction_is_kept_or_dropped_as_asked(tmp_path: Path) -> None:
    tensors = random_tensors(mtp=True)
    source = write_folder(tmp_path / "source", tensors, {**CONFIG, "num_nextn_predict_layers": 1})
    for mtp in ("keep", "drop"):
        checkpoint, back = tmp_path / mtp, tmp_path / f"{mtp}_back"
        assert convert("to-megatron", "--hf", source, "--out", checkpoint, "--mtp", mtp) == 0
        assert convert("to-hf", "--megatron", checkpoint, "--out", back) == 0
    assert_identical(loaded(tmp_path / "keep_back"), tensors)
    assert convert("verify", "--hf", source, "--megatron", tmp_path / "keep") == 0
    assert_identical(loaded(tmp_path / "drop_back"), random_tensors())


def test_layers_that_config_json_promises_and_nobody_stored_are_not_expected(
    tmp_path: Path,
) -> None:
    """transformers writes num_nextn_predict_layers = 1 for models whose layer it does not have."""
    config = {**CONFIG, "num_nextn_predict_layers": 1}
    source = write_folder(tmp_path / "source", random_tensors(), config)
    assert convert("to-megatron", "--hf", source, "--out", tmp_path / "checkpoint") == 0


def test_fp8_blocks_are_dequantised(tmp_path: Path) -> None:
    tensors = random_tensors()
    name = "model.layers.0.mlp.up_proj.weight"
    weight = tensors[name].to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2) + 0.5  # 48 x 32 in blocks of 20 x 16
    tensors |= {name: weight, f"{name}_scale_inv": scales}
    quantization = {"quant_method": "fp8", "weight_block_size": [20, 16]}
    source = write_folder(
        tmp_path / "source", tensors, {**CONFIG, "quantization_config": quantization}
    )
    assert convert("to-megatron", "--hf", source, "--out", tmp_path / "checkpoint") == 0
    ours = saved_tensors(tmp_path / "checkpoint")["decoder.layers.0.mlp.linear_fc1.weight"][48:]
    wide = scales.repeat_interleave(20, 0)[:48].repeat_interleave(16, 1)
    assert torch.equal(ours, (weight.double() * wide.double()).float().to(torch.bfloat16))
    assert torch.equal(ours, dequantize(weight, scales, (20, 16)))


def test_gains_of_a_zero_centred_model_are_stored_less_one(tmp_path: Path) -> None:
    tensors = {name: tensor.float() for name, tensor in random_tensors().items()}
    source = write_folder(tmp_path / "source", tensors)
    checkpoint = tmp_path / "checkpoint"
    assert convert("to-megatron", "--hf", source, "--out", checkpoint) == 0
    settings = checkpoint / "settings.yaml"
    text = settings.read_text()
    settings.write_text(text.replace("zero_centered_gamma: false", "zero_centered_gamma: true"))
    seal(checkpoint)
    assert convert("to-hf", "--megatron", checkpoint, "--out", tmp_path / "back") == 0
    back = loaded(tmp_path / "back")
    for name, tensor in tensors.items():
        is_gain = "norm" in name
        assert torch.equal(back[name], tensor + 1 if is_gain else tensor), name


def test_asked_for_format_is_written_and_biases_stay(tmp_path: Path) -> None:
    tensors = random_tensors()
    source = write_folder(tmp_path / "source", tensors)
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    assert convert("to-megatron", "--hf", source, "--out", checkpoint) == 0
    assert convert("to-hf", "--megatron", checkpoint, "--out", back, "--dtype", "fp32") == 0
    assert_identical(loaded(back), {name: tensor.float() for name, tensor in tensors.items()})


class PowerCut(BaseException):
    """Ends the process's work on the spot, like a kill."""


def interrupt_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which can be called only so often."""
    left = iter(range(calls))

    def limited(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise PowerCut
        return function(*arguments)

    return limited


@pytest.mark.parametrize("calls", [0, 1, 7, 25, 40])
def test_an_interrupted_conversion_goes_on_and_ends_alike(
    calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_megatron, "PART_BYTES", 4000)
    tensors = random_tensors()
    source = write_folder(tmp_path / "source", tensors)
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    for model, target, arguments in (
        (to_megatron.HuggingFaceModel, checkpoint, ("to-megatron", "--hf", source)),
        (to_hugging_face.MegatronModel, back, ("to-hf", "--megatron", checkpoint)),
    ):
        command: list[str | Path] = [*arguments, "--out", target]
        if arguments[0] == "to-hf":
            command += ["--max-shard-gb", "4e-6"]
        read = model.read
        with monkeypatch.context() as patch:
            patch.setattr(model, "read", interrupt_after(calls, read))
            with pytest.raises(PowerCut):
                convert(*command)
        assert not target.exists()
        reads: list[object] = []
        with monkeypatch.context() as patch:

            def counted(self: Any, placement: Any, read: Any = read, reads: Any = reads) -> Any:
                reads.append(placement)
                return read(self, placement)

            patch.setattr(model, "read", counted)
            assert convert(*command) == 0
        # A part or file that was whole is not read again; at most one was under way.
        assert len(tensors) - calls <= len(reads) <= len(tensors) - calls + 12
        assert not target.with_name(f"{target.name}.partial").exists()
    assert_identical(loaded(back), tensors)


def test_another_source_is_not_mixed_with_an_interrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_megatron, "PART_BYTES", 4000)
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    sources = [write_folder(tmp_path / f"source{i}", random_tensors(i)) for i in range(2)]
    with monkeypatch.context() as patch:
        read = to_megatron.HuggingFaceModel.read
        patch.setattr(to_megatron.HuggingFaceModel, "read", interrupt_after(30, read))
        with pytest.raises(PowerCut):
            convert("to-megatron", "--hf", sources[0], "--out", checkpoint)
    assert convert("to-megatron", "--hf", sources[1], "--out", checkpoint) == 0
    assert convert("to-hf", "--megatron", checkpoint, "--out", back) == 0
    assert_identical(loaded(back), random_tensors(1))


def test_force_replaces_only_by_something_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "checkpoint"
    sources = [write_folder(tmp_path / f"source{i}", random_tensors(i)) for i in range(2)]
    assert convert("to-megatron", "--hf", sources[0], "--out", checkpoint) == 0
    command = ("to-megatron", "--hf", sources[1], "--out", checkpoint, "--force")
    with monkeypatch.context() as patch:
        read = to_megatron.HuggingFaceModel.read
        patch.setattr(to_megatron.HuggingFaceModel, "read", interrupt_after(9, read))
        with pytest.raises(PowerCut):
            convert(*command)
    assert convert("verify", "--hf", sources[0], "--megatron", checkpoint) == 0
    assert convert(*command) == 0
    assert convert("verify", "--hf", sources[1], "--megatron", checkpoint) == 0
    assert convert("verify", "--hf", sources[0], "--megatron", checkpoint) == 1
