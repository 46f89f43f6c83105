"""`override_torch`: what is caught runs as `grouped_mm` runs it, the rest as torch has it, and nothing stays behind."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from grouped_gemm import KernelPreference, NoBackendError, grouped_mm, override, override_torch

OFFS = torch.tensor([3, 3, 24], dtype=torch.int32)


def operands(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """``a`` (24, 32) and ``b`` (3, 32, 64), leaves."""
    a, b = torch.randn(24, 32, dtype=dtype), torch.randn(3, 64, 32, dtype=dtype).transpose(1, 2)
    return a.requires_grad_(), b.requires_grad_()


def gradients(y: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y.float().square().sum(), leaves)


@pytest.fixture
def ours(monkeypatch) -> list[dict]:
    """The options of each call that reaches `grouped_mm`; they grow as calls are made."""
    calls = []

    def record(*args, **options):
        calls.append(options)
        return grouped_mm(*args, **options)

    monkeypatch.setattr(override, "grouped_mm", record)
    return calls


CALLS = {
    "public": lambda a, b: F.grouped_mm(a, b, offs=OFFS),
    "by_name": lambda a, b: F.grouped_mm(mat_a=a, mat_b=b, offs=OFFS, bias=None, out_dtype=a.dtype),
    "private": lambda a, b: torch._grouped_mm(a, b, OFFS),
    "private_by_name": lambda a, b: torch._grouped_mm(input=a, mat2=b, offs=OFFS),
    "op": lambda a, b: torch.ops.aten._grouped_mm(a, b, OFFS),
    "overload": lambda a, b: torch.ops.aten._grouped_mm.default(a, b, offs=OFFS),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("backward", ("inside", "outside"))
def test_a_call_and_its_gradients_are_those_of_grouped_mm(call, backward):
    a, b = operands()
    with override_torch("fp8_blockwise"):
        y = call(a, b)
        if backward == "inside":
            found = gradients(y, a, b)
    if backward == "outside":
        found = gradients(y, a, b)
    wanted = grouped_mm(a, b, OFFS, recipe="fp8_blockwise")
    assert torch.equal(y, wanted) and not torch.equal(y, call(a, b))
    assert all(map(torch.equal, found, gradients(wanted, a, b)))


def test_the_weight_gradient_form(ours):
    x, dy = torch.randn(24, 32).bfloat16(), torch.randn(24, 64).bfloat16()
    with override_torch("mxfp8"):
        c = F.grouped_mm(x.t(), dy, offs=OFFS)
    assert len(ours) == 1 and torch.equal(c, grouped_mm(x.t(), dy, OFFS, recipe="mxfp8"))


def test_arguments_are_passed_on_and_checked(ours):
    a, b = operands()
    with override_torch("mxfp8", group_alignment=3, kernel_preference="emulated"):
        F.grouped_mm(torch.nn.Parameter(a.detach()), b, offs=OFFS)
    (options,) = ours
    assert options["group_alignment"] == 3 and options["kernel_preference"] is KernelPreference.EMULATED
    for bad in ({"recipe": "fp7"}, {"kernel_preference": "mill"}, {"group_alignment": 0}):
        with pytest.raises(ValueError), override_torch(**bad):
            pass


def test_a_backend_that_refuses_says_so():
    a, b = operands()
    with override_torch("mxfp8", kernel_preference="torch"), pytest.raises(NoBackendError, match="torch"):
        F.grouped_mm(a, b, offs=OFFS)


class Subclass(Tensor):
    pass


LEFT_TO_TORCH = {
    "batched": lambda a, b: F.grouped_mm(b.transpose(1, 2), b),
    "columns_in_groups": lambda a, b: F.grouped_mm(b, torch.ones(64, 24, dtype=b.dtype).contiguous(), offs=OFFS),
    "of_another_class": lambda a, b: F.grouped_mm(a.detach().as_subclass(Subclass), b, offs=OFFS),
    "a_sum": lambda a, b: a.sum(),
}


@pytest.mark.parametrize("call", LEFT_TO_TORCH.values(), ids=LEFT_TO_TORCH)
def test_what_grouped_mm_does_not_do_is_left_to_torch(call, ours):
    a, b = operands()
    with override_torch("mxfp8"):
        found = call(a, b)
    assert not ours and torch.equal(found, call(a, b))


@pytest.mark.parametrize(
    "changed",
    (
        {"bias": torch.ones(3, 64)},
        {"offs": None},
        {"offs": OFFS.long()},
        {"mat_b": torch.ones(3, 32, 64)},
        {"out_dtype": torch.float64},
    ),
    ids=str,
)
def test_what_torch_refuses_is_refused_by_torch(changed, ours):
    a, b = operands()
    with override_torch("mxfp8"), pytest.raises(RuntimeError):
        F.grouped_mm(**{"mat_a": a, "mat_b": b, "offs": OFFS} | changed)
    assert not ours


def test_blocks_nest_and_the_innermost_wins(ours):
    a, b = operands()
    with override_torch("mxfp8"):
        with override_torch("fp8_rowwise", kernel_preference="emulated"):
            inner = F.grouped_mm(a, b, offs=OFFS)
        outer = F.grouped_mm(a, b, offs=OFFS)
    assert len(ours) == 2
    assert torch.equal(inner, grouped_mm(a, b, OFFS, recipe="fp8_rowwise"))
    assert torch.equal(outer, grouped_mm(a, b, OFFS, recipe="mxfp8"))


def test_nothing_stays_behind_a_block_whether_it_ends_or_raises(ours):
    a, b = operands()
    with pytest.raises(KeyError), override_torch("mxfp8"):
        raise KeyError
    with override_torch("mxfp8"):
        pass
    F.grouped_mm(a, b, offs=OFFS)
    assert not ours


def test_it_decorates_a_function(ours):
    a, b = operands()

    @override_torch("mxfp8")
    def forward() -> Tensor:
        return F.grouped_mm(a, b, offs=OFFS)

    for _ in range(2):
        assert torch.equal(forward(), grouped_mm(a, b, OFFS, recipe="mxfp8"))
    assert len(ours) == 2


def test_a_block_holds_for_its_own_thread(ours):
    a, b = operands()
    with override_torch("mxfp8"):
        other = threading.Thread(target=lambda: F.grouped_mm(a, b, offs=OFFS))
        other.start()
        other.join()
    assert not ours


def test_torchs_own_product_as_a_backend_is_not_caught_again(ours):
    a, b = operands()
    with override_torch(), override_torch(kernel_preference="torch"):
        y = F.grouped_mm(a, b, offs=OFFS)
        found = gradients(y, a, b)
        direct = grouped_mm(a, b, OFFS, kernel_preference="torch")
    assert len(ours) == 1
    assert torch.equal(y, direct) and all(map(torch.equal, found, gradients(direct, a, b)))


def test_autocast_is_as_for_torchs_product():
    a, b = operands(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), override_torch("mxfp8"):
        y = F.grouped_mm(a, b, offs=OFFS)
    assert y.dtype == torch.float32 and torch.equal(y, grouped_mm(a, b, OFFS, recipe="mxfp8"))


def test_what_is_checkpointed_runs_the_same_again_where_it_is_decorated(ours):
    a, b = operands()
    forward = override_torch("mxfp8")(lambda a, b: F.grouped_mm(a, b, offs=OFFS))
    found = gradients(checkpoint(forward, a, b, use_reentrant=False), a, b)
    assert len(ours) == 2
    assert all(map(torch.equal, found, gradients(grouped_mm(a, b, OFFS, recipe="mxfp8"), a, b)))


def test_the_loop_of_transformers_is_caught(ours):
    a, b = operands()
    with torch.library._scoped_library("transformers", "FRAGMENT") as library:
        library.define("grouped_mm_fallback(Tensor input, Tensor weight, Tensor offs) -> Tensor")
        with override_torch("mxfp8"):
            y = torch.ops.transformers.grouped_mm_fallback(a, b, offs=OFFS)
    assert len(ours) == 1 and torch.equal(y, grouped_mm(a, b, OFFS, recipe="mxfp8"))


@pytest.mark.parametrize("place", ("around", "inside"))
def test_compiled_functions_follow_it_and_are_not_compiled_anew(place):
    """Dynamo would not ask a mode about ``torch._grouped_mm`` by itself."""
    a, b = operands()
    counter = CompileCounterWithBackend("aot_eager")

    def plain(a: Tensor, b: Tensor) -> Tensor:
        return F.grouped_mm(a, b, offs=OFFS) * 2

    def overridden(a: Tensor, b: Tensor) -> Tensor:
        with override_torch("mxfp8"):
            return plain(a, b)

    torch._dynamo.reset()
    compiled = torch.compile(plain if place == "around" else overridden, fullgraph=True, backend=counter)
    wanted = grouped_mm(a, b, OFFS, recipe="mxfp8") * 2
    expected = gradients(wanted, a, b)
    for _ in range(3):
        if place == "around":
            with override_torch("mxfp8"):
                y = compiled(a, b)
        else:
            y = compiled(a, b)
        assert torch.equal(y, wanted) and all(map(torch.equal, gradients(y, a, b), expected))
    assert counter.frame_count == 1
    if place == "around":
        assert torch.equal(compiled(a, b), plain(a, b))
