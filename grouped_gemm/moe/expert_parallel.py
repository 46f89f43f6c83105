"""Expert parallelism: each rank has some experts, and tokens travel to them and back.

`experts_forward` with ``mesh`` runs three steps: a dispatcher brings each token to the ranks of its experts; every
rank runs its own experts on what has arrived, which adds up a token's experts on that rank; the dispatcher returns one
row per token and rank, and adds them up. `AllToAll` is the dispatcher on torch's collectives (NCCL, gloo). Others plug
in by the protocol `Dispatcher`.

A token goes once to a rank, however many of its experts are there. With k experts drawn at random among W ranks, that
are W * (1 - (1 - 1/W)^k) rows instead of k: on 2 ranks with k = 8, 4.0 times fewer, on 8 ranks 1.5.

Sums: a rank adds up a token's experts in fp32, in the order of slots, and rounds; then the ranks' rows are added in
fp32, in the order of ranks, and rounded. A token whose experts are all on one rank has the same bits as without
expert parallelism. Any other is rounded once more for each rank.

T, R, k, H: tokens of a rank, tokens that arrive at a rank, slots of a token, features. W, E: ranks, experts of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from grouped_gemm.core.library import ops
from grouped_gemm.core.machine import is_capturing
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.moe import steps  # noqa: F401  (defines ops)
from grouped_gemm.moe.rows import combine, gather
from grouped_gemm.selection import checks

_QUANTIZING = (Recipe.FP8_BLOCKWISE, Recipe.FP8_BLOCKWISE_POW2)  # recipes in which tokens travel in fp8


class Tokens(NamedTuple):
    """Tokens that have arrived, each with all its slots.

    Attributes:
        x: (R, H).
        topk_ids: (R, k), the local experts of each token. Ids of experts elsewhere are outside [0, E / W).
        topk_weights: (R, k).
        handle: what `Dispatcher.combine` needs.
    """

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    handle: Any


class SortedRows(NamedTuple):
    """Rows that have arrived in the order of local experts, one for each slot, perhaps padded.

    Attributes:
        rows: (M, H).
        offs: (E / W,) int32, the end row of each local expert, padding included.
        row_weights: (M,), 0 for padding.
        group_alignment: what every group's size is a multiple of.
        handle: what `Dispatcher.combine` needs.
    """

    rows: Tensor
    offs: Tensor
    row_weights: Tensor
    group_alignment: int
    handle: Any


class Dispatcher(Protocol):
    """Brings tokens to their experts and their results back; differentiable."""

    def dispatch(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tokens | SortedRows:
        """What arrives on this rank of ``x`` (T, H) with its slots (T, k) on all ranks. Ids count all experts."""

    def combine(self, y: Tensor, handle: Any) -> Tensor:
        """(T, H): the sums of the results ``y`` of what `dispatch` returned, one row for each of its rows."""


@dataclass
class _Routes:
    """Which token goes where: row ``places[t, w]`` of what is sent is token t for rank w; -1: it does not go there.

    Attributes:
        source: (S,) int32, the token of each row that is sent; -1: none.
        places: (T, W) int32.
        sends: rows for each rank; None: equally many.
        takes: rows from each rank; None: equally many.
        lost: (T,) whether a token did not fit; None: all fit.
    """

    source: Tensor
    places: Tensor
    sends: list[int] | None
    takes: list[int] | None
    lost: Tensor | None


class AllToAll:
    """The dispatcher on all-to-all collectives: each token once to a rank, in the order of tokens.

    Args:
        group: the ranks, a `torch.distributed.ProcessGroup` or a `DeviceMesh` of one dimension. Rank w has the experts
            from w * E / W on.
        num_experts: E.
        recipe: "fp8_blockwise" or "fp8_blockwise_pow2": tokens, and gradients of results in backward, travel in fp8
            with a scale for each 128 features. Results and gradients of tokens travel in their own dtype. None: all do.
        capacity: rows that a rank sends to each rank, at most and always. The host then reads no numbers, and a CUDA
            graph can be captured. A token that does not fit gets NaN as its result, and the next `dispatch` raises, on
            all ranks. While a graph is captured or replayed, nothing raises: call `check`. None: as many as there are;
            the host reads the numbers once in each call.

    Raises:
        TypeError, ValueError: an argument does not fit. E must be a multiple of W.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh,
        num_experts: int,
        *,
        recipe: Recipe | str | None = None,
        capacity: int | None = None,
    ) -> None:
        self.group = group_of(group)
        self.num_ranks, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        if num_experts % self.num_ranks:
            checks.fail("num_experts", f"a multiple of {self.num_ranks} ranks", num_experts)
        parsed = Recipe.NONE if recipe is None else Recipe.parse(recipe)
        if parsed.is_scaled and parsed not in _QUANTIZING:
            checks.fail("recipe", f"None or one of {', '.join([r.value for r in _QUANTIZING])}", parsed.value)
        if capacity is not None and (not isinstance(capacity, int) or capacity < 1):
            checks.fail("capacity", "None or a number of rows of at least 1", repr(capacity))
        self.num_experts, self.recipe, self.capacity = num_experts, parsed, capacity
        self._lost: Tensor | None = None  # () bool, on the device: whether a token did not fit
        self._seen: tuple[Tensor, torch.cuda.Event | None] | None = None  # a copy on the host, and when it is there

    def dispatch(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tokens:
        """See `Dispatcher`.

        Raises:
            RuntimeError: with a capacity, a token of the call before did not fit. The host waits for its dispatch.
        """
        self._raise_if_lost()
        routes = self._routes(topk_ids)
        ids = _rows_of(topk_ids.to(torch.int32), routes.source, -1)
        if routes.lost is not None:  # each row says whether its rank has lost a token: all ranks have to raise
            ids = torch.cat((ids, routes.lost.any().to(torch.int32).expand(len(ids), 1)), 1)
        ids = _exchange(ids, routes.sends, routes.takes, self.group)
        if routes.lost is not None:
            self._remember(ids[:, -1].any())
            ids = ids[:, :-1]
        weights = gather(topk_weights.float(), routes.source, routes.places)
        weights = _Exchange.apply(weights, routes.sends, routes.takes, self.group, None, None)
        outward = self.recipe if self.recipe.is_scaled else None
        x = _Exchange.apply(
            gather(x, routes.source, routes.places), routes.sends, routes.takes, self.group, outward, None
        )
        first = self.rank * (self.num_experts // self.num_ranks)
        local = torch.where(ids >= 0, ids - first, -1)
        return Tokens(x, local, weights, routes)

    def combine(self, y: Tensor, handle: _Routes) -> Tensor:
        """See `Dispatcher`."""
        outward = self.recipe if self.recipe.is_scaled else None
        rows = _Exchange.apply(y, handle.takes, handle.sends, self.group, None, outward)
        total = combine(rows, None, handle.source, handle.places)
        return total if handle.lost is None else total.masked_fill(handle.lost.unsqueeze(1), torch.nan)

    def check(self) -> None:
        """Synchronizes the host, and raises `RuntimeError` if a token has not fitted since the last error."""
        if self._lost is not None and bool(self._lost):
            self._raise()

    def _routes(self, topk_ids: Tensor) -> _Routes:
        (num_tokens, _), num_ranks = topk_ids.shape, self.num_ranks
        is_used = (topk_ids >= 0) & (topk_ids < self.num_experts)
        owners = torch.where(is_used, topk_ids // (self.num_experts // num_ranks), num_ranks).long()
        goes = torch.zeros(num_tokens, num_ranks + 1, dtype=torch.int32, device=topk_ids.device)
        goes = goes.scatter_(1, owners, 1)[:, :num_ranks]
        order, counts = goes.cumsum(0) - 1, goes.sum(0)
        lost = None
        if self.capacity is None:
            received = _exchange(counts, None, None, self.group)
            sends, takes = torch.stack((counts, received)).tolist()  # the host read
            starts, num_rows = counts.cumsum(0) - counts, sum(sends)
        else:
            sends = takes = None
            starts, num_rows = self.capacity * torch.arange(num_ranks, device=counts.device), self.capacity * num_ranks
            is_lost = (order >= self.capacity) & (goes > 0)
            lost, goes = is_lost.any(1), goes.masked_fill(is_lost, 0)
        places = torch.where(goes > 0, starts + order, -1)
        source = torch.full((num_rows + 1,), -1, dtype=torch.int32, device=counts.device)
        tokens = torch.arange(num_tokens, dtype=torch.int32, device=counts.device).unsqueeze(1).expand(-1, num_ranks)
        source.scatter_(0, torch.where(places < 0, num_rows, places).flatten(), tokens.flatten())
        return _Routes(source[:num_rows], places.to(torch.int32), sends, takes, lost)

    def _remember(self, lost: Tensor) -> None:
        if self._lost is None:
            self._lost = torch.zeros_like(lost)
        self._lost.logical_or_(lost)
        if is_capturing(lost) or torch.compiler.is_compiling():
            return
        if lost.is_cuda:
            host = torch.empty(lost.shape, dtype=lost.dtype, pin_memory=True).copy_(self._lost, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._seen = host, event
        else:
            self._seen = self._lost.clone(), None

    def _raise_if_lost(self) -> None:
        if self._seen is None or torch.compiler.is_compiling():
            return
        host, event = self._seen
        if event is not None:
            event.synchronize()  # no query: all ranks have to raise in the same call
        if bool(host):
            self._raise()

    def _raise(self) -> None:
        assert self._lost is not None, "a token has not fitted"
        self._lost.zero_()
        self._seen = None
        raise RuntimeError(
            f"expert parallelism: expected at most {self.capacity} tokens for each rank, the capacity; found more in "
            "an earlier call, whose tokens that did not fit have NaN. Give AllToAll a larger capacity, or none."
        )


Group: TypeAlias = "dist.ProcessGroup | DeviceMesh"


def group_of(group: Group) -> dist.ProcessGroup:
    """The process group of a mesh of one dimension, or ``group`` itself.

    Raises:
        TypeError, ValueError: it is neither.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names = f"mesh[{group.mesh_dim_names[-1]!r}]" if group.mesh_dim_names else "a slice of it"
            checks.fail("mesh", f"one dimension, such as {names}", f"{group.ndim} dimensions")
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"mesh: expected a DeviceMesh, a ProcessGroup or a Dispatcher; found {type(group).__name__}")
    return group


def dispatcher_of(mesh: Any, num_local_experts: int, recipe: Recipe | None) -> Dispatcher:
    """``mesh`` if it is a dispatcher; else `AllToAll` over it, with tokens that travel as the recipe quantizes them."""
    if hasattr(mesh, "dispatch") and hasattr(mesh, "combine"):
        found: Dispatcher = mesh
        return found
    group = group_of(mesh)
    outward = recipe if recipe in _QUANTIZING else None
    return AllToAll(group, num_local_experts * dist.get_world_size(group), recipe=outward)


def _rows_of(x: Tensor, source: Tensor, fill: int) -> Tensor:
    """Rows of integers, ``fill`` where there is no token."""
    if x.shape[0] == 0:
        return x.new_full((source.shape[0], x.shape[1]), fill)
    return x.index_select(0, source.clamp(min=0)).masked_fill_((source < 0).unsqueeze(1), fill)


class _Exchange(torch.autograd.Function):
    """Rows sent to ranks, and back in backward; in fp8 in a direction that has a recipe."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sends: list[int] | None, takes: list[int] | None, group: dist.ProcessGroup,
        recipe: Recipe | None, backward_recipe: Recipe | None,
    ) -> Tensor:  # fmt: skip
        """(R, H) from ``x`` (S, H), whose rows are in the order of ranks."""
        ctx.arguments = takes, sends, group, backward_recipe, recipe
        if recipe is None:
            return _exchange(x, sends, takes, group)
        data, scale = ops.moe_quantize_tokens(x, recipe.value)
        data = _exchange(data.contiguous().view(torch.uint8), sends, takes, group).view(data.dtype)
        return ops.moe_dequantize_tokens(data, _exchange(scale, sends, takes, group), x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of ``x``."""
        return _Exchange.apply(dy.contiguous(), *ctx.arguments), None, None, None, None, None


def _exchange(x: Tensor, sends: list[int] | None, takes: list[int] | None, group: dist.ProcessGroup) -> Tensor:
    return collectives.wait_tensor(collectives.all_to_all_single(x.contiguous(), takes, sends, group))
