"""DTensor operands: a call runs on their local shards, provided that local GEMMs give the whole result."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from grouped_gemm.selection.checks import fail


def is_dtensor(x: Any) -> bool:
    """Whether ``x`` is a DTensor. Does not import its module, which takes a second; no DTensor exists without it."""
    if type(x) in (Tensor, Parameter) or not isinstance(x, Tensor):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(**operands: Any) -> tuple[Any, ...]:
    """``operands``, by argument name, with each DTensor replaced by its local shard.

    On each mesh dimension, all DTensors are replicated, or all are sharded along their first axis: rows of ``a``,
    experts of ``b``. With sharded operands, ``offs`` is a plain tensor with the ends of the local rows. With any other
    placement, local results or gradients would be partial sums that nothing reduces. Gradients have the placements of
    their operands.

    Raises:
        ValueError: other placements; the message names the argument, what was expected and what was found.
    """
    dtensors = {name: x for name, x in operands.items() if is_dtensor(x)}
    if not dtensors:
        return tuple(operands.values())
    is_contraction = isinstance(operands["b"], Tensor) and operands["b"].dim() == 2
    first = next(iter(dtensors))
    mesh, placements = dtensors[first].device_mesh, tuple(dtensors[first].placements)
    for name, x in dtensors.items():
        if name == "offs" and not all(p.is_replicate() for p in (*x.placements, *placements)):
            fail("offs", "a plain tensor with the ends of the local rows", f"a DTensor, {x.placements}")
        allowed = "Replicate" if is_contraction else "Replicate or Shard(0)"
        if not all(p.is_replicate() or (p.is_shard(0) and not is_contraction) for p in x.placements):
            fail(name, f"a DTensor that is {allowed} on each mesh dimension, or its to_local()", x.placements)
        if x.device_mesh != mesh or tuple(x.placements) != placements:
            fail(name, f"the mesh and placements of {first}, {mesh}, {placements}", f"{x.device_mesh}, {x.placements}")
    return tuple(x.to_local() if name in dtensors else x for name, x in operands.items())
