"""Who pads in each case of `moe.padding`, observed where a backend plans, and the results of the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from grouped_gemm import BackendKind, Recipe
from grouped_gemm.backends import get_backend
from grouped_gemm.moe import experts_forward, group_alignment
from grouped_gemm.moe.expert_parallel import AllToAll, SortedRows
from grouped_gemm.moe.padding import CASES, Case, Pads
from grouped_gemm.moe.routing import route
from grouped_gemm.moe.rows import combine, gather

E, T, K = 4, 21, 2
# the table, and what is said below it
ALL = (
    *CASES,
    Case("bf16", "a dispatcher that pads", Pads.NOBODY, Pads.DISPATCHER, Pads.NOBODY),
    Case("fp8", "a dispatcher that pads", Pads.NOBODY, Pads.DISPATCHER, Pads.DISPATCHER),
)
FP8 = {BackendKind.HIPBLASLT: Recipe.FP8_ROWWISE}  # of a backend that has no blocks


def name(x: Case | BackendKind) -> str:
    """Of a parameter of a test."""
    return x.value if isinstance(x, BackendKind) else f"{x.recipe} from {x.rows_from}"


class Padding:
    """A dispatcher that pads by itself, as DeepEP's and HybridEP's do; of one rank."""

    def __init__(self, multiple: int) -> None:
        self.multiple = multiple

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> SortedRows:
        offs, source, places = route(ids, E, self.multiple)
        used = places >= 0
        by_row = weights.new_zeros(len(source)).index_copy(0, places[used].long(), weights[used])
        return SortedRows(gather(x, source, places), offs, by_row, self.multiple, (source, places))

    def combine(self, y: Tensor, handle: Any) -> Tensor:
        return combine(y, None, *handle)


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Plan(NamedTuple):
    """What a backend is told of the groups."""

    sizes: list[int]
    num_rows: int
    group_alignment: int


@contextmanager
def plans_of(kind: BackendKind) -> Iterator[list[Plan]]:
    """Every plan that the backend makes in the block."""
    found: list[Plan] = []
    backend = get_backend(kind)
    plan = backend.plan

    def record(offs: Tensor, num_rows: int, group_alignment: int = 1, **options: Any) -> Any:
        found.append(Plan(torch.diff(offs, prepend=offs.new_zeros(1)).tolist(), num_rows, group_alignment))
        return plan(offs, num_rows, group_alignment, **options)

    with mock.patch.object(backend, "plan", record):
        yield found


def layer(hidden: int, inner: int) -> tuple[Tensor, ...]:
    """Operands in bf16. Expert 2 has no tokens, and two slots are dropped."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, scale: float) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).bfloat16().requires_grad_()

    ids = torch.tensor([0, 1, 3])[torch.randint(0, 3, (T, K), generator=generator)]
    ids[3, 0], ids[5, 1] = -1, E
    weights = torch.rand(T, K, generator=generator).requires_grad_()
    return (
        leaf(T, hidden, scale=1),
        ids,
        weights,
        leaf(E, 2 * inner, hidden, scale=0.1),
        leaf(E, hidden, inner, scale=0.1),
    )


def results(operands: tuple[Tensor, ...], training: bool, **options: Any) -> list[Tensor]:
    """The layer's result, and its gradients if ``training``."""
    with torch.set_grad_enabled(training):
        y = experts_forward(*operands, implementation="grouped_mm", **options)
    leaves = [x for x in operands if x.requires_grad]
    return [y, *(torch.autograd.grad(y, leaves, torch.ones_like(y)) if training else ())]


def check(
    case: Case,
    kind: BackendKind,
    *,
    hidden: int = 256,
    inner: int = 128,
    training: bool = True,
    multiplied: Callable[[], int] | None = None,
) -> None:
    """Runs the layer of one case, which must have a process group if it has a dispatcher.

    Args:
        case: the case.
        kind: the backend.
        hidden: H.
        inner: I.
        training: whether to compute gradients.
        multiplied: the rows of the first GEMM, for a backend that may pad inside its calls; None: it does not.
    """
    recipe = {"bf16": Recipe.NONE, "mxfp8": Recipe.MXFP8}.get(case.recipe, FP8.get(kind, Recipe.FP8_BLOCKWISE))
    options: dict[str, Any] = {"recipe": recipe, "kernel_preference": kind}
    multiple = group_alignment(**options, device="cpu", training=training)
    meshes: dict[str, Callable[[], Any]] = {
        "own tokens": lambda: None,
        "a dispatcher": lambda: AllToAll(dist.group.WORLD, E),
        "a dispatcher that pads": lambda: Padding(multiple),
    }
    operands = layer(hidden, inner)
    with plans_of(kind) as plans:
        found = results(operands, training, mesh=meshes[case.rows_from](), **options)
    (plan,) = plans  # both GEMMs share it, and so does backward
    rows = plan.num_rows if multiplied is None else multiplied()
    sizes = [int((operands[1] == e).sum()) for e in range(E)]
    slots = sum(sizes) if case.rows_from == "a dispatcher" else T * K  # the host of `AllToAll` has read their number
    assert plan.sizes == [-(-size // plan.group_alignment) * plan.group_alignment for size in sizes]
    if plan.group_alignment > 1:
        assert plan.group_alignment == multiple and rows == plan.num_rows == slots + E * (multiple - 1)
        observed = Pads.DISPATCHER if case.rows_from == "a dispatcher that pads" else Pads.GATHER
    else:
        assert plan.num_rows == slots
        observed = Pads.CALL if rows > slots else Pads.NOBODY
    assert observed is case.pads(kind)
    emulated = results(operands, training, recipe=recipe, kernel_preference=BackendKind.EMULATED)
    for x, right in zip(found, emulated, strict=True):
        assert (x.double() - right.double()).norm() <= 0.02 * right.double().norm()
