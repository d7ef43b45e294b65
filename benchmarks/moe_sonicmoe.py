"""SonicMoE's experts (arXiv 2512.14080), with this model's routing before them.

Its own router knows softmax alone, so the choice is plain torch's, compiled. Rows of gate and up
lie in turns, which is what its kernels like best: the same work on other columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .moe_cases import Case, Inputs, Weights, compiled_routing


class SonicMoELayer(nn.Module):
    """Routing, the metadata kernels, and the two autograd functions of its layer."""

    def __init__(self, case: Case, weights: Weights, inputs: Inputs) -> None:
        super().__init__()
        import sonicmoe.functional as sonicmoe

        self.sonicmoe, self.case = sonicmoe, case
        self.expert_bias_X = inputs.expert_bias_X
        self.gate_up = nn.Parameter(weights.gate_up_E2ND)
        self.down = nn.Parameter(weights.down_EDN)
        self.router = nn.Parameter(weights.router_XD) if case.processes == 1 else None
        self.routing = compiled_routing(case)
        if inputs.experts_TK is not None:
            self.slot_of_entry = (inputs.experts_TK.flatten() >= 0).nonzero().flatten()
            self.token_of_entry = (self.slot_of_entry // case.experts_per_token).int()
            self.expert_of_entry = inputs.experts_TK.flatten()[self.slot_of_entry].contiguous()

    def forward(self, inputs: Inputs) -> torch.Tensor:
        gate_up, down = self.gate_up.permute(1, 2, 0), self.down.permute(1, 2, 0)
        swiglu = self.sonicmoe.ActivationType.SWIGLU
        if self.router is None:
            assert inputs.weights_TK is not None
            out_TD, _ = self.sonicmoe.moe_general_routing_inputs(
                inputs.hidden_states_TD,
                inputs.weights_TK.flatten().index_select(0, self.slot_of_entry),
                self.token_of_entry,
                self.expert_of_entry,
                gate_up,
                None,
                down,
                None,
                self.case.local_experts,
                torch.cuda.current_stream().cuda_stream,
                swiglu,
            )
            result: torch.Tensor = out_TD
            return result
        hidden_states_TD = inputs.hidden_states_TD
        weights_TK, experts_TK = self.routing(
            F.linear(hidden_states_TD, self.router), self.expert_bias_X
        )
        tokens, slots = experts_TK.shape
        rows, experts = tokens * slots, self.case.experts
        sizes = (experts, experts + 1, rows, rows, rows)
        frequency, offsets, token_of_row, slot_of_row, row_of_slot = (
            experts_TK.new_empty(size) for size in sizes
        )
        self.sonicmoe.TC_topk_router_metadata_triton(
            experts_TK, experts, frequency, offsets, token_of_row, slot_of_row, row_of_slot
        )
        order = (token_of_row, slot_of_row, row_of_slot, None, False, swiglu)
        activation, pre_activation = self.sonicmoe._UpProjection.apply(
            hidden_states_TD, gate_up, None, offsets, rows, slots, *order, False, False
        )
        whole: torch.Tensor = self.sonicmoe._DownProjection.apply(
            activation, pre_activation, down, None, weights_TK, offsets, tokens, slots, *order
        )
        return whole
