"""Bytes that processes send, and how long that takes.

Ranks are laid out as megatron-core does it: tensor parallelism first, then data parallelism (for
experts: expert-tensor, expert, then expert-data parallelism), then the pipeline, so that groups of
neighbours share a node. All bytes are what one GPU sends.
"""

from __future__ import annotations

from dataclasses import dataclass

from .architecture import Architecture
from .calibration import Efficiencies, Implementation
from .layout import Layout
from .machines import Machine


@dataclass(frozen=True)
class Message:
    """What one GPU sends.

    Attributes:
        nvlink: bytes to GPUs of its node.
        network: bytes to other nodes.
    """

    nvlink: float
    network: float

    def seconds(self, machine: Machine, efficiencies: Efficiencies) -> float:
        """Both ways at once."""
        return max(
            self.nvlink / (machine.nvlink_bandwidth * efficiencies.nvlink),
            self.network / (machine.network_bandwidth * efficiencies.network),
        )


def ring(size: float, group: int, stride: int, machine: Machine) -> Message:
    """An all-gather or a reduce-scatter of `size` bytes among `group` processes.

    Each sends size (group - 1) / group. Rings through several nodes enter and leave each node by
    the network card of each of their GPUs there in turn, so these share the network's part.

    Args:
        size: bytes of the whole tensor.
        group: processes.
        stride: between their ranks.
    """
    sent = size * (group - 1) / group
    in_node = max(1, min(group, machine.gpus_per_node // stride))
    if in_node >= group:
        return Message(nvlink=sent, network=0.0)
    return Message(nvlink=sent if in_node > 1 else 0.0, network=sent / in_node)


def tensor_parallel(architecture: Architecture, layout: Layout) -> list[float]:
    """Bytes of what one layer gathers and scatters in a forward pass: [attention, feed-forward].

    Sequence parallelism gathers the input of projections split by columns and scatters the sum of
    those split by rows.
    """
    if layout.tensor == 1:
        return [0.0, 0.0]
    hidden = architecture.hidden_size
    gathered = hidden if architecture.q_lora_rank is None else architecture.q_lora_rank
    gathered += (architecture.kv_lora_rank or 0) + architecture.rope_dim
    attention = 2.0 * layout.tokens * (gathered + hidden)
    return [attention, 2.0 * layout.tokens * 2 * hidden]


def tensor_parallel_message(
    size: float, layout: Layout, machine: Machine, *, forward: bool
) -> Message:
    """Gathers and scatters of `size` bytes forward, or their counterparts backward.

    Backward a gather becomes a scatter and the other way round, and the input is gathered again for
    the weights' gradients: half as much more.
    """
    once = ring(size, layout.tensor, 1, machine)
    factor = 1.0 if forward else 1.5
    return Message(once.nvlink * factor, once.network * factor)


def dispatch(
    architecture: Architecture, layout: Layout, machine: Machine, implementation: Implementation
) -> Message:
    """A microbatch's tokens of one layer sent to their experts; the way back is the same."""
    group = layout.expert
    if group == 1:
        return Message(0.0, 0.0)
    tokens = layout.tokens / layout.tensor
    size = 2.0 * architecture.hidden_size * tokens
    in_node = max(1, min(group, machine.gpus_per_node // layout.expert_tensor))
    nodes = group // in_node
    visited = architecture.num_experts_per_token
    if implementation.sends_once != "node":
        copies = float(visited)
        if implementation.sends_once == "process":
            copies = distinct(group, visited)
        network = size * copies * (1 - in_node / group)
        return Message(size * copies * (in_node - 1) / group, network)
    if layout.consecutive_experts:
        gpus = max(1.0, visited * group / architecture.num_experts)
        visited_nodes = max(1.0, gpus / in_node)
    else:
        gpus = distinct(group, visited)
        visited_nodes = distinct(nodes, visited)
        if architecture.num_routing_nodes is not None:
            visited_nodes = min(visited_nodes, architecture.num_routing_nodes)
    return Message(
        nvlink=size * gpus * (in_node - 1) / in_node,
        network=size * visited_nodes * (nodes - 1) / nodes,
    )


def distinct(places: int, drawn: int) -> float:
    """How many of `places` equal places `drawn` independent draws hit on average."""
    return places * (1 - (1 - 1 / places) ** drawn)


def pipeline_message(architecture: Architecture, layout: Layout, machine: Machine) -> Message:
    """Hidden states of a microbatch, from a stage to the next."""
    if layout.pipeline == 1:
        return Message(0.0, 0.0)
    size = 2.0 * architecture.hidden_size * layout.tokens / layout.tensor
    if layout.world_size // layout.pipeline >= machine.gpus_per_node:
        return Message(0.0, size)
    return Message(size, 0.0)


def gradients(
    dense: float, experts: float, layout: Layout, machine: Machine, gradient_bytes: int
) -> list[Message]:
    """Reduction of the gradients of so many local elements: [dense, experts]."""
    return [
        ring(gradient_bytes * dense, layout.data, layout.tensor, machine),
        ring(
            gradient_bytes * experts,
            layout.expert_data,
            layout.expert_tensor * layout.expert,
            machine,
        ),
    ]


def muon_exchange(dense: float, experts: float, layout: Layout, machine: Machine) -> list[Message]:
    """Momenta to the owners, and updates back: two all-to-alls in bf16, [dense, experts].

    Each process sends the pieces it holds, one share over data parallelism of its local matrices,
    and its own updates, on average as much.
    """
    return [
        _all_to_all(2 * 2.0 * dense / layout.data, layout.data * layout.tensor, 1, machine),
        _all_to_all(
            2 * 2.0 * experts / layout.expert_data,
            layout.expert_data * layout.expert_tensor,
            layout.expert,
            machine,
        ),
    ]


def _all_to_all(size: float, group: int, stride: int, machine: Machine) -> Message:
    in_node = max(1, min(group, machine.gpus_per_node // stride))
    return Message(size * (in_node - 1) / group, size * (group - in_node) / group)
