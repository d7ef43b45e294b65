"""Which experts a plan is made with, and that a layer of them follows from it."""

from __future__ import annotations

import pytest

from megatron_kanana.config import Environment, load_settings
from megatron_kanana.planning.calibration import (
    CSRC_EXPERTS,
    KANANA,
    PLAIN_EXPERTS,
    TRANSFORMER_ENGINE,
    Experts,
)
from megatron_kanana.planning.experts import experts_of
from megatron_kanana.planning.machines import MACHINES
from megatron_kanana.planning.plan import job_of

GPU = Environment(cuda_device_count=8)
WORDS = ("experiment=kanana_2_tiny", "model=kanana_2_30b_a3b", "precision=bf16")


@pytest.mark.parametrize(
    "machine, overrides, expected",
    [
        ("h100", (), CSRC_EXPERTS),
        ("h200", ("kernels.moe_backend=csrc",), CSRC_EXPERTS),
        ("h200", ("kernels.moe_backend=torch",), PLAIN_EXPERTS),
        ("h200", ("precision=fp32",), PLAIN_EXPERTS),
        ("h200", ("model.moe_ffn_hidden_size=800",), PLAIN_EXPERTS),
        ("b200", (), PLAIN_EXPERTS),
    ],
)
def test_experts_are_those_the_settings_take_on_the_machine(
    machine: str, overrides: tuple[str, ...], expected: Experts
) -> None:
    settings = load_settings([*WORDS, *overrides], GPU, with_files=False)
    assert experts_of(settings, MACHINES[machine]) is expected
    assert job_of(settings, 1, MACHINES[machine], KANANA).implementation.experts is expected


def test_dispatch_is_what_the_settings_take_and_transformer_engines_its_own() -> None:
    for dispatcher, sends_once in (("alltoall", "process"), ("deepep", "node")):
        words = [*WORDS, f"parallel.token_dispatcher={dispatcher}"]
        settings = load_settings(words, GPU, with_files=False)
        machine = MACHINES["h200"]
        assert job_of(settings, 1, machine, KANANA).implementation.sends_once == sends_once
        other = job_of(settings, 1, machine, TRANSFORMER_ENGINE)
        assert other.implementation is TRANSFORMER_ENGINE
