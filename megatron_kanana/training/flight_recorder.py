"""What torch's flight recorders know of operations: the first that has not ended, and the last.

NCCL's operations and gloo's have a recorder each. The form of what they write is that of
torch/csrc/distributed/c10d/FlightRecorderDetail.hpp. What matters here:

- an operation of NCCL has ended when its state is 'completed'. 'started' is known only where torch
  measures times, so that one in work is 'scheduled' too. gloo's operations have no state; they are
  'retired' when they have ended.
- of operations that are launched together each has an entry, whose state never changes, and after
  them comes one, 'nccl:coalesced' or 'nccl:ALLGATHER_coalesced', whose state is that of all. They
  have the same two sequence numbers, which no other launch of their process group has.
- the JSON form leaves out where an operation was called; the other one has it, but imports modules
  to tell it, which takes long where files do.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from .operation import Operation, place

logger = logging.getLogger(__name__)

Recorder = Literal["nccl", "gloo"]
Entry = dict[str, Any]

_C10D: Any = distributed_c10d
_DUMPS = {"nccl": "_dump_nccl_trace", "gloo": "_dump_fr_trace"}
_CALL_SITE_SECONDS = 1.0
_SHAPES = 3  # told of one launch
_PEERS = re.compile(r"(\d+)(->|<-)(\d+)")


@dataclass(frozen=True)
class Recorded:
    """What a recorder has.

    Attributes:
        pending: the first operation that has not ended, if any.
        last: the last one, if any.
    """

    pending: Operation | None = None
    last: Operation | None = None


def flight_record(recorder: Recorder) -> str | None:
    """All that a recorder has, as JSON; None in builds without the backend."""
    dump = getattr(torch._C._distributed_c10d, f"{_DUMPS[recorder]}_json", None)
    if dump is None:
        return None
    record: str | bytes = dump(includeCollectives=True, onlyActive=False)
    return record if isinstance(record, str) else record.decode()


def recorded(recorder: Recorder) -> Recorded:
    """The first operation that has not ended, and the last one; nothing if it cannot be read.

    Operations launched before the first pending one have ended. So it waits for no other one of
    this process, but for other processes, or for what this GPU computes.
    """
    try:
        record = json.loads(flight_record(recorder) or "{}")
        launches = _launches(record.get("entries", ()))
        if not launches:
            return Recorded()
        last = _operation(record, launches[-1])
        pending = next((launch for launch in launches if not _has_ended(launch)), None)
        if pending is None:
            return Recorded(last=last)
        call_site = _call_site(recorder, pending[0]["record_id"])
        return Recorded(_operation(record, pending, call_site), last)
    except Exception as error:  # another torch's form: the rest is told all the same
        logger.debug("the flight recorder of %s cannot be read: %s", recorder, error)
        return Recorded()


def _launches(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries by what was launched together, in the order in which that was."""
    launches: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: entry["record_id"]):
        key = entry["pg_id"], entry["collective_seq_id"], entry["p2p_seq_id"]
        launches.setdefault(key, []).append(entry)
    return list(launches.values())


def _has_ended(launch: Sequence[Entry]) -> bool:
    last = launch[-1]
    if last["profiling_name"].startswith("gloo:"):
        return bool(last["retired"])
    return bool(last["state"] == "completed")


def _operation(record: Entry, launch: Sequence[Entry], call_site: str = "") -> Operation:
    together = [entry for entry in launch if not entry["profiling_name"].endswith("coalesced")]
    named = together or launch
    group = _members(record, named[0]["process_group"][0])
    names: dict[str, None] = {}
    ranks: set[int] = set()
    for entry in named:
        name = entry["profiling_name"]
        if group and (peers := _PEERS.search(name)):  # numbered within the group
            one, other = group[int(peers[1])], group[int(peers[3])]
            name = f"{name[: peers.start()]}{one}{peers[2]}{other}{name[peers.end() :]}"
            ranks |= {one, other}
        names[name] = None
    shapes = [str(shape) for entry in named for shape in entry["input_sizes"]]
    more = ["..."] if len(shapes) > _SHAPES else []
    tensor = ", ".join(shapes[:_SHAPES] + more)
    return Operation(", ".join(names), tuple(sorted(ranks)) or group, tensor, call_site)


def _members(record: Entry, group: str) -> tuple[int, ...]:
    """Ranks of a process group; not every backend tells the recorder."""
    if known := json.loads(record.get("pg_config", {}).get(group, {}).get("ranks") or "[]"):
        return tuple(known)
    try:
        return tuple(dist.get_process_group_ranks(_C10D._resolve_process_group(group)))
    except (RuntimeError, ValueError, KeyError):  # not there any more
        return ()


def _call_site(recorder: Recorder, record_id: int) -> str:
    """Line of code that called an operation; empty where it is not found in time."""
    found: list[str] = []

    def look() -> None:
        try:
            dump = getattr(torch._C._distributed_c10d, _DUMPS[recorder])
            dumped = dump(includeCollectives=True, includeStackTraces=True, onlyActive=True)
            (entry,) = (e for e in pickle.loads(dumped)["entries"] if e["record_id"] == record_id)
            found.append(place((f["filename"], f["line"], f["name"]) for f in entry["frames"]))
        except Exception as error:
            logger.debug("where operation %d was called cannot be told: %s", record_id, error)

    thread = threading.Thread(target=look, name="call site", daemon=True)
    thread.start()
    thread.join(_CALL_SITE_SECONDS)
    return found[0] if found else ""
