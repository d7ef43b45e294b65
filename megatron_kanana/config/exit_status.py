"""How a run tells whoever started it that it saved before its end."""

SAVED_FOR_ANOTHER_START = 85
"""After SIGUSR1: a batch script puts its job into the queue again."""

SAVED_FOR_GOOD = 143
"""After SIGTERM, as of a process that it ended: its sender starts the run again himself, or not."""
