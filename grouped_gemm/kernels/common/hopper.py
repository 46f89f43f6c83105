"""What the warp-specialized kernels for Hopper share: names of Gluon, descriptors, the ring, the steps of a GEMM."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from grouped_gemm.kernels.common.launch import describe

# Triton 3.9 renamed them.
load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

STORED = [64, 128]  # what one `store_tile` copies of a result

# Layouts in shared memory of operands and results, by the size of a value, and of scales.
TILES_IN_SHARED = {
    size: gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * size, rank=2) for size in (1, 2)
}
RESULTS_IN_SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
RAGGED_IN_SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
SCALES_IN_SHARED = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


def describe_tile(x: Tensor, shape: list[int], stride: int, box: list[int]) -> Any:
    """A descriptor of ``x`` as a matrix of ``shape`` with rows ``stride`` apart, for copies of a ``box``."""
    return describe(TensorDescriptor, x, shape, [stride, 1], box, layout=TILES_IN_SHARED[x.element_size()])


def describe_result(out_EPQ: Tensor) -> Any:
    """A descriptor of a contiguous 16-bit (E, P, Q) result, for stores of parts of one of its matrices.

    TMA writes nothing past the end of a matrix.
    """
    _, p, q = shape = list(out_EPQ.shape)
    return describe(TensorDescriptor, out_EPQ, shape, [p * q, q, 1], [1, *STORED], layout=RESULTS_IN_SHARED)


def describe_ragged(x: Tensor, box: list[int]) -> Any:
    """A descriptor of a 16-bit (M, D) matrix, for copies of a ``box`` in which rows past a group's end are zero.

    This is the trick of `triton.tools.ragged_tma`. Addresses wrap around at 2^64, so the coordinates (2^30, end of the
    group, 2^30 - its size + row in it, column) give that row and column, and rows past the end are out of bounds.
    """
    line = x.stride(0)
    shape, strides = [0x7FFF0000, 0x7FFF0000, 1 << 30, x.shape[1]], [2**34 - line, line, line, 1]
    return describe(TensorDescriptor, x, shape, strides, [1, 1, *box], layout=RAGGED_IN_SHARED)


def describe_scales(scale: Tensor, count: int) -> Any:
    """A descriptor of fp32 scales (steps, lines), for copies of the scales of ``count`` lines in one step."""
    shape = list(scale.shape)
    return describe(TensorDescriptor, scale, shape, [scale.stride(0), 1], [1, count], layout=SCALES_IN_SHARED)


class HopperTile(NamedTuple):
    """How one program works.

    Attributes:
        consumers: warpgroups that multiply, 64 rows each.
        block_n: columns of an output tile.
        block_k: values of the contraction in one step.
        num_stages: steps whose operands are in shared memory at once.
        registers: registers of a consumer's thread.
        group_m: as in `tiles.Tile`.
        stores: buffers of a consumer's results, in shared memory until they are stored.
    """

    consumers: int
    block_n: int
    block_k: int
    num_stages: int
    registers: int
    group_m: int
    stores: int = 1


@gluon.jit
def even_height(rows, GROUP_M: gl.constexpr):
    """The height of stripes of about equal height, at most GROUP_M, for `tile_position`.

    A last stripe of few tile rows would read all columns from memory for little work.
    """
    stripes = (rows + GROUP_M - 1) // GROUP_M
    return (rows + stripes - 1) // stripes


@gluon.jit
def tile_position(tile, rows, columns, height):
    """As `groups.tile_position`, for Gluon, with stripes of ``height`` tile rows."""
    stripe = tile // (height * columns)
    its_height = gl.minimum(rows - stripe * height, height)
    in_stripe = tile - stripe * height * columns
    return stripe * height + in_stripe % its_height, in_stripe // its_height


@gluon.jit
def make_barriers(STAGES: gl.constexpr, CONSUMERS: gl.constexpr, COPIERS: gl.constexpr = 0):
    """Barriers of a ring of STAGES slots, which TMA fills, and COPIERS threads that copy with cp.async.

    Returns:
        One for each slot that completes when its copies have arrived, and one for each slot that completes when all
        CONSUMERS have released it.
    """
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + COPIERS)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    return full, empty


@gluon.jit
def make_tile_ring(CONSUMERS: gl.constexpr):
    """A ring of two slots, in which the producer tells the consumers which tile is next, and how many steps it has.

    Returns:
        The numbers in both slots, and barriers like those of `make_barriers`.
    """
    numbers = gl.allocate_shared_memory(gl.int32, [4, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    full, empty = make_barriers(2, CONSUMERS)
    return numbers, full, empty


@gluon.jit
def send_tile(tile, steps, count, numbers, full, empty, WARPS: gl.constexpr):
    """Sends a tile's number and its steps, as number ``count`` of what this producer, of WARPS warps, has sent."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    slot = count % 2
    mbarrier.wait(empty.index(slot), count // 2 % 2 ^ 1)
    numbers.index(2 * slot).store(gl.full([1], 0, gl.int32, ONE) + tile)
    numbers.index(2 * slot + 1).store(gl.full([1], 0, gl.int32, ONE) + steps)
    mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def receive_tile(count, numbers, full, empty):
    """The number of a tile and its steps, which `send_tile` has sent as number ``count``."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slot = count % 2
    mbarrier.wait(full.index(slot), count // 2 % 2)
    tile = gl.max(numbers.index(2 * slot).load(ONE), 0)
    steps = gl.max(numbers.index(2 * slot + 1).load(ONE), 0)
    mbarrier.arrive(empty.index(slot), count=1)
    return tile, steps


@gluon.jit
def copy_rows(pointers, mask, buffer):
    """Starts to copy rows to ``buffer`` with cp.async.

    Args:
        pointers: of the values, 16 bytes of a row for each copy.
        mask: what is copied; the rest of ``buffer`` becomes zero. None: everything.
    """
    if mask is None:
        async_copy.async_copy_global_to_shared(buffer, gl.multiple_of(pointers, (16, 16)))
    else:
        async_copy.async_copy_global_to_shared(buffer, gl.multiple_of(pointers, (16, 16)), mask=mask)


@gluon.jit
def next_slot(slot, phase, STAGES: gl.constexpr):
    """The slot after ``slot``, and the phase of its barriers, which flips with each round."""
    slot += 1
    if slot == STAGES:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def _slot_before(slot, STAGES: gl.constexpr):
    return gl.where(slot == 0, STAGES, slot) - 1


@gluon.jit
def accumulate(acc, lhs, rhs, step, empty, slot, STAGES: gl.constexpr):
    """Starts ``acc += lhs @ rhs``, waits for the step before, and releases that one's slot."""
    acc = warpgroup_mma(lhs, rhs, acc, is_async=True)
    acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
    mbarrier.arrive(empty.index(_slot_before(slot, STAGES)), count=1, pred=step > 0)
    return acc


@gluon.jit
def finish_accumulating(acc, any_step, empty, slot, STAGES: gl.constexpr):
    """Waits for the last step, if there was any, and releases its slot, the one before ``slot``."""
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    mbarrier.arrive(empty.index(_slot_before(slot, STAGES)), count=1, pred=any_step)
    return acc


@gluon.jit
def start_block(lhs, rhs, LAYOUT: gl.constexpr):
    """Starts ``lhs @ rhs`` in registers of its own; `finish_block` waits for it."""
    ROWS: gl.constexpr = lhs.shape[0]
    COLUMNS: gl.constexpr = rhs.shape[1]
    zeros = gl.zeros((ROWS, COLUMNS), gl.float32, LAYOUT)
    return warpgroup_mma(lhs, rhs, zeros, use_acc=False, is_async=True)


@gluon.jit
def restart_block(lhs, rhs, block, never):
    """As `start_block`, in the registers of a ``block`` that is done with. ``never``: false, unknown to the compiler.

    Without it, the compiler starts this product before the last one is added, in registers on top of that one's.
    """
    return warpgroup_mma(lhs, rhs, block, use_acc=never, is_async=True)


@gluon.jit
def add_done_block(acc, block, scale):
    """Waits for a ``block`` of `start_block`. Returns ``acc + block * scale``, and the block for `restart_block`."""
    block = warpgroup_mma_wait(num_outstanding=0, deps=(block,))
    # The second wait has nothing to wait for. It keeps the sum from moving behind the start of the next block, whose
    # registers would then be needed on top of this one's.
    return warpgroup_mma_wait(num_outstanding=0, deps=(acc + block * scale,)), block


@gluon.jit
def add_block(acc, block, scale):
    """Waits for a ``block`` of `start_block`, and returns ``acc + block * scale``."""
    acc, _ = add_done_block(acc, block, scale)
    return acc


@gluon.jit
def finish_block(acc, block, scale, empty, slot):
    """As `add_block`; also releases the ``slot`` of the operands."""
    block = warpgroup_mma_wait(num_outstanding=0, deps=(block,))
    mbarrier.arrive(empty.index(slot), count=1)
    return acc + block * scale


@gluon.jit
def store_tile(values, buffer, desc, place, PENDING: gl.constexpr = 0):
    """Stores 64 by 128 values at ``place`` through shared memory.

    Waits until at most PENDING of the stores before have yet to read their buffers; those must not be this ``buffer``.
    """
    tma.store_wait(PENDING)
    buffer.reshape(values.type.shape).store(values)
    fence_async_shared()
    store(desc, place, buffer)
