"""Expert parallelism: each rank has some experts, and tokens travel to them and back.

`experts_forward` with ``mesh`` runs three steps: a dispatcher brings each token to the ranks of its experts; every
rank runs its own experts on what has arrived, which adds up a token's experts on that rank; the dispatcher returns one
row per token and rank, and adds them up. `AllToAll` is the dispatcher on torch's collectives (NCCL, gloo), or on
memory that GPUs reach over NVLink. Others plug in by the protocol `Dispatcher`.

A token goes once to a rank, however many of its experts are there. With k experts drawn at random among W ranks, that
are W * (1 - (1 - 1/W)^k) rows instead of k: on 2 ranks with k = 8, 4.0 times fewer, on 8 ranks 1.5.

Sums: a rank adds up a token's experts in fp32, in the order of slots, and rounds; then the ranks' rows are added in
fp32, in the order of ranks, and rounded. A token whose experts are all on one rank has the same bits as without
expert parallelism. Any other is rounded once more for each rank.

With a recipe in blocks, a token is quantized once, on its own rank, and the GEMMs of the other one read what has
arrived: `Tokens.quantized`. Gradients of results travel in fp8 too. They are dequantized on arrival, since the gradient
of weights reads them in their own dtype, and quantized again for the gradient of tokens.

T, R, k, H: tokens of a rank, tokens that arrive at a rank, slots of a token, features. W, E: ranks, experts of all.
S: rows that a rank sends.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from packaging.version import Version
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from grouped_gemm.core.call_spec import dtype_name
from grouped_gemm.core.dense import dense_rows
from grouped_gemm.core.library import ops
from grouped_gemm.core.machine import is_capturing
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.core.vmap import is_batched
from grouped_gemm.moe import rows  # noqa: F401  (defines ops)
from grouped_gemm.moe.packing import unpack
from grouped_gemm.moe.peer_memory import PeerMemory
from grouped_gemm.moe.tokens import QuantizedTokens
from grouped_gemm.selection import checks

# Dynamo before torch 2.11 gives the gradients of a second autograd.Function the sizes of something else.
_CONFUSES_SIZES = Version(torch.__version__) < Version("2.11")
_QUANTIZING = (Recipe.FP8_BLOCKWISE, Recipe.FP8_BLOCKWISE_POW2)  # recipes in which tokens travel in fp8


class Tokens(NamedTuple):
    """Tokens that have arrived, each with all its slots.

    Attributes:
        x: (R, H). With ``quantized`` it has no values, only a shape, a dtype and a gradient.
        topk_ids: (R, k), the local experts of each token. Ids of experts elsewhere are outside [0, E / W).
        topk_weights: (R, k).
        handle: what `Dispatcher.combine` needs.
        num_slots: how many of ``topk_ids`` are local, if the host knows it: memory is for so many rows. None: R * k.
        quantized: the tokens, if they have arrived in fp8.
    """

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    handle: Any
    num_slots: int | None = None
    quantized: QuantizedTokens | None = None


class SortedRows(NamedTuple):
    """Rows that have arrived in the order of local experts, one for each slot, perhaps padded.

    Attributes:
        rows: (M, H).
        offs: (E / W,) int32, the end row of each local expert, padding included.
        row_weights: (M,), 0 for padding.
        group_alignment: what every group's size is a multiple of; `moe.group_alignment` says which multiple is enough.
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


class _Collectives(NamedTuple):
    """How rows travel by collectives. `PeerMemory` is the other way.

    Attributes:
        num_rows: S.
        sends: rows for each rank; None: equally many, with gaps.
        takes: rows from each rank; None: equally many.
        group: the ranks.
    """

    num_rows: int
    sends: list[int] | None
    takes: list[int] | None
    group: dist.ProcessGroup

    def send(self, x: Tensor, places: Tensor, recipe: Recipe) -> Tensor:
        """What arrives on this rank of ``x`` (T, H), rows (R, bytes) from `moe_pack`."""
        packed = ops.moe_pack(dense_rows(x), None, None, places, self.num_rows, recipe.value)
        return _exchange(packed, self.sends, self.takes, self.group)

    def sums(self, y: Tensor, places: Tensor, lost: Tensor | None) -> Tensor:
        """(T, H): the sums of each token's rows ``y`` (R, H) of all ranks. Tokens that are ``lost`` (T,) get NaN."""
        return ops.moe_combine(_exchange(y, self.takes, self.sends, self.group), None, places, lost)


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
        symmetric_memory: whether ranks write to each other's memory and read from it (`moe.peer_memory`), in place of
            collectives, which takes less time for few tokens. It needs a capacity, and GPUs that reach each other's
            memory, as in one host with NVLink. The first call with an H, k and dtype allocates that memory, on all
            ranks, and comes before any that is captured. Calls are on one stream, or on streams that wait for each
            other. Where gradients are off, what `dispatch` returns lasts until the next `dispatch` or `combine`.

    Raises:
        TypeError, ValueError: an argument does not fit. E must be a multiple of W. Ranks with different E, k, H,
            dtypes or recipes: without a capacity, `dispatch` raises on all of them; with one, nothing compares them.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh,
        num_experts: int,
        *,
        recipe: Recipe | str | None = None,
        capacity: int | None = None,
        symmetric_memory: bool = False,
    ) -> None:
        self.group = group_of(group)
        self.num_ranks, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        checks.check_num_experts(num_experts)
        if num_experts % self.num_ranks:
            checks.fail("num_experts", f"a multiple of {self.num_ranks} ranks, at least {self.num_ranks}", num_experts)
        parsed = Recipe.NONE if recipe is None else Recipe.parse(recipe)
        if parsed.is_scaled and parsed not in _QUANTIZING:
            checks.fail("recipe", f"None or one of {', '.join([r.value for r in _QUANTIZING])}", parsed.value)
        if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1):
            checks.fail("capacity", "None or a number of rows of at least 1", repr(capacity))
        self.num_experts, self.recipe, self.capacity = num_experts, parsed, capacity
        self._peers: PeerMemory | None = None
        if symmetric_memory:
            if capacity is None:
                checks.fail("capacity", "a number of rows of at least 1, with symmetric_memory=True", "None")
            self._peers = PeerMemory(self.group, capacity)
        self._lost: Tensor | None = None  # () bool, on the device: whether a token did not fit
        self._seen: tuple[Tensor, torch.cuda.Event | None] | None = None  # a copy on the host, and when it is there

    def __deepcopy__(self, memo: Any) -> AllToAll:
        """Another one of the same ranks, as groups cannot be copied; so that modules can."""
        symmetric_memory = self._peers is not None
        return AllToAll(
            self.group, self.num_experts, recipe=self.recipe, capacity=self.capacity, symmetric_memory=symmetric_memory
        )

    def dispatch(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tokens:
        """See `Dispatcher`.

        Raises:
            ValueError: without a capacity, ranks have different E, k, H, dtypes or recipes. All ranks raise, except in
                compiled calls, where nothing compares them. Or tensors are not on a GPU, with symmetric memory.
            RuntimeError: with a capacity, a token of the call before did not fit. The host waits for its dispatch.
                Without one, a CUDA graph is being captured, or torch < 2.11 compiles the call. Or the ranks do not
                reach each other's memory.
        """
        if self._peers is not None and torch.compiler.is_compiling():
            _break_graphs()
            found: Tokens = _eagerly(self.dispatch, x, topk_ids, topk_weights)
            return found
        if self.capacity is None and _CONFUSES_SIZES and torch.compiler.is_compiling():
            raise RuntimeError(
                "expert parallelism: expected torch >= 2.11, or an AllToAll with a capacity, under torch.compile; "
                "found neither. Dynamo would give gradients wrong sizes: pass mesh=AllToAll(..., capacity=...)."
            )
        self._check(x, topk_ids, topk_weights)
        num_ranks, (num_tokens, top_k) = self.num_ranks, topk_ids.shape
        form, digest = "", 0  # of the rows that travel; a compiled call has none
        if not torch.compiler.is_compiling():
            shape = f"E = {self.num_experts}, k = {top_k}, H = {x.shape[1]}"
            form = f"{shape}, {dtype_name(x.dtype)}, recipe {self.recipe.value}"
            digest = zlib.crc32(form.encode()) >> 1  # an int32
        numbers, places = ops.moe_find_ranks(topk_ids, self.num_experts, num_ranks, digest)
        lost = None
        if self.capacity is not None:
            places, lost, numbers = ops.moe_limit_rows(places, numbers, self.capacity)
        given = dense_rows(x.detach()), topk_ids, dense_rows(topk_weights.detach()), places
        num_slots = None
        transport: _Collectives | PeerMemory
        if self._peers is not None:
            transport = self._peers
            arrived, told = transport.send_tokens(*given, numbers, self.recipe)
            if torch.is_grad_enabled():
                arrived = arrived.clone()  # autograd keeps it
        else:
            # The numbers travel while rows are packed, which is for as many as there can be.
            most = num_tokens * min(num_ranks, top_k) if self.capacity is None else self.capacity * num_ranks
            receive = _start(numbers, None, None, self.group)
            packed = ops.moe_pack(*given, most, self.recipe.value)
            sends = takes = None
            if lost is None:
                sends, takes, num_slots = self._read(numbers, receive, form)
                packed = packed.narrow(0, 0, sum(sends))  # Dynamo cannot slice no rows at all to a data-dependent end
            transport = _Collectives(packed.shape[0], sends, takes, self.group)
            arrived = _exchange(packed, sends, takes, self.group)
            told = numbers if lost is None else receive()
        data, scale, ids, weights = unpack(arrived, x.shape[1], top_k, x.dtype, self.recipe)
        first = self.rank * (self.num_experts // num_ranks)
        if self.capacity is None:
            ids = ids - first
        else:
            ids, any_lost = ops.moe_local_ids(ids, told, first)
            self._remember(any_lost)
        quantized = None if scale is None else QuantizedTokens(data, scale.contiguous(), self.recipe)
        x = _Send.apply(x, data if quantized is None else None, len(arrived), places, transport)
        weights = _Send.apply(topk_weights, weights, len(arrived), places, transport)
        return Tokens(x, ids, weights, (places, transport, lost), num_slots, quantized)

    def combine(self, y: Tensor, handle: tuple[Tensor, _Collectives | PeerMemory, Tensor | None]) -> Tensor:
        """See `Dispatcher`."""
        if self._peers is not None and torch.compiler.is_compiling():
            _break_graphs()
            total: Tensor = _eagerly(self.combine, y, handle)
            return total
        places, transport, lost = handle
        total = _Return.apply(y, places, lost, transport, self.recipe)
        return total

    def check(self) -> None:
        """Synchronizes the host, and raises `RuntimeError` if a token has not fitted since the last error.

        Call it on all ranks: one that has raised takes the state for handled, and its next `dispatch` goes on.
        """
        if self._lost is not None and bool(self._lost):
            self._raise()

    def _check(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
        """Raises the errors of a call that this rank can see by itself, and that of lost tokens."""
        checks.check_topk_ids(topk_ids, self.num_experts)
        if not is_capturing(topk_ids):
            self._raise_if_lost()
        elif self.capacity is None:
            raise RuntimeError(
                "expert parallelism: expected an AllToAll with a capacity while a CUDA graph is captured; found none, "
                "so the host reads how many rows travel. Pass mesh=AllToAll(..., capacity=...)."
            )
        elif self._lost is None:  # it would be made, and cleared, by each replay
            raise RuntimeError(
                "expert parallelism: expected a call of this AllToAll before a CUDA graph is captured; found none. Run "
                "the captured function before, as torch's warm-up does."
            )
        if not x.shape[0] == topk_ids.shape[0] == topk_weights.shape[0] or topk_ids.shape != topk_weights.shape:
            found = f"{tuple(topk_ids.shape)} and {tuple(topk_weights.shape)}"
            checks.fail("topk_ids and topk_weights", f"(T, k) each, with T = {x.shape[0]}, as x has it", found)

    def _read(self, numbers: Tensor, receive: Callable[[], Tensor], form: str) -> tuple[list[int], list[int], int]:
        """The host read: how many rows go to each rank and come from it, and how many slots come.

        On a GPU it waits for the numbers alone, not for the packing of rows.

        Raises:
            ValueError: ranks have different forms. All of them raise.
        """
        is_apart = numbers.is_cuda and not torch.compiler.is_compiling()
        with torch.cuda.stream(_host_read_stream(numbers.device)) if is_apart else nullcontext():
            # What is received was sent after ``numbers`` were there.
            found = torch.cat((numbers[:, :1], receive()), 1).t().tolist()
        sends, takes, slots, digests = found
        if not torch.compiler.is_compiling() and len({*digests} - {0}) > 1:
            checks.fail("ranks", "the same E, k, H, dtype and recipe on each", f"{form} on this one, not on all")
        return sends, takes, sum(slots)

    def _remember(self, lost: Tensor) -> None:
        if self._lost is None:
            with torch.inference_mode(False):  # later calls outside of inference mode write to it
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


@functools.cache
def _host_read_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which the host waits for numbers."""
    return torch.cuda.Stream(device)


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
    # Dynamo cannot ask a group for an attribute, and it tells the type of a group for one class at a time.
    is_group = isinstance(mesh, DeviceMesh) or isinstance(mesh, dist.ProcessGroup)  # noqa: SIM101
    if not is_group and hasattr(mesh, "dispatch") and hasattr(mesh, "combine"):
        found: Dispatcher = mesh
        if isinstance(found, AllToAll) and found.num_experts != num_local_experts * found.num_ranks:
            expected = f"those of {found.num_experts} experts on {found.num_ranks} ranks, as mesh has it"
            checks.fail("weights", expected, f"{num_local_experts} experts on this one")
        return found
    group = group_of(mesh)
    outward = recipe if recipe in _QUANTIZING else None
    return AllToAll(group, num_local_experts * dist.get_world_size(group), recipe=outward)


def explain(dispatcher: Dispatcher) -> str:
    """How tokens travel, on a line."""
    if not isinstance(dispatcher, AllToAll):
        return f"  dispatch  by {type(dispatcher).__name__}"
    tokens = dispatcher.recipe.value if dispatcher.recipe.is_scaled else "their own dtype"
    capacity = dispatcher.capacity
    reads = "the host reads how many" if capacity is None else f"{capacity} rows for each rank, without a host sync"
    by = "all-to-all" if dispatcher._peers is None else "symmetric memory"
    where = f"each rank of {dispatcher.num_ranks} with its experts"
    return f"  dispatch  a token once to {where}, in {tokens}, by {by}; {reads}"


def check_ranks(mesh: Any, of_weights: DeviceMesh) -> None:
    """Checks that DTensors of weights are on the ranks of ``mesh``, in their order, except in compiled calls.

    Nothing is known of the ranks of a dispatcher that is no `AllToAll`.

    Raises:
        ValueError: they are on others, such as those of another axis of the same mesh.
    """
    if torch.compiler.is_compiling():
        return
    group = mesh.group if isinstance(mesh, AllToAll) else mesh
    if isinstance(group, (DeviceMesh, dist.ProcessGroup)):
        expected, found = dist.get_process_group_ranks(group_of(group)), of_weights.mesh.flatten().tolist()
        if found != expected:
            checks.fail("weights", f"DTensors on the ranks {expected}, those of mesh", f"some on {found}")


def _run(method: Callable[..., Any], *args: Any) -> Any:
    return method(*args)


_eagerly = _run  # becomes a function that Dynamo breaks the graph for


def _break_graphs() -> None:
    """As `weight_gradients._break_graphs`: before a call is traced, it would import all of Dynamo."""
    global _eagerly
    if _eagerly is _run:
        reason = "AllToAll with symmetric_memory=True breaks the graph; without it, none breaks."
        _eagerly = torch.compiler.disable(_run, reason=reason)


_break_graphs._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Send(torch.autograd.Function):
    """Tokens to the ranks of their experts, one row for each rank.

    ``places`` (T, W) int32: row ``places[t, w]`` of what is sent is token t for rank w; -1: it does not go there.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, arrived: Tensor | None, num_arrived: int, places: Tensor,
        transport: _Collectives | PeerMemory,
    ) -> Tensor:  # fmt: skip
        """(R, H): what has ``arrived`` of ``x`` (T, H). None: it arrived elsewhere, and this is NaN without memory."""
        ctx.save_for_backward(places)
        ctx.transport = transport
        if arrived is None:
            return x.new_full((1, 1), torch.nan).expand(num_arrived, x.shape[1])
        return arrived.clone() if torch.compiler.is_compiling() else arrived.view_as(arrived)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of ``x``."""
        return _Return.apply(dy, *ctx.saved_tensors, None, ctx.transport, Recipe.NONE), *[None] * 4


class _Return(torch.autograd.Function):
    """Rows back to the ranks of their tokens, and their sums."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, places: Tensor, lost: Tensor | None, transport: _Collectives | PeerMemory,
        backward_recipe: Recipe,
    ) -> Tensor:  # fmt: skip
        """(T, H) of ``y`` (R, H), NaN for tokens that are ``lost`` (T,). With a recipe, gradients travel in fp8."""
        ctx.save_for_backward(places, lost)
        ctx.transport, ctx.num_arrived, ctx.recipe = transport, y.shape[0], backward_recipe
        return transport.sums(y, places, lost)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of ``y``."""
        _check_gradient(dy, ctx.recipe)
        places, lost = ctx.saved_tensors
        if lost is not None:
            dy = dy.masked_fill(lost.unsqueeze(1), 0)
        arrived = ctx.transport.send(dy.detach(), places, ctx.recipe)
        data, scale, _, _ = unpack(arrived, dy.shape[1], 0, dy.dtype, ctx.recipe)
        if scale is not None:
            data = ops.moe_dequantize_tokens(data, scale.contiguous(), dy.dtype)
        return _Send.apply(dy, data, ctx.num_arrived, places, ctx.transport), *[None] * 4


def _check_gradient(dy: Tensor, recipe: Recipe) -> None:
    """Checks a gradient before it travels, by ``recipe``.

    Raises:
        RuntimeError: it is batched, or it is rounded to fp8 under ``create_graph=True``.
    """
    if torch.compiler.is_compiling():
        return
    if is_batched(dy):
        raise RuntimeError(
            "experts_forward: expected no batched gradients (is_grads_batched, vectorize=True) with mesh; found some; "
            "compute the gradients one by one"
        )
    if recipe.is_scaled and torch.is_grad_enabled():
        raise RuntimeError(
            f"AllToAll: expected create_graph=False with recipe {recipe.value}; found True. "
            "Rounding to fp8 has no second derivative: use recipe=None where second derivatives are needed."
        )


def _start(
    x: Tensor, sends: list[int] | None, takes: list[int] | None, group: dist.ProcessGroup
) -> Callable[[], Tensor]:
    """Begins to send the rows of ``x``. What it returns waits for those that arrive, as the current stream does."""
    x = x.contiguous()
    if torch.compiler.is_compiling():
        arriving = collectives.all_to_all_single(x, takes, sends, group)
        return lambda: collectives.wait_tensor(arriving)
    arrived = x.new_empty(x.shape[0] if takes is None else sum(takes), *x.shape[1:])
    work = dist.all_to_all_single(arrived, x, takes, sends, group, async_op=True)  # costs the host less

    def wait() -> Tensor:
        work.wait()
        return arrived

    return wait


def _exchange(x: Tensor, sends: list[int] | None, takes: list[int] | None, group: dist.ProcessGroup) -> Tensor:
    return _start(x, sends, takes, group)()
