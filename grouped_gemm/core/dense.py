"""Makes operands readable by kernels: values in memory, contiguous rows. It copies only operands that need it.

M, E, K, N: rows, groups, in and out features. D: K or N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grouped_gemm.core import tracing


def materialized(x: Tensor) -> Tensor:
    """``x`` with its values in memory.

    It copies a tensor with a pending negation, which only the dispatcher would resolve: from `torch._neg_view`, or the
    imaginary part of a conjugate.
    """
    if torch.compiler.is_compiling():  # compiled code goes through the dispatcher
        return x
    return x.clone() if x.is_neg() else x


def dense_rows(x: Tensor) -> Tensor:
    """``x`` (M, D) with contiguous rows. It copies a transpose, and a gradient that was expanded."""
    if torch.compiler.is_compiling():
        return x if tracing.holds(x.stride(1) == 1) else x.contiguous()
    x = x.clone() if x.is_neg() else x
    return x if x.stride(1) == 1 else x.contiguous()


def dense_weights(b_EKN: Tensor) -> tuple[Tensor, str]:
    """``b`` with K or N contiguous, and "k" or "n". It copies a slice across both axes."""
    b_EKN = materialized(b_EKN)
    if b_EKN.stride(2) == 1:
        return b_EKN, "n"
    return (b_EKN, "k") if b_EKN.stride(1) == 1 else (b_EKN.contiguous(), "n")
