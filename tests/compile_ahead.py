"""Compiles every shipped tile for GPUs that are not here, and prints what the compiler made of it as JSON lines.

    python tests/compile_ahead.py sm_90

A process of its own, with a fresh TRITON_CACHE_DIR and without TRITON_INTERPRET: `test_compile_ahead.py` starts it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grouped_gemm.kernels import gemm, launch, quantize, quantize_mx, tiles, wgrad
from grouped_gemm.kernels.tiles import Tile
from grouped_gemm.problem import RowClass

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TMA = ("sm_90", "sm_100")
# Arguments that the host specializes: pointers and strides are multiples of 16.
_PLAIN = ("M", "E", "rhs_scale_stride_e", "rhs_scale_stride_c", "rhs_scale_stride_o")


def target_of(arch: str) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def compile_kernel(kernel: Any, arch: str, types: dict[str, str], constants: dict[str, Any], **options: int) -> Any:
    """``types`` of arguments that are no integers; ``constants`` of those that are compiled in."""
    names = kernel.arg_names
    free = [name for name in names if name not in constants]
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name in free if name not in _PLAIN and "tensordesc" not in signature[name]]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=target_of(arch), options=options)


def dtype_of(kind: str, arch: str) -> str:
    return {"16 bit": "bf16", "32 bit": "fp32"}.get(kind, "fp8e4b8" if arch == "gfx942" else "fp8e4nv")


def scale_types(kind: str) -> dict[str, str]:
    return dict.fromkeys(("lhs_scale", "rhs_scale"), "*i32" if kind.startswith("mx") else "*fp32")


def compile_gemm(arch: str, kind: str, tile: Tile, c_contiguous: bool = True) -> Any:
    tma, dtype = arch in _TMA, dtype_of(kind, arch)
    sides = (tile.columns, tile.depth) if c_contiguous else (tile.depth, tile.columns)
    types = {"offs": "*i32", "out": "*bf16"} | scale_types(kind)
    types["lhs"] = f"tensordesc<{dtype}[{tile.rows}, {tile.depth}]>" if tma else f"*{dtype}"
    types["rhs"] = f"tensordesc<{dtype}[1, {sides[0]}, {sides[1]}]>" if tma else f"*{dtype}"
    constants = {
        "KIND": kind, "C_CONTIGUOUS": c_contiguous, "TMA": tma, "bias": None,
        "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_C": tile.depth, "BAND": tile.band,
    }  # fmt: skip
    if kind.endswith("bit"):
        constants |= {"lhs_scale": None, "rhs_scale": None}
    return compile_kernel(gemm._grouped_mm, arch, types, constants, num_warps=tile.warps, num_stages=tile.stages)


def compile_wgrad(arch: str, kind: str, tile: Tile) -> Any:
    tma, dtype = arch in _TMA, dtype_of(kind, arch)
    types = {"offs": "*i32", "out": "*bf16"} | scale_types(kind)
    for name, side in (("lhs", tile.rows), ("rhs", tile.columns)):
        box = f"1, 1, {tile.depth}, {side}" if kind.endswith("bit") else f"{side}, {tile.depth}"
        types[name] = f"tensordesc<{dtype}[{box}]>" if tma else f"*{dtype}"
    constants = {
        "KIND": kind, "TMA": tma, "TOKEN_BLOCK": 128, "E_PADDED": 256,
        "BLOCK_P": tile.rows, "BLOCK_Q": tile.columns, "BLOCK_T": tile.depth, "BAND": tile.band,
    }  # fmt: skip
    if kind.endswith("bit"):
        constants |= {"lhs_scale": None, "rhs_scale": None}
    return compile_kernel(wgrad._wgrad, arch, types, constants, num_warps=tile.warps, num_stages=tile.stages)


def compile_quantizers(arch: str) -> dict[str, Any]:
    fp8 = f"*{dtype_of('rowwise', arch)}"
    types = dict.fromkeys(("x", "w"), "*bf16") | dict.fromkeys(
        ("by_row", "by_column", "data", "straight", "transposed"), fp8
    )
    types |= dict.fromkeys(("row_scales", "column_scales", "line_scales", "scales"), "*fp32")
    types |= dict.fromkeys(("offs", "amax", "line_amax", "column_amax"), "*i32")
    numbers = {"LIMIT": 240.0 if arch == "gfx942" else 448.0, "POWER_OF_TWO": False}
    tile = {"E_PADDED": 256, "BLOCK": 128}
    both = {"STRAIGHT": True, "TRANSPOSED": True, "BLOCK": 128}

    def build(kernel: Any, constants: dict[str, Any]) -> Any:
        return compile_kernel(kernel, arch, types, constants, num_warps=8)

    own, given = {"column_amax": None, "ROWS": True, "COLUMNS": True}, {"ROWS": False, "COLUMNS": True}
    no_amax = {"line_amax": None, "column_amax": None}
    return {
        "rows": build(quantize._quantize_rows, numbers | {"BLOCK_M": 8, "BLOCK_D": 1024}),
        "column amax": build(quantize._column_amax, tile),
        "blocks": build(quantize._quantize_tiles, numbers | tile | own | {"STEP": 32}),
        "columns": build(quantize._quantize_tiles, numbers | tile | given | {"STEP": 32}),
        "weight amax": build(quantize._weight_amax, {"BLOCK": 128}),
        "weights rowwise": build(quantize._quantize_weights, numbers | both | {"ROWWISE": True}),
        "weights blockwise": build(quantize._quantize_weights, numbers | both | no_amax | {"ROWWISE": False}),
    }


def compile_mx_quantizers(arch: str) -> dict[str, Any]:
    fp8, limit = f"*{dtype_of('mx', arch)}", 240.0 if arch == "gfx942" else 448.0
    types = dict.fromkeys(("x", "w"), "*bf16") | {"offs": "*i32"}
    types |= dict.fromkeys(("by_row", "by_column", "straight", "transposed"), fp8)
    types |= dict.fromkeys(("row_scales", "column_scales", "straight_scales", "transposed_scales"), "*i32")
    tokens = {"ROWS": True, "COLUMNS": True, "LIMIT": limit, "E_PADDED": 256, "TOKEN_BLOCK": 128}
    weights = {"STRAIGHT": True, "TRANSPOSED": True, "LIMIT": limit}
    return {
        "mx": compile_kernel(quantize_mx._quantize_tiles, arch, types, tokens, num_warps=8),
        "weights mx": compile_kernel(quantize_mx._quantize_weights, arch, types, weights, num_warps=8),
    }


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
        command = [_TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.findall(r"STACK:(\d+)", text)))


def main(arch: str) -> None:
    vendor = "amd" if arch.startswith("gfx") else "nvidia"
    has_fp8 = arch != "sm_80"
    mx = "mx" if arch in launch.MX_ARCHS else "mx upcast"
    kinds = ("16 bit", "rowwise", "blockwise", mx) if has_fp8 else ("16 bit",)
    for kind in kinds:
        for tile in {tiles.gemm_tile(vendor, arch, kind, row_class) for row_class in RowClass}:
            print(json.dumps(facts_of(f"gemm {kind} {tuple(tile)}", compile_gemm(arch, kind, tile))), flush=True)
        tile = tiles.wgrad_tile(vendor, arch, kind)
        print(json.dumps(facts_of(f"wgrad {kind} {tuple(tile)}", compile_wgrad(arch, kind, tile))), flush=True)
    tile = tiles.gemm_tile(vendor, arch, "16 bit", RowClass.LARGE)
    print(json.dumps(facts_of(f"gemm 16 bit {tuple(tile)}, N contiguous", compile_gemm(arch, "16 bit", tile, False))))
    quantizers = compile_quantizers(arch) if arch in ("sm_90", "gfx942") else {}
    quantizers |= compile_mx_quantizers(arch) if has_fp8 else {}
    for name, compiled in quantizers.items():
        print(json.dumps(facts_of(f"quantize {name}", compiled)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
