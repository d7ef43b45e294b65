"""Our router beside megatron-core's own; prints, as JSON, the differences found in each case.

Argument: JSON, a list of [name, overrides of settings, sequences of a batch, share of padding].
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megatron_kanana import device
from megatron_kanana.config import Environment, Settings, load_settings
from tests.expert_losses import balance_losses, forget_losses

CONFIG_DIR = "tests/configs"
LENGTH = 24


def main(cases: list[tuple[str, list[str], int, float]]) -> None:
    """Compare the routers in each case."""
    found = {}
    for name, overrides, batch_size, padding in cases:
        words = ["experiment=small", "device=cpu", *overrides]
        settings = load_settings(words, Environment(), CONFIG_DIR, with_files=False)
        where = device.prepare_device(settings, Environment())
        dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
        device.process.lay_over_processes(settings, with_gloo_groups=False)
        found[name] = compare(settings, where, batch_size, padding)
        device.destroy_process_groups()
    print(json.dumps(found))


def compare(
    settings: Settings, where: device.Device, batch_size: int, padding: float
) -> dict[str, float]:
    """Largest differences, each over the largest value of megatron-core's router."""
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_kanana.model.megatron_config import transformer_config
    from megatron_kanana.model.router import Router

    class CountingRouter(TopKRouter):
        """megatron-core's; with a mask, its own count of the tokens fails."""

        def _apply_expert_bias(
            self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None
        ) -> None:
            counted = routing_map if padding_mask is None else routing_map[~padding_mask]
            self.local_tokens_per_expert += counted.sum(0)

    moe_utils.te_general_gemm = None  # undefined without Transformer Engine
    config = transformer_config(settings, where)
    groups = get_default_pg_collection()
    dice = torch.Generator().manual_seed(1)
    shape = (LENGTH, batch_size)
    hidden_states = torch.randn(*shape, config.hidden_size, generator=dice)
    weight = torch.randn(config.num_moe_experts, config.hidden_size, generator=dice) / 4
    bias = torch.randn(config.num_moe_experts, generator=dice) / 4
    gradient = torch.randn(LENGTH * batch_size, config.num_moe_experts, generator=dice)
    mask = torch.rand(shape, generator=dice) < padding if padding else None
    results = []
    for router in (
        CountingRouter(config, groups),
        Router(config, groups, backend=settings.kernels.moe_backend),
    ):
        router.set_layer_number(2)
        with torch.no_grad():
            router.weight.copy_(weight)
            router.expert_bias.copy_(bias)
        tokens = hidden_states.clone().requires_grad_()
        forget_losses()
        probs, chosen = router(tokens, mask)
        if not isinstance(router, CountingRouter):
            dense = torch.zeros(len(probs), config.num_moe_experts)
            probs = dense.scatter(1, chosen.long(), probs)
            with torch.no_grad():  # counts nothing, as a first pass before recomputation
                router(tokens, mask)
        (probs * gradient).sum().backward()
        results.append(
            {
                "weights": probs.detach(),
                "counts": router.local_tokens_per_expert,
                "gradient of the tokens": tokens.grad,
                "gradient of the router": router.weight.grad,
                "balance loss": balance_losses(),
            }
        )
    theirs, ours = results
    return {
        name: float((theirs[name] - ours[name]).abs().max() / theirs[name].abs().max())
        for name in theirs
    }


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
