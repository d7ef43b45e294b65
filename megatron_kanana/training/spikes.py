"""Whether a loss lies far above the losses before it, by statistics that outliers do not move."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

NORMAL_CONSISTENCY = 1.4826
"""Standard deviation over median absolute deviation of a normal distribution: 1 / Phi^-1(3/4)."""


class SpikeDetector:
    """Compares values with the median and the median absolute deviation of the last ones.

    Both stay where they are while fewer than half of the window are outliers, so that a spike does
    not hide the next one (Rousseeuw and Croux 1993, "Alternatives to the median absolute
    deviation").

    Args:
        window: values remembered.
        threshold: robust standard deviations above the median that make a spike.
        minimum_rise: relative rise over the median below which nothing is a spike.
    """

    def __init__(self, window: int, threshold: float, minimum_rise: float) -> None:
        self._values: deque[float] = deque(maxlen=window)
        self._needed = max(2, window // 4)
        self._threshold = threshold
        self._minimum_rise = minimum_rise

    @property
    def values(self) -> list[float]:
        """The values remembered, oldest first."""
        return list(self._values)

    def remember(self, value: float) -> None:
        """Take a value into the window."""
        self._values.append(value)

    def limit(self) -> float:
        """The value above which the next one is a spike; infinite while too few are known."""
        if len(self._values) < self._needed:
            return math.inf
        middle = median(self._values)
        deviation = NORMAL_CONSISTENCY * median(abs(value - middle) for value in self._values)
        rise = max(self._threshold * deviation, self._minimum_rise * abs(middle))
        return float(middle + rise)

    def restore(self, values: Sequence[float]) -> None:
        """Replace what is remembered."""
        self._values.clear()
        self._values.extend(values)
