#!/usr/bin/env python3
"""The Triton backend beside what a user would pick instead, on one CUDA GPU.

    PYTHONPATH=. python3 benchmarks/grouped_mm.py [--shapes seed ...] [--json FILE]

First everything is compared with `reference` on small ragged cases, then each product of the timed shapes on some of
its groups, in memory poisoned with NaN. Times are medians of CUDA events with a cold L2; only ratios within a run are
to be trusted. Peers: torch's grouped GEMMs, and DeepGEMM where it is installed (ragged: on groups padded to 128
beforehand, which it needs and which is not timed).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.testing import do_bench

from grouped_gemm import Recipe, grouped_mm, reference
from grouped_gemm.backends import get_backend
from grouped_gemm.backends.base import OffsetPlan
from grouped_gemm.operand import Quantized
from grouped_gemm.preference import KernelPreference

DEVICE = "cuda"
# name: (M tokens, E experts, N out features, K in features)
SHAPES = {
    "seed": (32768, 8, 2048, 7168),
    "dsv3_gateup": (32768, 32, 4096, 7168),
    "dsv3_down": (32768, 32, 7168, 2048),
    "qwen3_gateup": (131072, 128, 1536, 2048),
    "qwen3_down": (131072, 128, 2048, 768),
}
RECIPES = (Recipe.NONE, Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE)
TRITON = get_backend(KernelPreference.TRITON)
FP8 = torch.float8_e4m3fn
results: list[dict[str, Any]] = []
failures: list[str] = []


def attempt(what: str, function: Callable[[], Any]) -> Any:
    """What ``function`` returns; None where it fails, which is printed and does not stop the rest."""
    try:
        return function()
    except Exception as error:
        failures.append(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        print(f"FAILED {failures[-1]}", flush=True)
        traceback.print_exc(limit=-4)
        torch.cuda.empty_cache()
        return None


def milliseconds(what: str, function: Callable[[], Any]) -> float | None:
    return attempt(what, lambda: do_bench(function, warmup=20, rep=80, return_mode="median"))


def ends_of(num_rows: int, num_groups: int, kind: str) -> torch.Tensor:
    """End rows, (E,) int32: equal groups; or skewed ones, one empty, in multiples of 16, as torch's fp8 wants."""
    if kind == "balanced":
        sizes = torch.full((num_groups,), num_rows // num_groups)
    else:
        shares = torch.rand(num_groups, generator=torch.Generator().manual_seed(0))
        shares[num_groups // 2] = 0
        sizes = (shares / shares.sum() * num_rows).int() // 16 * 16
        sizes[0] += num_rows - sizes.sum()
    return sizes.cumsum(0).int().to(DEVICE)


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Of all elements together; NaN or Inf in ``x`` gives NaN or Inf."""
    return ((x.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)).item()


def poison(*shapes_and_dtype: Any) -> None:
    """Leaves NaN in the memory that the allocator will hand out next for such a tensor."""
    *shape, dtype = shapes_and_dtype
    torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


# -- right before fast


def check_small() -> None:
    """Forward, dgrad, wgrad and bias on ragged groups with rows past the last one, against `reference` in fp64."""
    cases = [(1000, 704, 2880, True), (1000, 2880, 704, False), (300, 100, 50, True), (300, 16, 200, False)]
    for recipe in (*RECIPES, Recipe.FP8_ROWWISE_POW2, Recipe.FP8_BLOCKWISE_POW2):
        for num_rows, k, n, k_contiguous in cases:
            name = f"{recipe.value} M={num_rows} K={k} N={n} {'k' if k_contiguous else 'n'} contiguous"
            attempt(name, lambda: check_case(name, recipe, num_rows, k, n, k_contiguous))  # noqa: B023
    for recipe in RECIPES[1:]:
        attempt(f"quantizers {recipe.value}", lambda: check_quantizers(recipe))  # noqa: B023


def check_case(name: str, recipe: Recipe, num_rows: int, k: int, n: int, k_contiguous: bool) -> None:
    ends = [0, num_rows // 3, num_rows // 3, num_rows // 2 + 7, num_rows - 61]
    offs = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    a = torch.randn(num_rows, k, device=DEVICE, dtype=torch.bfloat16)
    b = torch.randn(5, n, k, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
    b = b if k_contiguous else b.contiguous()
    dy = torch.randn(num_rows, n, device=DEVICE, dtype=torch.bfloat16)
    a[ends[-1] :], dy[ends[-1] :] = float("nan"), float("nan")
    a.requires_grad_(), b.requires_grad_()

    def passes(backend: str) -> tuple[torch.Tensor, ...]:
        poison(num_rows, n, torch.bfloat16)
        y = grouped_mm(a, b, offs, recipe=recipe, kernel_preference=backend)
        poison(num_rows, k, torch.bfloat16)
        return (y, *torch.autograd.grad(y, (a, b), dy))

    errors = [relative_error(x, truth) for x, truth in zip(passes("triton"), passes("emulated"))]
    y = grouped_mm(a, b, offs, recipe=recipe, kernel_preference="triton")
    past = bool((y[ends[-1] :] == 0).all())
    empty = bool((torch.autograd.grad(y, b, dy)[0][2] == 0).all())
    good = past and empty and all(error < 5e-3 for error in errors)
    print(f"{'ok  ' if good else 'BAD '} {name}: " + " ".join(f"{error:.1e}" for error in errors), flush=True)
    if not good:
        failures.append(f"{name}: errors {errors}, zero past the end {past}, zero where empty {empty}")


def check_quantizers(recipe: Recipe) -> None:
    """Bit for bit what `reference` computes on the CPU."""
    ends = [130, 130, 263, 700]
    x = torch.randn(777, 1000, dtype=torch.bfloat16) * torch.randn(777, 1).exp().bfloat16()
    x[5, 7], x[300, 9], x[400] = float("nan"), float("inf"), 0
    plan = OffsetPlan(torch.tensor(ends, dtype=torch.int32, device=DEVICE), 777)
    rows, columns = TRITON.quantize_activations(x.to(DEVICE), plan, recipe, rows=True, columns=True)
    same = []
    data, scale = reference.quantize(x[:700], reference.row_blocks(recipe), recipe, FP8)
    found = rows.scale.cpu()
    same += [is_same(rows.data[:700], data), is_same(found.t()[:700] if found.dim() == 2 else found[:700, None], scale)]
    data, scale = reference.quantize_columns(x, ends, recipe, FP8)
    same += [is_same(columns.scale, scale)]
    block = 0
    for group in reference.group_slices(ends):
        length = group.stop - group.start
        same += [is_same(columns.data[:, block * 128 : block * 128 + length].t(), data[group])]
        block += -(-length // 128)
    w = torch.randn(3, 300, 200, dtype=torch.bfloat16)
    for b in (w, w.transpose(1, 2)):
        for operand in TRITON.quantize_weights(b.to(DEVICE), recipe, forward=True, dgrad=True):
            data, scale = reference.quantize(b, reference.weight_blocks(recipe, operand.axis), recipe, FP8)
            scale = scale if recipe.block else scale.squeeze(operand.axis)
            same += [is_same(operand.data, data), is_same(operand.scale, scale)]
    print(f"{'ok  ' if all(same) else 'BAD '} quantizers {recipe.value}, bit for bit: {same}", flush=True)
    if not all(same):
        failures.append(f"quantizers {recipe.value} differ from reference: {same}")


def is_same(x: torch.Tensor, truth: torch.Tensor) -> bool:
    return torch.equal(x.cpu().float().nan_to_num(1e38), truth.float().nan_to_num(1e38))


# -- products


def time_products(shape: str, kind: str, recipe: Recipe) -> None:
    num_rows, num_groups, n, k = SHAPES[shape]
    flops = 2 * num_rows * n * k
    offs = ends_of(num_rows, num_groups, kind)
    plan = OffsetPlan(offs, num_rows)
    a = torch.randn(num_rows, k, device=DEVICE, dtype=torch.bfloat16)
    w = torch.randn(num_groups, n, k, device=DEVICE, dtype=torch.bfloat16) * 0.02
    dy = torch.randn(num_rows, n, device=DEVICE, dtype=torch.bfloat16)
    a_rows, a_columns = TRITON.quantize_activations(a, plan, recipe, rows=True, columns=True)
    dy_rows, dy_columns = TRITON.quantize_activations(dy, plan, recipe, rows=True, columns=True)
    w_forward, w_dgrad = TRITON.quantize_weights(w.transpose(1, 2), recipe, forward=True, dgrad=True)
    ours = {
        "forward": lambda: TRITON.grouped_mm(a_rows, w_forward, plan, torch.bfloat16),
        "dgrad": lambda: TRITON.grouped_mm(dy_rows, w_dgrad, plan, torch.bfloat16),
        "wgrad": lambda: TRITON.wgrad(a_columns, dy_columns, plan, torch.bfloat16, contiguous="k"),
    }
    peers = attempt(f"{shape} {recipe.value} peers", lambda: make_peers(recipe, a, w, dy, offs)) or {}
    for pass_, function in ours.items():
        name = f"{shape} {kind} {recipe.value} {pass_}"
        error = attempt(name, lambda: sampled_error(recipe, pass_, function, a, w, dy, offs))  # noqa: B023
        ms = None if error is None else milliseconds(name, function)
        row = {"shape": shape, "kind": kind, "recipe": recipe.value, "pass": pass_, "error": error, "ms": ms}
        row["tflops"] = ms and flops / ms / 1e9
        row["peers"] = {peer: milliseconds(f"{name} {peer}", call) for peer, call in peers.get(pass_, {}).items()}
        results.append(row)
        print(describe(row), flush=True)


def sampled_error(
    recipe: Recipe, pass_: str, function: Callable[[], torch.Tensor], a: Any, w: Any, dy: Any, offs: Any
) -> float:
    """The error of three groups, the quantization included in the truth, with NaN in the memory of the output."""
    (num_rows, k), n = a.shape, w.shape[1]
    poison(*((w.shape[0], n, k) if pass_ == "wgrad" else (num_rows, n if pass_ == "forward" else k)), torch.bfloat16)
    out = function()
    groups = reference.group_slices(reference.group_ends(offs.cpu(), num_rows))
    worst = 0.0
    for e in (0, len(groups) // 2, len(groups) - 1):
        rows = groups[e]
        if pass_ == "wgrad":
            blocks = reference.column_blocks(recipe)
            left, right = (rounded(x[rows], blocks, recipe) for x in (dy, a))
            found, truth = out[e].t(), left.t() @ right
        else:
            x, b, axis = (a, w[e].t(), 1) if pass_ == "forward" else (dy, w[e], 2)
            # dgrad multiplies by the transpose: along N of b is along its own first axis
            sides = reference.weight_blocks(recipe, axis)[1:]
            sides = sides if axis == 1 else sides[::-1]
            left, right = rounded(x[rows], reference.row_blocks(recipe), recipe), rounded(b, sides, recipe)
            found, truth = out[rows], left @ right
        if rows.start < rows.stop:
            worst = max(worst, relative_error(found, truth))
        elif pass_ == "wgrad" and not bool((found == 0).all()):
            raise AssertionError("an empty group's wgrad is not zero")
    if not worst < 6e-3:
        failures.append(f"{pass_} {recipe.value}: error {worst}")
    return worst


def rounded(x: torch.Tensor, blocks: Any, recipe: Recipe) -> torch.Tensor:
    """``x`` as its quantized form has it, in fp32."""
    if not recipe.is_scaled or x.shape[0] == 0:
        return x.float()
    return reference.dequantize(*reference.quantize(x, blocks, recipe, FP8), blocks)


def make_peers(recipe: Recipe, a: Any, w: Any, dy: Any, offs: Any) -> dict[str, dict[str, Callable[[], Any]]]:
    """By pass and name, what a user would call instead. Values do not matter to a peer's time; scales are random."""
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
    add_deep_gemm(peers, recipe, a, w, dy, offs)
    return peers


def add_deep_gemm(peers: Any, recipe: Recipe, a: Any, w: Any, dy: Any, offs: Any) -> None:
    try:
        import deep_gemm
    except Exception:
        return
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

    def quantized(x: Any) -> Any:  # DeepGEMM reads these scales, too: contiguous along rows
        rows, _ = TRITON.quantize_activations(x, whole, recipe, rows=True, columns=False)
        return rows.data, rows.scale.t()

    forward, dgrad = TRITON.quantize_weights(w.transpose(1, 2), recipe, forward=True, dgrad=True)
    qa, qdy = quantized(a), quantized(dy)
    qw = forward.data.transpose(1, 2), forward.scale.transpose(1, 2).contiguous()
    qwt = dgrad.data, dgrad.scale.contiguous()
    product = deep_gemm.m_grouped_fp8_gemm_nt_contiguous
    peers["forward"]["deep_gemm"] = lambda: product(qa, qw, y, layout, recipe=(1, 128, 128))
    peers["dgrad"]["deep_gemm"] = lambda: product(qdy, qwt, da, layout, recipe=(1, 128, 128))
    dw = torch.zeros(num_groups, n, k, device=DEVICE)
    ks = torch.tensor(sizes, device=DEVICE, dtype=torch.int32)
    flat_dy, flat_a = dy.t().contiguous().to(FP8).flatten(), a.t().contiguous().to(FP8).flatten()
    one_n, one_k = (torch.ones(d, num_rows // 128, device=DEVICE) for d in (n, k))
    peers["wgrad"]["deep_gemm"] = lambda: deep_gemm.k_grouped_fp8_gemm_nt_contiguous(
        (flat_dy, one_n), (flat_a, one_k), dw, sizes, ks, dw
    )


# -- quantizers and host time


def time_quantizers(shape: str, kind: str) -> None:
    """GB/s of what must be moved, each input read once and each output written once, beside a copy."""
    num_rows, num_groups, n, k = SHAPES[shape]
    x = torch.randn(num_rows, k, device=DEVICE, dtype=torch.bfloat16)
    w = torch.randn(num_groups, n, k, device=DEVICE, dtype=torch.bfloat16)
    plan = OffsetPlan(ends_of(num_rows, num_groups, kind), num_rows)
    target = torch.empty_like(x)
    copy_ms = milliseconds("copy", lambda: target.copy_(x))
    copy = copy_ms and 4 * x.numel() / copy_ms / 1e6
    print(f"{shape} {kind} copy of the activations: {copy and f'{copy:.0f}'} GB/s", flush=True)
    for recipe in RECIPES[1:]:
        cases = {
            what: (
                3 * x.numel() if not (rows and columns) else 4 * x.numel(),
                lambda rows=rows, columns=columns, recipe=recipe: TRITON.quantize_activations(
                    x, plan, recipe, rows=rows, columns=columns
                ),
            )
            for what, rows, columns in (("rows", True, False), ("columns", False, True), ("both", True, True))
        }
        cases["weights, both"] = (
            4 * w.numel(),
            lambda recipe=recipe: TRITON.quantize_weights(w.transpose(1, 2), recipe, forward=True, dgrad=True),
        )
        for what, (nbytes, function) in cases.items():
            name = f"{shape} {kind} {recipe.value} quantizer, {what}"
            ms = milliseconds(name, function)
            row = {"shape": shape, "kind": kind, "recipe": recipe.value, "quantizer": what, "ms": ms, "copy": copy}
            row["gbs"] = ms and nbytes / ms / 1e6
            results.append(row)
            print(describe(row), flush=True)


def time_host() -> None:
    """Microseconds that the host spends on an eager call without gradients, in a queue that never fills."""
    offs = torch.tensor([64, 128], dtype=torch.int32, device=DEVICE)
    a = torch.randn(128, 256, device=DEVICE, dtype=torch.bfloat16)
    b = torch.randn(2, 256, 256, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
    calls = {
        f"grouped_mm {recipe.value}": lambda recipe=recipe: grouped_mm(
            a, b, offs, recipe=recipe, kernel_preference="triton"
        )
        for recipe in RECIPES
    }
    lhs, rhs = Quantized(a, None, Recipe.NONE, 1, ""), Quantized(b, None, Recipe.NONE, 1, "")
    calls["kernel only, bf16"] = lambda: TRITON.grouped_mm(lhs, rhs, OffsetPlan(offs, 128), torch.bfloat16)
    calls["torch._grouped_mm"] = lambda: torch._grouped_mm(a, b, offs=offs)
    for name, function in calls.items():

        def measure(function: Callable[[], Any] = function) -> float:
            for _ in range(20):
                function()
            best = float("inf")
            for _ in range(10):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(50):
                    function()
                best = min(best, (time.perf_counter() - begin) / 50 * 1e6)
            return best

        us = attempt(f"host time {name}", measure)
        results.append({"host": name, "us": us})
        print(f"host time {name}: {us and f'{us:.1f}'} us", flush=True)


# -- output


def describe(row: dict[str, Any]) -> str:
    if "host" in row:
        return f"host time {row['host']:24s} {row['us'] or float('nan'):8.1f} us"
    head = f"{row['shape']:13s}{row['kind']:9s}{row['recipe']:14s}"
    if "quantizer" in row:
        share = row["gbs"] / row["copy"] if row["gbs"] and row["copy"] else float("nan")
        return f"{head}quantizer {row['quantizer']:14s}{row['gbs'] or float('nan'):8.0f} GB/s {share:6.2f} of a copy"
    text = f"{head}{row['pass']:8s}{row['tflops'] or float('nan'):7.0f} TFLOP/s"
    for peer, ms in row["peers"].items():
        ratio = ms / row["ms"] if ms and row["ms"] else float("nan")
        text += f"  {ratio:5.2f}x {peer}"
    return text + f"  error {row['error'] if row['error'] is not None else float('nan'):.0e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--recipes", nargs="*", choices=[r.value for r in RECIPES], default=[r.value for r in RECIPES])
    parser.add_argument("--skip", nargs="*", choices=("check", "products", "quantizers", "host"), default=[])
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, flush=True)
    begin = time.time()
    health = attempt("health", lambda: TRITON.health(torch.device(DEVICE)))
    print(f"health: {health} after {time.time() - begin:.0f} s", flush=True)
    if "check" not in args.skip:
        check_small()
    if "host" not in args.skip:
        time_host()
    if "quantizers" not in args.skip:
        for shape in ("seed", "qwen3_gateup"):
            if shape in args.shapes:
                attempt(f"quantizers {shape}", lambda: time_quantizers(shape, "ragged"))  # noqa: B023
                torch.cuda.empty_cache()
    if "products" not in args.skip:
        for shape in args.shapes:
            for recipe in map(Recipe, args.recipes):
                for kind in ("balanced", "ragged"):
                    attempt(f"{shape} {recipe.value}", lambda: time_products(shape, kind, recipe))  # noqa: B023
                    torch.cuda.empty_cache()
    print(f"\nafter {time.time() - begin:.0f} s, x: how many times as fast as the peer")
    for row in results:
        print(describe(row))
    print(f"{len(failures)} failures" + "".join(f"\n  {failure}" for failure in failures))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "rows": results, "failures": failures}, file, indent=1)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
