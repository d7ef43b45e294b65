"""What is made of a profile's kernels, on intervals that can be added up by hand."""

from __future__ import annotations

import random

import pytest

from benchmarks.step_profile import component_of, covered, summarize


def test_overlapping_kernels_count_once_as_busy() -> None:
    dice = random.Random(7)
    ends = sorted(dice.sample(range(10_000), 60))
    intervals = [tuple(sorted(dice.sample(ends, 2))) for _ in range(20)]
    by_the_microsecond = {at for start, end in intervals for at in range(start, end)}
    assert covered([(float(a), float(b)) for a, b in intervals]) == len(by_the_microsecond)


def test_components_launches_and_idle_time_are_those_of_one_step() -> None:
    events = [
        ("sm90_flash_attention_forward", 0.0, 3000.0),
        ("nvjet_hsh_128x256", 3000.0, 5000.0),
        ("row_matmul_kernel<UpForward>", 4000.0, 6000.0),  # on another stream
        ("vectorized_elementwise_kernel<add>", 7000.0, 8000.0),
    ]
    found = summarize(events, steps=2)
    assert found.components == {
        "attention": 1.5,
        "dense products": 1.0,
        "experts": 1.0,
        "copies and sums": 0.5,
    }
    assert (found.launches, found.span) == (2.0, 4.0)
    assert found.idle == pytest.approx(1 / 8)


@pytest.mark.parametrize(
    ("kernel", "component"),
    [
        ("void megatron_kanana::route_backward_kernel", "routing, permutation, combination"),
        ("void megatron_kanana::sm90::backward_kernel<192, 128>", "attention"),
        ("void megatron_kanana::sm90::weight_gradient_kernel<true>", "experts"),
        ("void megatron_kanana::combine_kernel", "routing, permutation, combination"),
        ("rms_norm_fwd_general_kernel", "norms"),
        ("void megatron_kanana::rms_norm_backward_kernel<Row<32, 8>>", "norms"),
        ("megatron_kanana::embedding_add_kernel", "copies and sums"),
        ("rotary_fwd_q_kernel", "rotary embedding"),
        ("block_scaled_1d_cast_transpose_kernel", "casts to fp8"),
        ("unheard_of", "other"),
    ],
)
def test_a_kernel_belongs_to_the_component_its_name_tells_of(kernel: str, component: str) -> None:
    assert component_of(kernel) == component


def test_a_profile_without_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing ran"):
        summarize([], steps=1)
