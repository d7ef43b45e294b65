"""What stops a conversion, said so that a person can mend it."""

from __future__ import annotations

from collections.abc import Sequence

MOST_SHOWN = 20


class ConversionError(Exception):
    """Raised with everything that was found wrong, a line each; nothing whole was written."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        shown = self.problems[:MOST_SHOWN]
        if len(self.problems) > MOST_SHOWN:
            shown.append(f"... and {len(self.problems) - MOST_SHOWN} more")
        super().__init__("\n".join(shown))
