"""Pipeline schedules: bubbles, order and what waits in memory."""

from __future__ import annotations

import random

import pytest

from megatron_kanana.planning.pipeline import makespan, order, peak_bytes

SHAPES = [(1, 1, 5), (2, 1, 4), (4, 1, 9), (4, 1, 2), (2, 2, 6), (4, 3, 8), (8, 4, 16), (4, 2, 4)]


def simulate(microbatches: int, forward: list[list[float]], backward: list[list[float]]) -> float:
    """Start every pass as soon as its process is free and its input there, event after event."""
    pipeline, virtual = len(forward), len(forward[0])
    stages = pipeline * virtual
    waiting = [list(order(rank, pipeline, virtual, microbatches)) for rank in range(pipeline)]
    free = [0.0] * pipeline
    done: dict[tuple[str, int, int], float] = {}
    while any(waiting):
        for rank, passes in enumerate(waiting):
            if not passes:
                continue
            step = passes[0]
            stage = step.chunk * pipeline + rank
            needs = []
            if step.forward and stage > 0:
                needs.append(("f", stage - 1, step.microbatch))
            if not step.forward:
                needs.append(("f", stage, step.microbatch))
                if stage < stages - 1:
                    needs.append(("b", stage + 1, step.microbatch))
            if all(need in done for need in needs):
                passes.pop(0)
                start = max([free[rank], *(done[need] for need in needs)])
                times = forward if step.forward else backward
                free[rank] = start + times[rank][step.chunk]
                done["f" if step.forward else "b", stage, step.microbatch] = free[rank]
    return max(free)


@pytest.mark.parametrize("pipeline, virtual, microbatches", SHAPES)
def test_time_of_a_step_is_that_of_a_simulation(
    pipeline: int, virtual: int, microbatches: int
) -> None:
    numbers = random.Random(pipeline * 100 + virtual * 10 + microbatches)
    forward = [[numbers.uniform(1, 2) for _ in range(virtual)] for _ in range(pipeline)]
    backward = [[numbers.uniform(2, 4) for _ in range(virtual)] for _ in range(pipeline)]
    expected = simulate(microbatches, forward, backward)
    assert makespan(microbatches, forward, backward) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("pipeline, virtual", [(4, 1), (8, 1), (2, 2), (4, 4), (8, 4)])
def test_long_steps_are_extrapolated_as_the_simulation_goes_on(pipeline: int, virtual: int) -> None:
    numbers = random.Random(pipeline + virtual)
    forward = [[numbers.uniform(1, 1.2) for _ in range(virtual)] for _ in range(pipeline)]
    backward = [[numbers.uniform(2, 2.4) for _ in range(virtual)] for _ in range(pipeline)]
    microbatches = 12 * pipeline
    expected = simulate(microbatches, forward, backward)
    assert makespan(microbatches, forward, backward) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("pipeline, virtual", [(4, 1), (8, 1), (4, 2), (8, 4)])
def test_bubble_of_equal_stages_is_the_closed_form(pipeline: int, virtual: int) -> None:
    microbatches, forward, backward = 64, 1.0, 2.0
    working = microbatches * virtual * (forward + backward)
    found = makespan(
        microbatches, [[forward] * virtual] * pipeline, [[backward] * virtual] * pipeline
    )
    bubble = (pipeline - 1) / (virtual * microbatches)
    assert found / working - 1 == pytest.approx(bubble, rel=1e-9)


def test_messages_between_stages_delay_the_first_and_the_last_microbatch() -> None:
    pipeline, message = 4, 0.25
    found = makespan(8, [[1.0]] * pipeline, [[1.0]] * pipeline, message)
    assert found >= 8 * 2 + 2 * (pipeline - 1) * (1 + message) - 1e-9


@pytest.mark.parametrize("pipeline, virtual, microbatches", SHAPES)
def test_every_pass_comes_once_and_backward_after_forward(
    pipeline: int, virtual: int, microbatches: int
) -> None:
    for rank in range(pipeline):
        passes = order(rank, pipeline, virtual, microbatches)
        assert len(set(passes)) == len(passes) == 2 * virtual * microbatches
        for index, step in enumerate(passes):
            if not step.forward:
                before = passes[:index]
                assert any(
                    p.forward and (p.chunk, p.microbatch) == (step.chunk, step.microbatch)
                    for p in before
                )


@pytest.mark.parametrize("pipeline, virtual", [(4, 1), (8, 1), (2, 2), (4, 4), (8, 4)])
def test_passes_in_flight_are_those_megatron_core_warms_up_with(
    pipeline: int, virtual: int
) -> None:
    """With one more, the first forward pass of the steady state."""
    for rank in range(pipeline):
        peak = peak_bytes(rank, pipeline, virtual, 64, [1.0] * virtual, [0.0] * virtual)
        if virtual == 1:
            assert peak == pipeline - rank
        else:
            assert peak == 2 * (pipeline - rank - 1) + (virtual - 1) * pipeline + 1


def test_passes_have_the_order_of_megatron_core() -> None:
    """Its own table of microbatches and chunks, for the forward passes."""
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    pipeline, virtual, microbatches = 4, 3, 8
    table = get_schedule_table(microbatches, virtual, pipeline)
    for rank in range(pipeline):
        passes = order(rank, pipeline, virtual, microbatches)
        forward = [(p.microbatch, p.chunk) for p in passes if p.forward]
        assert forward == [tuple(entry) for entry in table]


def test_what_a_pass_needs_counts_while_it_runs() -> None:
    assert peak_bytes(0, 1, 1, 4, [10.0], [3.0]) == 13.0
    assert peak_bytes(1, 2, 1, 4, [10.0], [3.0]) == 13.0
    assert peak_bytes(0, 2, 1, 4, [10.0], [3.0]) == 23.0
