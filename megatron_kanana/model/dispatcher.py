"""How tokens reach the processes that hold their experts: dispatchers on megatron-core's seam.

megatron-core's interface has a step for each part of the way. Its two opaque arguments are here
weights_TK and experts_TK of `kernels.moe.route`; what the experts get is a `Permutation`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_kanana.kernels.moe import Permutation, permutation_of

from .token_exchange import (
    Destinations,
    Routes,
    counts_of,
    destinations_of,
    return_outputs,
    routes_of,
    send_tokens,
)


def token_dispatcher(
    kind: str,
    num_local_experts: int,
    config: TransformerConfig,
    pg_collection: ProcessGroupCollection,
    backend: str,
) -> MoETokenDispatcher:
    """The dispatcher for this layout.

    Args:
        kind: `parallel.token_dispatcher`: 'alltoall' or 'deepep'.
        num_local_experts: experts of this process.
        config: megatron-core's.
        pg_collection: megatron-core's process groups.
        backend: of `kernels.moe`.
    """
    arguments = (num_local_experts, config, pg_collection, backend)
    if pg_collection.tp_ep.size() == 1:
        return LocalDispatcher(*arguments)
    if kind == "deepep":
        from .deep_ep import DeepEPDispatcher

        return DeepEPDispatcher(*arguments)
    return AllToAllDispatcher(*arguments)


class LocalDispatcher(MoETokenDispatcher):
    """All experts lie here whole: nothing is copied, and nothing waits for the device.

    Also the steps the other dispatchers have in common.

    Args:
        num_local_experts: experts of this process.
        config: megatron-core's.
        pg_collection: megatron-core's process groups.
        backend: of `kernels.moe`.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        backend: str,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.num_local_experts = num_local_experts
        self.backend = backend
        self._shape = torch.Size()
        self._experts: torch.Tensor | None = None

    def dispatch_preprocess(
        self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the tokens of a layer.

        Args:
            tokens: [sequence, batch, D].
            routing_map: int32 [T, K], the tokens' experts among all.
            probs: fp32 [T, K], weights of the experts.

        Returns:
            [T, D], and the weights.
        """
        self._shape, self._experts = tokens.shape, routing_map
        return tokens.flatten(0, -2), probs

    def token_dispatch(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bring tokens and weights where their experts are: here."""
        return hidden_states, probs

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, Permutation, torch.Tensor]:
        """What the experts take: tokens, the order of their slots by expert, and weights."""
        return hidden_states, self._permutation(probs.numel()), probs

    def _permutation(self, num_rows: int) -> Permutation:
        experts, self._experts = self._experts, None
        assert experts is not None
        return permutation_of(experts, self.num_local_experts, num_rows, backend=self.backend)

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What is done with the experts' outputs before they are sent: nothing."""
        return hidden_states

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Bring the outputs back to the tokens' processes."""
        return hidden_states

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T, D] in the shape in which the tokens came."""
        return hidden_states.view(self._shape)


class AllToAllDispatcher(LocalDispatcher):
    """Sends each token once to each process of expert parallelism that holds some of its experts.

    With expert tensor parallelism the processes that hold parts of the same experts bring their
    tokens together, and each gets its own tokens' outputs, summed over the parts in fp32.

    The sizes of what is sent are on the device. They start on their way to the host in
    `dispatch_preprocess` and are waited for in `token_dispatch`; nothing else waits for the device.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        backend: str,
    ) -> None:
        super().__init__(num_local_experts, config, pg_collection, backend)
        self._destinations: Destinations | None = None
        self._counts: _CountsOnTheirWay | None = None
        self._routes: Routes | None = None
        self._num_rows = 0
        self._num_gathered = 0

    def dispatch_preprocess(
        self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As LocalDispatcher's; and tell all processes how much will come to them."""
        self._destinations = destinations_of(routing_map, self.num_local_experts)
        counts = counts_of(self._destinations, self.ep_size)
        self._counts = _CountsOnTheirWay(counts, self.tp_ep_group)
        return super().dispatch_preprocess(tokens, routing_map, probs)

    def token_dispatch(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Send tokens and weights where their experts are; those that came here."""
        assert self._destinations is not None and self._counts is not None
        here = self.ep_group.rank()
        # From each process of expert parallelism, and part of experts there, to each: rows, slots.
        counts = self._counts.wait().view(self.ep_size, self.tp_size, self.ep_size, 2)
        to_here = counts[:, :, here]
        self._num_rows = int(to_here[..., 1].sum())
        self._num_gathered = int(to_here[..., 0].sum(0).max())
        sent = counts[here, self.tp_rank, :, 0].tolist()
        received = to_here[:, self.tp_rank, 0].tolist()
        if self.ep_size > 1:
            self._routes, expert_RK = routes_of(
                self._destinations, sent, received, self.ep_group, self.backend
            )
            hidden_states, probs, self._experts = send_tokens(
                hidden_states, probs, expert_RK, self._routes
            )
        self._destinations = self._counts = None
        return hidden_states, probs

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, Permutation, torch.Tensor]:
        """As LocalDispatcher's, with the tokens of all that hold parts of the same experts."""
        self._num_received = len(hidden_states)
        if self.tp_size > 1:
            assert self._experts is not None
            hidden_states, probs, self._experts = (
                gather_from_sequence_parallel_region(
                    # Every process brings as many; what fills up has no expert.
                    F.pad(rows, (0, 0, 0, self._num_gathered - len(rows)), value=fill),
                    group=self.tp_group,
                )
                for rows, fill in ((hidden_states, 0), (probs, 0), (self._experts, -1))
            )
        return hidden_states, self._permutation(self._num_rows), probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Outputs of the tokens that came to this process, summed over the parts of experts."""
        if self.tp_size == 1:
            return hidden_states
        summed: torch.Tensor = reduce_scatter_to_sequence_parallel_region(
            hidden_states.float(), group=self.tp_group
        )
        return summed[: self._num_received].to(hidden_states.dtype)

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Send the outputs back, and add up those of each token."""
        routes, self._routes = self._routes, None
        return hidden_states if routes is None else return_outputs(hidden_states, routes)


class _CountsOnTheirWay:
    """Counts of all processes of a group, one after another, on their way to the host.

    Args:
        counts: int64, this process's.
        group: the processes; every one of them must make this.
    """

    def __init__(self, counts: torch.Tensor, group: dist.ProcessGroup) -> None:
        everywhere = counts.new_empty(group.size() * len(counts), *counts.shape[1:])
        dist.all_gather_into_tensor(everywhere, counts, group=group)
        self._event: Any = None
        self._on_host = everywhere
        if everywhere.is_cuda:
            self._on_host = torch.empty_like(everywhere, device="cpu", pin_memory=True)
            self._on_host.copy_(everywhere, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> torch.Tensor:
        """The counts, on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._on_host
