"""What a replayed op must return: what the op itself does, bit for bit, with other operands in other places."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from grouped_gemm.backends import triton  # noqa: F401 - defines ops
from grouped_gemm.core import replay
from grouped_gemm.testing import poisoned_memory


def other(x: Any) -> Any:
    """A copy of a tensor at another address, with the same strides. Floats have other values."""
    if not isinstance(x, Tensor):
        return x
    copy = torch.empty(extent(x.shape, x.stride()), dtype=x.dtype, device=x.device).as_strided(x.shape, x.stride())
    is_high_precision = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return copy.copy_(x.flatten().roll(1).view(x.shape) if is_high_precision else x)


def poisoned(device: torch.device, size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    """Memory as the op itself gets it in `poisoned_memory`."""
    with poisoned_memory():  # torch.empty_strided would not fill it
        return torch.empty(extent(size, stride), dtype=dtype, device=device).as_strided(size, stride)


def extent(size: Any, stride: Any) -> int:
    """How many values of memory a tensor spans."""
    return 1 + sum((n - 1) * s for n, s in zip(size, stride)) if 0 not in size else 0


def bits(result: Any) -> list[bytes]:
    results = [result] if isinstance(result, Tensor) else list(result or ())
    return [r.contiguous().view(torch.uint8).cpu().numpy().tobytes() if r.numel() else b"" for r in results]


def at(address: int, like: Tensor) -> Tensor:
    """The tensor on a CPU at an address."""
    if not like.numel():
        return torch.empty(like.shape, dtype=like.dtype)
    size, stride = like.shape, like.stride()
    memory = (ctypes.c_char * (extent(size, stride) * like.element_size())).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(size, stride)


def without_values(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


class OpLaunch:
    """An op as if it were one launch, for ops that compute in plain torch on a CPU."""

    def __init__(self, op: Callable[..., Any], args: tuple[Any, ...], results: list[Tensor], place: replay.Place):
        self.op, self.num_args = op, len(args)
        self.places = [place(x) if isinstance(x, Tensor) else None for x in (*args, *results)]
        with _disable_current_modes():  # only shapes and strides, so that what the call frees is freed
            self.like = [without_values(x) if isinstance(x, Tensor) else x for x in (*args, *results)]

    def can_run(self, device: int) -> bool:
        return True

    def __call__(self, addresses: Sequence[int]) -> None:
        operands = [
            x if place is None else at(addresses[place[0]] + place[1], x) for x, place in zip(self.like, self.places)
        ]
        found = self.op(*operands[: self.num_args])
        for out, x in zip(operands[self.num_args :], [found] if isinstance(found, Tensor) else found, strict=True):
            out.copy_(x)


def replay_ops_on_a_cpu(monkeypatch: Any) -> None:
    """Calls are replayed as on a GPU, with ops as steps that are not looked into."""

    def as_launch(op: Callable[..., Any], *args: Any) -> Any:
        recording = replay.current()
        assert recording is not None
        replay._local.recording = None  # its launches are part of the op
        with _disable_current_modes():
            result = op(*args)
        replay._local.recording = recording
        results = [result] if isinstance(result, Tensor) else list(result)
        for x in results:
            recording._allocate(x)
        recording.add(OpLaunch(op, args, results, recording.place))
        return result

    for overload, op in replay.implementations.items():
        monkeypatch.setitem(replay.implementations, overload, functools.partial(as_launch, op))
    replay_on_a_cpu(monkeypatch)


def replay_on_a_cpu(monkeypatch: Any) -> None:
    monkeypatch.setattr(replay, "_is_on_gpu", lambda x: True)
    monkeypatch.setattr(replay, "_new_empty", lambda *form: torch.empty_strided(*form[:2], dtype=form[2]))
    monkeypatch.setattr(replay.Program, "can_run", lambda self: True)


def count_programs(monkeypatch: Any) -> list[replay.Program]:
    """The programs that run from now on."""
    ran, run = list[replay.Program](), replay.Program.run

    def counted(program: replay.Program, *args: Any) -> Any:
        ran.append(program)
        return run(program, *args)

    monkeypatch.setattr(replay.Program, "run", counted)
    return ran


def check_replay(
    op: Callable[..., Any], arguments: tuple[Any, ...], monkeypatch: Any, *, changes: bool = False
) -> bool:
    """Checks three calls, each with operands of its own. Returns whether the last one was replayed.

    Args:
        changes: whether the op changes its first argument.
    """
    ran = count_programs(monkeypatch)
    monkeypatch.setattr(replay, "_new_empty", functools.partial(poisoned, arguments[0].device))
    replay.forget()
    for number in range(4):
        arguments = tuple(map(other, arguments))
        again = tuple(x.clone() if i == 0 and changes else x for i, x in enumerate(arguments))
        if number < 2:  # the first one compiles, the second one records
            with poisoned_memory():
                found = op(*arguments)
        else:
            found = op(*arguments)
        known = dict(replay._programs)
        replay.forget()
        with poisoned_memory():
            expected = op(*again)
        replay._programs.clear()
        replay._programs.update(known)
        assert bits(found) == bits(expected), f"call {number}"
        if changes:
            assert bits(arguments[0]) == bits(again[0]), f"call {number}"
    return bool(ran)


def check_replayed_steps(
    layer: Callable[[Tensor], Tensor], new_input: Callable[[], Tensor], parameters: tuple[Tensor, ...],
    monkeypatch: Any, programs: int,
) -> None:  # fmt: skip
    """Checks that replayed forward and backward have the bits of those that are not.

    Args:
        layer: a function of what ``new_input`` returns, which needs a gradient, and of ``parameters``.
        programs: how many a step consists of.
    """

    def step(x: Tensor, dy: Tensor) -> list[bytes]:
        y = layer(x)
        return bits((y, *torch.autograd.grad(y, (x, *parameters), dy)))

    y = layer(new_input()).detach()
    ran = count_programs(monkeypatch)
    replay.forget()
    kept: list[Tensor] = []  # so that no address comes again
    for number in range(4):
        x, dy = new_input(), torch.randn_like(y)
        kept += x, dy
        ran.clear()
        found = step(x, dy)
        assert len(ran) == (programs if number > 1 else 0), f"step {number}: {len(ran)} programs"
        with monkeypatch.context() as patch:
            patch.setattr(replay, "_is_on_gpu", lambda x: False)
            assert found == step(x, dy), f"step {number}"
