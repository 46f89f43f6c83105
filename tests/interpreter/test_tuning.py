"""`warmup` with GROUPED_GEMM_AUTOTUNE=1 on the Triton backend: every GEMM is tuned, and no result changes."""

from __future__ import annotations

import pytest
import torch

from grouped_gemm import grouped_mm, warmup
from grouped_gemm.kernels.gemm import k_grouped, m_grouped, tile_search


@pytest.mark.parametrize("recipe", ("none", "fp8_blockwise"))
def test_every_gemm_is_tuned_and_no_result_changes(monkeypatch, tmp_path, recipe):
    times = []

    def milliseconds(run):
        run()
        times.append(tile_search._watch.trial[1])
        return 1.0 if times[-1].group_m == 4 else 2.0

    # Two variants, since an interpreted one takes seconds. The second cannot run, and is skipped.
    monkeypatch.setattr(tile_search, "_sides", lambda site, tile: [tile._replace(group_m=4), tile._replace(block_k=7)])
    for name in ("_block_ks", "_stages", "_group_ms"):
        monkeypatch.setattr(tile_search, name, lambda site, tile: [])
    monkeypatch.setattr(tile_search, "_milliseconds", milliseconds)
    monkeypatch.setenv("GROUPED_GEMM_CACHE_DIR", str(tmp_path))
    tile_search.forget()
    torch.manual_seed(0)
    a = torch.randn(11, 48, dtype=torch.bfloat16, requires_grad=True)
    b = torch.randn(2, 80, 48, dtype=torch.bfloat16, requires_grad=True).transpose(1, 2)
    offs = torch.tensor([4, 11], dtype=torch.int32)

    def call():
        y = grouped_mm(a, b, offs, recipe=recipe, kernel_preference="triton")
        return (y, *torch.autograd.grad(y, (a, b), torch.ones_like(y)))

    shipped = call()
    monkeypatch.setenv("GROUPED_GEMM_AUTOTUNE", "1")
    done = warmup(b, recipe=recipe, rows=("decode",), kernel_preference="triton")
    (decode,) = done.classes
    assert decode.calls == 2
    assert sorted(search.site.kernel for search in decode.searches) == ["gemm", "gemm", "wgrad"]
    assert all(search.tile.group_m == 4 for search in decode.searches)
    assert all(len(search.failed) == 1 for search in decode.searches)
    assert all(map(torch.equal, call(), shipped))
    for module in (m_grouped, k_grouped):  # no cached launch has a tuned tile, which would outlive the switch
        assert module._gemms and not any(gemm.tile.group_m == 4 for gemm in module._gemms.values())
    tile_search.forget()
