"""Which process of a run that stands still the others wait for, and in which operation.

What a process waits for is read from torch's flight recorder of NCCL, as on GPUs Python is ahead of
the kernels: the line at which the main thread waits for the GPU names no operation. Else, and on a
CPU, it is read from the Python stacks of its threads, by another of its threads: that costs nothing
while all is well, and works while the main thread waits in a collective operation.
"""

from __future__ import annotations

import dataclasses
import functools
import linecache
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from .flight_recorder import recorded
from .operation import Operation, place, ranks_in_words

_COLLECTIVES = "/torch/distributed/distributed_c10d.py"
_PIPELINE = "/megatron/core/pipeline_parallel/p2p_communication.py"
_LOOKED_AT = 6  # innermost frames; waiting is done by one of the last


@dataclass(frozen=True)
class Report:
    """What a process says of itself when the run stands still.

    Attributes:
        phase: what it does, in words, such as 'step 17'.
        seconds: for which it has done so.
        operation: in which it waits; None for one that waits in none.
        at: where its main thread is.
        last: the last operation that a flight recorder has, where it has none that has not ended
            and the stacks name none either; empty where there is none.
    """

    phase: str
    seconds: float
    operation: Operation | None
    at: str
    last: str = ""

    @property
    def last_in_words(self) -> str:
        """What is added to where the process is."""
        return f"; the last operation recorded, {self.last}, has ended" if self.last else ""


def is_waiting(frame: FrameType) -> bool:
    """Whether a thread waits for other processes; cheap enough to ask ten times a second."""
    return _waiting_frame(frame) is not None


def current_operation(main_thread: int) -> tuple[Operation | None, str, str]:
    """The operation in which this process waits, where its main thread is, and `Report.last`.

    An operation of NCCL that has not ended comes first, whatever the main thread does: it may have
    gone on, or wait for the GPU. Of the stacks the main thread's comes first.
    """
    frames = sys._current_frames()
    own = threading.get_ident()
    others = [frame for ident, frame in frames.items() if ident not in (own, main_thread)]
    main = frames.get(main_thread)
    at = _place(main) if main is not None else "no main thread"
    of_nccl = recorded("nccl")
    if of_nccl.pending is not None:
        waits_at = "" if of_nccl.pending.caller == at else at
        return dataclasses.replace(of_nccl.pending, waits_at=waits_at), at, ""
    last = str(of_nccl.last or "")
    for frame in ([main] if main is not None else []) + others:
        found = _waiting_frame(frame)
        if found is None:
            continue
        operation = _operation(found)
        if operation is not None:
            return operation, at, ""
        of_gloo = recorded("gloo")
        if of_gloo.pending is not None:
            return dataclasses.replace(of_gloo.pending, waits_at=_place(found)), at, ""
        unknown = Operation("an operation started before", waits_at=_place(found))
        return unknown, at, last or str(of_gloo.last or "")
    return None, at, last


def _waiting_frame(frame: FrameType | None) -> FrameType | None:
    for _ in range(_LOOKED_AT):
        if frame is None:
            return None
        if _waits_at(frame.f_code.co_filename, frame.f_lineno):
            return frame
        frame = frame.f_back
    return None


@functools.lru_cache(maxsize=4096)
def _waits_at(file: str, line: int) -> bool:
    """Whether code that is at this line waits for other processes; a step passes few lines."""
    if file.endswith((_COLLECTIVES, _PIPELINE)):
        return True
    return ".wait()" in linecache.getline(file, line) and "/threading.py" not in file


def _operation(frame: FrameType) -> Operation | None:
    """What is waited for there; None for one that was started elsewhere."""
    name, file = frame.f_code.co_name, frame.f_code.co_filename
    values = frame.f_locals
    caller = frame.f_back
    while caller is not None and "/torch/distributed/" in caller.f_code.co_filename:
        caller = caller.f_back
    at = _place(caller) if caller is not None else ""
    if file.endswith(_COLLECTIVES):
        tensor = next((v for v in values.values() if isinstance(v, torch.Tensor)), None)
        described = "" if tensor is None else f"{list(tensor.shape)} {_format(tensor)}"
        return Operation(name, _members(values.get("group")), described, at)
    if file.endswith(_PIPELINE):
        from megatron.core import parallel_state

        members = _members(parallel_state.get_pipeline_model_parallel_group())
        return Operation("send and receive between pipeline stages", members, "", _place(frame))
    return None


def _members(group: Any) -> tuple[int, ...]:
    try:
        return tuple(dist.get_process_group_ranks(group))
    except (RuntimeError, ValueError, KeyError):  # not there yet, or not any more
        return ()


def _format(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _place(frame: FrameType) -> str:
    stack = traceback.walk_stack(frame)
    return place((each.f_code.co_filename, line, each.f_code.co_name) for each, line in stack)


def culprits(reports: Mapping[int, Report | None]) -> list[int]:
    """The processes that the others wait for.

    Silent ones, if any; else those that others wait for and that wait for nobody; else, where
    all wait in different operations, none can be told.

    Args:
        reports: by rank; None for a process that gave none.
    """
    if silent := [rank for rank, report in reports.items() if report is None]:
        return silent
    told = {rank: report for rank, report in reports.items() if report is not None}
    busy = [rank for rank, report in told.items() if report.operation is None]
    waiting = {rank: report.operation for rank, report in told.items() if report.operation}
    awaited = {rank for operation in waiting.values() for rank in operation.ranks}
    return [rank for rank in busy if rank in awaited] or busy


def describe(
    reports: Mapping[int, Report | None], places: Mapping[int, str], states: Mapping[int, str]
) -> str:
    """Words for the log: who is waited for, and who waits where.

    Args:
        reports: by rank; None for a process that gave none.
        places: host and process number of each rank.
        states: what is known of silent ones, such as 'it is stopped'.
    """
    lines = []
    for rank in culprits(reports):
        report = reports[rank]
        if report is None:
            state = states.get(rank, "its process or its node is frozen or gone")
            lines.append(f"rank {rank} ({places.get(rank, 'never seen')}) does not answer: {state}")
        else:
            lines.append(
                f"rank {rank} ({places[rank]}) is waited for: {report.phase} for"
                f" {report.seconds:.0f} s, at {report.at}{report.last_in_words}"
            )
    if not lines:
        lines.append(f"no rank is missing: {_why_all_wait(reports)}")
    together: dict[str, list[int]] = {}
    for rank, report in reports.items():
        if report is not None and report.operation is not None:
            what = f"{report.phase}: {report.operation}{report.last_in_words}"
            together.setdefault(what, []).append(rank)
    lines += [
        f"{ranks_in_words(ranks)} wait{'s' if len(ranks) == 1 else ''} in {what}"
        for what, ranks in together.items()
    ]
    return "\n".join(lines)


def _why_all_wait(reports: Mapping[int, Report | None]) -> str:
    waiting = {rank: r.operation for rank, r in reports.items() if r is not None and r.operation}
    for operation in waiting.values():
        others = [waiting.get(rank) for rank in operation.ranks]
        if not others or not all(o is not None and _is_same(o, operation) for o in others):
            return "they wait in operations that do not fit together"
    return "all wait in the same operations: a GPU, or what is between them, stands still"


def _is_same(one: Operation, other: Operation) -> bool:
    """One that sends and one that receives have other names."""
    sends = ["send" in operation.name or "recv" in operation.name for operation in (one, other)]
    return one.ranks == other.ranks and (one.name == other.name or all(sends))
