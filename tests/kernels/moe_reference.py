"""Routing and experts as they are defined, in float64, and random inputs for them.

Every expert computes every token, and a one-hot matrix picks. Shape suffixes as in
`megatron_kanana.kernels.moe`; A a token's activations, P an expert's pre-activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def float64_route(
    logits_TX: torch.Tensor,
    bias_X: torch.Tensor | None,
    num_experts_per_token: int,
    num_groups: int,
    groups_per_token: int,
    scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [T, K], differentiable in the logits, and experts [T, K]: a token at a time."""
    scores_TX = torch.sigmoid(logits_TX.double())
    choice_TX = scores_TX.detach() if bias_X is None else scores_TX.detach() + bias_X.double()
    group_size = logits_TX.shape[1] // num_groups
    rows = []
    for choice in choice_TX.tolist():
        groups = [choice[i : i + group_size] for i in range(0, len(choice), group_size)]
        worth = [sum(sorted(group, reverse=True)[:2]) for group in groups]
        kept = _falling(worth)[:groups_per_token]
        allowed = [x for x in _falling(choice) if x // group_size in kept]
        rows.append(allowed[:num_experts_per_token])
    experts_TK = torch.tensor(rows, dtype=torch.long).reshape(-1, num_experts_per_token)
    weights_TK = scores_TX.gather(1, experts_TK)
    if num_experts_per_token > 1:
        weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
    return scaling_factor * weights_TK, experts_TK


def _falling(values: list[float]) -> list[int]:
    """Places of the values, the largest first; of equals the first first."""
    return [place for _, place in sorted((-value, place) for place, value in enumerate(values))]


def float64_experts(
    hidden_states_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    experts_TK: torch.Tensor,
    gate_up_E2ND: torch.Tensor,
    down_EDN: torch.Tensor,
) -> torch.Tensor:
    """The weighted sums of the experts' outputs; a slot of expert -1 adds nothing."""
    hidden_TD, weights, gate_up, down = (
        x.double() for x in (hidden_states_TD, weights_TK, gate_up_E2ND, down_EDN)
    )
    one_hot_TKE = (experts_TK[:, :, None] == torch.arange(len(down))).double()
    combine_TE = torch.einsum("tk,tke->te", weights, one_hot_TKE)
    pre_TEP = torch.einsum("td,epd->tep", hidden_TD, gate_up)
    gate_TEA, up_TEA = pre_TEP.chunk(2, dim=2)
    activation_TEA = gate_TEA * torch.sigmoid(gate_TEA) * up_TEA
    return torch.einsum("te,tea,eda->td", combine_TE, activation_TEA, down)


LOADS = ("uniform", "Zipf", "half empty", "one expert", "elsewhere")


def random_experts(
    load: str, tokens: int, slots: int, experts: int, generator: torch.Generator
) -> torch.Tensor:
    """int32 [T, K], a token's different, with -1 for those elsewhere."""
    if load == "one expert":  # a token's other experts are elsewhere
        chosen = torch.full((tokens, slots), -1)
        chosen[:, slots // 2] = experts // 2
        return chosen.int()
    popularity = torch.ones(experts)
    if load == "Zipf":
        popularity = 1.0 / torch.arange(1, experts + 1)
    elif load == "half empty":
        popularity[::2] = 0.0
    noise = torch.rand(tokens, experts, generator=generator)
    # The smallest of exponential times are a choice without replacement by these rates.
    chosen = (-noise.log() / popularity).topk(slots, largest=False).indices
    if load == "elsewhere":
        chosen[torch.rand(tokens, slots, generator=generator) < 0.6] = -1
        chosen[: tokens // 4] = -1  # tokens without any expert here
    return chosen.int()


@dataclass(frozen=True)
class Sizes:
    """Sizes of one call; see `megatron_kanana.kernels.moe`."""

    tokens: int
    slots: int
    experts: int
    hidden: int
    width: int


@dataclass
class Inputs:
    """Tensors of one call, all contiguous.

    Attributes:
        hidden_states: [T, D].
        weights: fp32 [T, K].
        chosen: int32 [T, K].
        gate_up: [E, 2N, D].
        down: [E, D, N].
        grad_out: gradient of the output, [T, D].
    """

    hidden_states: torch.Tensor
    weights: torch.Tensor
    chosen: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    grad_out: torch.Tensor

    @property
    def rows(self) -> int:
        """Slots whose expert is here."""
        return int((self.chosen >= 0).sum())


def random_inputs(
    sizes: Sizes, load: str = "uniform", *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Inputs:
    """Hidden states of order one, weights that keep their size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tokens, slots, experts = sizes.tokens, sizes.slots, sizes.experts
    gate_up = normal(experts, 2 * sizes.width, sizes.hidden) * sizes.hidden**-0.5
    down = normal(experts, sizes.hidden, sizes.width) * sizes.width**-0.5
    return Inputs(
        normal(tokens, sizes.hidden).to(dtype),
        torch.rand(tokens, slots, generator=generator),
        random_experts(load, tokens, slots, experts, generator),
        gate_up.to(dtype),
        down.to(dtype),
        normal(tokens, sizes.hidden).to(dtype),
    )


def float64_results(inputs: Inputs) -> dict[str, torch.Tensor]:
    """Output and gradients by name."""
    leaves = {
        name: tensor.double().requires_grad_()
        for name, tensor in vars(inputs).items()
        if name not in ("chosen", "grad_out")
    }
    out = float64_experts(
        leaves["hidden_states"],
        leaves["weights"],
        inputs.chosen,
        leaves["gate_up"],
        leaves["down"],
    )
    grads = torch.autograd.grad(out, list(leaves.values()), inputs.grad_out.double())
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}
