"""The learning rate of each step, against closed forms."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from megatron_kanana.config import Environment, load_settings
from megatron_kanana.optimizer.schedule import build_scheduler

PEAK, LOWEST, STEPS, WARM_UP, DECAY = 1e-2, 1e-3, 40, 5, 10

DECAYS = {
    "linear": lambda part: 1 - part,
    "cosine": lambda part: (1 + math.cos(math.pi * part)) / 2,
    "exponential": lambda part: 2 * 0.5**part - 1,
    "minus_sqrt": lambda part: 1 - math.sqrt(part),
}


@pytest.mark.parametrize("style", DECAYS)
def test_rate_warms_up_stays_and_decays(style: str) -> None:
    overrides = (
        f"optimizer.learning_rate={PEAK}",
        f"schedule.minimum_learning_rate={LOWEST}",
        f"schedule.steps={STEPS}",
        f"schedule.warmup_steps={WARM_UP}",
        f"schedule.decay_steps={DECAY}",
        f"schedule.decay_style={style}",
    )
    group: dict[str, float] = {}
    scheduler = build_scheduler(
        SimpleNamespace(param_groups=[group]), load_settings(overrides, Environment())
    )
    for step in range(1, STEPS + 1):
        scheduler.step(increment=1)
        part = max(0, step - (STEPS - DECAY)) / DECAY
        decayed = LOWEST + (PEAK - LOWEST) * DECAYS[style](part)
        expected = PEAK * step / WARM_UP if step <= WARM_UP else decayed
        assert group["lr"] == pytest.approx(expected)
