"""Comparisons of sizes that ``torch.compile`` and ``torch.export`` may not know while tracing.

A size can be dynamic (M differs from call to call), have stated bounds (`torch._dynamo.mark_dynamic` with a range,
`torch._check`), or be data-dependent: only the device knows it, such as the number of rows that a mask keeps. A Python
``if`` on a data-dependent size is an error, and on a size with stated bounds it can violate the bounds. Eager calls use
the plain comparison.

`torch.fx.experimental.symbolic_shapes` is imported only while tracing: it imports sympy, which takes half a second.
"""

from __future__ import annotations

import torch

from grouped_gemm.core.call_spec import DECODE_ROWS, SMALL_ROWS, RowClass, row_class


def holds(condition: bool) -> bool:
    """Whether ``condition`` holds; False if it is data-dependent."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def is_data_dependent(size: int) -> bool:
    """Whether only the device knows ``size``."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

    # By Fermat's little theorem the condition is true for every size, so a guard on it causes no recompilation. But
    # torch cannot prove it from bounds or factors of the size. So the two guards differ only if the size has no example
    # value to evaluate it with.
    remainder = size % 13
    condition = remainder**13 % 13 == remainder
    return guard_or_true(condition) and not guard_or_false(condition)


def row_class_of(num_rows: int, num_groups: int) -> RowClass:
    """`call_spec.row_class`; LARGE if M is data-dependent, or if the class would narrow M's stated bounds.

    Exported programs also get LARGE: a program for one class only would be of little use.
    """
    if _is_exporting():
        return RowClass.LARGE
    if not torch.compiler.is_compiling():
        return row_class(num_rows, num_groups)
    from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

    most_decode, most_small = DECODE_ROWS * num_groups, SMALL_ROWS * num_groups
    if _has_stated_bounds(num_rows):
        if statically_known_true(num_rows <= most_decode):
            return RowClass.DECODE
        is_small = statically_known_true(num_rows > most_decode) and statically_known_true(num_rows <= most_small)
        return RowClass.SMALL if is_small else RowClass.LARGE
    if guard_or_false(num_rows <= most_decode):
        return RowClass.DECODE
    return RowClass.SMALL if guard_or_false(num_rows <= most_small) else RowClass.LARGE


def is_at_most(size: int, limit: int) -> bool:
    """Whether ``size <= limit``. False in exported programs, and where it would narrow stated bounds of ``size``."""
    if _is_exporting():
        return False
    if not torch.compiler.is_compiling():
        return size <= limit
    from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

    if _has_stated_bounds(size):
        return statically_known_true(size <= limit)
    return guard_or_false(size <= limit)


def _has_stated_bounds(size: int) -> bool:
    """Whether the caller has bounded a dynamic ``size``, so that a guard on it could violate the bounds."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(size > 2) or statically_known_true(size < 2**48)  # Dynamo's own bound is 2


def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


# Evaluated as a constant: Dynamo would trace torch 2.11's `is_exporting` as True, also under torch.compile.
_is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]
