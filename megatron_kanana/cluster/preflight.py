"""Before a run: is every node what it should be, and as fast as the others?

    srun --ntasks-per-node=8 … python -m megatron_kanana.cluster.preflight --nodes n1 n2 …
    torchrun --nnodes 2 --nproc-per-node 8 … -m megatron_kanana.cluster.preflight --nodes n1 n2

One process for each of the run's, by the variables of torchrun (RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT). The first one collects what each node says of itself;
nodes without a fault measure clocks and bandwidths together; what is wrong is printed by name. A
node that is silent or hangs is bad after the time limit and holds nobody up for longer.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from megatron_kanana.config.cluster_settings import PreflightSettings

from .measure import Place, measure
from .nodes import (
    Measured,
    Node,
    Wanted,
    faults_of_answers,
    faults_of_measurements,
    look,
)

T = TypeVar("T")


class Meeting:
    """What the processes tell one another, by way of the first.

    Args:
        timeout: seconds that any of them waits for another.
    """

    def __init__(self, timeout: float) -> None:
        rank = int(os.environ["RANK"])
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.processes = int(os.environ["LOCAL_WORLD_SIZE"])
        self.node = rank // self.processes
        self.timeout = timeout
        self.is_first = rank == 0
        self.is_first_of_node = self.local_rank == 0
        self.store = self.join(serve=self.is_first)

    def join(self, *, serve: bool = False) -> TCPStore:
        """A connection to the first process; one that waits holds up whatever else goes over it."""
        return TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=serve,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=self.timeout),
        )

    def tell(self, what: str, value: Any) -> None:
        """Tell a node's dataclass, or plain values."""
        self.store.set(what, json.dumps(_plain(value)))

    def hear(self, what: str) -> Any:
        """Wait for what the first process tells once it has collected."""
        end = time.monotonic() + 3 * self.timeout
        while not self.store.check([what]):
            if time.monotonic() > end:
                raise TimeoutError(f"the first process did not tell {what}")
            time.sleep(0.05)
        return json.loads(self.store.get(what))

    def collect(self, what: str, nodes: Sequence[int], make: Callable[..., T]) -> list[T | None]:
        """What each of some nodes tells, None for those that have not by the time limit."""
        end = time.monotonic() + self.timeout
        told: dict[int, T] = {}
        while len(told) < len(nodes) and time.monotonic() < end:
            for node in nodes:
                if node not in told and self.store.check([f"{what}/{node}"]):
                    told[node] = make(**json.loads(self.store.get(f"{what}/{node}")))
            time.sleep(0.05)
        return [told.get(node) for node in nodes]


def main() -> int:
    """Take part; the first process judges. Returns 1 there where no node is good."""
    options = parse_arguments()
    meeting = Meeting(options.timeout)
    meeting.store.add(f"processes/{meeting.node}", 1)
    if meeting.is_first_of_node:
        node = look(options.folders)
        while meeting.store.add(f"processes/{meeting.node}", 0) < meeting.processes:
            time.sleep(0.05)  # a node whose processes have not all come has not answered
        meeting.tell(f"answer/{meeting.node}", node)
    # A collective operation can hang for good; the first process must judge nevertheless.
    threading.Thread(target=take_part, args=(meeting, options), daemon=True).start()
    status = 0
    if meeting.is_first:
        status = judge(meeting, options)
        meeting.tell("end", True)
        time.sleep(1.0)  # the others hear it from this process
    else:
        meeting.hear("end")
    sys.stdout.flush()
    os._exit(status)


def take_part(meeting: Meeting, options: argparse.Namespace) -> None:
    """Measure, if this process's node is among those without a fault."""
    sound: list[int] = meeting.hear("measuring")
    if meeting.node not in sound:
        return
    place = Place(
        tuple(options.nodes[node] for node in sound),
        sound.index(meeting.node),
        meeting.local_rank,
        meeting.processes,
    )
    store = PrefixStore("measure", meeting.join())
    measured = measure(place, store, int(options.bandwidth_size * 2**20), options.timeout)
    if meeting.is_first_of_node:
        meeting.tell(f"measured/{meeting.node}", measured)


def judge(meeting: Meeting, options: argparse.Namespace) -> int:
    """Collect, judge, print and write; the exit status."""
    names: list[str] = options.nodes
    wanted = Wanted(
        options.gpus,
        options.minimum_free_disk,
        options.maximum_clock_difference,
        options.minimum_bandwidth,
    )
    everyone = range(len(names))
    answers = dict(zip(names, meeting.collect("answer", everyone, Node), strict=True))
    faults = faults_of_answers(answers, wanted)
    sound = [index for index in everyone if not faults[names[index]]]
    meeting.tell("measuring", sound)
    results = meeting.collect("measured", sound, Measured)
    measured = {names[index]: result for index, result in zip(sound, results, strict=True)}
    faults |= faults_of_measurements(measured, wanted)
    good = [name for name in names if not faults[name]]
    bad = [name for name in names if faults[name]]
    for name in names:
        verdict = f"BAD: {'; '.join(faults[name])}" if faults[name] else "good"
        print(f"pre-flight: {name} is {verdict}{_speeds(measured, name)}")
    report = {
        name: {
            "faults": faults[name],
            "answer": _plain(answers[name]),
            "measured": _plain(measured.get(name)),
        }
        for name in names
    }
    if options.report is not None:
        path = str(options.report)
        Path(path + ".json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        Path(path + ".bad").write_text("".join(f"{name}\n" for name in bad), "utf-8")
        # Last: who finds it finds the others too.
        Path(path + ".good").write_text("".join(f"{name}\n" for name in good), "utf-8")
    return 0 if good else 1


def _plain(value: Any) -> Any:
    """For JSON."""
    return dataclasses.asdict(value) if isinstance(value, (Node, Measured)) else value


def _speeds(measured: Mapping[str, Measured | None], name: str) -> str:
    """What was measured of a node, for a person."""
    result = measured.get(name)
    if result is None:
        return ""
    inside = [] if result.inside is None else [f"{result.inside:.2f} GB/s inside"]
    between = [f"{speed:.2f} GB/s with {other}" for other, speed in result.between.items()]
    words = ", ".join([*inside, *between])
    return f" ({words})" if words else ""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    defaults = PreflightSettings()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", nargs="+", required=True, help="names of all nodes, in order")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs a node must have")
    parser.add_argument(
        "--folders", nargs="*", default=[], help="folders that must be writable and have room"
    )
    parser.add_argument("--report", type=Path, help="beginning of .good, .bad and .json files")
    for field in dataclasses.fields(PreflightSettings):
        if field.name != "enabled":
            parser.add_argument(
                f"--{field.name.replace('_', '-')}",
                type=float,
                default=getattr(defaults, field.name),
                help=field.metadata["help"],
            )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
