"""The router's choice, losses, gradients and counts are those of megatron-core's."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_kanana.model.balance_loss import balance_loss
from megatron_kanana.model.gating import gating_logits, split_in_bf16
from tests.launch import run_python

GROUPS = [
    "model.num_experts_per_token=4",
    "model.num_expert_groups=4",
    "model.num_expert_groups_per_token=2",
]
CASES: dict[str, tuple[list[str], int, float]] = {
    "one sequence": ([], 1, 0.0),
    "several sequences": ([], 3, 0.0),
    "padding": ([], 3, 0.3),
    "groups": (GROUPS, 2, 0.0),
    "one expert a token": (["model.num_experts_per_token=1"], 2, 0.2),
    "no z-loss": (["model.z_loss_coefficient=0"], 2, 0.0),
}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    """Relative differences of each case and backend."""
    cases = [
        [f"{name}, {backend}", [*overrides, f"kernels.moe_backend={backend}"], *rest]
        for name, (overrides, *rest) in CASES.items()
        for backend in ("csrc", "torch")
    ]
    finished = run_python("-m", "tests.model.router_beside_megatron", json.dumps(cases))
    assert finished.returncode == 0, finished.stderr
    values: dict[str, dict[str, float]] = json.loads(finished.stdout.splitlines()[-1])
    return values


@pytest.mark.parametrize("backend", ["csrc", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_routing_is_megatron_cores(
    case: str, backend: str, found: dict[str, dict[str, float]]
) -> None:
    differences = found[f"{case}, {backend}"]
    assert differences.pop("counts") == 0.0
    assert len(differences) == 4
    assert max(differences.values()) < 3e-6, differences


@pytest.mark.parametrize("with_padding", [False, True])
def test_gradient_of_the_balance_loss_is_autograds(with_padding: bool) -> None:
    torch.manual_seed(0)
    sequences, experts = 3, 5
    logits = torch.randn(7 * sequences, experts, dtype=torch.float64, requires_grad=True)
    counts = torch.rand(sequences, experts, dtype=torch.float64)
    padding = torch.rand(len(logits)) < 0.4 if with_padding else None

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return balance_loss(logits, counts, 0.7, padding)

    assert torch.autograd.gradcheck(loss, logits)


def test_two_bf16_numbers_keep_16_bits_of_an_fp32_one() -> None:
    torch.manual_seed(0)
    numbers = torch.randn(10_000) * torch.logspace(-8, 8, 10_000)
    high, low = (part.double() for part in split_in_bf16(numbers))
    error = (high + low - numbers.double()).abs() / numbers.abs()
    assert float(error.max()) <= 2**-17
    assert float((high - numbers).abs().div(numbers.abs()).max()) > 2**-10


def test_logits_of_fp32_are_plain_products() -> None:
    torch.manual_seed(0)
    tokens, weight = torch.randn(9, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True)
    logits, gradient = gating_logits(tokens, weight), torch.randn(9, 4)
    assert torch.equal(logits, tokens @ weight.T)
    found = torch.autograd.grad(logits, (tokens, weight), gradient)
    assert torch.equal(found[0], gradient @ weight)
    assert torch.equal(found[1], gradient.T @ tokens)
