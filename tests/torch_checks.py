"""What is checked of the Torch backend's layouts both interpreted and on a GPU, and torch's fp8 product for a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from grouped_gemm import Recipe, reference, testing
from grouped_gemm.backends import get_backend, torch_native
from grouped_gemm.preference import KernelPreference

FP8 = torch.float8_e4m3fn
BACKEND = get_backend(KernelPreference.TORCH)
# ends of groups, M: ragged, with empty groups and rows past the last one; ends out of order and range; none of them;
# one row; many groups; multiples of 16
GROUPS = (
    ([0, 130, 130, 131, 300], 310),
    ([-5, 200, 40, 999], 263),
    ([0, 0], 20),
    ([0, 0], 0),
    ([1], 1),
    (list(range(1, 41)), 50),
    ([128, 128, 384], 384),
)


def tokens_of(ends: list[int]) -> list[slice]:
    """Where each group's tokens lie: from a multiple of 16 on, in multiples of 16, and never none."""
    found, first = [], 0
    for rows in reference.group_slices(ends):
        size = max(-(-(rows.stop - rows.start) // 16), 1) * 16
        found.append(slice(first, first + size))
        first += size
    return found


def check_plan(ends: list[int], num_rows: int, device: torch.device | str = "cpu") -> None:
    """Ends in order and range, and those of the tokens, for which there is room."""
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    with testing.poisoned_memory():
        found, tokens = BACKEND.plan(offs, num_rows).derived
    assert found.tolist() == reference.group_ends(offs, num_rows)
    assert tokens.tolist() == [group.stop for group in tokens_of(found.tolist())]
    assert tokens[-1] <= (num_rows // 16 + len(ends)) * 16
    assert found.dtype == tokens.dtype == torch.int32


def check_activations(ends: list[int], num_rows: int, recipe: Recipe, device: torch.device | str = "cpu") -> None:
    """Both layouts, padding included, are what `reference` makes of each group, and each alone is the same.

    The rows are a slice of wider ones; past the last group they are NaN.
    """
    torch.manual_seed(0)
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    ends = reference.group_ends(offs, num_rows)
    x = torch.randn(num_rows, 144) * torch.randn(num_rows, 1).mul(4).exp()
    x[ends[-1] :] = torch.nan
    if ends[-1] > 11:
        x[3, 5], x[7, 1], x[9] = torch.nan, torch.inf, 0
    x = torch.cat([torch.ones(num_rows, 8), x], 1).to(device, torch.bfloat16)[:, 8:]
    with testing.poisoned_memory():
        plan = BACKEND.plan(offs, num_rows)
        rows, columns = BACKEND.quantize_activations(x, plan, recipe, rows=True, columns=True)
        rows_alone, _ = BACKEND.quantize_activations(x, plan, recipe, rows=True, columns=False)
        _, columns_alone = BACKEND.quantize_activations(x, plan, recipe, rows=False, columns=True)
    inside = slice(0, ends[-1])
    if ends[-1]:
        data, scale = reference.quantize(x[inside], reference.row_blocks(recipe), recipe, FP8)
        for found in (rows, rows_alone):
            assert_equal(found.data[inside].float(), data.float())
            assert_equal(found.scale[inside], scale[:, 0])
    for found in (columns, columns_alone):
        assert found.data.is_contiguous() and found.scale.shape == (len(ends), 144)
        for e, (group, tokens) in enumerate(zip(reference.group_slices(ends), tokens_of(ends))):
            data, scale = torch.zeros(16, 144, device=device), torch.ones(1, 144, device=device)
            if group.start < group.stop:
                quantized, scale = reference.quantize(x[group], reference.column_blocks(recipe), recipe, FP8)
                # what is past the end of a group is 0 times the inverse scale, NaN where that is
                past = scale.reciprocal() * torch.zeros(tokens.stop - tokens.start - len(quantized), 1, device=device)
                data = torch.cat([quantized.float(), past])
            assert_equal(found.data[:, tokens].float(), data.t())
            assert_equal(found.scale[e], scale[0])


def check_zeros(ends: list[int], num_rows: int, device: torch.device | str = "cpu") -> None:
    """Rows past the last group, and matrices of empty groups, become zero, and nothing else changes."""
    from grouped_gemm.kernels import quantize_torch

    offs = torch.tensor(reference.group_ends(torch.tensor(ends), num_rows), dtype=torch.int32, device=device)
    x = torch.full((num_rows, 72), torch.nan, dtype=torch.bfloat16, device=device)
    quantize_torch.zero_tail(x, offs)
    assert x[: offs[-1]].isnan().all() and not x[offs[-1] :].any()
    sizes = offs.diff(prepend=offs.new_zeros(1))
    matrices = torch.full((len(ends), 24, 72), torch.nan, device=device)
    quantize_torch.zero_empty_groups(matrices, offs)
    assert matrices[sizes > 0].isnan().all() and not matrices[sizes == 0].any()


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert torch.equal(found.nan_to_num(1e38), expected.nan_to_num(1e38))


def scaled_grouped_mm(
    mat_a: Tensor, mat_b: Tensor, scale_a: Tensor, recipe_a: object, scale_b: Tensor, recipe_b: object, *,
    offs: Tensor, output_dtype: torch.dtype, use_fast_accum: bool,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.scaled_grouped_mm`, rowwise, on a CPU: what torch checks on a GPU, and plain products.

    As there, what belongs to no group keeps what is in memory: NaN.
    """
    rowwise = torch_native.F.ScalingType.RowWise
    assert recipe_a == recipe_b == rowwise and output_dtype == torch.bfloat16 and use_fast_accum
    assert mat_a.dtype == mat_b.dtype == FP8 and scale_a.dtype == scale_b.dtype == torch.float32
    assert mat_a.dim() == 2 and mat_a.stride(1) == 1 and mat_a.stride(0) >= max(mat_a.shape[1], 2)
    assert mat_b.stride(-2) == 1 and mat_b.stride(-1) >= max(mat_b.shape[-2], 2)
    assert mat_a.stride(0) % 16 == 0 and mat_b.stride(-1) % 16 == 0
    assert mat_a.shape[1] % 16 == 0 and mat_b.shape[-2] % 16 == 0 and mat_b.shape[-1] % 16 == 0
    assert offs.dtype == torch.int32 and offs.dim() == 1 and len(offs) < 1024
    ends = offs.tolist()
    sizes = [end - start for start, end in zip([0, *ends], ends)]
    a, b = mat_a.double(), mat_b.double()
    if mat_b.dim() == 2:
        assert mat_a.shape[1] == mat_b.shape[0] and 0 <= ends[-1] <= mat_a.shape[1]
        assert all(size > 0 for size in sizes) and all(size % 16 == 0 for size in sizes[:-1])
        assert scale_a.shape == (len(ends) * mat_a.shape[0],) and scale_a.is_contiguous()
        assert scale_b.shape == (len(ends) * mat_b.shape[1],) and scale_b.is_contiguous()
        products = [a[:, group] @ b[group] for group in reference.group_slices(ends)]
        scales = scale_a.view(len(ends), -1, 1) * scale_b.view(len(ends), 1, -1)
        return (torch.stack(products) * scales).to(output_dtype)
    assert mat_b.shape[:2] == (len(ends), mat_a.shape[1]) and 0 <= ends[-1] <= mat_a.shape[0]
    assert all(size >= 0 for size in sizes)
    assert scale_a.shape == (mat_a.shape[0],) and scale_a.is_contiguous()
    assert scale_b.shape == (len(ends), mat_b.shape[2]) and scale_b.stride(1) == 1
    out = torch.full((mat_a.shape[0], mat_b.shape[2]), torch.nan, dtype=output_dtype)
    for e, group in enumerate(reference.group_slices(ends)):
        out[group] = (a[group] @ b[e] * scale_a[group, None] * scale_b[e]).to(output_dtype)
    return out
