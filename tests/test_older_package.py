"""`grouped_gemm.ops` and `grouped_gemm.backend`: the calls of the older package with this import name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grouped_gemm
from grouped_gemm import backend, ops

ROOT = Path(grouped_gemm.__file__).parent.parent
SIZES, K, N = (3, 0, 5, 4), 32, 16


def operands(trans_b: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    a = torch.randn(sum(SIZES), K, requires_grad=True)
    b = torch.randn(len(SIZES), *((N, K) if trans_b else (K, N)), requires_grad=True)
    return a, b, torch.tensor(SIZES)


def each_group(a, b, trans_b):
    return torch.cat([x @ (w.T if trans_b else w) for x, w in zip(a.split(SIZES), b)])


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32), ids=str)
@pytest.mark.parametrize("trans_b", (False, True))
def test_gmm_and_its_gradients(trans_b, dtype):
    a, b, sizes = operands(trans_b)
    y, truth = ops.gmm(a, b, sizes.to(dtype), trans_b), each_group(a, b, trans_b)
    dy = torch.randn_like(y)
    torch.testing.assert_close(y, truth)
    for x, grad, right in zip((a, b), torch.autograd.grad(y, (a, b), dy), torch.autograd.grad(truth, (a, b), dy)):
        torch.testing.assert_close(grad, right)
        assert grad.is_contiguous() and grad.shape == x.shape


def test_gmm_without_gradients():
    a, b, sizes = operands()
    y = backend.gmm(a, b, sizes)
    torch.testing.assert_close(y, each_group(a, b, False))
    torch.testing.assert_close(backend.gmm(a, b.transpose(1, 2), sizes, trans_b=True), y)
    assert not y.requires_grad


def test_gmm_with_trans_a():
    a, _, sizes = operands()
    g = torch.randn(sum(SIZES), N)
    db = backend.gmm(a, g, sizes, trans_a=True)
    truth = torch.stack([x.T @ y for x, y in zip(a.split(SIZES), g.split(SIZES))])
    torch.testing.assert_close(db, truth)
    assert not db[1].any()


@pytest.mark.parametrize("trans_a", (False, True))
def test_gmm_writes_to_c(trans_a):
    a, b, sizes = operands()
    if trans_a:
        b = torch.randn(sum(SIZES), N)
    c = torch.full((len(SIZES), K, N) if trans_a else (sum(SIZES), N), torch.nan)
    assert backend.gmm(a, b, sizes, trans_a=trans_a, c=c) is c
    assert torch.equal(c, backend.gmm(a, b, sizes, trans_a=trans_a))


def test_rows_past_the_last_group_are_zero():
    a, b, sizes = operands()
    sizes[-1] -= 2
    assert not ops.gmm(a, b, sizes)[-2:].any()


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda a, b, sizes: ops.gmm(None, b, sizes), TypeError, "a: expected a torch.Tensor; found NoneType"),
        (lambda a, b, sizes: ops.gmm(a, b[0], sizes, True), ValueError, "b: expected a tensor of rank 3; found 2"),
        (lambda a, b, sizes: ops.gmm(a, b, list(SIZES)), TypeError, "batch_sizes: expected a torch.Tensor; found list"),
        (
            lambda a, b, sizes: ops.gmm(a, b, sizes.float()),
            ValueError,
            "batch_sizes.dtype: expected one of int64, int32",
        ),
        (lambda a, b, sizes: ops.gmm(a, b, sizes[:2]), ValueError, "offs: expected 4 entries"),
        (lambda a, b, sizes: backend.gmm(a, b, sizes, True, True), ValueError, "trans_a and trans_b: expected at most"),
        (
            lambda a, b, sizes: backend.gmm(a, b, sizes, c=a),
            ValueError,
            r"c: expected shape \(12, 16\); found \(12, 32\)",
        ),
        (
            lambda a, b, sizes: backend.gmm(a, b, sizes, c=torch.ones(12, 16).long()),
            ValueError,
            "c.dtype: expected one of",
        ),
        (lambda a, b, sizes: ops.permute(a, sizes), ValueError, r"indices.shape\[0\]: expected 12"),
        (
            lambda a, b, sizes: ops.permute(a, sizes.new_zeros(12, device="meta")),
            ValueError,
            "indices.device: expected cpu",
        ),
        (lambda a, b, sizes: ops.permute(a, sizes.new_zeros(12), 2.0), TypeError, "num_out_tokens: expected an int"),
        (lambda a, b, sizes: ops.unpermute(a, sizes.new_zeros(12), a[:5, :2]), ValueError, "probs: expected"),
    ],
    ids=[
        "no a",
        "a matrix",
        "list",
        "floats",
        "too few",
        "both",
        "c",
        "c of integers",
        "few",
        "meta",
        "float",
        "few probs",
    ],
)
def test_bad_arguments_are_named(call, error, text):
    with pytest.raises(error, match=text):
        call(*operands())


# -- permute and unpermute


def routed(num_tokens: int = 7, top_k: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(num_tokens, 8, requires_grad=True)
    experts = torch.rand(num_tokens, 5).argsort(1)[:, :top_k]
    return x, experts, torch.rand(num_tokens, top_k, requires_grad=True)


def test_rows_are_in_the_order_of_experts_then_of_tokens():
    x, experts, _ = routed()
    rows, row_id_map = ops.permute(x, experts)
    expected = [x[t] for e in range(5) for t in range(len(x)) if e in experts[t]]
    assert torch.equal(rows, torch.stack(expected))
    assert row_id_map.dtype == torch.int32
    for t in range(len(x)):
        for j in range(experts.shape[1]):
            assert torch.equal(rows[row_id_map[j * len(x) + t]], x[t])


@pytest.mark.parametrize("kept", (None, -1, 50, 10), ids=str)
def test_unpermute_inverts_permute_and_so_do_its_gradients(kept):
    x, experts, probs = routed()
    rows, row_id_map = ops.permute(x, experts, num_out_tokens=kept)
    y = ops.unpermute(rows, row_id_map, probs)
    places = row_id_map.view(3, -1).T
    truth = (x[:, None] * (probs * (places >= 0))[:, :, None]).sum(1)
    torch.testing.assert_close(y, truth)
    dy = torch.randn_like(y)
    for found, right in zip(torch.autograd.grad(y, (x, probs), dy), torch.autograd.grad(truth, (x, probs), dy)):
        torch.testing.assert_close(found, right)
    assert len(rows) == (10 if kept == 10 else 21)


def test_one_expert_for_each_token_needs_no_probabilities():
    x, experts, _ = routed(top_k=1)
    rows, row_id_map = ops.permute(x, experts[:, 0])
    y = ops.unpermute(rows, row_id_map)
    assert torch.equal(y, x)
    assert torch.equal(torch.autograd.grad(y, x, x.detach())[0], x)


def test_no_tokens():
    x = torch.randn(0, 8, requires_grad=True)
    rows, row_id_map = ops.permute(x, torch.zeros(0, 2, dtype=torch.int64))
    y = ops.unpermute(rows, row_id_map, torch.rand(0, 2))
    assert (rows.shape, y.shape) == ((0, 8), (0, 8))
    spare = torch.randn(2, 8, requires_grad=True)
    assert not torch.autograd.grad(ops.unpermute(spare, row_id_map, torch.rand(0, 2)).sum(), spare)[0].any()
    assert torch.autograd.grad(y.sum(), x)[0].shape == (0, 8)


def test_no_rows():
    _, _, probs = routed()
    y = ops.unpermute(torch.randn(0, 8, requires_grad=True), torch.full((21,), -1, dtype=torch.int32), probs)
    assert y.shape == (7, 8) and not y.any()
    assert not torch.autograd.grad(y.sum(), probs)[0].any()


def test_low_precision_is_rounded_once():
    x, experts, probs = routed()
    rows, row_id_map = ops.permute(x.bfloat16(), experts)
    y = ops.unpermute(rows, row_id_map, probs)
    truth = (x.bfloat16().double() * probs.double().sum(1, keepdim=True)).bfloat16()
    torch.testing.assert_close(y, truth, rtol=2**-8, atol=0)
    dy = torch.randn_like(y)
    (drows,) = torch.autograd.grad(y, rows, dy)
    for t, j in ((0, 0), (3, 1), (6, 2)):
        expected = (dy[t].float() * probs[t, j]).bfloat16()
        assert torch.equal(drows[row_id_map[j * len(x) + t]], expected)


def test_gradients_have_gradients():
    x, experts, probs = routed()

    def penalty(y):
        gradients = torch.autograd.grad(y.pow(3).sum(), (x, probs), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), (x, probs))

    rows, row_id_map = ops.permute(x, experts)
    found, right = penalty(ops.unpermute(rows, row_id_map, probs)), penalty(x * probs.sum(1, keepdim=True))
    for ours, truth in zip(found, right):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-3)


def test_tokens_selected_by_a_mask_compile():
    x, experts, probs = routed()

    def layer(x, experts, probs, mask):
        rows, row_id_map = ops.permute(x[mask], experts[mask])
        return ops.unpermute(rows, row_id_map, probs[mask])

    mask = torch.arange(len(x)) % 3 > 0
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for kept in (mask, torch.zeros_like(mask)):
            y, truth = compiled(x, experts, probs, kept), layer(x, experts, probs, kept)
            torch.testing.assert_close(y, truth)
            for ours, right in zip(
                torch.autograd.grad(y.sum(), (x, probs)), torch.autograd.grad(truth.sum(), (x, probs))
            ):
                torch.testing.assert_close(ours, right)


def test_a_moe_layer_on_permute_gmm_and_unpermute():
    x, experts, probs = routed()
    w = torch.randn(5, 8, 8, requires_grad=True)
    rows, row_id_map = ops.permute(x, experts)
    y = ops.unpermute(ops.gmm(rows, w, torch.bincount(experts.flatten(), minlength=5)), row_id_map, probs)
    truth = (torch.einsum("th,tkhn->tkn", x, w[experts]) * probs[..., None]).sum(1)
    torch.testing.assert_close(y, truth)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), w)[0], torch.autograd.grad(truth.sum(), w)[0])


@pytest.mark.gpu
def test_there_is_no_host_sync(device):
    x, experts, probs = (t.detach().to(device).requires_grad_(t.requires_grad) for t in routed(64))
    w = torch.randn(5, 8, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
    sizes = torch.tensor([64, 32, 32, 32, 32])
    torch.cuda.set_sync_debug_mode("error")  # before a route is cached
    try:
        for batch_sizes in (sizes, sizes.to(device, non_blocking=True)):
            rows, row_id_map = ops.permute(x.bfloat16(), experts)
            ops.unpermute(ops.gmm(rows, w, batch_sizes), row_id_map, probs).backward(x.detach().bfloat16())
    finally:
        torch.cuda.set_sync_debug_mode(0)
    assert w.grad.isfinite().all() and probs.grad.isfinite().all()


# -- imports


def run_python(*arguments: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(path)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=path, env=environment, capture_output=True, text=True, timeout=120)


def test_the_import_lines_of_megablocks_and_megatron():
    code = "import grouped_gemm; backend = grouped_gemm.backend; ops = grouped_gemm.ops; assert ops.gmm and backend.gmm"
    assert run_python("-W", "error", "-c", f"{code}; assert ops.backend is backend").returncode == 0


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of packages where nv-grouped-gemm 1.1.4 was installed over this one."""
    info = tmp_path / "nv_grouped_gemm-1.1.4.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nv-grouped-gemm\nVersion: 1.1.4\n")
    (info / "top_level.txt").write_text("grouped_gemm\ngrouped_gemm_backend\n")
    (tmp_path / "grouped_gemm_backend.py").touch()
    (tmp_path / "grouped_gemm").mkdir()
    for file in ROOT.joinpath("grouped_gemm").iterdir():
        (tmp_path / "grouped_gemm" / file.name).symlink_to(file)
    (tmp_path / "grouped_gemm" / "core").unlink()
    shutil.copytree(ROOT / "grouped_gemm" / "core", tmp_path / "grouped_gemm" / "core")
    return tmp_path


FOUND = "expected no other distribution in the folder of grouped-gemm-dispatch; found nv-grouped-gemm 1.1.4."


def test_another_distribution_in_the_folder_is_named_by_import_and_doctor(site):
    done = run_python("-m", "grouped_gemm", "doctor", path=site)
    assert f"UserWarning: grouped_gemm: {FOUND}" in done.stderr
    assert f"error: {FOUND}" in done.stdout


def test_doctor_says_who_has_overwritten_this_package(site):
    (site / "grouped_gemm" / "__init__.py").unlink()
    (site / "grouped_gemm" / "__init__.py").touch()
    done = run_python("-m", "grouped_gemm", "doctor", path=site)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"grouped_gemm: {FOUND}")


def test_another_distribution_in_another_folder_causes_no_warning(site):
    done = run_python("-W", "error", "-c", f"import sys; sys.path.append({str(site)!r}); import grouped_gemm")
    assert done.returncode == 0, done.stderr
