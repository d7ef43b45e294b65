"""Layers whose quantisers are csrc's: their results, and what stays with Transformer Engine."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from megatron_kanana.kernels import fp8_blockwise
from megatron_kanana.model.linear_layers import quantize_dense_by_csrc


class Storage:
    """What Float8BlockwiseQTensorStorage takes."""

    def __new__(
        cls,
        rowwise_data: torch.Tensor | None,
        rowwise_scale_inv: torch.Tensor | None,
        columnwise_data: torch.Tensor | None,
        columnwise_scale_inv: torch.Tensor | None,
        fp8_dtype: str,
        quantizer: Any,
        is_2D_scaled: bool,
        data_format: str,
        *args: Any,
        **kwargs: Any,
    ) -> Storage:
        made = object.__new__(cls)
        made.tensors = rowwise_data, rowwise_scale_inv, columnwise_data, columnwise_scale_inv
        made.others = fp8_dtype, is_2D_scaled, data_format, kwargs
        return made

    tensors: tuple[Any, ...]
    others: tuple[Any, ...]


class Tensor(Storage):
    """What Float8BlockwiseQTensor takes."""


class Quantizer:
    """The attributes of Float8BlockQuantizer."""

    block_len = 128
    block_scaling_dim = 1
    all_gather_usage = False
    amax_epsilon = 0.0
    force_pow_2_scales = rowwise_usage = columnwise_usage = internal = True
    dtype = "e4m3"

    def quantize_impl(self, tensor: torch.Tensor) -> Any:
        return "theirs"


PACKAGE = "transformer_engine.pytorch.tensor"
MODULE = f"{PACKAGE}.float8_blockwise_tensor"
STORAGE_MODULE = f"{PACKAGE}.storage.float8_blockwise_tensor_storage"
VALUES = torch.zeros(64, 2, 256, dtype=torch.bfloat16)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Usages that our kernel was asked for, on a machine that has it."""
    modules: dict[str, dict[str, Any]] = {
        "transformer_engine": {},
        "transformer_engine.pytorch": {},
        PACKAGE: {},
        f"{PACKAGE}.storage": {},
        STORAGE_MODULE: {"Float8BlockwiseQTensorStorage": Storage},
        MODULE: {
            "Float8BlockScaleTensorFormat": types.SimpleNamespace(GEMM_READY="ready"),
            "Float8BlockwiseQTensor": Tensor,
            "Float8BlockQuantizer": type("Quantizer", (Quantizer,), dict(vars(Quantizer))),
            "TE_DType": types.SimpleNamespace(kFloat8E4M3="e4m3"),
        },
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    found = []

    def quantize(values: torch.Tensor, *, rowwise: bool, columnwise: bool) -> Any:
        assert not values.requires_grad
        found.append((rowwise, columnwise))
        return "data", "scales", "transposed", "transposed scales"

    monkeypatch.setattr(fp8_blockwise, "quantize_blocks", quantize)
    monkeypatch.setattr(fp8_blockwise, "native_library_error", lambda: None)
    monkeypatch.setattr(fp8_blockwise, "hopper_error", lambda: None)
    monkeypatch.setattr(fp8_blockwise, "has_operation_for", lambda *_: True)
    monkeypatch.setattr(fp8_blockwise, "_is_on_gpu", lambda _: True)
    return found


class Layer(torch.nn.Module):
    """What of a layer of Transformer Engine's makes its quantisers."""

    fuse_wgrad_accumulation = True

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind
        self.quantizers: dict[str, list[Any]] = {}

    def set_meta_tensor(self, fwd: bool, recipe: Any) -> None:
        self.quantizers["scaling_fwd" if fwd else "scaling_bwd"] = [self.kind() for _ in range(3)]


def quantizer(**attributes: Any) -> Any:
    """The last one of a layer's backward pass."""
    layer = Layer(vars(sys.modules[MODULE])["Float8BlockQuantizer"])
    quantize_dense_by_csrc(torch.nn.ModuleDict({"linear_proj": layer}))
    for fwd in (True, False):
        layer.set_meta_tensor(fwd, "recipe")
    made = layer.quantizers["scaling_bwd"][-1]
    vars(made).update(attributes)
    return made


def test_results_are_transformer_engines(calls: list[Any]) -> None:
    both = quantizer().quantize_impl(VALUES)
    assert type(both) is Storage
    assert both.tensors == ("data", "scales", "transposed", "transposed scales")
    assert both.others == ("e4m3", False, "ready", {})
    of_rows = quantizer(internal=False, columnwise_usage=False).quantize_impl(
        VALUES.clone().requires_grad_()
    )
    assert type(of_rows) is Tensor
    assert of_rows.tensors == ("data", "scales", None, None)
    shape = {"shape": VALUES.shape, "dtype": torch.bfloat16}
    assert of_rows.others == ("e4m3", False, "ready", shape)
    of_columns = quantizer(rowwise_usage=False).quantize_impl(VALUES)
    assert of_columns.tensors == (None, None, "transposed", "transposed scales")
    assert calls == [(True, True), (True, False), (False, True)]


@pytest.mark.parametrize(
    ("attributes", "values"),
    [
        ({"block_scaling_dim": 2}, VALUES),
        ({"block_len": 64}, VALUES),
        ({"all_gather_usage": True}, VALUES),
        ({"force_pow_2_scales": False}, VALUES),
        ({"amax_epsilon": 1e-3}, VALUES),
        ({"dtype": "e5m2"}, VALUES),
        ({"rowwise_usage": False, "columnwise_usage": False}, VALUES),
        ({}, VALUES.float()),
        ({}, VALUES[:3]),
        ({}, VALUES[..., :192].contiguous()),
        ({}, VALUES.transpose(0, 1)),
        ({}, VALUES[:0]),
        ({}, torch.zeros(128, dtype=torch.bfloat16)),
    ],
)
def test_others_are_left_to_transformer_engine(
    attributes: dict[str, Any], values: torch.Tensor, calls: list[Any]
) -> None:
    assert quantizer(**attributes).quantize_impl(values) == "theirs"
    assert not calls


def test_quantisers_of_other_recipes_stay() -> None:
    class Tensorwise:
        """Float8CurrentScalingQuantizer."""

        def quantize_impl(self, tensor: torch.Tensor) -> Any:
            return "theirs"

    layer = Layer(Tensorwise)
    fp8_blockwise.quantize_by_csrc(layer)
    layer.set_meta_tensor(True, "recipe")
    assert all(not vars(made) for made in layer.quantizers["scaling_fwd"])


def test_nothing_is_replaced_where_it_cannot_be(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8_blockwise, "has_operation_for", lambda *_: False)
    assert quantizer().quantize_impl(VALUES) == "theirs"
    monkeypatch.setattr(fp8_blockwise, "has_operation_for", lambda *_: True)
    monkeypatch.setattr(sys.modules[STORAGE_MODULE], "Float8BlockwiseQTensorStorage", object)
    assert fp8_blockwise.blockwise_error() == "another Transformer Engine than 2.11"
    assert quantizer().quantize_impl(VALUES) == "theirs"
    assert not calls
