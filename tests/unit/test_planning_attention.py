"""Which attention is planned, and how long it takes beside what was measured."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_kanana.config import Environment, Settings, load_settings
from megatron_kanana.planning.attention import attention_of
from megatron_kanana.planning.calibration import (
    CSRC,
    CSRC_DETERMINISTIC,
    KANANA,
    PLAIN_EXPERTS,
    SDPA,
    TRANSFORMER_ENGINE,
    Attention,
)
from megatron_kanana.planning.layer_times import Job, layer_parts
from megatron_kanana.planning.machines import MACHINES, machine_named
from megatron_kanana.planning.observation import slice_of_30b
from megatron_kanana.planning.plan import job_of
from tools.plan import main

GPU = Environment(cuda_device_count=8)
WORDS = ("experiment=kanana_2_tiny", "model=kanana_2_30b_a3b", "precision=bf16")


def load(*overrides: str) -> Settings:
    """Settings of one GPU."""
    return load_settings([*WORDS, *overrides], GPU, with_files=False)


@pytest.mark.parametrize(
    "machine, overrides, expected",
    [
        ("h100", (), CSRC),
        ("h200", (), CSRC),
        ("h200", ("precision=auto",), CSRC),
        ("h200", ("kernels.backend=csrc",), CSRC),
        ("h200", ("kernels.deterministic=true",), CSRC_DETERMINISTIC),
        ("h200", ("kernels.backend=sdpa",), SDPA),
        ("h200", ("kernels.backend=cudnn",), SDPA),
        ("h200", ("precision=fp32",), SDPA),
        ("h200", ("model.v_head_dim=96",), SDPA),
        ("b200", (), SDPA),
    ],
)
def test_attention_is_what_the_settings_take_on_the_machine(
    machine: str, overrides: tuple[str, ...], expected: Attention
) -> None:
    settings = load(*overrides)
    assert attention_of(settings, MACHINES[machine]) is expected
    assert job_of(settings, 1, MACHINES[machine], KANANA).implementation.attention is expected


def test_a_machine_with_values_of_ones_own_keeps_its_attention() -> None:
    machine = machine_named("h200", {"network_bandwidth": 25e9})
    assert attention_of(load(), machine) is CSRC


def test_attention_of_transformer_engine_is_its_own() -> None:
    job = job_of(load(), 1, MACHINES["h200"], TRANSFORMER_ENGINE)
    assert job.implementation is TRANSFORMER_ENGINE


def job(attention: Attention, batch: int, length: int) -> Job:
    """32 heads of 192 and 128 on an H100."""
    made = slice_of_30b(4, batch, machine="h100")
    layout = dataclasses.replace(made.layout, sequence_length=length)
    implementation = dataclasses.replace(KANANA, attention=attention)
    return dataclasses.replace(made, layout=layout, implementation=implementation)


def milliseconds(attention: Attention, batch: int, length: int, *, forward: bool) -> float:
    """Predicted, of one layer."""
    parts = layer_parts(job(attention, batch, length), forward=forward, is_moe=False)
    return 1e3 * parts["core attention"]


@pytest.mark.parametrize(
    "attention, batch, length, forward, measured",
    [
        (CSRC, 2, 4096, True, 0.5106),
        (CSRC, 1, 8192, True, 0.9399),
        (CSRC, 2, 4096, False, 1.8249),
        (CSRC, 1, 8192, False, 3.2635),
        (CSRC_DETERMINISTIC, 2, 4096, False, 2.1911),
        (CSRC_DETERMINISTIC, 1, 8192, False, 3.9450),
    ],
)
def test_time_of_csrcs_attention_is_the_measured_one(
    attention: Attention, batch: int, length: int, forward: bool, measured: float
) -> None:
    """With the largest logits, 192/128, 32 heads, on an H100; alone, which a step is not."""
    predicted = attention.in_step * milliseconds(attention, batch, length, forward=forward)
    assert predicted == pytest.approx(measured, rel=0.005)


def test_lengths_between_and_beyond_take_the_rate_of_the_longest_measured_before_them() -> None:
    for attention in (CSRC, SDPA):
        shortest, longest = attention.shares[0], attention.shares[-1]
        assert attention.shares_at(128) == shortest[1:]
        assert attention.shares_at(longest[0] - 1) == shortest[1:]
        assert attention.shares_at(longest[0]) == longest[1:]
        assert attention.shares_at(1 << 20) == longest[1:]


def test_a_second_product_for_the_largest_logits_takes_time_forward_alone() -> None:
    without = dataclasses.replace(SDPA, second_product=False)
    more = milliseconds(SDPA, 2, 4096, forward=True) - milliseconds(without, 2, 4096, forward=True)
    pairs = 2 * 32 * 1024 * sum(range(1024, 4096 + 1, 1024))  # 1,024 rows at a time
    by_memory = 20 * pairs / (0.60 * 3.35e12)
    by_product = 2 * 192 * pairs / (0.67 * 989.5e12)
    assert more == pytest.approx(1e3 * (by_memory + by_product))
    backward = (milliseconds(each, 2, 4096, forward=False) for each in (SDPA, without))
    assert next(backward) == next(backward)


@pytest.mark.parametrize("attention", [SDPA, CSRC])
def test_host_waits_for_attention_before_it_launches_experts(attention: Attention) -> None:
    made = job(attention, 2, 4096)
    plain = dataclasses.replace(made.implementation, experts=PLAIN_EXPERTS)
    made = dataclasses.replace(made, implementation=plain)
    free = dataclasses.replace(made.machine, host_time=0.0)
    for is_moe in (True, False):
        parts = layer_parts(dataclasses.replace(made, machine=free), forward=True, is_moe=is_moe)
        waited = parts["attention projections"] + parts["core attention"] if is_moe else 0.0
        assert parts["host"] == pytest.approx(waited)
    backward = layer_parts(dataclasses.replace(made, machine=free), forward=False, is_moe=True)
    assert backward["host"] == 0.0


def test_command_says_which_attention(capsys: pytest.CaptureFixture[str]) -> None:
    for words, name in (((), "csrc"), (("kernels.backend=sdpa",), "sdpa")):
        assert main(["--processes", "1", *WORDS, *words, "--tokens", "1e9"]) in (0, 1)
        first = capsys.readouterr().out.splitlines()[0]
        assert first == (
            f"1 x h200, layers computed by megatron_kanana, attention by {name}, experts by csrc"
        )
