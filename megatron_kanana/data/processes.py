"""Worker processes for long tasks; any of them may be killed, and so may the one that starts them.

The standard library's pools either wait for ever when a worker is killed, or race with it while
they start; here each worker has a pipe of its own, and its end is seen.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

Task = tuple[Callable[..., Any], tuple[Any, ...]]


class WorkerKilledError(RuntimeError):
    """A worker process ended before its task did."""


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    connection: Connection


def run_tasks(
    count: int, prepare: Callable[..., None], arguments: tuple[Any, ...], tasks: Iterable[Task]
) -> Iterator[Any]:
    """Results of the tasks, as they come.

    Args:
        count: processes, each of which calls `prepare(*arguments)` first; 1 is this process itself.
        prepare: makes ready for tasks.
        arguments: of `prepare`.
        tasks: functions with their arguments; one more than there are processes is taken ahead.

    Raises:
        ValueError, OSError: as a task does.
        WorkerKilledError: a worker ended otherwise.
    """
    if count == 1:
        prepare(*arguments)
        yield from (function(*values) for function, values in tasks)
        return
    workers: list[_Worker] = []
    try:
        for _ in range(count):
            workers.append(_start(prepare, arguments))
        busy: list[_Worker] = []
        for task in tasks:
            if len(busy) == count:
                yield from _finished(busy)
            worker = next(worker for worker in workers if worker not in busy)
            _send(worker, task)
            busy.append(worker)
        while busy:
            yield from _finished(busy)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()


def _start(prepare: Callable[..., None], arguments: tuple[Any, ...]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, prepare, arguments), daemon=True)
    try:
        process.start()
    except BrokenPipeError as error:
        raise WorkerKilledError("a worker process was killed as it started") from error
    theirs.close()  # the worker's own end is then the only one, and closes with it
    return _Worker(process, ours)


def _send(worker: _Worker, task: Task) -> None:
    try:
        worker.connection.send(task)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise WorkerKilledError("a worker process was killed") from error


def _finished(busy: list[_Worker]) -> Iterator[Any]:
    """Wait for results; their workers are busy no longer."""
    ready = wait([worker.connection for worker in busy])
    for worker in [worker for worker in busy if worker.connection in ready]:
        try:
            failed, result = worker.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise WorkerKilledError("a worker process was killed") from error
        if failed:
            raise result
        busy.remove(worker)
        yield result


def _work(connection: Connection, prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process answers it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(*arguments)
    while True:
        function, values = connection.recv()
        try:
            answer = False, function(*values)
        except (ValueError, OSError) as error:
            answer = True, error
        connection.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
