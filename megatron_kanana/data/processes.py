"""Worker processes that end when the process that started them does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

Task = tuple[Callable[..., Any], tuple[Any, ...]]


@contextmanager
def worker_processes(
    count: int, prepare: Callable[..., None], arguments: tuple[Any, ...]
) -> Iterator[Executor]:
    """`count` processes, each of which has called `prepare(*arguments)`.

    A worker that is killed raises BrokenProcessPool where its result is waited for.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, _start, (prepare, arguments))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def run_all(pool: Executor | None, tasks: Iterable[Task], waiting: int) -> Iterator[Any]:
    """Results of the tasks as they come; without a pool, computed here.

    Args:
        pool: runs them.
        tasks: functions with their arguments; taken from the iterable no sooner than needed.
        waiting: how many may be under way or wait for a worker.
    """
    if pool is None:
        yield from (function(*arguments) for function, arguments in tasks)
        return
    running: set[Future[Any]] = set()
    for function, arguments in tasks:
        running.add(pool.submit(function, *arguments))
        if len(running) >= waiting:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    while running:
        done, running = wait(running, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)


def _start(prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process answers it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
