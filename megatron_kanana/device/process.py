"""Starting and ending one process of the job: device, process groups, random state."""

from __future__ import annotations

import datetime
import logging
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from megatron_kanana.config import Environment, Settings, resolve_device, resolve_precision
from megatron_kanana.config.exit_status import START

from .orphans import end_children_with_me, end_with_parent
from .patches import apply_patches

logger = logging.getLogger(__name__)

TIMEOUT = datetime.timedelta(minutes=30)
"""After which a process gives up waiting for others, at the earliest."""

PRECISION_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Device:
    """Where this process computes.

    Attributes:
        torch_device: the CUDA device of this process, or the CPU.
        dtype: format of weights and activations.
    """

    torch_device: torch.device
    dtype: torch.dtype

    @property
    def is_cuda(self) -> bool:
        """Whether this process computes on a GPU."""
        return self.torch_device.type == "cuda"


def prepare_device(settings: Settings, environment: Environment) -> Device:
    """Choose the device and apply its patches; must come before megatron-core is imported."""
    kind = resolve_device(settings.device, environment)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # else the parent may be a shell that may go
        end_with_parent()
    end_children_with_me()
    quiet_libraries()
    if kind == "cuda":
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # the watchdog reads it
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local_rank)
        torch_device = torch.device("cuda", local_rank)
    else:
        torch_device = torch.device("cpu")
        torch.compiler.set_stance("force_eager")  # compiling takes longer than a tiny run
        if "OMP_NUM_THREADS" not in os.environ or environment.local_world_size > 1:
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // environment.local_world_size))
    for patch in apply_patches(kind):
        logger.debug("patch %s: %s", patch.name, patch.reason)
    dtype = PRECISION_DTYPES[resolve_precision(settings.precision.compute, kind)]
    return Device(torch_device, dtype)


def quiet_libraries() -> None:
    """Silence warnings that no user of this project can act on: code of megatron-core and torch."""
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.c10d_logger")
    warnings.filterwarnings("ignore", message="Please use DTensor instead")
    warnings.filterwarnings(
        "ignore", message=r"barrier\(\): using the device under current context"
    )
    warnings.filterwarnings("ignore", message=".*pynvml package is deprecated.*")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)


def initialize_process_groups(settings: Settings, device: Device) -> None:
    """Join the other processes and lay the model over them."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    # Without device_id, each NCCL group takes GPU memory when it is first used, and the many groups
    # of megatron-core that a layout never uses take none.
    # The watchdog, which knows more, is to speak first.
    timeout = max(TIMEOUT, datetime.timedelta(seconds=1.2 * settings.watchdog.long_timeout))
    dist.init_process_group("nccl" if device.is_cuda else "gloo", timeout=timeout, **_meeting())
    lay_over_processes(settings)
    parallel = settings.parallel
    world_size = dist.get_world_size()
    logger.info(
        "device: %s, %s; %d x tensor, %d x context, %d x pipeline, %d x data, experts over %d:"
        " %d process%s",
        device.torch_device,
        "bf16" if device.dtype == torch.bfloat16 else "fp32",
        parallel.tensor_parallel_size,
        parallel.context_parallel_size,
        parallel.pipeline_parallel_size,
        settings.data_parallel_size(world_size),
        parallel.expert_parallel_size,
        world_size,
        "es" if world_size > 1 else "",
    )
    torch.manual_seed(settings.seed)
    model_parallel_cuda_manual_seed(settings.seed)


def lay_over_processes(settings: Settings, *, with_gloo_groups: bool = True) -> None:
    """Give each process its place in the layout (megatron-core's parallel_state)."""
    from megatron.core import parallel_state

    parallel = settings.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline_stages if parallel.virtual_pipeline_stages > 1 else None
        ),
        expert_model_parallel_size=parallel.expert_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        create_gloo_process_groups=with_gloo_groups,
    )


def _meeting() -> dict[str, Any]:
    """Where the processes meet, and the place of this one among them."""
    if "RANK" not in os.environ:  # no launcher started it: a job of its own
        store = TCPStore("127.0.0.1", 0, world_size=1, is_master=True)  # 0 is any free port
        return {"store": store, "rank": 0, "world_size": 1}
    store, rank, world_size = next(rendezvous("env://", timeout=TIMEOUT))
    # torchrun keeps its store over restarts; what processes before these wrote there, such as the
    # addresses they listened at, must not be taken for what these write.
    of_start = PrefixStore(f"start_{start_name()}", store)
    return {"store": of_start, "rank": rank, "world_size": world_size}


def start_name() -> str:
    """Another text for each start of the run's processes, the same for all of them."""
    return os.environ.get(START) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def destroy_process_groups() -> None:
    """Leave the job."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
