"""Forward, dgrad, wgrad and bias on the Triton backend, through `grouped_mm`, against `reference` and Emulated."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
from kernel_checks import assert_same_bits
from packaging.version import Version

from grouped_gemm import BackendKind, Recipe, grouped_mm, quantize_weights, reference
from grouped_gemm.backends import get_backend
from grouped_gemm.kernels.common.launch import kind_of
from grouped_gemm.kernels.gemm import k_grouped, m_grouped

# ends of groups, M: empty groups, rows past the last one; ends out of order and out of range
GROUPS = (([5, 5, 40, 60], 64), ([50, 20, 70, -3], 64), ([0, 0], 7))
BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-6}


@pytest.fixture(params=(True, False), ids=("descriptors", "pointers"))
def tma(request, monkeypatch):
    if not request.param:
        for module in (m_grouped, k_grouped):
            monkeypatch.setattr(module, "can_use_tma", lambda *operands: False)
            monkeypatch.setattr(module, "_gemms", {})  # cached launches with descriptors
    return request.param


def case(ends, num_rows, k, n, dtype, contiguous):
    """a, b, bias, dy and offs; rows past the last group are NaN."""
    torch.manual_seed(0)
    offs = torch.tensor(ends, dtype=torch.int32)
    last = reference.group_ends(offs, num_rows)[-1]
    a, dy = torch.randn(num_rows, k), torch.randn(num_rows, n)
    a[last:], dy[last:] = torch.nan, torch.nan
    b = torch.randn(len(ends), n, k).transpose(1, 2)
    b = b if contiguous == "k" else b.contiguous()
    bias = torch.randn(len(ends), n)
    a, b, bias = (x.to(dtype).requires_grad_() for x in (a, b, bias))
    return a, b, bias, dy.to(dtype), offs


def passes(backend, a, b, bias, dy, offs, **options):
    y = grouped_mm(a, b, offs, bias=bias, kernel_preference=backend, **options)
    return (y, *torch.autograd.grad(y, (a, b, bias), dy.to(y.dtype)))


def assert_near(found, truth, bound):
    assert found.shape == truth.shape
    error = (found.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)
    assert error <= bound


@pytest.mark.parametrize(
    "dtype, k, n, contiguous, tma",
    (
        (torch.bfloat16, 48, 80, "k", True),
        (torch.bfloat16, 48, 80, "k", False),
        (torch.bfloat16, 48, 80, "n", True),
        (torch.bfloat16, 48, 80, "n", False),
        (torch.float16, 50, 37, "k", False),  # no descriptors: rows are not a multiple of 16 bytes
        (torch.float32, 36, 20, "n", True),
    ),
    indirect=("tma",),
    ids=str,
)
@pytest.mark.parametrize("ends, num_rows", GROUPS, ids=str)
def test_operands_without_scales(ends, num_rows, dtype, k, n, contiguous, tma):
    a, b, bias, dy, offs = operands = case(ends, num_rows, k, n, dtype, contiguous)
    y, da, db, dbias = passes("triton", *operands)
    ends = reference.group_ends(offs, num_rows)
    a, b, bias = a.detach(), b.detach(), bias.detach()
    assert_near(y, reference.grouped_mm(a, b, ends, bias), BOUNDS[dtype])
    assert_near(da, reference.grouped_mm(dy, b.transpose(1, 2), ends), BOUNDS[dtype])
    assert_near(db, reference.wgrad(a, dy, ends), BOUNDS[dtype])
    assert_near(dbias, reference.group_sums(dy, ends), BOUNDS[dtype])
    assert not y[ends[-1] :].any() and not da[ends[-1] :].any()
    assert db.stride() == b.stride()


OVERLAPPING = pytest.param(lambda dy: torch.randn(sum(dy.shape) - 1).unfold(0, dy.shape[1], 1), id="overlapping")
LAYOUTS = [
    *((recipe, OVERLAPPING) for recipe in ("none", "fp8_rowwise", "fp8_blockwise", "mxfp8")),
    ("fp8_blockwise", pytest.param(torch._neg_view, id="negated")),
    ("fp8_blockwise", pytest.param(lambda dy: dy.t().contiguous().t(), id="transposed")),
]


@pytest.mark.parametrize(
    "recipe, layout", [pytest.param(recipe, *layout.values, id=f"{recipe}-{layout.id}") for recipe, layout in LAYOUTS]
)
def test_the_gradient_of_an_output_in_another_dtype_may_have_any_layout(recipe, layout):
    a, b, bias, dy, offs = case([1, 1, 5], 5, 32, 31, torch.bfloat16, "k")
    dy, options = layout(dy.float()), {"recipe": recipe, "out_dtype": torch.float32}
    for ours, right in zip(
        passes("triton", a, b, bias, dy, offs, **options), passes("emulated", a, b, bias, dy, offs, **options)
    ):
        assert_near(ours, right, BOUNDS[torch.bfloat16])


def test_a_gradient_with_any_layout_may_need_a_graph():
    a, b, bias, dy, offs = case([1, 1, 5], 5, 32, 31, torch.bfloat16, "k")
    dy = OVERLAPPING.values[0](dy)

    def gradients(backend):
        y = grouped_mm(a, b, offs, bias=bias, out_dtype=torch.float32, kernel_preference=backend)
        return torch.autograd.grad(y, (a, b, bias), dy, create_graph=True)

    for ours, right in zip(gradients("triton"), gradients("emulated")):
        assert_near(ours, right, BOUNDS[torch.bfloat16])


@pytest.mark.parametrize("create_graph", (False, True), ids=("plain", "with a graph"))
def test_the_gradient_of_a_weight_gradient_may_have_any_layout(create_graph):
    x, _, _, g, offs = case([1, 1, 5], 5, 32, 31, torch.bfloat16, "k")
    dc = torch.randn(3 + 32 + 31 - 2).as_strided((3, 32, 31), (1, 1, 1))  # a cast makes its first axis contiguous

    def gradients(backend):
        c = grouped_mm(x.t(), g.requires_grad_(), offs, out_dtype=torch.float32, kernel_preference=backend)
        return torch.autograd.grad(c, (x, g), dc, create_graph=create_graph)

    for ours, right in zip(gradients("triton"), gradients("emulated")):
        assert_near(ours, right, BOUNDS[torch.bfloat16])


@pytest.mark.parametrize("operand", range(3), ids=("a", "b", "bias"))
def test_a_pending_negation_of_an_operand_is_resolved(operand):
    *operands, dy, offs = case([1, 1, 5], 5, 32, 31, torch.bfloat16, "k")
    right = passes("triton", *operands, dy, offs)
    operands[operand] = torch._neg_view(-operands[operand].detach()).requires_grad_()
    for _ in range(2):  # a second call like it, and one like the first
        for ours, theirs in zip(passes("triton", *operands, dy, offs), right):
            assert torch.equal(ours, theirs)


@pytest.fixture(params=("mx", "mx upcast"))
def mx(request, monkeypatch):
    """How MX operands are multiplied: by `tl.dot_scaled`, or converted to bf16 first."""
    if request.param == "mx" and Version(triton.__version__) < Version("3.8"):
        pytest.skip("Triton's interpreter has no tl.dot_scaled before 3.8")
    for module in (m_grouped, k_grouped):
        monkeypatch.setattr(module, "_gemms", {})  # cached launches of the other kind
        monkeypatch.setattr(
            module, "kind_of", lambda x, recipe: request.param if recipe is Recipe.MXFP8 else kind_of(x, recipe)
        )


fp8_cases = pytest.mark.parametrize(
    "k, n, contiguous, tma", ((144, 40, "k", True), (50, 37, "n", False)), indirect=("tma",), ids=str
)


@fp8_cases
@pytest.mark.parametrize("recipe", (Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE_POW2), ids=lambda r: r.value)
def test_fp8(k, n, contiguous, recipe, tma):
    check_fp8(k, n, contiguous, recipe)


@fp8_cases
def test_mx(k, n, contiguous, mx, tma):
    check_fp8(k, n, contiguous, Recipe.MXFP8)


def check_fp8(k, n, contiguous, recipe):
    operands = case([5, 5, 140, 150], 160, k, n, torch.bfloat16, contiguous)
    found = passes("triton", *operands, recipe=recipe, out_dtype=torch.float32)
    expected = passes("emulated", *operands, recipe=recipe, out_dtype=torch.float32)
    # Emulated multiplies by scales before it sums; powers of two commute with rounding, so that only the order of sums
    # differs, and how that rounds the gradients to bf16
    bounds = (1e-6, 1e-4, 1e-4, 1e-4) if recipe.power_of_two_scales else (1e-3,) * 4
    for x, truth, bound in zip(found, expected, bounds):
        assert_near(x, truth, bound)


SCALED = (Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE, Recipe.MXFP8)


@pytest.mark.parametrize("recipe", (Recipe.NONE, *SCALED), ids=lambda r: r.value)
@pytest.mark.parametrize("contiguous, tma", (("k", True), ("n", False)), indirect=("tma",), ids=str)
def test_a_gradient_that_is_added_has_the_bits_of_one_that_is_stored(recipe, contiguous, tma):
    k, n = (48, 80) if tma else (50, 37)
    a, _, _, dy, offs = case([5, 5, 40, 60], 64, k, n, torch.bfloat16, contiguous)
    backend = get_backend(BackendKind.TRITON)
    plan = backend.plan(offs, len(a))
    columns = [backend.quantize_activations(x.detach(), plan, recipe, rows=False, columns=True)[1] for x in (a, dy)]
    db = backend.wgrad(*columns, plan, torch.float32, contiguous=contiguous)
    total = torch.randn_like(db)
    total[1] = -0.0  # of a group without rows, which is not written: adding 0 would make it 0.0
    expected = total + db
    expected[1] = total[1]
    backend.add_wgrad(*columns, plan, total)
    assert_same_bits(total, expected, "the sum")
    backend.add_wgrad(columns[0], columns[1], dataclasses.replace(plan, num_rows=0), total)
    assert_same_bits(total, expected, "the sum after a call without rows")


def test_a_nan_stays_in_its_row_and_its_group(tma):
    a, b, bias, dy, offs = case([5, 5, 40, 60], 64, 48, 80, torch.bfloat16, "k")
    a.data[20] = torch.nan
    y, _, db, _ = passes("triton", a, b, bias, dy, offs)
    assert y[20].isnan().all() and y.isnan().sum() == 80
    assert db[2].isnan().all() and not db[[0, 1, 3]].isnan().any()


def test_mx_scales_of_any_size(mx, tma):
    """Also those that our quantizers never write: the smallest, huge ones, NaN. Each affects only its own block."""
    torch.manual_seed(0)
    data = torch.randn(1, 160, 48).to(torch.float8_e4m3fn)
    codes = torch.full((1, 5, 48), 127, dtype=torch.uint8)
    codes[0, :, 1], codes[0, 1, 2], codes[0, 2, 4], codes[0, 4, 3] = 0, 250, 1, 255
    data[0, 128:, 3] = 0  # times NaN
    scale = codes.view(torch.float8_e8m0fnu)
    a = torch.randn(20, 160)
    a[:, 32:64] *= 1e-20
    weights = quantize_weights(data, "mxfp8", scale=scale, dtype=a.dtype, kernel_preference="triton")
    y = grouped_mm(a, weights, torch.tensor([17], dtype=torch.int32), kernel_preference="triton")
    assert y[:17, 3].isnan().all() and y.isnan().sum() == 17

    blocks = reference.row_blocks(Recipe.MXFP8)
    values = reference.dequantize(*reference.quantize(a, blocks, Recipe.MXFP8, data.dtype), blocks)
    b = reference.dequantize(data, scale, reference.weight_blocks(Recipe.MXFP8, 1))
    truth = reference.grouped_mm(values, b, [17]).float()
    # column 1, around 1e-38, is of values that bfloat16 has as subnormals, with an error of up to 2^-134
    torch.testing.assert_close(y, truth, rtol=1e-4, atol=3e-40, equal_nan=True)


def test_a_nan_reaches_the_mx_results_of_its_blocks(mx):
    a, b, bias, dy, offs = case([5, 5, 40, 60], 64, 48, 80, torch.bfloat16, "k")
    a.data[20, 3] = torch.inf
    y, _, db, _ = passes("triton", a, b, bias, dy, offs, recipe="mxfp8")
    assert y[20].isnan().all() and y.isnan().sum() == 80
    assert db[2, 3].isnan().all() and db.isnan().sum() == 80


@pytest.mark.parametrize("recipe", (Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE, Recipe.MXFP8), ids=lambda r: r.value)
def test_a_checkpoints_weights(recipe):
    a, b, _, dy, offs = case([5, 5, 40, 60], 64, 144, 136, torch.bfloat16, "k")
    data, scale = reference.quantize(b.detach(), reference.weight_blocks(recipe, 1), recipe, torch.float8_e4m3fn)
    found, expected = [], []
    for backend, results in (("triton", found), ("emulated", expected)):
        weights = quantize_weights(data, recipe, scale=scale, dgrad=True, kernel_preference=backend)
        y = grouped_mm(a, weights, offs, kernel_preference=backend)
        results += (y, torch.autograd.grad(y, a, dy)[0])
    assert_near(found[0], expected[0], 3e-3)
    # rowwise and MX scales run along K: for dgrad the Triton backend quantizes again, which Emulated need not
    assert_near(found[1], expected[1], 3e-3 if recipe.weight_lines > 1 else 5e-2)


def test_a_checkpoints_weights_with_gaps_between_experts(tma):
    """Gate and up, views of one tensor, whose blocks begin at their own rows: they are not copied."""
    a, b, _, _, offs = case([5, 5, 40, 60], 64, 144, 192, torch.bfloat16, "k")
    recipe = Recipe.FP8_BLOCKWISE
    data, scale = reference.quantize(b.detach(), reference.weight_blocks(recipe, 1), recipe, torch.float8_e4m3fn)
    data, results = data.transpose(1, 2).contiguous().transpose(1, 2), []
    for backend in ("triton", "emulated"):
        up = quantize_weights(data[:, :, 96:], recipe, scale=scale[:, :, :1], kernel_preference=backend)
        assert up.forward.data.data_ptr() == data[:, :, 96:].data_ptr()
        results.append(grouped_mm(a.detach(), up, offs, kernel_preference=backend))
    assert_near(*results, 3e-3)


# A cached launch serves other M of its row class, and no other calls.


def not_at_16_bytes(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def in_wider_rows(x):
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


@pytest.fixture
def num_cached(monkeypatch):
    for module in (m_grouped, k_grouped):
        monkeypatch.setattr(module, "_gemms", {})
    return lambda: len(m_grouped._gemms) + len(k_grouped._gemms)


@pytest.mark.parametrize(
    "changed, more",
    (
        ({"rows": 9}, 0),
        ({"rows": 33}, 1),  # another row class
        ({"dtype": torch.float16}, 1),
        ({"out_dtype": torch.float32}, 1),
        ({"a": not_at_16_bytes}, 1),
        ({"a": in_wider_rows}, 1),
        ({"b": not_at_16_bytes}, 1),
        ({"b": in_wider_rows}, 1),
        ({"b": lambda b: b.transpose(1, 2).contiguous().transpose(1, 2)}, 1),
    ),
)
def test_a_gemm_launch_is_cached_for_equal_calls(num_cached, changed, more):
    def run(rows=8, dtype=torch.bfloat16, out_dtype=torch.bfloat16, a=lambda a: a, b=lambda b: b):
        torch.manual_seed(0)
        offs = torch.tensor([3, rows], dtype=torch.int32)
        lhs, rhs = a(torch.randn(rows, 32, dtype=dtype)), b(torch.randn(2, 32, 16, dtype=dtype))
        y = torch.empty(rows, 16, dtype=out_dtype)
        m_grouped.grouped_mm(lhs, None, rhs, None, None, offs, Recipe.NONE, y)
        assert_near(y, reference.grouped_mm(lhs, rhs, offs.tolist(), dtype=out_dtype), BOUNDS[torch.bfloat16])

    run()
    run(**changed)
    assert num_cached() == 1 + more
    run(**changed)
    assert num_cached() == 1 + more


@pytest.mark.parametrize(
    "changed, more",
    (
        ({"rows": 33}, 0),
        ({"dtype": torch.float16}, 1),
        ({"out_dtype": torch.bfloat16}, 1),
        ({"x": not_at_16_bytes}, 1),
        ({"x": in_wider_rows}, 1),
        ({"most_rows": 1}, 1),  # more than a ragged descriptor addresses
        ({"accumulate": True}, 1),
    ),
)
def test_a_wgrad_launch_is_cached_for_equal_calls(num_cached, monkeypatch, changed, more):
    def run(rows=8, dtype=torch.bfloat16, out_dtype=torch.float32, x=lambda x: x, most_rows=1 << 30, accumulate=False):
        monkeypatch.setattr(k_grouped, "_MOST_RAGGED_ROWS", most_rows)
        torch.manual_seed(0)
        offs = torch.tensor([3, rows], dtype=torch.int32)
        lhs, rhs = x(torch.randn(rows, 32, dtype=dtype)), x(torch.randn(rows, 16, dtype=dtype))
        db = torch.zeros(2, 32, 16, dtype=out_dtype)
        k_grouped.wgrad(lhs, None, rhs, None, offs, rows, Recipe.NONE, db, accumulate)
        assert_near(db, reference.wgrad(lhs, rhs, offs.tolist(), dtype=out_dtype), BOUNDS[torch.bfloat16])

    run()
    run(**changed)
    assert num_cached() == 1 + more
    run(**changed)
    assert num_cached() == 1 + more
