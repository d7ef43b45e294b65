"""Ends a run that stands still, so that it can be started again, and says why it did.

Each process has a thread that looks into torch's store for an alarm. A process that has not begun a
new step (or evaluation, or save) for too long raises it: every process tells what it waits for; the
first to raise the alarm finds out for whom; those that do not answer are killed by the ones on
their machine; and all write their Python stacks into the run's folder and leave with status 86.
Where this thread itself cannot run, because another one keeps Python's lock or the store keeps
silent, faulthandler's takes its place: it writes the stacks to stderr and ends the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from megatron_kanana.config import Environment, Settings
from megatron_kanana.config.exit_status import HUNG
from megatron_kanana.config.watchdog_settings import HANGS
from megatron_kanana.device.process import start_name

from .flight_recorder import flight_record
from .operation import Operation
from .processes import Place, kill, state_of, this_place
from .standstill import Report, current_operation, describe
from .stragglers import OwnTime

logger = logging.getLogger(__name__)

SAMPLE_SECONDS = 0.1
_SHORTEST_BEAT, _LONGEST_BEAT = 0.2, 10.0
_STORE_SECONDS = 20.0


class Watchdog:
    """Watches this process from the beginning of a `with` block to its end.

    Attributes:
        own_time: of the steps, without waiting for others.

    Args:
        settings: of the run.
        environment: place of this process.
    """

    def __init__(self, settings: Settings, environment: Environment) -> None:
        self.settings = settings.watchdog
        self.own_time = OwnTime()
        self._folder = Path(settings.run_dir) / HANGS
        self._rank, self._world_size = environment.rank, environment.world_size
        self._main_thread = threading.get_ident()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._phase, self._since, self._limit = "start-up", time.monotonic(), 0.0
        self._in_step = False
        self._store: Any = None
        timeout = self.settings.timeout
        self._beat_seconds = min(max(timeout / 20, _SHORTEST_BEAT), _LONGEST_BEAT)
        self.enter("start-up")

    def __enter__(self) -> Watchdog:
        if self.settings.enabled:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        if self.settings.enabled:
            faulthandler.cancel_dump_traceback_later()

    def enter(self, phase: str) -> None:
        """Something begins that may take `watchdog.long_timeout`, as may the step after it."""
        self._in_step = False
        self._phase, self._since, self._limit = phase, time.monotonic(), self.settings.long_timeout
        self._is_first = True

    def enter_step(self, step: int) -> None:
        """A step begins."""
        limit = self.settings.long_timeout if self._is_first else self.settings.timeout
        self._phase, self._since, self._limit = f"step {step}", time.monotonic(), limit
        self._in_step = not self._is_first
        self._is_first = False

    @contextlib.contextmanager
    def longer(self, phase: str) -> Iterator[None]:
        """Inside a step, something that may take `watchdog.long_timeout`."""
        before, limit, in_step = self._phase, self._limit, self._in_step
        self.enter(phase)
        yield
        self._phase, self._since, self._limit = before, time.monotonic(), limit
        self._in_step, self._is_first = in_step, False

    def _watch(self) -> None:
        try:
            self._look()
        finally:  # without this thread nobody would put it off
            faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        next_beat = 0.0
        last = time.monotonic()
        while not self._stopped.wait(SAMPLE_SECONDS):
            now = time.monotonic()
            if self._in_step:
                self.own_time.sample(sys._current_frames()[self._main_thread], now - last)
            last = now
            if now < next_beat:
                continue
            next_beat = now + self._beat_seconds
            faulthandler.dump_traceback_later(self._limit + 5 * self._beat_seconds + 5.0, exit=True)
            if now - self._since > self._limit:
                self._raise_alarm()
            self._try(self._beat)

    def _beat(self) -> None:
        if self._world_size == 1:
            return
        if self._store is None:
            self._store = self._connect()
            self._store.set(f"place/{self._rank}", json.dumps(dataclasses.asdict(this_place())))
        if self._store.check(["alarm"]):
            self._answer(int(self._store.get("alarm")))

    def _connect(self) -> Any:
        """A connection of its own: one that waits holds up whatever else goes over it."""
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=_STORE_SECONDS),
        )
        return PrefixStore(f"watchdog/{start_name()}", store)

    def _try(self, function: Callable[[], None]) -> bool:
        """Whether the store answers. Its process may be the one that is frozen."""
        try:
            function()
        except Exception as error:
            logger.debug("the watchdog's store does not answer: %s", error)
            return False
        return True

    def _raise_alarm(self) -> None:
        """This process has stood still for too long."""
        first = [self._rank]

        def agree() -> None:
            first[0] = int(self._store.compare_set("alarm", "", str(self._rank)))

        if self._world_size == 1 or self._store is None or not self._try(agree):
            self._leave_alone()
        self._answer(first[0])

    def _leave_alone(self) -> None:
        """Without the others: they are none, or the store does not answer."""
        report = self._own_report()
        where = f"in {report.operation}" if report.operation else f"at {report.at}"
        text = f"rank {self._rank} waits {where}{report.last_in_words}"
        if self._world_size > 1:
            text += (
                "\nthe processes' store does not answer: the process that holds it, torchrun's of"
                " the first node or rank 0, or its node is frozen or gone"
            )
        self._tell(text)
        self._dump_stacks()
        os._exit(HUNG)

    def _answer(self, first: int) -> None:
        """Tell what this process does, hear or find the verdict, and leave."""
        answer = dataclasses.asdict(self._own_report())
        if self._try(lambda: self._store.set(f"report/{self._rank}", json.dumps(answer))):
            judge = self._judge if first == self._rank else self._hear
            self._try(judge)
        self._dump_stacks()  # at the end, as the run's folder may be what hangs
        os._exit(HUNG)

    def _own_report(self) -> Report:
        operation, at, last = current_operation(self._main_thread)
        return Report(self._phase, time.monotonic() - self._since, operation, at, last)

    def _judge(self) -> None:
        ranks = range(self._world_size)
        missing = set(ranks)
        end = time.monotonic() + 3 * self._beat_seconds + 1.0
        while missing and time.monotonic() < end:
            missing = {rank for rank in missing if not self._store.check([f"report/{rank}"])}
            time.sleep(SAMPLE_SECONDS)
        reports = {rank: None if rank in missing else self._report_of(rank) for rank in ranks}
        places = {rank: place for rank in ranks if (place := self._place_of(rank)) is not None}
        here = socket.gethostname()
        states = {r: state_of(places[r]) for r in missing if r in places and places[r].host == here}
        silent = [dataclasses.asdict(places[rank]) for rank in missing & places.keys()]
        self._store.set("silent", json.dumps(silent))
        self._hear()
        self._tell(describe(reports, {r: str(p) for r, p in places.items()}, states))

    def _hear(self) -> None:
        """Wait for the verdict, and kill those on this machine that do not answer."""
        end = time.monotonic() + 5 * self._beat_seconds + 5.0
        while not self._store.check(["silent"]) and time.monotonic() < end:
            time.sleep(SAMPLE_SECONDS)
        for place in json.loads(self._store.get("silent")):
            kill(Place(**place))

    def _report_of(self, rank: int) -> Report:
        values = json.loads(self._store.get(f"report/{rank}"))
        operation = values.pop("operation")
        if operation is not None:
            operation = Operation(**{**operation, "ranks": tuple(operation["ranks"])})
        return Report(operation=operation, **values)

    def _place_of(self, rank: int) -> Place | None:
        key = f"place/{rank}"
        return Place(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _dump_stacks(self) -> None:
        """Write the Python stacks of all threads into the run's folder, and NCCL's operations."""
        folder = self._folder / start_name()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"stacks_of_rank_{self._rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            if operations := flight_record("nccl"):
                (folder / f"nccl_of_rank_{self._rank}.json").write_text(operations)
        except Exception as error:  # this process leaves all the same
            print(f"the stacks cannot be written: {error}", file=sys.stderr)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)

    def _tell(self, found: str) -> None:
        seconds = time.monotonic() - self._since
        text = (
            f"watchdog: no progress for {seconds:.0f} s ({self._phase}); the run ends, to be"
            f" started again\n{found}\nstacks: {self._folder / start_name()}"
        )
        print(text, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # it is on the terminal
            (self._folder / start_name()).mkdir(parents=True, exist_ok=True)
            (self._folder / start_name() / "report.txt").write_text(text + "\n")
