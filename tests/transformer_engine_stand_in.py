"""A stand-in for Transformer Engine, which needs CUDA: megatron-core's layers on it run on a CPU.

`Linear` computes in torch what Transformer Engine's does without fp8 (2.11, `module/linear.py`),
with its side effects: weight gradients in `main_grad`, which a first microbatch overwrites, and a
pickle as extra state. It remembers how it was built and in which fp8 context it computed. Of
everything else there are empty classes, as megatron-core only inherits from them.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

NAME = "transformer_engine"
ABSENT = (f"{NAME}.pytorch.optimizers",)
"""Without these megatron-core uses torch's optimizers, as without Transformer Engine."""

built: list[dict[str, Any]] = []
"""Keyword arguments of each linear layer, with its class."""
contexts: list[tuple[str, int, str | None]] = []
"""Class and number of inputs of each layer that computed, and its fp8 recipe."""
checkpointed: list[str] = []
"""The functions whose inner values are computed again in the backward pass."""
_recipe: list[Any] = [None]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, layer: Any, first: bool) -> Any:
        ctx.save_for_backward(x)
        ctx.weight, ctx.layer, ctx.first = weight, layer, first
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        (x,) = ctx.saved_tensors
        weight = ctx.weight
        of_weight = gradient.flatten(0, -2).t() @ x.flatten(0, -2)
        if ctx.layer.fuse_wgrad_accumulation:
            if ctx.first:
                weight.main_grad.copy_(of_weight)
            else:
                weight.main_grad.add_(of_weight)
            weight.grad_added_to_main_grad = True
            of_weight = torch.full_like(weight, float("nan"))  # nobody is to look at it
        return gradient @ weight, of_weight, None, None


class Linear(torch.nn.Module):
    """On one process."""

    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__()
        assert options.pop("tp_size") == 1
        built.append({"class": type(self).__name__, "in": in_features, "out": out_features})
        built[-1].update({name: options[name] for name in ("bias", "parallel_mode", "return_bias")})
        self.in_features, self.out_features = in_features, out_features
        self.parallel_mode = options["parallel_mode"]
        self.fuse_wgrad_accumulation = options["fuse_wgrad_accumulation"]
        self.save_original_input = False
        weight = torch.empty(out_features, in_features, dtype=options["params_dtype"])
        self.weight = torch.nn.Parameter(weight)
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        options["init_method"](self.weight)

    def forward(self, x: torch.Tensor, is_first_microbatch: bool) -> torch.Tensor:
        recipe = _recipe[-1]
        contexts.append((type(self).__name__, self.in_features, recipe and type(recipe).__name__))
        out: torch.Tensor = _Product.apply(x, self.weight, self, is_first_microbatch)
        return out

    def get_extra_state(self) -> torch.Tensor:
        state = pickle.dumps({"recipe": "of the last forward pass"})
        return torch.frombuffer(bytearray(state), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("a pickle of a checkpoint would be run")


@contextmanager
def fp8_autocast(*, enabled: bool, fp8_recipe: Any = None, fp8_group: Any = None) -> Iterator[None]:
    """As Transformer Engine's; nothing computes in fp8."""
    _recipe.append(fp8_recipe if enabled else None)
    try:
        yield
    finally:
        _recipe.pop()


def checkpoint(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Recompute, as Transformer Engine does it around fp8 contexts."""
    checkpointed.append(function.__name__)
    assert options.keys() == {"distribute_saved_activations", "get_rng_state_tracker", "tp_group"}
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True)


def cpu_offload(*_: Any, **__: Any) -> tuple[Any, None]:
    """None, which megatron-core asks for."""
    return nullcontext(), None


class Recipe:
    """Remembers its options."""

    def __init__(self, **options: Any) -> None:
        self.options = options


class _Module(types.ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (Recipe if self.__name__.endswith("recipe") else torch.nn.Module,), {})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != NAME or name in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        contents: dict[str, dict[str, Any]] = {
            NAME: {"__version__": "2.11.0"},
            f"{NAME}.pytorch": {"Linear": Linear, "fp8_autocast": fp8_autocast},
            f"{NAME}.pytorch.fp8": {"fp8_autocast": fp8_autocast},
            f"{NAME}.pytorch.distributed": {"checkpoint": checkpoint},
            f"{NAME}.pytorch.cpu_offload": {"get_cpu_offload_context": cpu_offload},
            f"{NAME}.common.recipe": {"Format": types.SimpleNamespace(E4M3="e4m3", HYBRID="mix")},
        }
        vars(module).update(contents.get(module.__name__, {}))


def install() -> None:
    """Have it imported in place of Transformer Engine; before megatron-core is."""
    assert "megatron.core" not in sys.modules
    sys.meta_path.insert(0, _Finder())
    for name in ("pytorch", "pytorch.fp8", "pytorch.distributed", "pytorch.ops", "common.recipe"):
        importlib.import_module(f"{NAME}.{name}")
