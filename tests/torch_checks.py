"""Checks of the Torch backend's layouts, which run interpreted and on a GPU, and torch's fp8 GEMMs on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from grouped_gemm import Recipe, reference, testing
from grouped_gemm.backends import get_backend
from grouped_gemm.core.preference import BackendKind
from grouped_gemm.core.quantized import Quantized

FP8 = torch.float8_e4m3fn
BACKEND = get_backend(BackendKind.TORCH)
# ends of groups, M: ragged, with empty groups and rows past the last one; ends out of order and out of range; empty
# groups only, with and without rows; one row; multiples of 32
GROUPS = (
    ([0, 130, 130, 131, 300], 310),
    ([-5, 200, 40, 999], 263),
    ([0, 0], 20),
    ([0, 0], 0),
    ([1], 1),
    ([128, 128, 384], 384),
)
MANY_GROUPS = list(range(1, 41)), 50  # more than one program of the kernel that finds the blocks


def tokens_of(ends: list[int]) -> list[slice]:
    """Each group's tokens: they start at a multiple of 32, and number a multiple of 32, at least 32."""
    found, first = [], 0
    for rows in reference.group_slices(ends):
        size = max(-(-(rows.stop - rows.start) // 32), 1) * 32
        found.append(slice(first, first + size))
        first += size
    return found


def check_plan(ends: list[int], num_rows: int, device: torch.device | str = "cpu") -> None:
    """The ends are in order and in range, and so are the ends of the tokens, for which there is room."""
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    with testing.poisoned_memory():
        found, tokens = BACKEND.plan(offs, num_rows).derived
    assert found.tolist() == reference.group_ends(offs, num_rows)
    assert tokens.tolist() == [group.stop for group in tokens_of(found.tolist())]
    assert tokens[-1] <= (num_rows // 32 + len(ends)) * 32
    assert found.dtype == tokens.dtype == torch.int32


def make_operand(
    ends: list[int], num_rows: int, features: int, recipe: Recipe, device: torch.device | str
) -> tuple[list[int], Tensor, tuple[Quantized, Quantized], tuple[Quantized, Quantized]]:
    """Ends in order, an operand, and its layouts by rows and by columns, made together and alone.

    The rows are a slice of wider ones; past the last group they are NaN.
    """
    torch.manual_seed(0)
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    ends = reference.group_ends(offs, num_rows)
    x = torch.randn(num_rows, features) * torch.randn(num_rows, 1).mul(4).exp()
    x[ends[-1] :] = torch.nan
    if ends[-1] > 11:
        x[3, 5], x[7, 1], x[9] = torch.nan, torch.inf, 0
    x = torch.cat([torch.ones(num_rows, 8), x], 1).to(device, torch.bfloat16)[:, 8:]
    with testing.poisoned_memory():
        plan = BACKEND.plan(offs, num_rows)
        rows, columns = BACKEND.quantize_activations(x, plan, recipe, rows=True, columns=True)
        rows_alone, _ = BACKEND.quantize_activations(x, plan, recipe, rows=True, columns=False)
        _, columns_alone = BACKEND.quantize_activations(x, plan, recipe, rows=False, columns=True)
    return ends, x, (rows, rows_alone), (columns, columns_alone)


def check_activations(ends: list[int], num_rows: int, recipe: Recipe, device: torch.device | str = "cpu") -> None:
    """Both rowwise layouts, with padding, equal those of `reference` for each group."""
    ends, x, by_row, by_column = make_operand(ends, num_rows, 144, recipe, device)
    inside = slice(0, ends[-1])
    if ends[-1]:
        data, scale = reference.quantize(x[inside], reference.row_blocks(recipe), recipe, FP8)
        for found in by_row:
            assert_equal(found.data[inside].float(), data.float())
            assert_equal(found.scale[inside], scale[:, 0])
    for found in by_column:
        assert found.data.is_contiguous() and found.scale.shape == (len(ends), 144)
        for e, (group, tokens) in enumerate(zip(reference.group_slices(ends), tokens_of(ends))):
            data, scale = torch.zeros(32, 144, device=device), torch.ones(1, 144, device=device)
            if group.start < group.stop:
                quantized, scale = reference.quantize(x[group], reference.column_blocks(recipe), recipe, FP8)
                # values past the end of a group are 0 times the inverse scale: NaN where the scale is NaN
                past = scale.reciprocal() * torch.zeros(tokens.stop - tokens.start - len(quantized), 1, device=device)
                data = torch.cat([quantized.float(), past])
            assert_equal(found.data[:, tokens].float(), data.t())
            assert_equal(found.scale[e], scale[0])


def unswizzled(scale: Tensor, lines: int, count: int) -> Tensor:
    """The codes of ``count`` scales of each of some lines, (lines, count), up to whole atoms of 128 by 4."""
    line, block = (torch.arange(-(-size // side) * side) for size, side in ((lines, 128), (count, 4)))
    atom = line[:, None] // 128 * (len(block) // 4) + block // 4
    place = atom * 512 + (line % 32 * 16 + line % 128 // 32 * 4)[:, None] + block % 4
    return scale.view(torch.uint8).flatten()[place.to(scale.device)]


def assert_scales(found: Tensor, scale: Tensor) -> None:
    """Swizzled scales equal the (lines, count) E8M0 ones; the padding of atoms is 1."""
    lines, count = scale.shape
    padded = F.pad(scale.view(torch.uint8), (0, -count % 4, 0, -lines % 128), value=127)
    assert_equal(unswizzled(found, lines, count), padded)


def check_mx_activations(ends: list[int], num_rows: int, device: torch.device | str = "cpu") -> None:
    """Both MX layouts, with padding, equal those of `reference` for each group."""
    mxfp8, features = Recipe.MXFP8, 160
    ends, x, by_row, by_column = make_operand(ends, num_rows, features, mxfp8, device)
    blocks = num_rows // 128 + len(ends)
    for found in by_row:
        assert found.data.is_contiguous() and found.scale.shape == (128 * blocks, 8)
        first = 0
        for group in filter(lambda rows: rows.start < rows.stop, reference.group_slices(ends)):
            data, scale = reference.quantize(x[group], reference.row_blocks(mxfp8), mxfp8, FP8)
            last = first + -(-len(data) // 128) * 128
            assert_equal(found.data[group].float(), data.float())
            assert_scales(found.scale[first:last], scale)
            first = last
    for found in by_column:
        assert found.data.is_contiguous() and found.scale.shape == (256, 4 * blocks)
        scales, first = found.scale.flatten(), 0
        for group, tokens in zip(reference.group_slices(ends), tokens_of(ends)):
            size = tokens.stop - tokens.start
            padded = F.pad(x[group], (0, 0, 0, size - (group.stop - group.start)))
            data, scale = reference.quantize(padded, reference.column_blocks(mxfp8), mxfp8, FP8)
            if group.start == group.stop:
                scale = reference.to_e8m0(torch.ones(scale.shape, device=device))
            last = first + 256 * -(-size // 128) * 4
            assert_equal(found.data[:, tokens].float(), data.t().float())
            assert_scales(scales[first:last], scale.t())
            first = last


def check_mx_weights(b_contiguous: str, device: torch.device | str = "cpu") -> None:
    """Both layouts equal those of `reference` for each matrix, whether made together or alone."""
    torch.manual_seed(0)
    b = torch.randn(2, 160, 288, device=device).bfloat16()
    b = b.transpose(1, 2).contiguous().transpose(1, 2) if b_contiguous == "k" else b
    with testing.poisoned_memory():
        forward, dgrad = BACKEND.quantize_weights(b, Recipe.MXFP8, forward=True, dgrad=True)
        forward_alone, _ = BACKEND.quantize_weights(b, Recipe.MXFP8, forward=True, dgrad=False)
        _, dgrad_alone = BACKEND.quantize_weights(b, Recipe.MXFP8, forward=False, dgrad=True)
    for axis, operands in ((1, (forward, forward_alone)), (2, (dgrad, dgrad_alone))):
        data, scale = reference.quantize(b, reference.weight_blocks(Recipe.MXFP8, axis), Recipe.MXFP8, FP8)
        for found in operands:
            assert found.data.stride(axis) == 1 and found.scale.shape == (2, 2 * 3 * 512)
            assert_equal(found.data.float(), data.float())
            for e in range(2):
                assert_scales(found.scale[e], scale[e].t() if axis == 1 else scale[e])


def check_zeros(ends: list[int], num_rows: int, device: torch.device | str = "cpu") -> None:
    """Rows past the last group, and matrices of empty groups, become zero, and nothing else changes."""
    from grouped_gemm.backends.torch_native import quantize as torch_native_quantize

    offs = torch.tensor(reference.group_ends(torch.tensor(ends), num_rows), dtype=torch.int32, device=device)
    x = torch.full((num_rows, 72), torch.nan, dtype=torch.bfloat16, device=device)
    torch_native_quantize.zero_tail(x, offs)
    assert x[: offs[-1]].isnan().all() and not x[offs[-1] :].any()
    sizes = offs.diff(prepend=offs.new_zeros(1))
    matrices = torch.full((len(ends), 24, 72), torch.nan, device=device)
    torch_native_quantize.zero_empty_groups(matrices, offs)
    assert matrices[sizes > 0].isnan().all() and not matrices[sizes == 0].any()


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert torch.equal(found.nan_to_num(1e38), expected.nan_to_num(1e38))


def scaled_grouped_mm(
    mat_a: Tensor, mat_b: Tensor, scale_a: Tensor, recipe_a: object, scale_b: Tensor, recipe_b: object,
    swizzle_a: object, swizzle_b: object, offs: Tensor, output_dtype: torch.dtype, use_fast_accum: bool,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.scaled_grouped_mm` on a CPU: the checks that torch makes on a GPU, and plain matmuls.

    As on a GPU, rows of no group are not written: they are NaN.
    """
    assert recipe_a == recipe_b and swizzle_a == swizzle_b and output_dtype == torch.bfloat16
    assert mat_a.dtype == mat_b.dtype == FP8
    assert mat_a.data_ptr() % 16 == mat_b.data_ptr() % 16 == 0
    assert mat_a.dim() == 2 and mat_a.stride(1) == 1 and mat_a.stride(0) >= max(mat_a.shape[1], 2)
    assert mat_b.stride(-2) == 1 and mat_b.stride(-1) >= max(mat_b.shape[-2], 2)
    assert mat_a.stride(0) % 16 == 0 and mat_b.stride(-1) % 16 == 0
    assert mat_a.shape[1] % 16 == 0 and mat_b.shape[-2] % 16 == 0 and mat_b.shape[-1] % 16 == 0
    assert offs.dtype == torch.int32 and offs.dim() == 1 and len(offs) < 1024
    ends = offs.tolist()
    if recipe_a == F.ScalingType.BlockWise1x32:
        assert swizzle_a == F.SwizzleType.SWIZZLE_32_4_4
        return _mx_gemm(mat_a, mat_b, scale_a, scale_b, ends)
    assert recipe_a == F.ScalingType.RowWise and swizzle_a is None and use_fast_accum
    assert scale_a.dtype == scale_b.dtype == torch.float32
    sizes = [end - start for start, end in zip([0, *ends], ends)]
    a, b = mat_a.double(), mat_b.double()
    if mat_b.dim() == 2:
        assert mat_a.shape[1] == mat_b.shape[0] and 0 <= ends[-1] <= mat_a.shape[1]
        assert all(size > 0 for size in sizes) and all(size % 16 == 0 for size in sizes[:-1])
        assert scale_a.shape == (len(ends) * mat_a.shape[0],) and scale_a.is_contiguous()
        assert scale_b.shape == (len(ends) * mat_b.shape[1],) and scale_b.is_contiguous()
        per_group = [a[:, group] @ b[group] for group in reference.group_slices(ends)]
        scales = scale_a.view(len(ends), -1, 1) * scale_b.view(len(ends), 1, -1)
        return (torch.stack(per_group) * scales).to(output_dtype)
    assert mat_b.shape[:2] == (len(ends), mat_a.shape[1]) and 0 <= ends[-1] <= mat_a.shape[0]
    assert all(size >= 0 for size in sizes)
    assert scale_a.shape == (mat_a.shape[0],) and scale_a.is_contiguous()
    assert scale_b.shape == (len(ends), mat_b.shape[2]) and scale_b.stride(1) == 1
    out = torch.full((mat_a.shape[0], mat_b.shape[2]), torch.nan, dtype=output_dtype)
    for e, group in enumerate(reference.group_slices(ends)):
        out[group] = (a[group] @ b[e] * scale_a[group, None] * scale_b[e]).to(output_dtype)
    return out


def _mx_gemm(mat_a: Tensor, mat_b: Tensor, scale_a: Tensor, scale_b: Tensor, ends: Sequence[int]) -> Tensor:
    """MX operands: what torch 2.11 and its MSLK kernels check and assume, and plain matmuls."""
    assert scale_a.dtype == scale_b.dtype == torch.float8_e8m0fnu
    assert mat_a.is_contiguous() and mat_b.mT.is_contiguous()
    assert scale_a.is_contiguous() and scale_b.is_contiguous()
    (lines_a, contraction), lines_b = mat_a.shape, mat_b.shape[-1]
    groups = reference.group_slices(ends)
    assert all(group.start <= group.stop for group in groups)
    assert scale_a.dim() == scale_b.dim() == 2 and scale_a.shape[0] >= lines_a
    assert scale_a.numel() < 2**31
    scales_a, scales_b = scale_a.flatten(), scale_b.flatten()
    if mat_b.dim() == 2:
        assert contraction == mat_b.shape[0] and ends[-1] <= contraction and scale_b.shape[0] >= lines_b
        out = torch.full((len(ends), lines_a, lines_b), torch.nan, dtype=torch.bfloat16)
        first = 0
        for e, group in enumerate(groups):
            size = group.stop - group.start
            assert size % 32 == 0
            last = first + -(-size // 128) * 4
            if size > 0:
                lhs = _mx_values(mat_a[:, group], scales_a, first * -(-lines_a // 128) * 128)
                rhs = _mx_values(mat_b[group].t(), scales_b, first * -(-lines_b // 128) * 128)
                out[e] = (lhs @ rhs.t()).to(out.dtype)
            first = last
        return out
    assert mat_b.shape[:2] == (len(ends), contraction) and ends[-1] <= lines_a
    count = -(-(contraction // 32) // 4) * 4
    scales_of_group = count * -(-lines_b // 128) * 128
    assert scale_b.shape == (len(ends), scales_of_group)
    out, first = torch.full((lines_a, lines_b), torch.nan, dtype=torch.bfloat16), 0
    for e, group in enumerate(groups):
        lhs = _mx_values(mat_a[group], scales_a, first * count)
        rhs = _mx_values(mat_b[e].t(), scales_b, e * scales_of_group)
        out[group] = (lhs @ rhs.t()).to(out.dtype)
        first += -(-(group.stop - group.start) // 128) * 128
    return out


def _mx_values(data: Tensor, scales: Tensor, first: int) -> Tensor:
    """Values of (lines, contraction) data whose scales begin at ``first``, padded to whole atoms of scales."""
    lines, contraction = data.shape
    assert contraction % 32 == 0
    end = first + -(-lines // 128) * 128 * -(-contraction // 128) * 4
    assert end <= len(scales)
    codes = unswizzled(scales[first:end], lines, contraction // 32)[:lines]
    padded = F.pad(data.double(), (0, -contraction % 128))
    return padded * codes.view(torch.float8_e8m0fnu).double().repeat_interleave(32, 1)
