"""Cases of `moe.padding` on Triton's kernels: routing, gather, quantizers and GEMMs of forward."""

from __future__ import annotations

import padding_checks
import pytest

from grouped_gemm import BackendKind

# Tokens of a dispatcher reach the same kernels as a rank's own.
ROWS = (("bf16", "own tokens"), ("mxfp8", "own tokens"), ("fp8", "a dispatcher that pads"))


@pytest.mark.parametrize("row", [r for r in padding_checks.ALL if r[:2] in ROWS], ids=padding_checks.name)
def test_nobody_pads(row):
    padding_checks.check(row, BackendKind.TRITON, hidden=64, inner=32, training=False)
