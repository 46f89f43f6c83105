"""Operands as kernels read them: values in memory, rows contiguous. What lies so already is not copied.

M, E, K, N: rows, groups, in and out features. D: K or N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grouped_gemm.core import tracing


def materialized(x: Tensor) -> Tensor:
    """``x`` with its values in memory.

    It is a copy where a negation is pending, which only the dispatcher carries out: of `torch._neg_view`, and of the
    imaginary part of a conjugate.
    """
    if torch.compiler.is_compiling():  # compiled code goes through the dispatcher
        return x
    return x.clone() if x.is_neg() else x


def dense_rows(x: Tensor) -> Tensor:
    """``x`` (M, D) with contiguous rows: itself, unless it is a transpose or an expanded gradient."""
    if torch.compiler.is_compiling():
        return x if tracing.holds(x.stride(1) == 1) else x.contiguous()
    x = x.clone() if x.is_neg() else x
    return x if x.stride(1) == 1 else x.contiguous()


def dense_weights(b_EKN: Tensor) -> tuple[Tensor, str]:
    """``b`` with K or N contiguous, and which of them: itself, unless it is a slice across both."""
    b_EKN = materialized(b_EKN)
    if b_EKN.stride(2) == 1:
        return b_EKN, "n"
    return (b_EKN, "k") if b_EKN.stride(1) == 1 else (b_EKN.contiguous(), "n")
