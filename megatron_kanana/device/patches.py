"""Named changes to megatron-core and torch, each with its reason.

Five lists: what megatron-core needs because there is no CUDA (`CPU_PATCHES`), what is broken in
megatron-core wherever Transformer Engine is absent (`NO_TRANSFORMER_ENGINE_PATCHES`), what the
installed version of megatron-core needs (`compatibility.version_patches`), what keeps files from
running code (`SAFETY_PATCHES`), and what keeps processes from outliving the run
(`PROCESS_PATCHES`). Nothing else in the project changes another package.
`tests/parallel/test_patches.py` switches each of the first three off and shows that training still
fails without it; `tests/unit/test_safe_loading.py` and `tests/faults/test_kills.py` show what the
others prevent.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from .compatibility import results_queue_name, version_patches
from .patch import Patch

CPU = torch.device("cpu")


def apply_patches(device: str, disabled: Collection[str] = ()) -> list[Patch]:
    """Apply the patches that `device` needs; returns those applied.

    Args:
        device: 'cpu' or 'cuda'.
        disabled: names to leave out, for the test that shows each is needed.
    """
    patches = [
        *(CPU_PATCHES if device == "cpu" else ()),
        *NO_TRANSFORMER_ENGINE_PATCHES,
        *version_patches(device),
        *SAFETY_PATCHES,
        *PROCESS_PATCHES,
    ]
    applied = [patch for patch in patches if patch.name not in disabled]
    for patch in applied:
        patch.apply()
    return applied


def _names_cuda(device: Any) -> bool:
    if isinstance(device, int):
        return True
    return torch.device(device).type == "cuda"


def _current_device() -> None:
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]


def _synchronize() -> None:
    torch.cuda.synchronize = lambda device=None: None


def _tensor_factories() -> None:
    for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and _names_cuda(device):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)  # for copies to a GPU
        return factory(*args, **kwargs)

    return wrapper


def _tensor_cuda() -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _tensor_type_name() -> None:
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if isinstance(result, str) and not result.startswith("torch.cuda."):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.type = type_name  # type: ignore[method-assign,assignment]


def _random_state() -> None:
    import megatron.core.tensor_parallel.random as megatron_random

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.default_generator.get_state()

    def set_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.default_generator.set_state(new_state)

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    class CpuRNGStatesTracker(megatron_random.CudaRNGStatesTracker):
        """megatron-core's tracker, without its check that the CPU generator stood still."""

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            outside = get_state()
            set_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = get_state()
                set_state(outside)

    torch.cuda.get_rng_state = get_state
    torch.cuda.set_rng_state = set_state
    torch.cuda.manual_seed = manual_seed
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
    megatron_random.CudaRNGStatesTracker = CpuRNGStatesTracker


def _recompute_without_fp8() -> None:
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    constructor: Any = CheckpointWithoutOutput.__init__
    constructor.__defaults__ = (None,)


def _weights_only() -> None:
    from .safe_unpickling import force_weights_only

    force_weights_only()


def _checkpoint_metadata() -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    from .safe_unpickling import SafeFileSystemReader

    reader: Any = FileSystemReader
    reader.read_metadata = SafeFileSystemReader.read_metadata


def _no_results_queue() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    setattr(filesystem_async, results_queue_name(), lambda: None)


CPU_PATCHES = (
    Patch(
        "current_device",
        "megatron-core allocates on torch.cuda.current_device(), which raises without CUDA",
        _current_device,
    ),
    Patch(
        "synchronize",
        "checkpoint writing and batched sends call torch.cuda.synchronize()",
        _synchronize,
    ),
    Patch(
        "tensor_factories",
        'schedules, optimizer and clipping build tensors with a literal device="cuda"',
        _tensor_factories,
    ),
    Patch(
        "tensor_cuda",
        "the last pipeline stage moves its copy of the embedding with Tensor.cuda()",
        _tensor_cuda,
    ),
    Patch(
        "tensor_type_name",
        "the optimizer sorts parameters by the strings torch.cuda.FloatTensor and BFloat16Tensor",
        _tensor_type_name,
    ),
    Patch(
        "random_state",
        "the RNG tracker saves and restores CUDA generators, and warns when the CPU's moves",
        _random_state,
    ),
)

NO_TRANSFORMER_ENGINE_PATCHES = (
    Patch(
        "recompute_without_fp8",
        "CheckpointWithoutOutput takes any fp8 but None, its own default False too, for fp8",
        _recompute_without_fp8,
    ),
)

SAFETY_PATCHES = (
    Patch(
        "weights_only",
        "torch's planner loads objects that are no tensors with weights_only=False",
        _weights_only,
    ),
    Patch(
        "checkpoint_metadata",
        "torch reads the .metadata of a checkpoint with a pickle that runs any code",
        _checkpoint_metadata,
    ),
)

PROCESS_PATCHES = (
    Patch(
        "no_results_queue",
        "megatron-core starts a Python process for the results of its own checkpoint writers, which"
        " are not used; a killed run would leave it behind",
        _no_results_queue,
    ),
)
