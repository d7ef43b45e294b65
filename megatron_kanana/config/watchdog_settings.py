"""Settings of the group `watchdog`: runs that stand still, slow processes, and the end of time."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import setting

HANGS = "hangs"
"""In the run's folder: what the watchdog found, in a folder for each start that it ended."""


@dataclass(kw_only=True)
class WatchdogSettings:
    """What ends a run that hangs, names a slow process, and leaves before a deadline."""

    enabled: bool = setting(
        True,
        help="a thread of each process ends a run that stands still, for a restart, and says which"
        " process the others wait for",
    )
    timeout: float = setting(
        600.0, help="seconds without a new step after which the run stands still", above=0.0
    )
    long_timeout: float = setting(
        1800.0,
        help="the same for what takes longer than a step: start-up with its first step, an"
        " evaluation, a checkpoint, the end of the run",
        above=0.0,
    )
    other_job_timeout: float = setting(
        120.0,
        help="seconds that a start waits for another job in the run's folder to end, such as one"
        " whose node was lost, before it is refused",
        minimum=0.0,
    )
    straggler_interval: int = setting(
        100,
        help="steps between comparisons of the processes' own time, without their waiting for one"
        " another; 0 compares never",
        minimum=0,
    )
    straggler_factor: float = setting(
        1.5, help="a process whose own time is this many times the median is named", above=1.0
    )
    time_limit: str | None = setting(
        None,
        help="[days-]hours:minutes:seconds, or seconds, since the launch: the run saves and leaves"
        " in time, to be started again; null never. SLURM jobs know their own limit",
    )
