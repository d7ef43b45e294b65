"""Sequences of each optimizer step, which may change with the tokens trained on."""

from __future__ import annotations

import math

from .schema import Settings


def global_batch_size(settings: Settings, consumed_samples: int) -> int:
    """Sequences of the step that begins after `consumed_samples` sequences."""
    schedule = settings.schedule
    tokens = consumed_samples * settings.data.sequence_length
    size = schedule.global_batch_size
    for change in schedule.batch_size_changes:
        if tokens >= change.tokens:
            size = change.global_batch_size
    return size


def samples_of_steps(settings: Settings, steps: int, consumed_samples: int = 0) -> int:
    """Sequences of the next `steps` steps, after `consumed_samples` sequences."""
    consumed = consumed_samples
    for change in settings.schedule.batch_size_changes:
        begins = math.ceil(change.tokens / settings.data.sequence_length)
        if consumed < begins:
            size = global_batch_size(settings, consumed)
            before = min(steps, -(-(begins - consumed) // size))
            consumed += before * size
            steps -= before
    return consumed + steps * global_batch_size(settings, consumed) - consumed_samples
