"""What a user would call instead of the Triton backend: torch's grouped GEMMs, and DeepGEMM where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from _common import DEVICE, FP8, TRITON, attempt

from grouped_gemm import Recipe
from grouped_gemm.backends.base import OffsetPlan


def make_peers(recipe: Recipe, a: Any, w: Any, dy: Any, offs: Any) -> dict[str, dict[str, Callable[[], Any]]]:
    """By pass and name, what a user would call instead. Values do not affect a peer's time, so scales are random."""
    (num_rows, k), (num_groups, n, _) = a.shape, w.shape
    if recipe is Recipe.NONE:
        peers = {
            "forward": {"torch": lambda: torch._grouped_mm(a, w.transpose(1, 2), offs=offs)},
            "dgrad": {"torch": lambda: torch._grouped_mm(dy, w, offs=offs)},
            "wgrad": {"torch": lambda: torch._grouped_mm(dy.t(), a, offs=offs)},
        }
    elif recipe is Recipe.FP8_ROWWISE:
        fp8 = {"a": a.to(FP8), "w": w.to(FP8), "dy": dy.to(FP8), "wt": w.transpose(1, 2).contiguous().to(FP8)}
        at, dyt = a.t().contiguous().to(FP8), dy.t().contiguous().to(FP8)
        ones = {size: torch.rand(size, device=DEVICE) + 0.5 for size in {num_rows, num_groups * n, num_groups * k}}

        def scaled(x: Any, y: Any, x_scale: Any, y_scale: Any) -> Any:
            return torch._scaled_grouped_mm(
                x, y, x_scale, y_scale, offs=offs, out_dtype=torch.bfloat16, use_fast_accum=True
            )

        by_row, by_n, by_k = ones[num_rows], ones[num_groups * n], ones[num_groups * k]
        peers = {
            "forward": {"torch": lambda: scaled(fp8["a"], fp8["w"].transpose(1, 2), by_row, by_n.view(num_groups, n))},
            "dgrad": {"torch": lambda: scaled(fp8["dy"], fp8["wt"].transpose(1, 2), by_row, by_k.view(num_groups, k))},
            "wgrad": {"torch": lambda: scaled(dyt, at.t(), by_n, by_k)},
        }
    else:
        peers = {"forward": {}, "dgrad": {}, "wgrad": {}}
    attempt(f"DeepGEMM {recipe.value}", lambda: add_deep_gemm(peers, recipe, a, w, dy, offs))
    return peers


def add_deep_gemm(peers: Any, recipe: Recipe, a: Any, w: Any, dy: Any, offs: Any) -> None:
    if find_spec("deep_gemm") is None:
        return
    import deep_gemm

    (_, k), (num_groups, n, _) = a.shape, w.shape
    sizes = (-(-offs.diff(prepend=offs.new_zeros(1)) // 128) * 128).tolist()
    num_rows = sum(sizes)
    layout = torch.repeat_interleave(
        torch.arange(num_groups, device=DEVICE, dtype=torch.int32), torch.tensor(sizes, device=DEVICE)
    )
    a, dy = (torch.randn(num_rows, d, device=DEVICE, dtype=torch.bfloat16) for d in (k, n))
    y, da = torch.empty_like(dy), torch.empty_like(a)
    if recipe is Recipe.NONE:
        peers["forward"]["deep_gemm"] = lambda: deep_gemm.m_grouped_bf16_gemm_nt_contiguous(a, w, y, layout)
    if recipe is not Recipe.FP8_BLOCKWISE:
        return
    whole = OffsetPlan(torch.tensor([num_rows], dtype=torch.int32, device=DEVICE), num_rows)

    def quantized(x: Any) -> Any:  # DeepGEMM can read these scales: contiguous along rows
        rows, _ = TRITON.quantize_activations(x, whole, recipe, rows=True, columns=False)
        return rows.data, rows.scale[:, :num_rows].contiguous().t()

    forward, dgrad = TRITON.quantize_weights(w.transpose(1, 2), recipe, forward=True, dgrad=True)
    qa, qdy = quantized(a), quantized(dy)
    qw = forward.data.transpose(1, 2), forward.scale.transpose(1, 2).contiguous()
    qwt = dgrad.data, dgrad.scale.contiguous()
    gemm = deep_gemm.m_grouped_fp8_gemm_nt_contiguous
    peers["forward"]["deep_gemm"] = lambda: gemm(qa, qw, y, layout, recipe=(1, 128, 128))
    peers["dgrad"]["deep_gemm"] = lambda: gemm(qdy, qwt, da, layout, recipe=(1, 128, 128))
    dw = torch.zeros(num_groups, n, k, device=DEVICE)
    ks = torch.tensor(sizes, device=DEVICE, dtype=torch.int32)
    flat_dy, flat_a = dy.t().contiguous().to(FP8).flatten(), a.t().contiguous().to(FP8).flatten()
    one_n, one_k = (torch.ones(d, num_rows // 128, device=DEVICE) for d in (n, k))
    peers["wgrad"]["deep_gemm"] = lambda: deep_gemm.k_grouped_fp8_gemm_nt_contiguous(
        (flat_dy, one_n), (flat_a, one_k), dw, sizes, ks, dw
    )
