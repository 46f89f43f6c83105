"""Every shipped tile compiles for GPUs that this machine does not have: matrix instructions, spills, shared memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import processes
import pytest

from grouped_gemm.core.machine import ARCHS

pytest.importorskip("triton")

# The instruction for MX operands: an MX one, or that of bf16 where our kernels convert the operands first.
MX = {
    "sm_89": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16",
    "sm_90": "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16",
    "sm_100": "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale",
    "gfx942": "v_mfma_f32_32x32x8_bf16",
    "gfx950": "v_mfma_scale_f32_32x32x64_f8f6f4",
}
# The instruction of an fp8 GEMM, or of a bf16 one where Triton has no fp8.
EXPECTED = {
    "sm_80": "mma.sync.aligned.m16n8k16.row.col.f32.bf16",
    "sm_89": "mma.sync.aligned.m16n8k32.row.col.f32.e4m3",
    "sm_90": "wgmma.mma_async.sync.aligned.m64n",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma_f32_32x32x16_fp8_fp8",
    "gfx950": "v_mfma_f32_32x32x64_f8f6f4",
}


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Log and exit code of the process that compiles each architecture's kernels."""
    logs = tmp_path_factory.mktemp("compiled")
    script = Path(__file__).with_name("compile_ahead.py")

    def run(arch: str) -> tuple[Path, int]:
        log = logs / f"{arch}.log"
        environment = processes.environment(
            TRITON_INTERPRET=None, TRITON_CACHE_DIR=str(logs / arch), TRITON_DISABLE_LINE_INFO="1"
        )
        return log, processes.run([sys.executable, script, arch], log, environment)

    with processes.two_at_a_time(request, "arch", run) as running:
        yield running


@pytest.mark.parametrize("arch", EXPECTED)
def test_shipped_tiles_compile_well(arch, runs):
    instruction = EXPECTED[arch]
    log, code = runs[arch].result()
    text = log.read_text()
    assert code == 0, f"exit code {code}; the whole log is {log}\n{text[-6000:]}"
    kernels = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert kernels
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= ARCHS[arch].shared_memory * 1024, kernel
        if kernel["kernel"].startswith(("gemm", "wgrad")):
            assert kernel["instructions"], kernel
        if kernel["kernel"].startswith(("gemm mx", "wgrad mx")):
            assert len(kernel["instructions"]) == 1 and kernel["instructions"][0].startswith(MX[arch]), kernel
        if arch.startswith("gfx") and kernel["kernel"].startswith(("gemm", "wgrad")) and "wise" in kernel["kernel"]:
            assert all(name.startswith(instruction) for name in kernel["instructions"]), kernel
        if arch == "sm_90" and "wise" in kernel["kernel"] and "quantize" not in kernel["kernel"]:
            assert all("f32.e4m3.e4m3" in name for name in kernel["instructions"]), kernel
    large = [kernel for kernel in kernels if "blockwise" in kernel["kernel"] and "quantize" not in kernel["kernel"]]
    for kernel in large or [kernel for kernel in kernels if kernel["kernel"].startswith(("gemm", "wgrad"))]:
        assert any(name.startswith(instruction) for name in kernel["instructions"]), kernel
