"""Bytes that are sent, counted message by message."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from megatron_kanana.planning.architecture import Architecture
from megatron_kanana.planning.calibration import DEEPEP, KANANA, TRANSFORMER_ENGINE, Implementation
from megatron_kanana.planning.communication import (
    Message,
    dispatch,
    distinct,
    gradients,
    muon_exchange,
    pipeline_message,
    ring,
    tensor_parallel,
    tensor_parallel_message,
)
from megatron_kanana.planning.layout import Layout
from megatron_kanana.planning.machines import MACHINES

H200 = MACHINES["h200"]
SMALL = Architecture(*(4, 1, 64, 512, 4, 24, 16, 128, 32, 4, 32, 64), kv_lora_rank=32, rope_dim=8)


def layout(**sizes: Any) -> Layout:
    """A layout of 64 GPUs, everything else alone."""
    base = Layout(
        64, 1, 1, 1, 1, 1, False, sequence_length=128, micro_batch_size=2, global_batch_size=128
    )
    return dataclasses.replace(base, **sizes)


def send_tokens(chosen: Layout, implementation: Implementation) -> Message:
    """Draw experts for each token of one GPU and count what it sends."""
    numbers = random.Random(0)
    local = SMALL.num_experts // chosen.expert
    in_node = min(chosen.expert, H200.gpus_per_node)
    tokens, size = 20_000, 2 * SMALL.hidden_size
    nvlink = network = 0
    for token in range(tokens):
        me = token % chosen.expert  # the sender's place, every one in turn
        experts = numbers.choices(range(SMALL.num_experts), k=SMALL.num_experts_per_token)
        gpus = [expert // local for expert in experts]
        if implementation.sends_once == "node":
            nodes = {gpu // in_node for gpu in gpus}
            network += size * len(nodes - {me // in_node})
            # What comes to a node is passed on there; as much is passed on by this GPU's node.
            nvlink += size * sum(gpu % in_node != me % in_node for gpu in set(gpus))
        else:
            for gpu in set(gpus) if implementation.sends_once == "process" else gpus:
                if gpu // in_node != me // in_node:
                    network += size
                elif gpu != me:
                    nvlink += size
    share = chosen.tokens / chosen.tensor / tokens
    return Message(nvlink * share, network * share)


@pytest.mark.parametrize("implementation", [TRANSFORMER_ENGINE, KANANA, DEEPEP])
@pytest.mark.parametrize("expert", [2, 8, 16, 32])
def test_dispatch_is_what_drawn_experts_cause(expert: int, implementation: Implementation) -> None:
    chosen = layout(expert=expert)
    expected = send_tokens(chosen, implementation)
    found = dispatch(SMALL, chosen, H200, implementation)
    assert found.nvlink == pytest.approx(expected.nvlink, rel=0.03)
    assert found.network == pytest.approx(expected.network, rel=0.03)


def test_dispatch_stays_within_the_nodes_a_router_is_limited_to() -> None:
    limited = dataclasses.replace(SMALL, num_routing_nodes=2)
    free = dispatch(SMALL, layout(expert=32), H200, DEEPEP)
    found = dispatch(limited, layout(expert=32), H200, DEEPEP)
    assert found.network == pytest.approx(2 * 2 * 64 * 256 * 3 / 4)
    assert found.network < free.network


def test_consecutive_experts_are_on_few_gpus() -> None:
    """4 of 32 experts over 8 GPUs: one GPU each."""
    chosen = dataclasses.replace(layout(expert=8), consecutive_experts=True)
    found = dispatch(SMALL, chosen, H200, DEEPEP)
    assert found == Message(nvlink=2 * 64 * 256 * 7 / 8, network=0.0)


def test_distinct_places_of_draws() -> None:
    assert distinct(1, 5) == 1
    assert distinct(8, 1) == pytest.approx(1)
    assert distinct(4, 2) == pytest.approx(1.75)


@pytest.mark.parametrize("group, stride", [(2, 1), (8, 1), (4, 2), (16, 1), (16, 8), (4, 4)])
def test_ring_sends_what_an_all_gather_needs(group: int, stride: int) -> None:
    """Step by step: in each, every process passes on one piece to the next process."""
    size, pieces = 960.0, group
    sent = (pieces - 1) * size / pieces
    ranks = [index * stride for index in range(group)]
    crossing = sum(ranks[i] // 8 != ranks[(i + 1) % group] // 8 for i in range(group))
    found = ring(size, group, stride, H200)
    assert found.nvlink + (0 if found.nvlink else found.network) == pytest.approx(sent)
    if crossing == 0:
        assert found.network == 0
    else:
        # One ring crosses nodes so often; as many rings as GPUs of a node share the crossings.
        nodes = len({rank // 8 for rank in ranks})
        in_node = group // nodes
        assert found.network == pytest.approx(sent * crossing / (nodes * in_node))


def test_one_process_sends_nothing() -> None:
    alone = layout(world_size=1)
    assert ring(1e9, 1, 1, H200) == Message(0, 0)
    assert dispatch(SMALL, alone, H200, TRANSFORMER_ENGINE) == Message(0, 0)
    assert pipeline_message(SMALL, alone, H200) == Message(0, 0)
    assert tensor_parallel(SMALL, alone) == [0, 0]


def test_pipeline_sends_hidden_states() -> None:
    between_nodes = pipeline_message(SMALL, layout(pipeline=4, tensor=2), H200)
    assert between_nodes == Message(0.0, 2 * 64 * 256 / 2)
    in_node = pipeline_message(SMALL, layout(pipeline=16), H200)
    assert in_node == Message(2 * 64 * 256, 0.0)


def test_tensor_parallelism_gathers_inputs_and_scatters_sums() -> None:
    chosen = layout(tensor=4)
    attention, feed_forward = tensor_parallel(SMALL, chosen)
    tokens = chosen.tokens
    assert attention == 2 * tokens * ((64 + 32 + 8) + 64)  # input, latent, rotary key; output
    assert feed_forward == 2 * tokens * (64 + 64)
    forward = tensor_parallel_message(1000, chosen, H200, forward=True)
    backward = tensor_parallel_message(1000, chosen, H200, forward=False)
    assert forward == Message(750, 0)
    assert backward == Message(1125, 0)


def test_gradients_are_reduced_over_the_replicas_of_each_group() -> None:
    chosen = layout(pipeline=2, tensor=2, expert=8)
    dense, experts = gradients(1000, 4000, chosen, H200, 4)
    # 16 data-parallel ranks at stride 2: four in a node.
    assert dense.network == pytest.approx(4000 * 15 / 16 / 4)
    # Four replicas of experts at stride 8: one in a node.
    assert experts == Message(0.0, pytest.approx(16000 * 3 / 4))  # type: ignore[arg-type]


def test_muon_exchanges_its_share_twice() -> None:
    """docs/optimizer.md: 4 / R bytes an element of the stage's matrices, R = tensor x data."""
    chosen = layout(tensor=2)
    local = 8000  # of a stage's 16000
    dense, _ = muon_exchange(local, 0, chosen, H200)
    everything = 4 * 16000 / 64
    assert dense.nvlink + dense.network == pytest.approx(everything * 63 / 64)


def test_message_takes_the_slower_way() -> None:
    from megatron_kanana.planning.calibration import Efficiencies

    e = Efficiencies()
    assert Message(450e9, 0).seconds(H200, e) == pytest.approx(1 / e.nvlink)
    assert Message(450e9, 50e9).seconds(H200, e) == pytest.approx(1 / min(e.nvlink, e.network))
