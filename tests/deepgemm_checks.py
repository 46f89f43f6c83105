"""Checks of DeepGEMM's layouts, bit for bit against torch twins. They run interpreted and on a GPU."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from grouped_gemm import Recipe, reference, testing
from grouped_gemm.backends import get_backend
from grouped_gemm.core.preference import BackendKind

FP8 = torch.float8_e4m3fn
BACKEND = get_backend(BackendKind.DEEPGEMM)
# ends of groups, M, alignment: ragged, with empty groups and rows past the last one; ends out of order and range; only
# empty groups; one row; more blocks than a program of the plan's kernel has; whole blocks, with and without a tail that
# is not one
GROUPS = (
    ([0, 130, 130, 131, 300], 310, 1),
    ([-5, 200, 40, 999], 263, 1),
    ([0, 0], 20, 1),
    ([1], 1, 1),
    (list(range(1, 11)), 13, 1),
    ([128, 128, 384], 384, 128),
    ([256, 512], 555, 256),
    ([0, 0], 130, 128),
)
MANY_GROUPS = list(range(1, 41)), 50, 1


def placed(ends: list[int], num_rows: int) -> list[tuple[slice, int, int]]:
    """For each group: its rows, where they begin after padding, and its padded size."""
    first, found = 0, []
    for rows in reference.group_slices(ends):
        size = -(-(rows.stop - rows.start) // 128) * 128
        found.append((rows, first, size))
        first += size
    return found


def check_plan(ends: list[int], num_rows: int, alignment: int, device: str = "cpu") -> None:
    """The group of each row, and of a block past the last one; the padded sizes."""
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    with testing.poisoned_memory():
        plan = BACKEND.plan(offs, num_rows, alignment)
    row_map, _, sizes = plan.derived
    ends = reference.group_ends(offs, num_rows)
    if alignment % 128:
        assert len(row_map) == min(num_rows // 128 + len(ends) + 1, num_rows) * 128
    else:
        assert len(row_map) == num_rows
    expected = torch.full_like(row_map, -1)
    for e, (rows, first, _) in enumerate(placed(ends, num_rows)):
        expected[first : first + rows.stop - rows.start] = e
    assert torch.equal(row_map, expected)
    assert sizes.tolist() == [size for _, _, size in placed(ends, num_rows)]
    beyond = torch.as_strided(row_map, (len(row_map) + 128,), (1,))
    assert (beyond[len(row_map) :] == -1).all()


def check_activations(ends: list[int], num_rows: int, alignment: int, recipe: Recipe, device: str = "cpu") -> None:
    """Both layouts, with padding, equal those of `reference` for each group, whether made together or alone.

    The rows are a slice of wider ones; past the last group they are NaN.
    """
    torch.manual_seed(0)
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    ends = reference.group_ends(offs, num_rows)
    x = torch.randn(num_rows, 256) * torch.randn(num_rows, 1).mul(4).exp()
    x[ends[-1] :] = torch.nan
    if ends[-1] > 11:
        x[3, 5], x[7, 1], x[9] = torch.nan, torch.inf, 0
    x = torch.cat([torch.ones(num_rows, 8), x], 1).to(device, torch.bfloat16)[:, 8:]
    with testing.poisoned_memory():
        plan = BACKEND.plan(offs, num_rows, alignment)
        rows, columns = BACKEND.quantize_activations(x, plan, recipe, rows=True, columns=True)
    length, zeros = len(plan.derived[0]), partial(torch.zeros, device=device)
    data, scale = zeros(length, 256), zeros(length, 2) + 1
    blocks = sum(size for _, _, size in placed(ends, num_rows)) // 128
    flat, column_scale = zeros(blocks * 128 * 256), zeros(len(columns.scale), 256) + 1
    for group, first, size in placed(ends, num_rows):
        if group.start == group.stop:
            continue
        here = slice(first, first + group.stop - group.start)
        found = reference.quantize(x[group], reference.row_blocks(recipe), recipe, FP8)
        data[here], scale[here] = found[0].float(), found[1]
        found = reference.quantize(x[group], reference.column_blocks(recipe), recipe, FP8)
        by_token = zeros(size, 256)
        by_token[: len(found[0])] = found[0].float()
        # values past the end of a group are 0 times the inverse scale: NaN where the scale is NaN
        column_scale[first // 128 : (first + size) // 128] = found[1]
        by_token[len(found[0]) :] = by_token[len(found[0]) :] * found[1][-1].reciprocal()
        flat[first * 256 : (first + size) * 256] = by_token.t().flatten()
    assert_equal(rows.data.float(), data)
    assert_equal(rows.scale, scale)
    assert rows.scale.stride() == (1, -(-length // 4) * 4) or length < 2
    assert_equal(columns.data[: len(flat)].float(), flat)
    assert_equal(columns.scale, column_scale)
    alone, _ = BACKEND.quantize_activations(x, plan, recipe, rows=True, columns=False)
    assert_equal(alone.data.float(), data)
    _, alone = BACKEND.quantize_activations(x, plan, recipe, rows=False, columns=True)
    assert_equal(alone.scale, column_scale)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert torch.equal(found.nan_to_num(1e38), expected.nan_to_num(1e38))
