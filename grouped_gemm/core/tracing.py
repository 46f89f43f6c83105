"""Questions about sizes that ``torch.compile`` and ``torch.export`` may not know while they trace.

A size can be dynamic (M differs from call to call), have stated bounds (`torch._dynamo.mark_dynamic` with a range,
`torch._check`), or be data-dependent: only the device knows it, such as the number of rows that a mask keeps. Python's
``if`` on a data-dependent size is an error, and on a size with stated bounds it can break what was stated. Eager calls
take the plain comparison.

`torch.fx.experimental.symbolic_shapes` is imported while tracing only: it brings sympy, which takes half a second.
"""

from __future__ import annotations

import torch

from grouped_gemm.core.call_spec import DECODE_ROWS, SMALL_ROWS, RowClass, row_class


def holds(condition: bool) -> bool:
    """Whether ``condition`` holds; False where that is data-dependent."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def is_data_dependent(size: int) -> bool:
    """Whether only the device knows ``size``."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

    # Fermat's little theorem holds for every size, so that a guard on it costs no compilation, and neither bounds nor
    # factors of the size prove it to torch. So the two differ only where there is no size to try it on.
    remainder = size % 13
    condition = remainder**13 % 13 == remainder
    return guard_or_true(condition) and not guard_or_false(condition)


def row_class_of(num_rows: int, num_groups: int) -> RowClass:
    """`call_spec.row_class`, LARGE where M is data-dependent, and where the class would narrow down M's stated bounds.

    An exported program has the LARGE class as well: a program of one class would be of little use.
    """
    if _is_exporting():
        return RowClass.LARGE
    if not torch.compiler.is_compiling():
        return row_class(num_rows, num_groups)
    from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

    most_decode, most_small = DECODE_ROWS * num_groups, SMALL_ROWS * num_groups
    if statically_known_true(num_rows > 2) or statically_known_true(num_rows < 2**48):  # Dynamo's own bound is 2
        if statically_known_true(num_rows <= most_decode):
            return RowClass.DECODE
        is_small = statically_known_true(num_rows > most_decode) and statically_known_true(num_rows <= most_small)
        return RowClass.SMALL if is_small else RowClass.LARGE
    if guard_or_false(num_rows <= most_decode):
        return RowClass.DECODE
    return RowClass.SMALL if guard_or_false(num_rows <= most_small) else RowClass.LARGE


def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


# Evaluated while tracing: Dynamo itself takes torch 2.11's function for True under torch.compile, too.
_is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]
