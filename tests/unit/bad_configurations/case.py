"""What a bad configuration is, and what must be said about it."""

from __future__ import annotations

import dataclasses

from megatron_kanana.config import Environment

ONE_CPU = Environment()
CUDA_MACHINE = Environment(cuda_device_count=1)


@dataclasses.dataclass(frozen=True)
class Bad:
    """One bad configuration and what must be said about it.

    Attributes:
        overrides: words of the command line; `{tmp}` is a folder of the test.
        setting: name the message must give.
        value: value it must show.
        remedy: part of the remedy.
        environment: machine and launch.
    """

    overrides: tuple[str, ...]
    setting: str
    value: str
    remedy: str
    environment: Environment = ONE_CPU


def world(size: int) -> Environment:
    """A launch of `size` processes on CPUs."""
    return Environment(world_size=size, local_world_size=size)
