"""`gmm` without gradients, as in the older package of this import name. MegaBlocks and others call it."""

from __future__ import annotations

import torch
from torch import Tensor

from grouped_gemm.core.preference import VALIDATE
from grouped_gemm.functional import grouped_mm
from grouped_gemm.selection import checks


def gmm(
    a: Tensor,
    b: Tensor,
    batch_sizes: Tensor,
    trans_a: bool = False,
    trans_b: bool = False,
    c: Tensor | None = None,
) -> Tensor:
    """Multiplies each group of rows by its own matrix, or computes ``a^T b`` for each group (``trans_a``).

    Args:
        a: (M, K); bfloat16, float16 or float32.
        b: (E, K, N), or (E, N, K) with ``trans_b``; (M, N) with ``trans_a``.
        batch_sizes: (E,) integers on the CPU or on the device of ``a``: the number of rows in each group. Rows past
            their sum belong to no group.
        trans_a: whether the rows of a group are the contraction, as in the gradient of ``b``.
        trans_b: whether ``b`` is (E, N, K).
        c: a tensor that the result is written to, or None.

    Returns:
        (M, N), zero in rows past the last group; with ``trans_a`` (E, K, N), zero for an empty group. If ``c`` is
        given, ``c`` is returned. The result is not differentiable; `grouped_gemm.ops.gmm` is.

    Raises:
        TypeError, ValueError: as `grouped_gemm.grouped_mm`; or ``trans_a`` and ``trans_b`` are both set, or ``c`` does
            not have the shape and dtype of the result.
        NoBackendError: no backend can run the call.
    """
    if trans_a and trans_b:
        checks.fail("trans_a and trans_b", "at most one of them", "both")
    checks.check_tensor("a", a, (2,), checks.DTYPES)
    checks.check_tensor("b", b, (2,) if trans_a else (3,), checks.DTYPES)
    offs = ends(batch_sizes, a)
    with torch.no_grad():
        result = grouped_mm(a.t() if trans_a else a, b.transpose(1, 2) if trans_b else b, offs)
        if c is None:
            return result
        checks.check_tensor("c", c, (result.dim(),), (result.dtype,))
        if c.shape != result.shape:
            checks.fail("c", f"shape {tuple(result.shape)}", tuple(c.shape))
        return c.copy_(result)


def ends(batch_sizes: Tensor, a: Tensor) -> Tensor:
    """The end row of each group, (E,) int32 on the device of ``a``, from the sizes of the groups. No host sync.

    Raises:
        TypeError: ``batch_sizes`` is not a tensor.
        ValueError: ``batch_sizes`` is not (E,) or does not hold integers. Under GROUPED_GEMM_VALIDATE=1, which
            synchronizes the host, also if the sizes add up to more rows than ``a`` has.
    """
    checks.check_tensor("batch_sizes", batch_sizes, (1,), (torch.int64, torch.int32))
    if VALIDATE.is_on() and (total := int(batch_sizes.sum())) > a.shape[0]:
        checks.fail("batch_sizes", f"a sum of at most {a.shape[0]}, the rows of a", total)
    return batch_sizes.cumsum(0, dtype=torch.int32).to(a.device, non_blocking=True)
