"""DTensor operands: each is taken as its local shard, where local products are all that there is to compute."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from grouped_gemm.selection.checks import fail


def is_dtensor(x: Any) -> bool:
    """Whether ``x`` is a DTensor; without importing its module, which takes a second and is there where one is."""
    if type(x) in (Tensor, Parameter) or not isinstance(x, Tensor):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(**operands: Any) -> tuple[Any, ...]:
    """``operands``, by the names of arguments, with each DTensor as its local shard; others as they are.

    On each dimension of a mesh DTensors are all replicated; or they are all sharded along their first axis, rows of
    ``a`` and matrices of ``b``, and ``offs`` is a plain tensor with the ends of local rows. Products of other shards,
    or their gradients, would be parts of sums that nobody adds up. Gradients have the placements of their operands.

    Raises:
        ValueError: placements are others; the message names the argument, what was expected and found.
    """
    dtensors = {name: x for name, x in operands.items() if is_dtensor(x)}
    if not dtensors:
        return tuple(operands.values())
    is_contraction = isinstance(operands["b"], Tensor) and operands["b"].dim() == 2
    first = next(iter(dtensors))
    mesh, placements = dtensors[first].device_mesh, tuple(dtensors[first].placements)
    for name, x in dtensors.items():
        if name == "offs" and not all(p.is_replicate() for p in (*x.placements, *placements)):
            fail("offs", "a plain tensor, the ends of local rows", f"a DTensor, {x.placements}")
        allowed = "Replicate" if is_contraction else "Replicate or Shard(0)"
        if not all(p.is_replicate() or (p.is_shard(0) and not is_contraction) for p in x.placements):
            fail(
                name, f"a DTensor that is {allowed} on each mesh dimension, or what its to_local() gives", x.placements
            )
        if x.device_mesh != mesh or tuple(x.placements) != placements:
            fail(name, f"mesh and placements of {first}, {mesh}, {placements}", f"{x.device_mesh}, {x.placements}")
    return tuple(x.to_local() if name in dtensors else x for name, x in operands.items())
