"""Layers of experts that are measured: sizes, weights, inputs, and loads like a trained router's.

Shape suffixes: T tokens, K slots (experts a token), X all experts, E experts held here, D hidden
size, N width of an expert, S width of the shared experts together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

LOADS = ("uniform", "zipf", "half of the experts empty", "all tokens to the same experts")
LARGEST_LOAD = 2.0  # of 'zipf', over the mean: a MaxVio of 1
FITTING_STEPS = 100


@dataclass(frozen=True)
class Case:
    """Sizes of a layer and of one call.

    Attributes:
        tokens: tokens routed by each process that shares the experts.
        processes: how many share them; more than one: what the first of them computes of the tokens
            sent to it, without router, communication and shared experts.
        experts: of all processes.
        loads: one of `LOADS`.
    """

    name: str
    tokens: int
    hidden_size: int = 2048
    width: int = 768
    experts: int = 128
    experts_per_token: int = 6
    shared_width: int = 1536
    scaling_factor: float = 2.448
    processes: int = 1
    loads: str = "zipf"

    @property
    def local_experts(self) -> int:
        """Experts of one process."""
        return self.experts // self.processes

    @property
    def label(self) -> str:
        """For rows of a card."""
        name = f"{self.name}, {self.tokens:,} tokens"
        return name if self.loads == "zipf" else f"{name}, {self.loads}"


CASES = {
    "30b": Case("30b layer", 16384),
    "155b_ep16": Case(
        "155b experts of one of 16 processes",
        16384,
        hidden_size=4096,
        width=1536,
        shared_width=0,
        processes=16,
    ),
}


@dataclass
class Weights:
    """Random weights of a layer, bf16 on the device; all contenders use these very tensors.

    Attributes:
        shared_gate_up, shared_down: None without shared experts.
    """

    router_XD: torch.Tensor
    gate_up_E2ND: torch.Tensor
    down_EDN: torch.Tensor
    shared_gate_up_2SD: torch.Tensor | None
    shared_down_DS: torch.Tensor | None


@dataclass
class Inputs:
    """What a layer is given.

    Attributes:
        hidden_states_TD: bf16; gradients are asked for.
        grad_out_TD: gradient of the output, bf16.
        expert_bias_X: fp32, fitted so that random tokens make the loads of the case.
        weights_TK, experts_TK: where experts are shared among processes, the routing of the tokens
            sent here: fp32, gradients are asked for, and int32 with -1 for an expert elsewhere.
        rows: pairs of a token and an expert held here.
    """

    hidden_states_TD: torch.Tensor
    grad_out_TD: torch.Tensor
    expert_bias_X: torch.Tensor
    rows: int
    weights_TK: torch.Tensor | None = None
    experts_TK: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens that this process computes something of."""
        return int(self.hidden_states_TD.shape[0])


def random_weights(case: Case, device: str = "cuda", seed: int = 0) -> Weights:
    """Normal random numbers, of the size that keeps a unit variance."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        tensor = torch.empty(*size, dtype=torch.bfloat16, device=device)
        return tensor.normal_(generator=generator).mul_(size[-1] ** -0.5)

    shared = case.shared_width if case.processes == 1 else 0
    return Weights(
        normal(case.experts, case.hidden_size),
        normal(case.local_experts, 2 * case.width, case.hidden_size),
        normal(case.local_experts, case.hidden_size, case.width),
        normal(2 * shared, case.hidden_size) if shared else None,
        normal(case.hidden_size, shared) if shared else None,
    )


def random_inputs(case: Case, weights: Weights, seed: int = 1) -> Inputs:
    """Normal random tokens, and the bias or the routing that gives the loads of the case."""
    device = weights.router_XD.device
    generator = torch.Generator(device).manual_seed(seed)
    if case.processes == 1:
        hidden_states_TD, grad_out_TD = random_tokens(case, case.tokens, generator)
        logits_TX = (hidden_states_TD.detach() @ weights.router_XD.T).float()
        rows = case.tokens * case.experts_per_token
        return Inputs(hidden_states_TD, grad_out_TD, fitted_bias(case, logits_TX), rows)
    logits_TX = torch.randn(
        case.tokens * case.processes, case.experts, device=device, generator=generator
    )
    bias_X = fitted_bias(case, logits_TX)
    weights_TK, experts_TK = routing(logits_TX, bias_X, case)
    experts_TK = experts_TK.where(experts_TK < case.local_experts, -1)
    sent_here = (experts_TK >= 0).any(1)
    experts_TK = experts_TK[sent_here].int()
    tokens = experts_TK.shape[0]
    return Inputs(
        *random_tokens(case, tokens, generator),
        bias_X,
        int((experts_TK >= 0).sum()),
        weights_TK[sent_here].contiguous().requires_grad_(),
        experts_TK,
    )


def random_tokens(
    case: Case, tokens: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states, which ask for gradients, and a gradient of the output."""
    size = (tokens, case.hidden_size)
    hidden_states_TD, grad_out_TD = (
        torch.empty(size, dtype=torch.bfloat16, device=generator.device).normal_(
            generator=generator
        )
        for _ in range(2)
    )
    return hidden_states_TD.requires_grad_(), grad_out_TD


def routing(
    logits_TX: torch.Tensor, bias_X: torch.Tensor, case: Case
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and experts in plain torch, as DeepSeek-V3 (section 2.1.2) defines them."""
    scores_TX = logits_TX.sigmoid()
    experts_TK = (scores_TX + bias_X).topk(case.experts_per_token, dim=1).indices
    weights_TK = scores_TX.gather(1, experts_TK)
    if case.experts_per_token > 1:
        weights_TK = weights_TK / (weights_TK.sum(1, keepdim=True) + 1e-20)
    return weights_TK * case.scaling_factor, experts_TK


def compiled_routing(
    case: Case,
) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """`routing` of the logits in any dtype, compiled; experts int32."""

    def of_logits(
        logits_TX: torch.Tensor, bias_X: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights_TK, experts_TK = routing(logits_TX.float(), bias_X, case)
        return weights_TK, experts_TK.int()

    return torch.compile(of_logits, dynamic=False)


def target_loads(case: Case) -> torch.Tensor:
    """Share of each expert in the rows, fp32 [experts]; with zipf, each process has the same."""
    if case.loads == "uniform":
        return torch.full((case.experts,), 1 / case.experts)
    ranks = torch.arange(1, case.local_experts + 1, dtype=torch.float32)
    low, high = 0.0, 4.0
    for _ in range(50):
        exponent = (low + high) / 2
        loads = ranks**-exponent
        low, high = (exponent, high) if loads[0] / loads.mean() < LARGEST_LOAD else (low, exponent)
    loads = loads[torch.randperm(len(loads), generator=torch.Generator().manual_seed(0))]
    return (loads / loads.sum() / case.processes).repeat(case.processes)


def fitted_bias(case: Case, logits_TX: torch.Tensor) -> torch.Tensor:
    """Expert bias with which these tokens make about the loads of the case: fp32 [experts]."""
    bias_X = torch.zeros(case.experts, device=logits_TX.device)
    if case.loads == LOADS[2]:
        bias_X[case.experts // 2 :] = -10.0
    elif case.loads == LOADS[3]:
        bias_X[: case.experts_per_token] = 10.0
    else:
        target_X = target_loads(case).to(bias_X.device)
        for _ in range(FITTING_STEPS):
            _, experts_TK = routing(logits_TX, bias_X, case)
            counts_X = torch.bincount(experts_TK.flatten(), minlength=case.experts) + 0.5
            bias_X += 0.05 * (target_X * counts_X.sum() / counts_X).log()
    return bias_X


def active_parameters(case: Case, *, with_shared: bool) -> int:
    """Matmul parameters a token passes through; the router's are left out."""
    width = case.experts_per_token * case.width + (case.shared_width if with_shared else 0)
    return 3 * case.hidden_size * width


def floating_point_operations(case: Case, rows: int, tokens: int, *, with_shared: bool) -> float:
    """Forward and backward: 6 times the parameters of each row and token."""
    shared = case.shared_width if with_shared else 0
    return 6.0 * 3 * case.hidden_size * (rows * case.width + tokens * shared)


def stated_bytes(case: Case, rows: int, tokens: int) -> int:
    """Kept for the backward pass of the routed experts: input, pre-activation, without routing."""
    return 2 * (tokens * case.hidden_size + 2 * rows * case.width)


def of_experts(case: Case, experts: int) -> Case:
    """The layer with another number of experts."""
    return dataclasses.replace(case, experts=experts, name=f"{experts} experts")
