"""Where tokens go, and how what comes back is added; exchanges are tested in tests/parallel."""

from __future__ import annotations

import pytest
import torch

from megatron_kanana.model.token_exchange import counts_of, destinations_of, sums_of_rows


def test_destinations_are_those_of_a_loop() -> None:
    torch.manual_seed(0)
    local, processes, slots = 3, 4, 5
    experts = torch.rand(50, local * processes).argsort(1)[:, :slots].int()
    destinations = destinations_of(experts, local)
    rows, visits = [0] * processes, [0] * processes
    for token, chosen in enumerate(experts.tolist()):
        seen: set[int] = set()
        for slot, expert in enumerate(chosen):
            process = expert // local
            assert destinations.process_TK[token, slot] == process
            assert destinations.expert_TK[token, slot] == expert % local
            assert destinations.first_TK[token, slot] == (-1 if process in seen else process)
            rows[process] += process not in seen
            visits[process] += 1
            seen.add(process)
    assert counts_of(destinations, processes).tolist() == [
        list(p) for p in zip(rows, visits, strict=True)
    ]


def test_without_tokens_nothing_goes_anywhere() -> None:
    destinations = destinations_of(torch.empty(0, 4, dtype=torch.int32), 2)
    assert counts_of(destinations, 3).tolist() == [[0, 0]] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_tokens_rows_are_added_in_fp32(device: str, dtype: torch.dtype) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    torch.manual_seed(0)
    rows = torch.randn(40, 64).to(dtype)
    rows[-1] = 0
    of_token = torch.randint(0, 40, (30, 6), dtype=torch.int32)
    expected = torch.zeros(30, 64)
    for place in range(6):
        expected += rows[of_token[:, place].long()].float()
    found = sums_of_rows(rows.to(device), of_token.to(device))
    assert torch.equal(found.cpu(), expected.to(dtype))
