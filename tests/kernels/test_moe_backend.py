"""Which backend routing and experts take, and what their interface needs."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_kanana.kernels.moe.backend import choose_fp8_experts, choose_moe_backend
from megatron_kanana.native_library import (
    HOPPER_EXPERT_WIDTH_UNIT,
    HOPPER_MAX_EXPERT_GROUPS,
    HOPPER_MAX_EXPERTS,
    HOPPER_MAX_EXPERTS_OF_A_TOKEN,
    ExpertLayerSizes,
)

MODULE = "megatron_kanana.kernels.moe.backend"


def choice(requested: str, device_type: str, **options: Any) -> str:
    """For Kanana-2's sizes in bf16 where nothing else is said."""
    dtype = options.pop("dtype", torch.bfloat16)
    sizes = dataclasses.replace(ExpertLayerSizes(2048, 768, 768, 128, 6, 1), **options)
    return choose_moe_backend(requested, device_type, dtype=dtype, sizes=sizes)


def test_auto_takes_the_compiled_operations_where_they_run(
    hopper: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert choice("auto", "cpu", dtype=torch.float32, hidden_size=5) == "csrc"
    assert "kernels of the experts: csrc (compiled operations found)" in caplog.text
    assert choice("torch", "cpu") == "torch"
    assert choice("auto", "cuda") == "csrc" and choice("csrc", "cuda") == "csrc"
    assert choice("auto", "cuda", width=96) == "torch"
    assert "torch (the CUDA kernels take multiples of 64, not a hidden size of 2048" in caplog.text
    assert choice("auto", "cuda", hidden_size=96) == "torch"
    assert choice("auto", "cuda", dtype=torch.float32) == "torch"
    assert choice("auto", "cuda", num_experts=513) == "torch"
    assert "torch (the CUDA kernels take at most 512 experts, not 513)" in caplog.text
    assert choice("auto", "cuda", num_experts_per_token=33) == "torch"
    assert choice("auto", "cuda", num_groups=64) == "torch"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    assert choice("auto", "cuda") == "torch"
    monkeypatch.setattr(f"{MODULE}.native_library_error", lambda: "not built")
    assert choice("auto", "cpu") == "torch"


def test_what_was_asked_for_and_cannot_run_is_refused_by_name(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match=r"kernels.moe_backend = csrc: .* compute in bfloat16"):
        choice("csrc", "cuda", dtype=torch.float32)
    monkeypatch.setattr(f"{MODULE}.has_operation_for", lambda *_: False)
    with pytest.raises(RuntimeError, match=r"kernels.moe_backend = csrc: .*build them again"):
        choice("csrc", "cuda")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    with pytest.raises(RuntimeError, match=r"kernels.moe_backend = csrc: a GPU is no Hopper GPU"):
        choice("csrc", "cuda")


def test_limits_are_those_the_kernels_are_compiled_for() -> None:
    header = Path(__file__).parents[2] / "csrc" / "kernels" / "moe.h"
    found = dict(re.findall(r"constexpr int (\w+) = (\d+);", header.read_text()))
    assert int(found["kMaxExperts"]) == HOPPER_MAX_EXPERTS
    assert int(found["kMaxExpertsOfAToken"]) == HOPPER_MAX_EXPERTS_OF_A_TOKEN
    assert int(found["kMaxExpertGroups"]) == HOPPER_MAX_EXPERT_GROUPS
    assert int(found["kExpertWidthUnit"]) == HOPPER_EXPERT_WIDTH_UNIT


def fp8(requested: str, **options: Any) -> bool:
    """For Kanana-2's sizes in blocks on CUDA where nothing else is said."""
    given = {"fp8": "blockwise", "backend": "csrc", "device_type": "cuda", **options}
    sizes = ExpertLayerSizes(2048, given.pop("width", 768), 768, 128, 6, 1)
    return choose_fp8_experts(requested, sizes=sizes, **given)


def test_experts_are_in_fp8_where_it_is_asked_for_and_a_cpu_leaves_it_out(
    hopper: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert fp8("fp8") and not fp8("bf16") and not fp8("bf16", fp8="none")
    assert "experts in fp8 (asked for by precision.experts)" in caplog.text
    assert not fp8("fp8", device_type="cpu", backend="torch")
    assert "experts without fp8 (a CPU has none)" in caplog.text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"fp8": "tensorwise"}, "have scales of blocks, not those of precision.fp8 = tensorwise"),
        ({"backend": "torch"}, "kernels.moe_backend is torch, and csrc alone has fp8"),
        ({"width": 192}, "multiples of 128 in fp8, not a hidden size of 2048, experts 192 wide"),
    ],
    ids=str,
)
def test_experts_in_fp8_that_cannot_be_are_refused_by_name(
    hopper: None, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RuntimeError, match=f"precision.experts = fp8: .*{reason}.* set it to bf16"):
        fp8("fp8", **options)
