"""Compiles every shipped tile for GPUs that this machine does not have. Prints facts about the kernels as JSON lines.

    python tests/compile_ahead.py sm_90

`test_compile_ahead.py` starts it in a process of its own, with a fresh TRITON_CACHE_DIR and without TRITON_INTERPRET.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from grouped_gemm.backends.deepgemm import quantize as deepgemm_quantize
from grouped_gemm.backends.hipblaslt import quantize as hipblaslt_quantize
from grouped_gemm.backends.torch_native import quantize as torch_native_quantize
from grouped_gemm.backends.torch_native import quantize_mx as torch_native_quantize_mx
from grouped_gemm.core.call_spec import RowClass
from grouped_gemm.core.machine import ARCHS
from grouped_gemm.kernels.common import hopper
from grouped_gemm.kernels.common.groups import MOST_AT_ONCE
from grouped_gemm.kernels.gemm import k_grouped, k_grouped_hopper, m_grouped, m_grouped_hopper, tiles
from grouped_gemm.kernels.gemm.tiles import Tile
from grouped_gemm.kernels.moe import activation as moe_activation
from grouped_gemm.kernels.moe import combine as moe_combine
from grouped_gemm.kernels.moe import decode as moe_decode
from grouped_gemm.kernels.moe import gather as moe_gather
from grouped_gemm.kernels.moe import gathered_mm, gathered_wgrad, packing, routing
from grouped_gemm.kernels.moe import quantize as moe_quantize
from grouped_gemm.kernels.quantize import blockwise, packed_bf16, rowwise
from grouped_gemm.kernels.quantize import fp8 as quantize_fp8
from grouped_gemm.kernels.quantize import mx as quantize_mx
from grouped_gemm.moe.decode import _MOST_ROWS

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Arguments that need not be multiples of 16; all other pointers and integers are.
_UNALIGNED = (
    "M",
    "E",
    "K",
    "S",
    "B",
    "k",
    "blocks",
    "bias_stride",
    "up_row",
    "column_stride",
    "lhs_scale_stride",
    "row_scale_stride",
    "B",
    "R",
    "T",
    "rhs_scale_stride_e",
    "rhs_scale_stride_c",
    "rhs_scale_stride_o",
    "scale_stride_e",
    "scale_stride_r",
    "scale_stride_c",
    "scale_stride_o",
    "scale_stride_n",
    "weights_stride",
)


def target_of(arch: str) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def compile_kernel(
    kernel: Any, arch: str, types: dict[str, str], constants: dict[str, Any], form: Any = ASTSource, **options: int
) -> Any:
    """``types``: of arguments that are not integers; ``constants``: values that are compiled in."""
    print(f"{kernel.__name__} {constants} {options}", file=sys.stderr, flush=True)  # shows where it fails or hangs
    names = kernel.arg_names
    free = [name for name in names if name not in constants]
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name in free if name not in _UNALIGNED and "tensordesc" not in signature[name]]
    source = form(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=target_of(arch), options=options)


def dtype_of(kind: str, arch: str) -> str:
    fp8 = "fp8e4b8" if ARCHS[arch].fp8 is torch.float8_e4m3fnuz else "fp8e4nv"
    return {"16 bit": "bf16", "32 bit": "fp32"}.get(kind, fp8)


def limit_of(arch: str) -> float:
    return torch.finfo(ARCHS[arch].fp8).max


def scale_types(kind: str) -> dict[str, str]:
    return dict.fromkeys(("lhs_scale", "rhs_scale"), "*i32" if kind.startswith("mx") else "*fp32")


def compile_gemm(arch: str, kind: str, tile: Tile, c_contiguous: bool = True) -> Any:
    tma, dtype = ARCHS[arch].tma, dtype_of(kind, arch)
    sides = (tile.block_n, tile.block_k) if c_contiguous else (tile.block_k, tile.block_n)
    types = {"offs": "*i32", "out": "*bf16"} | scale_types(kind)
    types["lhs"] = f"tensordesc<{dtype}[{tile.block_m}, {tile.block_k}]>" if tma else f"*{dtype}"
    types["rhs"] = f"tensordesc<{dtype}[1, {sides[0]}, {sides[1]}]>" if tma else f"*{dtype}"
    constants = {
        "KIND": kind, "C_CONTIGUOUS": c_contiguous, "TMA": tma, "bias": None,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m,
        "SCALE_ALIGNMENT": 4,
    }  # fmt: skip
    if kind.endswith("bit"):
        constants |= {"lhs_scale": None, "rhs_scale": None}
    return compile_kernel(
        m_grouped._grouped_mm, arch, types, constants, num_warps=tile.num_warps, num_stages=tile.num_stages
    )


def compile_wgrad(arch: str, kind: str, tile: Tile, accumulate: bool = False) -> Any:
    tma, dtype = ARCHS[arch].tma, dtype_of(kind, arch)
    types = {"offs": "*i32", "out": "*fp32" if accumulate else "*bf16"} | scale_types(kind)
    for name, side in (("lhs", tile.block_m), ("rhs", tile.block_n)):
        box = f"1, 1, {tile.block_k}, {side}" if kind.endswith("bit") else f"{side}, {tile.block_k}"
        types[name] = f"tensordesc<{dtype}[{box}]>" if tma else f"*{dtype}"
    constants = {
        "KIND": kind, "TMA": tma, "TOKEN_BLOCK": 128, "E_AT_ONCE": 256,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m,
        "ACCUMULATE": accumulate,
    }  # fmt: skip
    if kind.endswith("bit"):
        constants |= {"lhs_scale": None, "rhs_scale": None}
    return compile_kernel(
        k_grouped._wgrad, arch, types, constants, num_warps=tile.num_warps, num_stages=tile.num_stages
    )


def compile_quantizers(arch: str) -> dict[str, Any]:
    fp8 = f"*{dtype_of('rowwise', arch)}"
    types = dict.fromkeys(("x", "w"), "*bf16") | dict.fromkeys(
        ("by_row", "by_column", "data", "straight", "transposed"), fp8
    )
    types |= dict.fromkeys(("row_scales", "column_scales", "line_scales", "scales"), "*fp32")
    types |= dict.fromkeys(("offs", "blocks", "row_amax", "line_amax", "column_amax"), "*i32")
    types |= dict.fromkeys(("row_maxima", "line_maxima", "column_maxima", "counts"), "*i32")
    nvidia = arch.startswith("sm")
    numbers = {"LIMIT": limit_of(arch), "POWER_OF_TWO": False, "NVIDIA": nvidia}
    tile = {"BLOCK": 128, "GROUP_M": 8}
    activations = numbers | tile | {"ROWS": True, "COLUMNS": True, "SCALE_ALIGNMENT": 4}
    weights = numbers | tile | {"STRAIGHT": True, "TRANSPOSED": True}
    find = {"E_AT_ONCE": 256, "BLOCK": 128, "SCALE_ALIGNMENT": 4, "AT_ONCE": 32}

    def build(kernel: Any, constants: dict[str, Any], warps: int) -> Any:
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        return compile_kernel(kernel, arch, types, constants, num_warps=warps)

    packed = {}
    if ARCHS[arch].packed_max:
        tiles, scaled = packed_bf16.TILES, packed_bf16.SCALED_TILES
        forms = {
            "amax": (packed_bf16.find_amax, {"num_warps": 4}),
            "tiles rowwise": (packed_bf16.quantize_rowwise, scaled),
            "tiles blockwise": (packed_bf16.quantize_blockwise, tiles),
            "weights rowwise": (packed_bf16.quantize_weights_rowwise, scaled),
            "weights rowwise transposed": (packed_bf16.quantize_weights_rowwise, scaled),
            "weights blockwise": (packed_bf16.quantize_weights_blockwise, tiles),
        }
        for name, (kernel, options) in forms.items():
            alone = {"STRAIGHT": False, "line_maxima": None} if name.endswith("transposed") else {}
            constants = {k: v for k, v in (activations | weights | alone).items() if k in kernel.arg_names}
            built = compile_kernel(kernel, arch, types, constants, form=GluonASTSource, **options)
            packed[f"{name} packed"] = built
    return {
        "find blocks": build(quantize_fp8._find_blocks, find, 4),
        "find blocks of many groups": build(quantize_fp8._find_blocks, find | {"E_AT_ONCE": 1024, "AT_ONCE": 8}, 4),
        "rows": build(rowwise.quantize_rows_alone, numbers | {"BLOCK_M": 1, "BLOCK_D": 8192, "WHOLE": True}, 8),
        "amax": build(rowwise.find_amax, tile, 4),
        "tiles rowwise": build(rowwise.quantize_tiles, activations, 4),
        "tiles blockwise": build(blockwise.quantize_tiles, activations, 4),
        **packed,
        "weight amax": build(rowwise.find_weight_amax, tile, 8),
        "weights rowwise": build(rowwise.quantize_weight_tiles, weights, 8),
        "weights blockwise": build(blockwise.quantize_weight_tiles, weights, 8),
    }


def compile_deepgemm_quantizers(arch: str) -> dict[str, Any]:
    types = {"x": "*bf16", "source": "*bf16", "target": "*bf16"} | dict.fromkeys(("by_row", "by_column"), "*fp8e4nv")
    types |= dict.fromkeys(("row_scales", "column_scales"), "*fp32")
    types |= dict.fromkeys(("offs", "row_map", "blocks", "sizes"), "*i32")
    sides = {"BLOCK": 128, "FIELDS": 5}
    tile: dict[str, Any] = {"LIMIT": 448.0, "POWER_OF_TWO": False, "NVIDIA": True, **sides, "GROUP_M": 8}
    kernels: dict[str, tuple[Any, dict[str, Any]]] = {
        "deepgemm plan": (deepgemm_quantize._lay_out, {"E_AT_ONCE": 1024, **sides, "AT_ONCE": 8}),
        "deepgemm rows": (deepgemm_quantize._quantize_tiles, {"ROWS": True, "COLUMNS": False, **tile}),
        "deepgemm both": (deepgemm_quantize._quantize_tiles, {"ROWS": True, "COLUMNS": True, **tile}),
    }
    for mode in ("pad", "unpad", "zero tail"):
        constants = {"MODE": mode, **sides, "ROWS": 32, "COLUMNS": 256}
        kernels[f"deepgemm {mode}"] = deepgemm_quantize._move_rows, constants
    compiled = {name: compile_kernel(kernel, arch, types, constants) for name, (kernel, constants) in kernels.items()}
    del tile["GROUP_M"]
    for name, rows in (("both", True), ("columns", False)):
        constants = {"ROWS": rows, "COLUMNS": True, **tile}
        kernel, options = deepgemm_quantize._quantize_packed, packed_bf16.TILES
        built = compile_kernel(kernel, arch, types, constants, form=GluonASTSource, **options)
        compiled[f"deepgemm {name} packed"] = built
    return compiled


def compile_torch_quantizers(arch: str) -> dict[str, Any]:
    types = {"x": "*bf16"} | dict.fromkeys(("by_row", "by_column"), "*fp8e4nv")
    types |= dict.fromkeys(("row_scales", "column_scales"), "*fp32")
    types |= dict.fromkeys(("offs", "ends", "token_ends", "blocks", "row_amax", "column_amax"), "*i32")
    tile = {"LIMIT": 448.0, "POWER_OF_TWO": False, "NVIDIA": True, "TOKENS": 32, "BLOCK": 128, "GROUP_M": 8}
    kernels: dict[str, tuple[Any, dict[str, Any]]] = {
        "torch plan": (torch_native_quantize._lay_out, {"E_PADDED": 512, "TOKENS": 32}),
        "torch blocks": (torch_native_quantize._find_blocks, {"E_PADDED": 512, "BLOCK": 128, "AT_ONCE": 32}),
        "torch both": (torch_native_quantize._quantize_tiles, {"ROWS": True, **tile}),
        "torch columns": (torch_native_quantize._quantize_tiles, {"ROWS": False, "row_amax": None, **tile}),
        "torch zero tail": (torch_native_quantize._zero, {"TAIL": True, "BLOCK": 4096}),
        "torch zero groups": (torch_native_quantize._zero, {"TAIL": False, "BLOCK": 4096}),
    }
    return {name: compile_kernel(kernel, arch, types, constants) for name, (kernel, constants) in kernels.items()}


def compile_hopper() -> dict[str, Any]:
    """The Hopper kernels, for each kind and each way to store the result."""
    compiled = {}
    for kind, tile in m_grouped_hopper.TILES.items():
        for c_contiguous in (True, False) if kind == "16 bit" else (True,):
            for whole in (True, False):
                name = f"gemm_hopper {kind} {tuple(tile)} {c_contiguous=} {whole=}"
                compiled[name] = compile_gemm_hopper(kind, tile, c_contiguous, whole)
    for kind, tile in k_grouped_hopper.TILES.items():
        for whole in (True, False):
            compiled[f"wgrad_hopper {kind} {tuple(tile)} {whole=}"] = compile_wgrad_hopper(kind, tile, whole)
        name = f"wgrad_hopper {kind} {tuple(tile)}, added to the result"
        compiled[name] = compile_wgrad_hopper(kind, tile, whole=False, accumulate=True)
    return compiled


def ragged_descriptor(rows: int, columns: int) -> str:
    return f"tensordesc<bf16[1, 1, {rows}, {columns}],{hopper.RAGGED_IN_SHARED!r}>"


def result_descriptor() -> str:
    rows, columns = hopper.STORED
    return f"tensordesc<bf16[1, {rows}, {columns}],{hopper.RESULTS_IN_SHARED!r}>"


def descriptor(dtype: str, rows: int, columns: int) -> str:
    layout = hopper.SCALES_IN_SHARED if dtype == "fp32" else hopper.TILES_IN_SHARED[2 if dtype == "bf16" else 1]
    return f"tensordesc<{dtype}[{rows}, {columns}],{layout!r}>"


def compile_gemm_hopper(kind: str, tile: Any, c_contiguous: bool, whole: bool) -> Any:
    """``whole``: the result is stored in whole tiles, in bf16; else masked, in fp32 and with a bias."""
    dtype = dtype_of(kind, "sm_90")
    lhs = descriptor(dtype, 64, tile.block_k)
    types = dict.fromkeys(("lhs_scale", "rhs_scale"), "*fp32") | {"bias": "*bf16", "offs": "*i32"}
    types |= {"out": "*bf16" if whole else "*fp32", "lhs_desc": lhs}
    types["rhs_desc"] = descriptor(
        dtype, *((tile.block_n, tile.block_k) if c_contiguous else (tile.block_k, tile.block_n))
    )
    types |= {"scale_desc": descriptor("fp32", 1, 64), "out_desc": descriptor("bf16", 64, 128)}
    constants = dict.fromkeys(("bias",) if whole else ("out_desc",))
    constants |= {} if kind == "blockwise" else {"scale_desc": None}
    constants |= {"lhs_scale": None, "rhs_scale": None} if kind == "16 bit" else {}
    constants |= {
        "KIND": kind, "C_CONTIGUOUS": c_contiguous, "CONSUMERS": tile.consumers,
        "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "STAGES": tile.num_stages,
        "GROUP_M": tile.group_m, "REGISTERS": tile.registers, "num_warps": 4,
    }  # fmt: skip
    return compile_kernel(m_grouped_hopper._kernel, "sm_90", types, constants, GluonASTSource, num_warps=4)


def compile_wgrad_hopper(kind: str, tile: Any, whole: bool, accumulate: bool = False) -> Any:
    """``whole``: tiles are stored through shared memory, in bf16; else masked, in fp32."""
    part = k_grouped_hopper.part_of(kind, tile)
    lhs, rhs = descriptor("fp8e4nv", 64, 128), descriptor("fp8e4nv", part, 128)
    if kind == "16 bit":
        lhs, rhs = ragged_descriptor(tile.block_k, 64), ragged_descriptor(tile.block_k, tile.block_n)
    types = dict.fromkeys(("lhs_scale", "rhs_scale"), "*fp32") | {"offs": "*i32", "next_tile": "*i32", "lhs_desc": lhs}
    types |= {"out": "*bf16" if whole else "*fp32", "rhs_desc": rhs}
    types |= {"lhs_scale_desc": descriptor("fp32", 1, 64), "rhs_scale_desc": descriptor("fp32", 1, part)}
    types["out_desc"] = result_descriptor()
    constants: dict[str, Any] = {} if whole else {"out_desc": None}
    constants |= {"lhs_scale": None, "rhs_scale": None} if kind == "16 bit" else {}
    constants |= {} if kind == "blockwise" else {"lhs_scale_desc": None, "rhs_scale_desc": None}
    constants |= {
        "KIND": kind, "CONSUMERS": tile.consumers,
        "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "STAGES": tile.num_stages, "GROUP_M": tile.group_m,
        "STORES": tile.stores, "REGISTERS": tile.registers, "ACCUMULATE": accumulate, "num_warps": 4,
    }  # fmt: skip
    return compile_kernel(k_grouped_hopper._kernel, "sm_90", types, constants, GluonASTSource, num_warps=4)


def compile_gathered() -> dict[str, Any]:
    """The Hopper kernels that gather rows, for each use of them in a fused MoE layer.

    ``even`` and ``far`` concern only the warps that copy. The gate and what is stored concern only those that multiply.
    Each has registers of its own, so not every combination of the two is compiled.
    """
    compiled = {}
    uses: tuple[tuple[str, str | None, dict[str, bool]], ...] = (
        ("16 bit", "swiglu", {"stored": True, "far": True}),
        ("16 bit", "swiglu", {"stored": True, "interleaved": True}),
        ("16 bit", "swiglu", {"even": False}),
        ("16 bit", "swiglu", {"interleaved": True}),
        ("16 bit", None, {"even": False}),
        ("16 bit", None, {"c_contiguous": False}),
        ("blockwise", "swiglu", {"stored": True}),
        ("blockwise", "swiglu", {"stored": True, "quantized": True, "even": False}),
        ("blockwise", "swiglu", {"even": False}),
        ("blockwise", "swiglu_clamped", {"stored": True, "far": True}),
        ("blockwise", "geglu", {"stored": True}),
        ("blockwise", "geglu_tanh", {"stored": True}),
        ("blockwise", "reglu", {"stored": True}),
        ("blockwise", None, {}),
    )
    for kind, activation, how in uses:
        compiled[f"gemm gathered {kind} {activation} {how}"] = compile_gathered_mm(kind, activation, **how)
    for lhs, whole in itertools.product((True, False), repeat=2):
        compiled[f"wgrad gathered {lhs=} {whole=}"] = compile_gathered_wgrad(lhs, whole)
    for lhs in (True, False):
        kernel = compile_gathered_wgrad(lhs, whole=False, accumulate=True)
        compiled[f"wgrad gathered {lhs=}, added to the result"] = kernel
    return compiled


def compile_gathered_mm(
    kind: str, activation: str | None = None, *, interleaved: bool = False, stored: bool = False,
    quantized: bool = False, c_contiguous: bool = True, even: bool = True, far: bool = False,
) -> Any:  # fmt: skip
    """``stored``: with pre-activations, ``quantized`` or not; ``even``: the contraction has whole steps; ``far``: rows
    of x are too far apart for offsets of 32 bits."""
    tile = gathered_mm.TILES[kind + (", gated" if activation else "") + (", stored" if stored else "")]
    dtype = dtype_of(kind, "sm_90")
    scales_h = kind == "blockwise" and activation is not None
    result = dtype if scales_h else "bf16"
    kept = dtype if quantized else "bf16"
    types = dict.fromkeys(("x_scale", "w_scale", "out_scale", "pre_scale"), "*fp32")
    types |= dict.fromkeys(("source", "offs"), "*i32")
    types |= {"x": f"*{dtype}", "out": f"*{result}", "pre": f"*{kept}"}
    box = (tile.block_n // 2, tile.block_k) if c_contiguous else (tile.block_k, tile.block_n)
    types |= {"w_desc": descriptor(dtype, *box), "out_desc": descriptor(result, 64, 128)}
    types["pre_desc"] = descriptor(kept, 64, 128)
    constants: dict[str, Any] = {} if stored else {"pre": None, "pre_desc": None}
    constants |= {} if quantized else {"pre_scale": None}
    constants |= {} if kind == "blockwise" else {"x_scale": None, "w_scale": None}
    constants |= {} if scales_h else {"out_scale": None}
    constants |= {
        "KIND": kind, "ACTIVATION": activation, "INTERLEAVED": interleaved, "POWER_OF_TWO": False,
        "C_CONTIGUOUS": c_contiguous, "EVEN_C": even, "INT64": far, "CONSUMERS": tile.consumers,
        "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "STAGES": tile.num_stages, "GROUP_M": tile.group_m,
        "REGISTERS": tile.registers, "COPY_WARPS": 4 if far else gathered_mm.COPY_WARPS[kind], "num_warps": 4,
    }  # fmt: skip
    return compile_kernel(gathered_mm._kernel, "sm_90", types, constants, GluonASTSource, num_warps=4)


def compile_gathered_wgrad(gathers_lhs: bool, whole: bool, accumulate: bool = False) -> Any:
    """``whole``: tiles are stored through shared memory, in bf16; else masked, in fp32."""
    tile = gathered_wgrad.TILE
    types = {"x": "*bf16", "next_tile": "*i32", "source": "*i32", "offs": "*i32", "out": "*bf16" if whole else "*fp32"}
    types["desc"] = ragged_descriptor(tile.block_k, tile.block_n if gathers_lhs else 64)
    types["out_desc"] = result_descriptor()
    constants: dict[str, Any] = {} if whole else {"out_desc": None}
    constants |= {
        "GATHERS_LHS": gathers_lhs, "CONSUMERS": tile.consumers,
        "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "STAGES": tile.num_stages, "GROUP_M": tile.group_m,
        "REGISTERS": tile.registers, "ACCUMULATE": accumulate, "num_warps": 4,
    }  # fmt: skip
    return compile_kernel(gathered_wgrad._kernel, "sm_90", types, constants, GluonASTSource, num_warps=4)


def compile_mx_quantizers(arch: str) -> dict[str, Any]:
    fp8, limit = f"*{dtype_of('mx', arch)}", limit_of(arch)
    types = dict.fromkeys(("x", "w"), "*bf16") | {"offs": "*i32"}
    types |= dict.fromkeys(("by_row", "by_column", "straight", "transposed"), fp8)
    types |= dict.fromkeys(("row_scales", "column_scales", "straight_scales", "transposed_scales"), "*i32")
    tokens = {"ROWS": True, "COLUMNS": True, "LIMIT": limit, "E_AT_ONCE": 256, "TOKEN_BLOCK": 128}
    weights = {"STRAIGHT": True, "TRANSPOSED": True, "LIMIT": limit, "SCALES": "by block"}
    kernels: dict[str, Any] = {
        "mx": (quantize_mx._quantize_tiles, tokens),
        "weights mx": (quantize_mx._quantize_weights, weights),
    }
    if arch == "sm_100":
        types |= dict.fromkeys(("ends", "token_ends"), "*i32")
        tokens = {"LIMIT": limit, "E_PADDED": 512, "TOKENS": 32}
        for name, rows, columns in (("both", True, True), ("rows", True, False), ("columns", False, True)):
            constants = {"ROWS": rows, "COLUMNS": columns, **tokens}
            kernels[f"torch mx {name}"] = torch_native_quantize_mx._quantize_tiles, constants
        kernels["torch weights mx"] = quantize_mx._quantize_weights, weights | {"SCALES": "swizzled"}
    return {
        name: compile_kernel(kernel, arch, types, constants, num_warps=8)
        for name, (kernel, constants) in kernels.items()
    }


def compile_hipblaslt_quantizers(arch: str) -> dict[str, Any]:
    """The quantizers of rowwise activations and of MX operands; rowwise weights share that of the Triton backend."""
    fp8, limit = f"*{dtype_of('rowwise', arch)}", limit_of(arch)
    types = dict.fromkeys(("x", "w"), "*bf16") | dict.fromkeys(("offs", "blocks", "row_amax", "column_amax"), "*i32")
    types |= dict.fromkeys(("by_row", "by_column", "straight", "transposed"), fp8)
    scales = ("row_scales", "column_scales", "straight_scales", "transposed_scales")
    fp32, words = dict.fromkeys(scales, "*fp32"), dict.fromkeys(scales, "*i32")
    numbers = {"LIMIT": limit, "POWER_OF_TWO": False, "NVIDIA": False, "BLOCK": 128, "GROUP_M": 8}
    tiles, mx_tiles = hipblaslt_quantize._quantize_tiles, hipblaslt_quantize._quantize_mx_tiles
    both, mx = {"ROWS": True, **numbers}, {"ROWS": True, "COLUMNS": True, "LIMIT": limit, "E_AT_ONCE": 256}
    compiled = {"hipblaslt": compile_kernel(tiles, arch, types | fp32, both)}
    if arch == "gfx950":
        weights = {"STRAIGHT": True, "TRANSPOSED": True, "LIMIT": limit, "SCALES": "by line"}
        kernel = quantize_mx._quantize_weights
        compiled["hipblaslt mx"] = compile_kernel(mx_tiles, arch, types | words, mx, num_warps=8)
        compiled["hipblaslt weights mx"] = compile_kernel(kernel, arch, types | words, weights, num_warps=8)
    return compiled


def compile_routing(arch: str) -> dict[str, Any]:
    types = {"topk_ids": "*i64"} | dict.fromkeys(("table", "ends", "padded", "offs", "source", "places"), "*i32")
    large, few, many = {"BLOCK": routing._LARGE}, {"E_AT_ONCE": 128}, {"E_AT_ONCE": MOST_AT_ONCE.value}
    alone = {"BLOCK": routing._SMALL, "table": None, "E": 1, "E_AT_ONCE": 1}
    return {
        "routing count": compile_kernel(routing._count, arch, types, large | few, num_warps=8),
        "routing count of many experts": compile_kernel(routing._count, arch, types, large | many, num_warps=8),
        "routing add blocks": compile_kernel(routing._add_blocks, arch, types, routing._SUMS, num_warps=4),
        "routing pad": compile_kernel(routing._pad, arch, types, few | {"ALIGNMENT": 128}, num_warps=4),
        "routing place": compile_kernel(routing._place, arch, types, large | few, num_warps=8),
        "routing place alone": compile_kernel(routing._place, arch, types, alone, num_warps=4),
        "routing place without sources": compile_kernel(
            routing._place, arch, types, large | {"source": None, "E_AT_ONCE": 2}, num_warps=8
        ),
    }


def compile_packing(arch: str) -> dict[str, Any]:
    """Rows between ranks, with and without scales and slots."""
    types = {"x": "*bf16", "topk_ids": "*i64", "topk_weights": "*fp32", "scales": "*fp32", "weights": "*fp32"}
    types |= dict.fromkeys(("ranks", "numbers", "places", "ids"), "*i32")
    ranks = {"TOKENS": 256, "SLOTS": 8}
    compiled = {"ranks of tokens": compile_kernel(packing._find_ranks, arch, types, ranks, num_warps=4)}
    types |= dict.fromkeys(("limited", "told", "header"), "*i32") | {"shifts": "*i64", "lost": "*u8"}
    types |= {"local": "*i32", "any_lost": "*u8"}
    local = {"ROWS": 256, "SLOTS": 8, "RANKS": 8}
    compiled["local ids"] = compile_kernel(packing._local_ids, arch, types, local, num_warps=4)
    limits = {"TOKENS": 256, "RANKS": 8}
    compiled["limited rows of ranks"] = compile_kernel(packing._limit, arch, types, limits, num_warps=4)
    tile = {"BLOCK": 128, "ROWS": 4, "WIDTH": 1024, "SLOTS": 8}
    no_peers = dict.fromkeys(("shifts", "told", "header"))
    without = {"scales": None, "LIMIT": 0.0, "POWER_OF_TWO": False, "NVIDIA": False} | no_peers
    forms = [("pack", "bf16", without), ("pack alone", "bf16", without | _NO_SLOTS)]
    if ARCHS[arch].fp8 is not None:
        fp8, scaling = dtype_of("rowwise", arch), without | {"LIMIT": limit_of(arch), "NVIDIA": arch.startswith("sm")}
        del scaling["scales"]
        forms += [("pack in fp8", fp8, scaling), ("pack in fp8 alone", fp8, scaling | _NO_SLOTS)]
        forms.append(("pack in fp8 for peers", fp8, {k: v for k, v in scaling.items() if k not in no_peers}))
    for name, data, changes in forms:
        compiled[name] = compile_kernel(packing._pack, arch, types | {"data": f"*{data}"}, tile | changes, num_warps=4)
    return compiled


_NO_SLOTS = dict.fromkeys(("topk_ids", "topk_weights", "ids", "weights"))


def compile_moe(arch: str) -> dict[str, Any]:
    """Gather and combine of bf16 rows: 8 slots, 16, and more than are unrolled."""
    types = dict.fromkeys(("x", "rows", "y", "out"), "*bf16") | dict.fromkeys(("source", "places"), "*i32")
    types |= dict.fromkeys(("weights", "dots"), "*fp32") | {"shifts": "*i64", "lost": "*u8"}
    compiled = {}
    for top_k in (8, 16, 40):
        constants = {"TOP_K": top_k, "UNROLLED": moe_combine.unrolled(top_k), "BLOCK_H": 1024}
        local, of_peers = constants | {"shifts": None, "lost": None}, constants | {"weights": None}
        for name, one in (("combine", local), ("combine of peers", of_peers)):
            compiled[f"{name} {top_k=}"] = compile_kernel(moe_combine._combine, arch, types, one, num_warps=4)
        slots = min(top_k, 16)
        constants = {"TOP_K": top_k, "SLOTS": slots, "BLOCK_H": 2048 // slots}
        alone = dict.fromkeys(("rows", "weights", "dots"))
        for name, absent in (("gather", alone), ("combine backward", {})):
            kernel = compile_kernel(moe_gather._gather, arch, types, constants | absent, num_warps=4)
            compiled[f"{name} {top_k=}"] = kernel
    return compiled


def compile_moe_steps(arch: str) -> dict[str, Any]:
    """What is between the GEMMs, of bf16 operands: activations in each layout, quantized and not."""
    fp8 = f"*{dtype_of('rowwise', arch)}"
    types = dict.fromkeys(("pre", "h", "dh", "dpre", "x"), "*bf16") | dict.fromkeys(("weights", "dweights"), "*fp32")
    types |= dict.fromkeys(("by_row", "data"), fp8) | dict.fromkeys(("row_scales", "scales", "pre_scales"), "*fp32")
    types |= dict.fromkeys(("offs", "blocks", "source", "places"), "*i32")
    has_fp8 = ARCHS[arch].fp8 is not None
    numbers = {"LIMIT": limit_of(arch) if has_fp8 else 0.0, "POWER_OF_TWO": False, "NVIDIA": arch.startswith("sm")}
    numbers["K_POWER"] = 8
    tile = numbers | {"SCALE_ALIGNMENT": 4, "BLOCK": 128, "GROUP_M": 8}
    compiled = {}

    def build(name: str, kernel: Any, constants: dict[str, Any], **options: int) -> None:
        constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
        compiled[name] = compile_kernel(kernel, arch, types, constants, **{"num_warps": 4} | options)

    for act, layout in (("silu", "halves"), ("swiglu_clamped", "interleaved"), ("gelu", "plain")):
        form, name = numbers | {"ACT": act, "LAYOUT": layout}, f"{act} {layout}"
        build(f"activate {name}", moe_activation._activate, form | {"ROWS": 8, "WIDTH": 256}, **moe_activation.OPTIONS)
        whole = form | {"ROWS": 1, "WIDTH": 1024, "E_AT_ONCE": 256}
        build(f"activate backward {name}", moe_activation._activate_backward, whole, **moe_activation.OPTIONS)
        if not has_fp8:
            continue
        rows = form | tile | {"ROWS": moe_quantize._ROWS}
        build(f"activate quantize {name}", moe_quantize._activate_quantize, rows, **moe_activation.OPTIONS)
        whole = rows | {"ROWS": moe_quantize._BACKWARD_ROWS, "WIDTH": 64 if layout == "interleaved" else 128}
        kernel = moe_quantize._activate_backward_quantize
        unscaled = whole | {"pre_scales": None}
        build(f"activate backward quantize {name}", kernel, unscaled, **moe_activation.OPTIONS)
        types["pre"] = fp8
        build(f"activate backward quantize {name}, of fp8", kernel, whole, **moe_activation.OPTIONS)
        types["pre"] = "*bf16"
    if has_fp8:
        tokens = {"BLOCK": 128, "ROWS": 4, "WIDTH": 1024, "PDL": False}
        build("tokens", moe_quantize._quantize_tokens, numbers | tokens)
        build("values of tokens", moe_quantize._dequantize_tokens, tokens)
    return compiled


def compile_decode() -> dict[str, Any]:
    """The kernels of a MoE layer's decode: each tile, for few slots and for the most that "auto" takes."""
    compiled: dict[str, Any] = {}
    for (gemm, kind), tile in moe_decode.TILES.items():
        few = compile_decode_gemm(gemm, kind, tile, 8, BY_SLOT=True)
        many = compile_decode_gemm(gemm, kind, tile, _MOST_ROWS[kind], even=False)
        compiled |= {f"gemm decode {gemm} {kind} {tuple(tile)}{name}": k for name, k in ((", few", few), ("", many))}
    for kind, changes in (
        ("16 bit", {"w_stride_c": None}),
        ("blockwise", {"SLOTS": 1, "ACT": "gelu", "LAYOUT": "plain"}),
        ("blockwise", {"ACT": "swiglu_clamped", "row_step": 2}),
        ("16 bit", {"pair": True}),
        ("blockwise", {"pair": True}),
    ):
        kernel = compile_decode_gemm("gate_up", kind, moe_decode.TILES["gate_up", kind], 8, **changes)
        compiled[f"gemm decode gate_up {kind} {changes}"] = kernel
    for rows, parts, block_h in (("bf16", 1, 1024), ("fp32", 4, 256)):
        types = {"rows": f"*{rows}", "ids": "*i64", "weights": "*fp32", "y": "*bf16"}
        constants = {"TOP_K": 8, "UNROLLED": 8, "PARTS": parts, "BLOCK_H": block_h, "PDL": True}
        kernel = compile_kernel(moe_decode._sum, "sm_90", types, constants, num_warps=max(1, block_h // 256))
        compiled[f"moe sum {parts=}"] = kernel
    types = {"x": "*bf16", "data": "*fp8e4nv", "scales": "*fp32"}
    numbers = {"LIMIT": 448.0, "POWER_OF_TWO": False, "NVIDIA": True}
    tokens = numbers | {"BLOCK": 128, "ROWS": 4, "WIDTH": 1024, "PDL": True}
    kernel = compile_kernel(moe_quantize._quantize_tokens, "sm_90", types, tokens, num_warps=4)
    compiled["moe tokens, overlapping"] = kernel
    return compiled


def compile_decode_gemm(
    gemm: str, kind: str, tile: moe_decode.Tile, slots: int, even: bool = True, pair: bool = False, **changes: Any
) -> Any:
    """``even``: the contraction has whole steps, weights are prefetched and down is split; else there are biases.
    ``pair``: gate and up are two tensors. ``changes``: of constants; None: the argument is not one."""
    is_down = gemm == "down"
    w, x = "bf16" if kind == "16 bit" else "fp8e4nv", "fp8e4nv" if kind == "blockwise" else "bf16"
    types = {"x": f"*{x}", "ids": "*i64", "w": f"*{w}", "out": "*fp32" if is_down and even else "*bf16"}
    types |= {"x_scale": "*fp32", "scale": "*fp32", "bias": "*bf16"}
    types |= {"up_w": f"*{w}", "up_scale": "*fp32", "up_bias": "*bf16"}
    strides = {"w_stride_c": 1, "row_step": 1, "scale_stride_n": 1}
    constants: dict[str, Any] = {name: value for name, value in (strides | changes).items() if value is not None}
    constants = {
        "ACT": None if is_down else "silu", "LAYOUT": "plain" if is_down else "halves", "NVIDIA": True, "KIND": kind,
        "BY_SLOT": False, "SLOTS": slots, "PDL": True, "EVEN_C": even,
        "PREFETCH": moe_decode._PREFETCHED if even and "w_stride_c" in constants else 0,
        "BLOCK_N": tile.block_n, "BLOCK_M": tile.block_m, "BLOCK_C": tile.block_c, "UNROLL": tile.unroll,
        "STAGES": tile.num_stages, "UNIT": 8 if w == "bf16" else 16,
    } | constants  # fmt: skip
    constants |= dict.fromkeys(("x_scale",) if kind != "blockwise" else ())
    constants |= dict.fromkeys(("scale", "up_scale") if kind == "16 bit" else ())
    constants |= dict.fromkeys(("bias", "up_bias") if even else ())
    constants |= dict.fromkeys(() if pair else ("up_w", "up_scale", "up_bias"))
    return compile_kernel(moe_decode._mm, "sm_90", types, constants, num_warps=tile.num_warps)


def facts_of(name: str, compiled: Any) -> dict[str, Any]:
    """Shared memory, spilled bytes, and the matrix instructions in the assembly."""
    found = {"kernel": name, "shared": compiled.metadata.shared}
    if "amdgcn" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        found["spilled"] = sum(map(int, re.findall(r"\.vgpr_spill_count: +(\d+)", assembly)))
        found["instructions"] = sorted(set(re.findall(r"v_mfma_\w+", assembly)))
        return found
    ptx = compiled.asm["ptx"]
    found["instructions"] = sorted(set(re.findall(r"(?:wgmma|mma|tcgen05)\.(?:mma_async|sync|mma)[\w.:]*", ptx)))
    found["spilled"] = stack_bytes(compiled)
    return found


def stack_bytes(compiled: Any) -> int:
    """Bytes of stack that a CUDA kernel spills to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.findall(r"STACK:(\d+)", text)))


def main(arch: str) -> None:
    vendor = "amd" if arch.startswith("gfx") else "nvidia"
    has_fp8 = ARCHS[arch].fp8 is not None
    mx = "mx" if ARCHS[arch].mx else "mx upcast"
    kinds = ("16 bit", "rowwise", "blockwise", mx) if has_fp8 else ("16 bit",)
    for kind in kinds:
        for tile in {tiles.gemm_tile(vendor, arch, kind, row_class) for row_class in RowClass}:
            print(json.dumps(facts_of(f"gemm {kind} {tuple(tile)}", compile_gemm(arch, kind, tile))), flush=True)
        tile = tiles.wgrad_tile(vendor, arch, kind)
        print(json.dumps(facts_of(f"wgrad {kind} {tuple(tile)}", compile_wgrad(arch, kind, tile))), flush=True)
        # On AMD these two spill a dozen registers with any fp32 result, added or stored.
        if (arch, kind) not in (("gfx942", "mx upcast"), ("gfx950", "blockwise")):
            name = f"wgrad {kind} {tuple(tile)}, added to the result"
            print(json.dumps(facts_of(name, compile_wgrad(arch, kind, tile, accumulate=True))), flush=True)
    tile = tiles.gemm_tile(vendor, arch, "16 bit", RowClass.LARGE)
    print(
        json.dumps(facts_of(f"gemm 16 bit {tuple(tile)}, N contiguous", compile_gemm(arch, "16 bit", tile, False))),
        flush=True,
    )
    quantizers = compile_quantizers(arch) if arch in ("sm_90", "gfx942", "gfx950") else {}
    quantizers |= compile_mx_quantizers(arch) if has_fp8 else {}
    quantizers |= compile_deepgemm_quantizers(arch) if arch in ("sm_90", "sm_100") else {}
    quantizers |= compile_torch_quantizers(arch) if arch in ("sm_90", "sm_100") else {}
    quantizers |= compile_hipblaslt_quantizers(arch) if vendor == "amd" else {}
    for name, compiled in quantizers.items():
        print(json.dumps(facts_of(f"quantize {name}", compiled)), flush=True)
    for name, compiled in compile_routing(arch).items():
        print(json.dumps(facts_of(name, compiled)), flush=True)
    moe = (
        compile_moe(arch) | compile_moe_steps(arch) | compile_packing(arch)
        if arch in ("sm_80", "sm_90", "gfx942")
        else {}
    )
    for name, compiled in moe.items():
        print(json.dumps(facts_of(f"moe {name}", compiled)), flush=True)
    hopper_kernels = compile_hopper() | compile_gathered() | compile_decode() if ARCHS[arch].kernels == "hopper" else {}
    for name, compiled in hopper_kernels.items():
        print(json.dumps(facts_of(name, compiled)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
