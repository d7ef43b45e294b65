"""A Python that has loaded torch, and forks from itself each program that a test has it run.

    python -m tests.forked_python

Loading torch takes longer than most of what tests start. A program is a process of its own as if
Python had been started for it; megatron-core and this package it imports itself, patches first.

Reads requests, a JSON object a line: `arguments` of Python, `environment`, and the files that
`stdout` and `stderr` are appended to. Answers each with two lines, which are the process's number
and, when it has ended, its exit status.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

LIBRARIES = (
    "hydra",
    "torch._inductor.compile_fx",
    "torch.distributed._tensor",
    "torch.distributed.checkpoint",
    "torch.utils.cpp_extension",
    "torch.utils.tensorboard",
)
"""Nothing that a run patches, nor that megatron-core is part of (`device/patches.py`)."""


def serve() -> list[str] | None:
    """Answer requests until there are no more.

    Returns:
        in each process that was forked, the arguments of the program that it is to run; in this
        one, None.
    """
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        if (process := os.fork()) == 0:
            become(request)
            return list(request["arguments"])
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def become(request: dict[str, Any]) -> None:
    """Take the environment and the files of a program, in a session of its own."""
    os.setsid()
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["stdout"], os.O_WRONLY | os.O_APPEND),
        (2, request["stderr"], os.O_WRONLY | os.O_APPEND),
    ):
        opened = os.open(path, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(request["environment"])


def run(arguments: list[str]) -> None:
    """Run a program as `python ARGUMENTS` does: -m MODULE, -c CODE or a file."""
    first, *rest = arguments
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.collect()
    gc.freeze()  # what is loaded stays, in every process
    if (program := serve()) is not None:
        run(program)
