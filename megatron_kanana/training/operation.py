"""An operation in which processes wait for each other, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Operation:
    """An operation in which a process waits for others.

    Attributes:
        name: of torch.distributed's function or of its backend's operation, or what is waited for.
        ranks: processes that take part; empty where that is not known.
        tensor: shape and format of what is communicated; empty where that is not known.
        caller: line of code that called it; empty where that is not known.
        waits_at: where the main thread is, of an operation that does not itself hold it up.
    """

    name: str
    ranks: tuple[int, ...] = ()
    tensor: str = ""
    caller: str = ""
    waits_at: str = ""

    def __str__(self) -> str:
        tensor = f" of {self.tensor}" if self.tensor else ""
        over = f" over {ranks_in_words(self.ranks)}" if self.ranks else ""
        caller = f", called at {self.caller}" if self.caller else ""
        waits_at = f", waited for at {self.waits_at}" if self.waits_at else ""
        return f"{self.name}{tensor}{over}{caller}{waits_at}"


def ranks_in_words(ranks: Sequence[int]) -> str:
    """Such as 'rank 3' or 'ranks 0, 1'."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def place(frames: Iterable[tuple[str, int, str]]) -> str:
    """The innermost line of this project's or megatron-core's code, else of any.

    Args:
        frames: file, line and function, innermost first.
    """
    innermost = ""
    for file, line, function in frames:
        if "megatron" in file and "/torch/" not in file:
            return f"{file[file.index('megatron') :]}:{line} ({function})"
        if not innermost and "/torch/distributed/" not in file:
            innermost = f"{file}:{line} ({function})"
    return innermost
