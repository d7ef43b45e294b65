"""Which process of a run that stands still the others wait for, and in which operation.

What a process does is read from the Python stacks of its threads, by another of its threads: that
costs nothing while all is well, and works while the main thread waits in a collective operation. On
GPUs, where Python is ahead of the kernels, it is read from torch's flight recorder of NCCL.
"""

from __future__ import annotations

import functools
import json
import linecache
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

_COLLECTIVES = "/torch/distributed/distributed_c10d.py"
_PIPELINE = "/megatron/core/pipeline_parallel/p2p_communication.py"
_LOOKED_AT = 6  # innermost frames; waiting is done by one of the last


@dataclass(frozen=True)
class Operation:
    """An operation in which a process waits for others.

    Attributes:
        name: of torch.distributed's function, or what is waited for.
        ranks: processes that take part; empty where that is not known.
        tensor: shape and format of what is communicated; empty where that is not known.
        caller: line of code that called it.
    """

    name: str
    ranks: tuple[int, ...] = ()
    tensor: str = ""
    caller: str = ""

    def __str__(self) -> str:
        over = f" over {_ranks(self.ranks)}" if self.ranks else ""
        tensor = f" of {self.tensor}" if self.tensor else ""
        return f"{self.name}{tensor}{over}, called at {self.caller}"


@dataclass(frozen=True)
class Report:
    """What a process says of itself when the run stands still.

    Attributes:
        phase: what it does, in words, such as 'step 17'.
        seconds: for which it has done so.
        operation: in which it waits; None for one that waits in none.
        at: where its main thread is.
    """

    phase: str
    seconds: float
    operation: Operation | None
    at: str


def is_waiting(frame: FrameType) -> bool:
    """Whether a thread waits for other processes; cheap enough to ask ten times a second."""
    return _waiting_frame(frame) is not None


def current_operation(main_thread: int) -> tuple[Operation | None, str]:
    """The operation in which this process waits, and where its main thread is.

    The main thread's operation comes first: on GPUs a backward pass has threads of its own.
    """
    frames = sys._current_frames()
    own = threading.get_ident()
    others = [frame for ident, frame in frames.items() if ident not in (own, main_thread)]
    main = frames.get(main_thread)
    at = _place(main) if main is not None else "no main thread"
    for frame in ([main] if main is not None else []) + others:
        found = _waiting_frame(frame)
        if found is not None:
            return _operation(found), at
    try:
        return recorded_operation(at), at
    except (KeyError, TypeError, ValueError):  # another torch's form: the rest is told all the same
        return None, at


def nccl_trace(*, only_active: bool) -> str | None:
    """torch's flight recorder of NCCL's operations, as JSON; None in builds without NCCL.

    Args:
        only_active: leaves out operations that have ended.
    """
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
    if dump is None:
        return None
    trace: str | bytes = dump(includeCollectives=True, onlyActive=only_active)
    return trace if isinstance(trace, str) else trace.decode()


def recorded_operation(at: str) -> Operation | None:
    """The first of NCCL's operations that has not ended, by torch's flight recorder."""
    dumped = nccl_trace(only_active=True)
    if dumped is None:
        return None
    trace = json.loads(dumped)
    entries = [entry for entry in trace.get("entries", ()) if entry["state"] != "completed"]
    if not entries:
        return None
    first = min(entries, key=lambda entry: entry["record_id"])
    group = trace["pg_config"].get(str(first["process_group"][0]), {})
    shapes = ", ".join(map(str, first["input_sizes"]))
    ranks = tuple(json.loads(group.get("ranks", "[]")))
    return Operation(first["profiling_name"], ranks, shapes, at)


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


def _operation(frame: FrameType) -> Operation:
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
    return Operation("an operation started before", (), "", _place(frame))


def _members(group: Any) -> tuple[int, ...]:
    try:
        return tuple(dist.get_process_group_ranks(group))
    except (RuntimeError, ValueError, KeyError):  # not there yet, or not any more
        return ()


def _format(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _place(frame: FrameType) -> str:
    """The innermost line of this project's or megatron-core's code, else of any."""
    for each, line in traceback.walk_stack(frame):
        file = each.f_code.co_filename
        if "megatron" in file and "/torch/" not in file:
            short = file[file.index("megatron") :]
            return f"{short}:{line} ({each.f_code.co_name})"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"


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
                f" {report.seconds:.0f} s, at {report.at}"
            )
    if not lines:
        lines.append("no rank is missing: they wait in operations that do not fit together")
    together: dict[str, list[int]] = {}
    for rank, report in reports.items():
        if report is not None and report.operation is not None:
            together.setdefault(f"{report.phase}: {report.operation}", []).append(rank)
    lines += [f"{_ranks(ranks)} wait{_s(ranks)} in {what}" for what, ranks in together.items()]
    return "\n".join(lines)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _s(ranks: Sequence[int]) -> str:
    return "s" if len(ranks) == 1 else ""
