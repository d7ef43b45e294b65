"""The dispatcher on DeepEP's functions, with stand-ins for two processes' exchange on one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_kanana.kernels.moe import routed_experts
from megatron_kanana.model import deep_ep

LOCAL, PROCESSES, SLOTS, HIDDEN, WIDTH = 3, 2, 2, 8, 4


class Group:
    """Of two processes, of which this is the second."""

    def size(self) -> int:
        """Two."""
        return PROCESSES

    def rank(self) -> int:
        """This one."""
        return 1


def test_tokens_go_through_deepep_with_its_conventions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Global int64 numbers in, local ones out with -1 elsewhere, counts on the host, a handle."""
    torch.manual_seed(0)
    tokens = torch.randn(5, 1, HIDDEN)
    chosen = torch.rand(5, LOCAL * PROCESSES).argsort(1)[:, :SLOTS].int()
    weights = torch.rand(5, SLOTS)
    gate_up, down = torch.randn(LOCAL, 2 * WIDTH, HIDDEN), torch.randn(LOCAL, HIDDEN, WIDTH)
    handle = object()

    def fused_dispatch(
        hidden: torch.Tensor, experts: torch.Tensor, probs: torch.Tensor, number: int, group: Any
    ) -> tuple[Any, ...]:
        assert experts.dtype == torch.int64
        assert number == LOCAL * PROCESSES
        local = torch.where(experts >= LOCAL, experts - LOCAL, -1)
        counts = torch.tensor([int((local == each).sum()) for each in range(LOCAL)])
        return hidden, local, probs, counts, handle

    def fused_combine(hidden: torch.Tensor, group: Any, given: object) -> tuple[Any, None]:
        assert given is handle
        return hidden, None

    monkeypatch.setattr(deep_ep, "fused_dispatch", fused_dispatch)
    monkeypatch.setattr(deep_ep, "fused_combine", fused_combine)
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    groups: Any = SimpleNamespace(ep=Group(), expt_tp=alone, tp_ep=Group())
    config: Any = SimpleNamespace(num_moe_experts=LOCAL * PROCESSES)
    dispatcher = deep_ep.DeepEPDispatcher(LOCAL, config, groups, "torch")
    hidden, probs = dispatcher.dispatch_preprocess(tokens, chosen, weights)
    hidden, probs = dispatcher.token_dispatch(hidden, probs)
    hidden, permutation, probs = dispatcher.dispatch_postprocess(hidden, probs)
    out = routed_experts(hidden, probs, permutation, gate_up, down, backend="torch")
    out = dispatcher.token_combine(dispatcher.combine_preprocess(out))
    out = dispatcher.combine_postprocess(out)
    expected = torch.zeros(5, 1, HIDDEN)
    for token in range(5):
        for slot in range(SLOTS):
            expert = int(chosen[token, slot]) - LOCAL
            if expert >= 0:
                gate, up = (gate_up[expert] @ tokens[token, 0]).chunk(2)
                activation = torch.nn.functional.silu(gate) * up
                expected[token, 0] += weights[token, slot] * (down[expert] @ activation)
    torch.testing.assert_close(out, expected)
