"""What is wrong with a configuration, said so that a person can mend it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .exit_status import WRONG_CONFIGURATION


@dataclass(frozen=True)
class Problem:
    """One wrong setting, or one wrong combination of settings.

    Attributes:
        setting: dotted name of the setting to change, as it is written on the command line.
        value: the value that was found there.
        reason: what is wrong with it.
        remedy: what to do instead.
    """

    setting: str
    value: Any
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"  {self.setting} = {self.value}\n      {self.reason}\n      remedy: {self.remedy}"


class ConfigurationError(Exception):
    """Raised with every problem of a configuration at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        noun = "problem" if count == 1 else "problems"
        header = f"The configuration has {count} {noun}; nothing was started."
        super().__init__("\n\n".join([header, *map(str, self.problems)]))


def tell(error: Exception, rank: int, status: int = WRONG_CONFIGURATION) -> int:
    """Say on the first process what is wrong; returns the exit code for it.

    The others wait a little: a launcher stops every process with the first that ends.
    """
    if rank == 0:
        print(error, file=sys.stderr, flush=True)
    else:
        time.sleep(5)
    return status
