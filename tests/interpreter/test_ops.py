"""``torch.library.opcheck`` on ops that launch Triton kernels: schemas, fakes, no argument is changed or returned."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from op_samples import samples
from replay_checks import at, check_replay, check_replayed_steps, count_programs, replay_on_a_cpu
from torch.utils._python_dispatch import _disable_current_modes

from grouped_gemm import cache_weights, grouped_mm, prefer, quantize_weights
from grouped_gemm.core import replay
from grouped_gemm.core.library import ops
from grouped_gemm.kernels.common import launch
from grouped_gemm.moe import experts_forward

OPS = torch.ops.grouped_gemm
CHANGING = "_add", "_for_peers"  # ops that change their first argument
ENDS = torch.tensor([3, 3, 20], dtype=torch.int32)


@pytest.mark.parametrize("name, arguments", list(samples()), ids=lambda x: x if isinstance(x, str) else "")
def test_op(name, arguments):
    tests = ("test_schema", "test_faketensor")  # opcheck compares outputs elsewhere, which fp8 tensors do not allow
    torch.library.opcheck(getattr(OPS, name).default, arguments, test_utils=tests)


class InterpretedLaunch:
    """A launch for Triton's interpreter, which needs tensors and not addresses."""

    def __init__(self, launcher, grid, args, place):
        self.launcher, self.grid, self.args = launcher, grid, args
        bases = [getattr(x, "base", x) for x in args]
        self.places = [place(base) if isinstance(base, torch.Tensor) else None for base in bases]

    def can_run(self, device):
        return True

    def __call__(self, addresses):
        placed = zip(self.args, self.places)
        self.launcher(self.grid, *(x if p is None else self.at(addresses[p[0]] + p[1], x) for x, p in placed))

    def at(self, address, x):
        if not isinstance(x, torch.Tensor):
            described = copy.copy(x)
            described.base = self.at(address, x.base)
            return described
        return at(address, x)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Calls are replayed, although operands are on a CPU."""
    replay_on_a_cpu(monkeypatch)
    monkeypatch.setattr(
        launch.Launcher, "_prepared",
        lambda self, compiled, device, grid, args, place: InterpretedLaunch(self, grid, args, place),
    )  # fmt: skip
    compile_and_launch = launch.Launcher._compile_and_launch

    def unseen(self, *args):  # a launch on a GPU calls no ops of torch
        with _disable_current_modes():
            return compile_and_launch(self, *args)

    monkeypatch.setattr(launch.Launcher, "_compile_and_launch", unseen)
    replay.forget()
    yield
    replay.forget()


@pytest.mark.parametrize("name, arguments", list(samples()), ids=lambda x: x if isinstance(x, str) else "")
def test_replayed_ops(name, arguments, monkeypatch, as_on_a_gpu):
    """Ids that are not contiguous are copied, and such calls are not replayed."""
    if name in ("moe_route", "moe_find_ranks", "moe_pack", "moe_pack_for_peers"):
        arguments = [x.contiguous() if isinstance(x, torch.Tensor) else x for x in arguments]
    assert check_replay(getattr(ops, name), arguments, monkeypatch, changes=name.endswith(CHANGING))


@pytest.mark.parametrize("recipe", ("none", "fp8_rowwise", "fp8_blockwise", "mxfp8"))
def test_replayed_steps(recipe, monkeypatch, as_on_a_gpu):
    """A step of training is a program of forward and one of backward."""
    w, bias = torch.randn(3, 48, 32).bfloat16().requires_grad_(), torch.randn(3, 48).bfloat16().requires_grad_()
    check_replayed_steps(
        lambda x: grouped_mm(x, w.mT, ENDS, recipe=recipe, bias=bias, kernel_preference="triton"),
        lambda: torch.randn(24, 32).bfloat16().requires_grad_(), (w, bias), monkeypatch, 2,
    )  # fmt: skip


def test_replayed_steps_do_not_quantize_cached_weights(monkeypatch, as_on_a_gpu):
    x, dy, w = (torch.randn(shape).bfloat16().requires_grad_() for shape in ((24, 32), (24, 32), (3, 32, 32)))

    def step():
        y = grouped_mm(x, w.mT, ENDS, recipe="fp8_rowwise", kernel_preference="triton")
        return torch.stack((y, *torch.autograd.grad(y, x, dy)))

    for _ in range(3):
        before = step()
    with cache_weights() as cache:
        assert torch.equal(step(), before) and w in cache
        (entry,) = cache._entries.values()
        (layouts,) = entry.layouts.values()
        layouts[0].data.zero_()
        ran = count_programs(monkeypatch)
        for _ in range(3):
            y, dx = step()
        assert not y.any() and torch.equal(dx, before[1]) and ran
    assert torch.equal(step(), before)


@pytest.mark.parametrize("recipe", ("none", "fp8_rowwise"))
@pytest.mark.parametrize("change", ("negated", "the input"))
def test_replayed_gradients_of_unusual_gradients(recipe, change, monkeypatch, as_on_a_gpu):
    """One with a pending negation; or once the very input, and later another tensor."""
    w = torch.randn(3, 32, 32).bfloat16().requires_grad_()
    ran = count_programs(monkeypatch)
    for number in range(4):
        x = torch.randn(24, 32).bfloat16().requires_grad_()
        dy = torch.randn(24, 32).bfloat16()
        if change == "negated":
            dy = torch._neg_view(dy) if number == 3 else dy
        elif number < 3:
            dy = x
        found = [None, None]
        for i, is_on_gpu in enumerate((True, False)):
            with monkeypatch.context() as patch:
                patch.setattr(replay, "_is_on_gpu", lambda _, on=is_on_gpu: on)
                y = grouped_mm(x, w.mT, ENDS, recipe=recipe, kernel_preference="triton")
                found[i] = torch.autograd.grad(y, (x, w), dy)
        assert all(map(torch.equal, *found)), number
    assert ran


def decoding(recipe=None):
    """A layer with few tokens, for inference, and its operands."""
    weights = torch.randn(4, 64, 32).bfloat16() / 8, torch.randn(4, 32, 32).bfloat16() / 8
    if recipe is not None:
        weights = [quantize_weights(w.mT, recipe, kernel_preference="triton") for w in weights]
    ids = torch.tensor([[0, 3], [1, -1]])
    call = functools.partial(experts_forward, implementation="decode")
    return call, lambda: (torch.randn(2, 32).bfloat16(), ids.clone(), torch.rand(2, 2), *weights)


@pytest.mark.parametrize("recipe", (None, "fp8_blockwise"))
def test_replayed_inference(recipe, monkeypatch, as_on_a_gpu):
    """Checks, choices and kernels are one program."""
    call, operands = decoding(recipe)
    ran = count_programs(monkeypatch)
    with torch.no_grad():
        for number in range(4):
            given = operands()
            y = call(*given)
            assert len(ran) == max(number - 1, 0)
            with monkeypatch.context() as patch:
                patch.setattr(replay, "_is_on_gpu", lambda x: False)
                assert torch.equal(y, call(*given))


@pytest.mark.parametrize("recipe", (None, "fp8_blockwise"))
def test_layers_whose_gate_and_up_are_apart(recipe, monkeypatch, as_on_a_gpu):
    """How far up is from gate differs from layer to layer. One program serves them all."""
    x, ids, weights = torch.randn(2, 128).bfloat16(), torch.tensor([[0, 3], [1, -1]]), torch.rand(2, 2)
    memory = list(torch.randn(9, 4, 128, 128).bfloat16() / 11)  # it holds whatever a wrong distance leads to
    if recipe is not None:
        memory = [quantize_weights(w.mT, recipe, kernel_preference="triton") for w in memory]
    ran = count_programs(monkeypatch)
    with torch.no_grad():
        for up in range(1, 8):
            given = x, ids, weights, (memory[0], memory[up]), memory[8]
            y = experts_forward(*given, implementation="decode")
            with monkeypatch.context() as patch:
                patch.setattr(replay, "_is_on_gpu", lambda x: False)
                assert torch.equal(y, experts_forward(*given, implementation="decode")), up
    assert len(ran) == 5  # all but the first two


@pytest.mark.parametrize("changed", (0, 2), ids=("x", "topk_weights"))
def test_replayed_inference_with_a_pending_negation(changed, monkeypatch, as_on_a_gpu):
    """The op is replayed, since a pair is not replayed as a whole."""
    gate, up, down = torch.randn(3, 4, 128, 128).bfloat16() / 11
    ran = count_programs(monkeypatch)
    with torch.no_grad():
        for number in range(4):
            given = [torch.randn(2, 128).bfloat16(), torch.tensor([[0, 3], [1, -1]]), torch.rand(2, 2)]
            negated = given.copy()
            if number == 3:
                negated[changed] = torch._neg_view(-given[changed])
            y = experts_forward(*negated, (gate, up), down, implementation="decode")
            with monkeypatch.context() as patch:
                patch.setattr(replay, "_is_on_gpu", lambda x: False)
                assert torch.equal(y, experts_forward(*given, (gate, up), down, implementation="decode")), number
    assert ran


def test_what_decides_a_call_is_part_of_its_key(monkeypatch, as_on_a_gpu):
    call, operands = decoding()
    given = operands()
    ran = count_programs(monkeypatch)
    with torch.no_grad():
        for _ in range(3):
            call(*given)
        assert len(ran) == 1
        for options, error in (({"keep": "all"}, "keep: expected"), ({"activation": "tanh"}, "activation: expected")):
            with pytest.raises(ValueError, match=error):
                call(*given, **options)
        with pytest.raises(TypeError, match="batch_invariant: expected"):
            call(*given, batch_invariant=0)  # which equals False
        with pytest.raises(TypeError, match="interleaved: expected"):
            call(*given, interleaved=0)
        with pytest.raises(ValueError, match="topk_weights"):
            call(*given[:2], given[2][:, :1], *given[3:])
        with pytest.raises(ValueError, match="kernel_preference auto or triton"), prefer("emulated"):
            call(*given)
        with monkeypatch.context() as patch:
            patch.setenv("GROUPED_GEMM_BACKEND", "emulated")
            with pytest.raises(ValueError, match="kernel_preference auto or triton"):
                call(*given)
    with pytest.raises(ValueError, match="expected no gradients"):
        call(given[0].requires_grad_(), *given[1:])
    assert len(ran) == 1
