"""Linear layers, rotary embeddings, norms: what is chosen, why, what it is the same as."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding

from megatron_kanana.config import Environment, load_settings
from megatron_kanana.config.norm_sizes import norm_limits_passed
from megatron_kanana.config.rotary_sizes import fused_rope_limits_passed
from megatron_kanana.device import Device
from megatron_kanana.kernels import dense
from megatron_kanana.kernels.backend import Backends
from megatron_kanana.kernels.dense import (
    choose_linear_backend,
    choose_norm_backend,
    choose_rope_backend,
)
from megatron_kanana.model.megatron_config import transformer_config
from megatron_kanana.model.rotary import any_number_of_tokens, rotary_options

BF16, FP32 = torch.bfloat16, torch.float32
GPU = Environment(cuda_device_count=1)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the packages that are there."""
    packages = {"transformer_engine", "triton"}
    find = SimpleNamespace(find_spec=lambda name: name if name in packages else None)
    monkeypatch.setattr(dense, "importlib", SimpleNamespace(util=find))
    return packages


@pytest.mark.parametrize(
    ("device", "dtype", "package", "backend", "reason"),
    [
        ("cuda", BF16, True, "te", "transformer-engine found"),
        ("cuda", BF16, False, "torch", "not installed"),
        ("cuda", FP32, True, "torch", "for bfloat16"),
        ("cpu", BF16, True, "torch", "for CUDA devices"),
    ],
)
def test_linear_layers_are_chosen_with_a_reason(
    device: str,
    dtype: torch.dtype,
    package: bool,
    backend: str,
    reason: str,
    installed: set[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    if not package:
        installed.discard("transformer_engine")
    assert choose_linear_backend("auto", device, dtype=dtype) == backend
    (line,) = caplog.messages
    assert line.startswith(f"linear layers: {backend} (")
    assert reason in line
    assert choose_linear_backend("torch", device, dtype=dtype) == "torch"
    if backend == "torch":
        with pytest.raises(RuntimeError, match=reason):
            choose_linear_backend("te", device, dtype=dtype)


def test_a_cpu_leaves_fp8_out_and_says_so(
    installed: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    choose_linear_backend("auto", "cpu", dtype=BF16, fp8="blockwise")
    choose_linear_backend("auto", "cuda", dtype=BF16, fp8="blockwise")
    on_cpu, on_gpu = caplog.messages
    assert on_cpu.endswith("in bfloat16: precision.fp8 = blockwise is left out, a CPU has no fp8")
    assert on_gpu == "linear layers: te (transformer-engine found), in fp8, blockwise"
    installed.clear()
    with pytest.raises(RuntimeError, match=r"precision\.fp8 = blockwise: .* not installed"):
        choose_linear_backend("auto", "cuda", dtype=BF16, fp8="blockwise")


@pytest.mark.parametrize(
    ("device", "dtype", "limits", "backend", "reason"),
    [
        ("cuda", BF16, [], "triton", "triton found"),
        ("cuda", BF16, ["24 heads"], "torch", "takes 24 heads"),
        ("cuda", BF16, [], "torch", "chosen by timing"),
        ("cuda", FP32, [], "torch", "for bfloat16"),
        ("cpu", BF16, [], "torch", "for CUDA devices"),
    ],
)
def test_rotary_embeddings_are_chosen_with_a_reason(
    device: str,
    dtype: torch.dtype,
    limits: list[str],
    backend: str,
    reason: str,
    installed: set[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    options: dict[str, Any] = {"dtype": dtype, "limits_passed": limits}
    options["deterministic"] = reason == "chosen by timing"
    assert choose_rope_backend("auto", device, **options) == backend
    (line,) = caplog.messages
    assert line.startswith(f"rotary embeddings: {backend} (")
    assert reason in line
    if backend == "torch":
        with pytest.raises(RuntimeError, match=reason):
            choose_rope_backend("triton", device, **options)


def test_the_rotary_kernel_takes_powers_of_two() -> None:
    def passed(*words: str) -> list[str]:
        return list(fused_rope_limits_passed(load_settings(words, GPU)))

    assert not passed()
    (of_heads,) = passed("model.num_attention_heads=24")
    assert "not 24" in of_heads
    (of_width,) = passed("model.qk_nope_head_dim=48")
    assert "model.qk_nope_head_dim" in of_width
    assert passed("model.qk_rope_head_dim=2")


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "built", "limits", "backend", "reason"),
    [
        ("cuda", BF16, (9, 0), True, [], "csrc", "compiled operations found"),
        ("cuda", BF16, (9, 0), False, [], "torch", "build them again"),
        ("cuda", BF16, (9, 0), True, ["a width of 20"], "torch", "take a width of 20"),
        ("cuda", BF16, (8, 0), True, [], "torch", "no Hopper GPU"),
        ("cuda", FP32, (9, 0), True, [], "torch", "in bfloat16"),
        ("cpu", BF16, (9, 0), True, [], "torch", "for Hopper GPUs"),
    ],
)
def test_norms_are_chosen_with_a_reason(
    device: str,
    dtype: torch.dtype,
    capability: tuple[int, int],
    built: bool,
    limits: list[str],
    backend: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setattr(dense, "has_operation_for", lambda *_: built)
    caplog.set_level(logging.INFO)
    options: dict[str, Any] = {"dtype": dtype, "limits_passed": limits}
    assert choose_norm_backend("auto", device, **options) == backend
    (line,) = caplog.messages
    assert line.startswith(f"norms and the embedding's gradient: {backend} (")
    assert reason in line
    if backend == "torch":
        with pytest.raises(RuntimeError, match=reason):
            choose_norm_backend("csrc", device, **options)


def test_norms_of_widths_that_are_multiples_of_eight_are_taken() -> None:
    def passed(*words: str) -> list[str]:
        return list(norm_limits_passed(load_settings(words, GPU)))

    assert not passed()
    (of_latent,) = passed("model.kv_lora_rank=20")
    assert "model.kv_lora_rank" in of_latent and of_latent.endswith("not 20")
    assert passed("model.q_lora_rank=12") and passed("model.hidden_size=32768")


@pytest.mark.parametrize("base", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("width", [16, 64])
def test_yarn_by_one_is_rope_bit_by_bit(
    width: int, base: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    words = [f"model.rotary_base={base}", f"model.qk_rope_head_dim={width}"]
    settings = load_settings([*words, "data.sequence_length=4096"], GPU)
    options = rotary_options(settings, "triton")
    assert options["rope_type"] == "yarn"
    assert options["apply_rope_fusion"]
    assert rotary_options(settings, "torch")["rope_type"] == "rope"
    on_cpu: dict[str, Any] = {"rotary_base": base, "use_cpu_initialization": True}
    plain = RotaryEmbedding(width, 1.0, **on_cpu)(4096)
    of_yarn = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    names = ("original_max_position_embeddings", *of_yarn)
    yarn, scale = YarnRotaryEmbedding(
        width,
        scaling_factor=options["rotary_scaling_factor"],
        **{name: options[name] for name in names},
        **on_cpu,
    )(4096)
    assert scale == 1.0
    assert torch.equal(yarn, plain)


def test_an_extended_context_keeps_yarns_settings() -> None:
    settings = load_settings(["model.yarn_factor=8", "model.yarn_original_context=128"], GPU)
    fused, plain = (rotary_options(settings, backend) for backend in ("triton", "torch"))
    assert fused == {**plain, "apply_rope_fusion": True}
    assert (fused["beta_fast"], fused["beta_slow"]) == (32.0, 1.0)
    assert fused["original_max_position_embeddings"] == 128


@pytest.mark.parametrize(
    ("recipe", "form"), [("blockwise", "e4m3"), ("tensorwise", "hybrid"), ("mxfp8", "e4m3")]
)
def test_recipes_reach_megatron_core(
    recipe: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.transformer import transformer_config as of_megatron

    monkeypatch.setattr(of_megatron, "is_te_min_version", lambda *_: True)
    words = [f"precision.fp8={recipe}", "precision.bf16_layers_at_end=1"]
    settings = load_settings(words, Environment())
    where = Device(torch.device("cpu"), BF16)
    backends = Backends("torch", "torch", linear="te")
    config: Any = transformer_config(settings, where, backends)
    assert (config.fp8, config.fp8_recipe) == (form, recipe)
    assert config.first_last_layers_bf16
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (0, 1)
    with any_number_of_tokens(config):
        inside = config.fp8, config.apply_rope_fusion
    assert inside == (None, False)
    assert config.fp8 == form
    assert transformer_config(settings, where).fp8 is None
