"""Trains models of several widths a little, and prints what muP made of them as JSON.

Argument: folder for the data. Printed: exponents and sizes of the coordinate check, and for each
optimizer every parameter of a muP model with its shape, fan-in by rule, spread and rates.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks import coordinate_check
from benchmarks.coordinate_check import BASE_HIDDEN_SIZE, BASE_NUM_EXPERTS
from benchmarks.several_runs import (
    OneProcess,
    parametrization_overrides,
    settings_of,
    width_overrides,
)

MULTIPLES = (1, 2, 4)


def main(cache_dir: str) -> None:
    """Measure and print."""
    data = f"data.cache_dir={cache_dir}"
    sizes = coordinate_check.measure(MULTIPLES, 4, [data, "optimizer.learning_rate=1e-3"])
    widths = [BASE_HIDDEN_SIZE * multiple for multiple in MULTIPLES]
    result: dict[str, Any] = {
        "sizes": sizes,
        "growth": {name: coordinate_check.growth(of, widths) for name, of in sizes.items()},
        "parameters": {name: parameters(name, data) for name in ("adamw", "muon")},
    }
    print(json.dumps(result))


def parameters(optimizer: str, data: str) -> dict[str, Any]:
    """Parameters of a muP model four times as wide as its base, with what the optimizer holds."""
    settings = settings_of(
        [
            *width_overrides(BASE_HIDDEN_SIZE, BASE_NUM_EXPERTS, 4),
            *parametrization_overrides("muP", BASE_HIDDEN_SIZE),
            f"optimizer={optimizer}",
            "optimizer.learning_rate=0.5",
            "optimizer.adamw_learning_rate_factor=0.25",
            "schedule.warmup_steps=2",
            "model.q_lora_rank=48",
            "model.num_layers=2",
            "model.num_mtp_layers=1",
            "model.vocab_size=2048",
            data,
        ]
    )
    run = OneProcess(settings).build(settings)
    run.scheduler.step(increment=1)

    from megatron_kanana.optimizer.flat_shards import flat_parameters, members
    from megatron_kanana.optimizer.transfer import width_rule

    flats = [flat for member in members(run.optimizer) for flat in flat_parameters(member)]
    result = {}
    for flat in flats:
        assert flat.group is not None
        is_whole = flat.matrix is None
        weight = flat.parameter if is_whole else flat.parameter[flat.matrix]
        result[flat.name if is_whole else f"{flat.name}[{flat.matrix}]"] = {
            "shape": list(flat.shape),
            "fan_in": width_rule(flat.name).fan_in(settings.model),
            "std": float(weight.detach().float().std()),
            "learning_rate": flat.group["lr"],
            "weight_decay": flat.group["weight_decay"],
        }
    return result


if __name__ == "__main__":
    main(sys.argv[1])
