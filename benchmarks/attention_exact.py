"""Attention and its gradients in float64 on a GPU, a block of query rows at a time."""

from __future__ import annotations

import torch

from megatron_kanana.kernels.attention import documents_of

from .attention_peers import Case, Inputs

ROWS = 512  # query rows whose logits are held at once

Results = dict[str, torch.Tensor]
"""By name: out [S, B, N, V], max logits [N], gradients of query, key and value."""

OUT, MAX_LOGITS = "out", "max logits"
GRADIENTS = ("gradient of query", "gradient of key", "gradient of value")


def exact(case: Case, inputs: Inputs) -> Results:
    """All results in float64; max logits over what is visible."""
    scale = case.softmax_scale
    repeats = case.query_heads // case.key_heads
    segment_ids = case.segment_ids()
    documents = None if segment_ids is None else documents_of(segment_ids)
    query, key, value, grad_out = (
        tensor.detach().double() for tensor in (*inputs.leaves, inputs.grad_out)
    )
    out, grad_query = torch.zeros_like(grad_out), torch.zeros_like(query)
    grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
    maxima = torch.full((case.query_heads,), -torch.inf, dtype=torch.float64, device="cuda")
    for sample in range(case.batch):
        key_NSH, value_NSV = (
            tensor[:, sample].transpose(0, 1).repeat_interleave(repeats, dim=0)
            for tensor in (key, value)
        )
        grad_key_NSH, grad_value_NSV = torch.zeros_like(key_NSH), torch.zeros_like(value_NSV)
        for start in range(0, case.length, ROWS):
            rows = slice(start, min(start + ROWS, case.length))
            query_NRH, grad_NRV = (x[rows, sample].transpose(0, 1) for x in (query, grad_out))
            logits = scale * query_NRH @ key_NSH.mT
            logits.masked_fill_(_hidden(case, documents, sample, rows), -torch.inf)
            maxima = torch.maximum(maxima, logits.amax((1, 2)))
            probabilities = logits.softmax(2)
            out_NRV = probabilities @ value_NSV
            grad_value_NSV += probabilities.mT @ grad_NRV
            grad_logits = grad_NRV @ value_NSV.mT - (grad_NRV * out_NRV).sum(2, keepdim=True)
            grad_logits *= probabilities * scale
            grad_query[rows, sample] = (grad_logits @ key_NSH).transpose(0, 1)
            grad_key_NSH += grad_logits.mT @ query_NRH
            out[rows, sample] = out_NRV.transpose(0, 1)
        for whole, of_heads in ((grad_key, grad_key_NSH), (grad_value, grad_value_NSV)):
            summed = of_heads.unflatten(0, (case.key_heads, repeats)).sum(1)
            whole[:, sample] = summed.transpose(0, 1)
    gradients = dict(zip(GRADIENTS, (grad_query, grad_key, grad_value), strict=True))
    return {OUT: out, MAX_LOGITS: maxima, **gradients}


def _hidden(case: Case, documents: torch.Tensor | None, sample: int, rows: slice) -> torch.Tensor:
    """Keys that the rows do not see: bool [rows, S]."""
    positions = torch.arange(case.length, device="cuda")
    queries = positions[rows, None]
    hidden = torch.zeros(len(queries), case.length, dtype=torch.bool, device="cuda")
    if case.causal:
        hidden |= positions > queries
    if documents is not None:
        begin, end = documents[:, sample, rows, None]
        hidden |= (positions < begin) | (positions >= end)
    return hidden
