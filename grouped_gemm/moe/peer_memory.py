"""Memory that all ranks of a group write to and read from, over NVLink: a buffer of torch's symmetric memory on each.

Tokens and gradients of results are written into the buffers of their experts' ranks by the kernel that packs them.
Results and gradients of tokens stay on the ranks that computed them, in a buffer, and the kernel that sums them reads
them there. A buffer serves all of them, since each step has the same form. Larger rows than before get a new buffer.

1. A barrier of all ranks: each has read what was in the buffers.
2. Rows are written.
3. A barrier of all ranks: each has written.
4. Rows are read.

So steps may follow each other in any order, on one stream or on streams that wait for each other, also as replays of
several CUDA graphs. What is in a buffer lasts until the next step.

T, k, H: tokens of a rank, slots of a token, features. W: ranks. S: rows that a rank gets, W * capacity.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grouped_gemm.core.dense import dense_rows
from grouped_gemm.core.library import ops
from grouped_gemm.core.machine import is_capturing
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.moe import packing, rows  # noqa: F401  (defines ops)
from grouped_gemm.selection import checks


class PeerMemory:
    """The buffers of the ranks of a group, each with ``capacity`` rows for each rank.

    All ranks have to take the same steps, with the same H, k, dtype and recipe. Places (T, W) are those of
    `moe_limit_rows`: the i-th token for rank w has ``w * capacity + i``, and is row ``rank * capacity + i`` of rank w.

    Args:
        group: the ranks.
        capacity: the most rows from a rank to a rank.
    """

    def __init__(self, group: dist.ProcessGroup, capacity: int) -> None:
        self._group, self._capacity = group, capacity
        self._num_ranks, self._rank = dist.get_world_size(group), dist.get_rank(group)
        self._last: _Buffer | None = None  # the largest
        # By the size of a row: the buffer that its first call found, which CUDA graphs may have captured, and shifts.
        self._found: dict[int, tuple[_Buffer, Tensor]] = {}

    def send(self, x: Tensor, places: Tensor, recipe: Recipe) -> Tensor:
        """(S, bytes): what arrives on this rank of ``x`` (T, H). With a recipe it is in the buffer, to be dequantized.

        Raises:
            ValueError: ``x`` is not on a GPU.
            RuntimeError: there is no buffer yet, and none can be made: a CUDA graph is being captured, or some rank
                does not reach the memory of another.
        """
        arrived, _ = self.send_tokens(x, None, None, places, None, recipe)
        return arrived if recipe.is_scaled else arrived.clone()

    def send_tokens(
        self, x: Tensor, topk_ids: Tensor | None, topk_weights: Tensor | None, places: Tensor, told: Tensor | None,
        recipe: Recipe,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Rows and headers that arrive: (S, bytes) uint8, as from `moe_pack`, and (W, 2) int32, both in the buffer.

        Args:
            x: (T, H).
            topk_ids: (T, k), and ``topk_weights`` (T, k), or None for k = 0.
            places: (T, W) int32.
            told: (W, 2) int32, for each rank's headers. None: they stay as they are.

        Raises:
            ValueError, RuntimeError: as `send`.
        """
        num_bytes = packing.row_bytes(x, 0 if topk_ids is None else topk_ids.shape[1], recipe)
        buffer, shifts = self._find(x, num_bytes)
        num_rows = self._num_ranks * self._capacity
        buffer.barrier()
        ops.moe_pack_for_peers(
            buffer.memory, dense_rows(x), topk_ids, topk_weights, places, told, shifts, self._rank, num_rows,
            recipe.value,
        )  # fmt: skip
        buffer.barrier()
        headers, arrived = packing.in_buffer(buffer.memory, self._num_ranks, num_rows, num_bytes)
        return arrived, headers

    def sums(self, y: Tensor, places: Tensor, lost: Tensor | None) -> Tensor:
        """(T, H): the sums of each token's rows ``y`` (S, H) of all ranks, in fp32 and in the order of ranks.

        Tokens that are ``lost`` (T,) get NaN.

        Raises:
            ValueError, RuntimeError: as `send`.
        """
        num_bytes = _row_bytes(y)
        buffer, shifts = self._find(y, num_bytes)
        _, here = packing.in_buffer(buffer.memory, self._num_ranks, len(y), num_bytes)
        here = here.view(y.dtype)[:, : y.shape[1]]
        if y.untyped_storage().data_ptr() == here.untyped_storage().data_ptr():
            y = y.clone()  # what has arrived here is the result, and lies where it is copied to
        buffer.barrier()
        here.copy_(y)
        buffer.barrier()
        return ops.moe_combine(here, None, places, lost, shifts[0])

    def _find(self, x: Tensor, num_bytes: int) -> tuple[_Buffer, Tensor]:
        """The buffer for rows of so many bytes, or of the size of those of ``x``, and its shifts.

        Shifts (2, W) int64: how many bytes from a row's place here to the row for rank w, and from here to rank w.
        """
        if num_bytes in self._found:
            return self._found[num_bytes]
        if is_capturing(x):
            raise RuntimeError(
                "symmetric_memory: expected a call with the same H, k, dtype and recipe before a CUDA graph is "
                "captured; found none, and no memory of peers is allocated while one is. Run the captured function "
                "before, as torch's warm-up does."
            )
        num_rows = self._num_ranks * self._capacity
        size = packing.buffer_bytes(self._num_ranks, num_rows * max(num_bytes, _row_bytes(x)))
        # Later calls outside of inference mode write to it.
        with torch.inference_mode(False):
            if self._last is None or self._last.memory.numel() < size:
                self._last = _Buffer(self._group, size, x.device)
            buffer = self._last
            moves = [(self._rank - w) * self._capacity * num_bytes for w in range(self._num_ranks)]
            of_rows = [base + move for base, move in zip(buffer.away, moves)]
            shifts = torch.tensor([of_rows, buffer.away], dtype=torch.int64, device=x.device)
        self._found[num_bytes] = buffer, shifts
        return buffer, shifts


class _Buffer:
    """One buffer of each rank.

    Attributes:
        memory: this rank's, (bytes,) uint8.
        away: how many bytes from it each rank's is.
        barrier: waits for all ranks, on the current stream.
    """

    def __init__(self, group: dist.ProcessGroup, num_bytes: int, device: torch.device) -> None:
        """Collective.

        Raises:
            ValueError: this is no GPU.
            RuntimeError: the ranks do not reach each other's memory.
        """
        if device.type != "cuda":
            checks.fail("symmetric_memory", "tensors on a GPU; leave the option out elsewhere", device.type)
        from torch._C._distributed_c10d import _SymmetricMemory

        try:
            # An allocation of its own has flags of its own for its barriers, which memory of a pool does not.
            self.memory = _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device)
            self._handle: Any = _SymmetricMemory.rendezvous(self.memory, group.group_name)
        except RuntimeError as error:
            raise RuntimeError(
                "symmetric_memory: expected GPUs that reach each other's memory, as in one host with NVLink, on all "
                f"{dist.get_world_size(group)} ranks; found: {error}. Leave the option out elsewhere."
            ) from error
        bases = [self._handle.get_buffer(w, (1,), torch.uint8).data_ptr() for w in range(self._handle.world_size)]
        self.away = [base - self.memory.data_ptr() for base in bases]

    def barrier(self) -> None:
        self._handle.barrier(channel=0)


def _row_bytes(y: Tensor) -> int:
    """The size of a row of results, or of the gradients of weights, of which there may be none."""
    return -(-max(y.shape[1], 1) * y.dtype.itemsize // 64) * 64
