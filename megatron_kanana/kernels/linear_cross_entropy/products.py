"""Products of gradients, summed in fp32."""

from __future__ import annotations

import torch


def add_product_(
    sums_VD: torch.Tensor, left_CV: torch.Tensor, right_CD: torch.Tensor, *, to_what_is_there: bool
) -> None:
    """sums = left^T right, or sums += left^T right.

    Args:
        sums_VD: fp32.
        left_CV, right_CD: fp32 or bf16.
        to_what_is_there: whether it is added to; else `sums_VD` may hold anything before.
    """
    beta = 1 if to_what_is_there else 0
    left_VC = left_CV.t()
    if right_CD.dtype == torch.float32:
        torch.addmm(sums_VD, left_VC, right_CD, beta=beta, out=sums_VD)
    elif right_CD.is_cuda:
        torch.addmm(sums_VD, left_VC, right_CD, torch.float32, beta=beta, out=sums_VD)
    else:
        torch.addmm(sums_VD, left_VC.float(), right_CD.float(), beta=beta, out=sums_VD)
