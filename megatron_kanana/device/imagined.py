"""One process of a job that is not running: it knows its place, and its weights take no memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_kanana.config import Environment, Settings

from .process import Device, destroy_process_groups, lay_over_processes, prepare_device


@contextmanager
def imagined_processes(settings: Settings) -> Iterator[Device]:
    """Let megatron-core build models on torch's meta device, which has shapes and no numbers.

    Must come before megatron-core is imported. What it yields says how the settings compute.
    """
    on_cpu = dataclasses.replace(
        settings,
        device="cpu",
        precision=dataclasses.replace(settings.precision, compute="bf16"),
    )
    where = prepare_device(on_cpu, Environment())
    before = torch.cuda.current_device
    meta = torch.device("meta")
    torch.cuda.current_device = lambda: meta  # type: ignore[assignment,return-value]
    try:
        with meta:
            yield where
    finally:
        torch.cuda.current_device = before


@contextmanager
def imagined_process(settings: Settings, rank: int, world_size: int) -> Iterator[None]:
    """Be process `rank` of `world_size`; collectives do nothing.

    Must be inside `imagined_processes`. May be entered for one rank after another.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        lay_over_processes(settings, with_gloo_groups=False)
        with torch.device("cpu"):  # states of random generators
            model_parallel_cuda_manual_seed(settings.seed)
        yield
    finally:
        destroy_process_groups()
