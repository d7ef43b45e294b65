"""Which operation torch's flight recorders say has not ended.

NCCL's recorder is in no build for CPUs, so what it writes is made up here, in the form of torch's
torch/csrc/distributed/c10d/FlightRecorderDetail.hpp (`dump_json`, `getCollectiveTrace`), with the
states and sequence numbers that ProcessGroupNCCL.cpp gives to operations on their own (`initWork`)
and together (`pointToPoint`, `endCoalescing`). Gloo's recorder is the same code, and is real here;
that both have the same fields is tested.
"""

from __future__ import annotations

import datetime
import json
import pickle
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megatron_kanana.model.dispatcher import _CountsOnTheirWay
from megatron_kanana.training import flight_recorder
from megatron_kanana.training.flight_recorder import Recorded, recorded
from megatron_kanana.training.operation import Operation
from megatron_kanana.training.standstill import current_operation

C10D: Any = torch._C._distributed_c10d
GROUPS = {"0": (0, 1, 2, 3), "3": (1, 3), "5": (2, 3)}
FRAMES = [
    {"name": "all_reduce", "filename": "/lib/torch/distributed/distributed_c10d.py", "line": 3245},
    {"name": "forward", "filename": "/home/user/run/megatron_kanana/model/layer.py", "line": 17},
    {"name": "main", "filename": "/home/user/run/megatron_kanana/train.py", "line": 5},
]
CALLER = "megatron_kanana/model/layer.py:17 (forward)"


def entry(number: int, name: str, state: str, group: str = "0", **fields: Any) -> dict[str, Any]:
    """One of a recorder's, with all the fields of its JSON form."""
    return {
        "record_id": number,
        "pg_id": list(GROUPS).index(group),
        "process_group": [group, f"GROUP_{group}"],
        "thread_name": "pt_main_thread",
        "thread_id": "140",
        "collective_seq_id": number,
        "p2p_seq_id": 0,
        "op_id": number,
        "profiling_name": name,
        "time_created_ns": 1000 + number,
        "input_sizes": [[16, 64]],
        "input_dtypes": ["BFloat16"],
        "output_sizes": [[16, 64]],
        "output_dtypes": ["BFloat16"],
        "state": state,
        "time_discovered_started_ns": 1 if state != "scheduled" else 0,
        "time_discovered_completed_ns": 2 if state == "completed" else 0,
        "retired": state == "completed",
        "timeout_ms": 1800000,
        "is_p2p": False,
        **fields,
    }


def together(
    number: int, names: list[str], state: str, closing: str = "nccl:coalesced"
) -> list[Any]:
    """Operations launched together, and the entry after them, which alone has a state.

    Those of sends and receives count as such; the one that ends them does not.
    """
    is_p2p = "->" in names[0] or "<-" in names[0]
    numbers = {"collective_seq_id": 900 + number * (not is_p2p), "p2p_seq_id": number * is_p2p}
    members = [
        entry(number + i, name, "scheduled", "3", **numbers, is_p2p=is_p2p)
        for i, name in enumerate(names)
    ]
    end = entry(
        number + len(names), closing, state, "3", **numbers, input_sizes=[], output_sizes=[]
    )
    return [*members, end]


@pytest.fixture
def of_nccl(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recorded]:
    """Reads a made-up record, in both of its forms."""

    def read(*entries: dict[str, Any], **fields: Any) -> Recorded:
        config = {
            name: {"name": name, "desc": f"GROUP_{name}", "ranks": str(list(ranks))}
            for name, ranks in GROUPS.items()
        }
        record: dict[str, Any] = {
            "version": "2.10",
            "pg_config": config,
            "pg_status": {},
            "nccl_comm_state": {},
        }
        if entries:  # the field is left out otherwise
            record["entries"] = list(entries)
        record |= fields
        with_stacks = {**record, "entries": [{**e, "frames": FRAMES} for e in entries]}

        def dump_json(*, includeCollectives: bool, onlyActive: bool) -> bytes:
            assert includeCollectives
            assert not onlyActive
            return json.dumps(record).encode()

        def dump(**settings: bool) -> bytes:
            assert settings["includeStackTraces"]
            return pickle.dumps(with_stacks)

        monkeypatch.setattr(C10D, "_dump_nccl_trace_json", dump_json, raising=False)
        monkeypatch.setattr(C10D, "_dump_nccl_trace", dump, raising=False)
        return recorded("nccl")

    return read


@pytest.mark.parametrize("state", ["scheduled", "started"])
def test_the_first_operation_that_has_not_ended_is_named(
    state: str, of_nccl: Callable[..., Recorded]
) -> None:
    """Without `TORCH_NCCL_ENABLE_TIMING` one in work is 'scheduled', with it 'started'."""
    found = of_nccl(
        entry(7, "nccl:broadcast", "completed"),
        entry(8, "nccl:_all_gather_base", state, "3"),
        entry(9, "nccl:all_to_all", "scheduled", "5"),
    )
    assert found.pending == Operation("nccl:_all_gather_base", (1, 3), "[16, 64]", CALLER)
    assert str(found.pending) == (
        f"nccl:_all_gather_base of [16, 64] over ranks 1, 3, called at {CALLER}"
    )


def test_an_operation_that_torch_gave_up_has_not_ended(of_nccl: Callable[..., Recorded]) -> None:
    """After torch's own time limit its entry is retired, and was never completed."""
    given_up = entry(3, "nccl:all_to_all", "scheduled", "5", retired=True)
    found = of_nccl(given_up, entry(4, "nccl:all_reduce", "scheduled"))
    assert found.pending is not None
    assert found.pending.name == "nccl:all_to_all"


SENDS = ["nccl:send 0->1", "nccl:recv 0<-1"]


def test_operations_launched_together_have_ended_with_the_entry_after_them(
    of_nccl: Callable[..., Recorded],
) -> None:
    """Their own entries stay 'scheduled' for ever."""
    ended = [
        *together(1, SENDS, "completed"),
        *together(4, ["nccl:broadcast"] * 2, "completed", "nccl:ALLGATHER_coalesced"),
    ]
    found = of_nccl(*ended, entry(9, "nccl:all_reduce", "scheduled"))
    assert found.pending == Operation("nccl:all_reduce", (0, 1, 2, 3), "[16, 64]", CALLER)
    found = of_nccl(*ended)
    assert found.pending is None
    assert found.last == Operation("nccl:broadcast", (1, 3), "[16, 64], [16, 64]")


@pytest.mark.parametrize("is_closed", [True, False])
def test_sends_and_receives_launched_together_are_named_with_ranks_of_the_job(
    is_closed: bool, of_nccl: Callable[..., Recorded]
) -> None:
    """The recorder has numbers within the group; it has no entry after them while they launch."""
    pending = together(9, SENDS, "scheduled")
    found = of_nccl(*together(1, SENDS, "completed"), *pending[: 3 if is_closed else 2])
    expected = Operation("nccl:send 1->3, nccl:recv 1<-3", (1, 3), "[16, 64], [16, 64]", CALLER)
    assert found.pending == expected


def test_a_send_on_its_own_is_named_with_its_two_ranks(of_nccl: Callable[..., Recorded]) -> None:
    """Its number counts sends and receives; the collectives' stays."""
    numbers: dict[str, Any] = {"collective_seq_id": 7, "is_p2p": True}
    first = entry(8, "nccl:send 3->1", "completed", **numbers, p2p_seq_id=1)
    found = of_nccl(first, entry(9, "nccl:send 3->0", "scheduled", **numbers, p2p_seq_id=2))
    assert found.pending == Operation("nccl:send 3->0", (0, 3), "[16, 64]", CALLER)


def test_what_is_left_of_operations_whose_entries_were_written_over_is_named(
    of_nccl: Callable[..., Recorded],
) -> None:
    found = of_nccl(together(9, SENDS, "scheduled")[-1])
    assert found.pending == Operation("nccl:coalesced", (1, 3), "", CALLER)


def test_of_many_tensors_some_are_told(of_nccl: Callable[..., Recorded]) -> None:
    """As of gradients that are summed together."""
    sizes = [[4], [5], [6], [7]]
    found = of_nccl(entry(9, "nccl:allreduce_coalesced", "scheduled", input_sizes=sizes))
    expected = Operation("nccl:allreduce_coalesced", (0, 1, 2, 3), "[4], [5], [6], ...", CALLER)
    assert found.pending == expected


def test_launches_in_random_order_are_told_by_the_first_that_has_not_ended(
    of_nccl: Callable[..., Recorded],
) -> None:
    numbers = random.Random(7)
    for _ in range(50):
        ended, total = numbers.randrange(6), 8
        entries: list[dict[str, Any]] = []
        expected = ""
        for launch in range(total):
            state = "completed" if launch < ended else "scheduled"
            if numbers.random() < 0.5:
                added = together(10 * launch + 1, SENDS * numbers.randint(1, 3), state)
                name = "nccl:send 1->3, nccl:recv 1<-3"
            else:
                name = f"nccl:operation_{launch}"
                added = [entry(10 * launch + 1, name, state, numbers.choice("05"))]
            entries += added
            expected = expected or (name if launch == ended else "")
        numbers.shuffle(entries)  # a ring, whose oldest entry may be anywhere
        found = of_nccl(*entries)
        assert found.pending is not None
        assert found.pending.name == expected


def test_without_stacks_or_in_another_form_what_can_be_told_is(
    of_nccl: Callable[..., Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = entry(9, "nccl:all_reduce", "scheduled", "3")
    of_nccl(waits)
    monkeypatch.delattr(C10D, "_dump_nccl_trace")
    assert recorded("nccl").pending == Operation("nccl:all_reduce", (1, 3), "[16, 64]")

    monkeypatch.setattr(flight_recorder, "_CALL_SITE_SECONDS", 0.05)
    monkeypatch.setattr(C10D, "_dump_nccl_trace", lambda **_: time.sleep(1), raising=False)
    begin = time.monotonic()
    assert recorded("nccl").pending == Operation("nccl:all_reduce", (1, 3), "[16, 64]")
    assert time.monotonic() - begin < 0.9

    assert of_nccl(waits, pg_config={}).pending == Operation(
        "nccl:all_reduce", (), "[16, 64]", CALLER
    )
    assert of_nccl() == Recorded()
    assert of_nccl(entries=[{"record_id": 1}]) == Recorded()
    monkeypatch.delattr(C10D, "_dump_nccl_trace_json")
    assert recorded("nccl") == Recorded()


def test_ranks_of_a_group_that_the_recorder_does_not_know_are_torchs(
    of_nccl: Callable[..., Recorded],
) -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    try:
        group = dist.new_group([0])
        unknown = entry(9, "nccl:all_reduce", "scheduled", process_group=[group.group_name, ""])
        pending = of_nccl(unknown, pg_config={}).pending
    finally:
        dist.destroy_process_group()
    assert pending == Operation("nccl:all_reduce", (0,), "[16, 64]", CALLER)


class Waiting:
    """A thread that waits until it is let go, as the main thread of a process that stands still."""

    def __init__(self, wait: Callable[[], Any]) -> None:
        self._thread = threading.Thread(target=wait, daemon=True)
        self._thread.start()
        time.sleep(0.1)

    @property
    def ident(self) -> int:
        """Number of the thread."""
        assert self._thread.ident is not None
        return self._thread.ident

    def join(self) -> None:
        """Wait for its end."""
        self._thread.join(20.0)
        assert not self._thread.is_alive()


class Event:
    """A GPU's, that comes when it is told to."""

    def __init__(self) -> None:
        self.comes = threading.Lock()
        self.comes.acquire()

    def synchronize(self) -> None:
        """Hold the thread up."""
        with self.comes:
            pass


def test_the_operation_of_nccl_is_named_that_a_copy_from_the_gpu_waits_for(
    of_nccl: Callable[..., Recorded],
) -> None:
    """The dispatcher waits for counts of tokens, which NCCL gathers: an event, not an operation."""
    counts = object.__new__(_CountsOnTheirWay)
    counts._event, counts._on_host = Event(), torch.zeros(2)

    def token_dispatch() -> torch.Tensor:
        return counts.wait()

    main = Waiting(token_dispatch)
    of_nccl(
        entry(8, "nccl:all_reduce", "completed"), entry(9, "nccl:_all_gather_base", "scheduled")
    )
    operation, at, last = current_operation(main.ident)
    assert at.startswith("megatron_kanana/model/dispatcher.py:")
    assert at.endswith(" (wait)")
    assert operation == Operation(
        "nccl:_all_gather_base", (0, 1, 2, 3), "[16, 64]", CALLER, waits_at=at
    )
    assert last == ""

    of_nccl(entry(8, "nccl:all_reduce", "completed", "3"))
    operation, _, last = current_operation(main.ident)
    assert operation is not None
    assert str(operation).startswith("an operation started before, waited for at ")
    assert last == "nccl:all_reduce of [16, 64] over ranks 1, 3"
    counts._event.comes.release()
    main.join()


def test_a_busy_process_tells_the_last_operation_that_has_ended(
    of_nccl: Callable[..., Recorded],
) -> None:
    event = Event()
    main = Waiting(event.synchronize)
    of_nccl(entry(8, "nccl:all_reduce", "completed", "3"))
    operation, at, last = current_operation(main.ident)
    assert operation is None
    assert at.endswith("(synchronize)")
    assert last == "nccl:all_reduce of [16, 64] over ranks 1, 3"
    event.comes.release()
    main.join()


def pair_over_gloo() -> list[Any]:
    """Two processes' ends of one group, both here."""
    store = HashStore()
    groups: list[Any] = [None, None]

    def join(rank: int) -> None:
        groups[rank] = dist.ProcessGroupGloo(store, rank, 2, datetime.timedelta(seconds=20))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return groups


def ended_over_gloo() -> Recorded:
    """What is recorded once nothing is pending: gloo's threads note an end after it is seen."""
    end = time.monotonic() + 30
    while (found := recorded("gloo")).pending is not None and time.monotonic() < end:
        time.sleep(0.01)
    return found


def test_an_operation_of_gloo_that_was_started_before_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Real ones: torch's recorder has the fields that are made up above."""
    monkeypatch.setattr(flight_recorder, "_CALL_SITE_SECONDS", 60.0)  # it imports modules first
    first, second = pair_over_gloo()
    tensor = torch.ones(3, 5)
    for work in [group.allreduce([torch.ones(7)]) for group in (first, second)]:
        work.wait()
    assert ended_over_gloo().pending is None
    work = first.allreduce([tensor])

    def wait() -> None:
        work.wait()

    main = Waiting(wait)
    operation, _, last = current_operation(main.ident)
    assert last == ""
    assert operation is not None
    assert (operation.name, operation.tensor) == ("gloo:all_reduce", "[3, 5]")
    here = "(test_an_operation_of_gloo_that_was_started_before_is_named)"
    assert "test_flight_recorder.py:" in operation.caller
    assert operation.caller.endswith(here)
    assert "test_flight_recorder.py:" in operation.waits_at

    read = json.loads(flight_recorder.flight_record("gloo") or "{}")["entries"][-1]
    assert set(entry(1, "nccl:all_reduce", "scheduled")) <= set(read)
    with_stacks = pickle.loads(C10D._dump_fr_trace(includeStackTraces=True))["entries"][-1]
    assert set(with_stacks) == {*read, "frames"}
    assert set(with_stacks["frames"][0]) == set(FRAMES[0])

    second.allreduce([torch.ones(3, 5)]).wait()
    main.join()
    found = ended_over_gloo()
    assert found.pending is None
    assert found.last is not None
    assert (found.last.name, found.last.tensor) == ("gloo:all_reduce", "[3, 5]")
