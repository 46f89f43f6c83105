"""Replayed ops do what the ops do. tests/interpreter/test_ops.py has the same for kernels that Triton interprets."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch

pytest.importorskip("triton")
from op_samples import hopper_samples, samples
from replay_checks import bits, check_replay, check_replayed_steps, replay_on_a_cpu

from grouped_gemm import grouped_mm
from grouped_gemm.core import replay
from grouped_gemm.core.library import ops
from grouped_gemm.core.machine import machine_of
from grouped_gemm.moe import experts_forward

CUDA = torch.device("cuda")


def dense(arguments):
    """An op that copies what is not dense is not replayed."""
    return tuple(x.contiguous() if isinstance(x, torch.Tensor) else x for x in arguments)


@pytest.mark.gpu
def test_ops_on_a_gpu(monkeypatch):
    refused = []
    for name, arguments in list(samples("cuda")):
        if not check_replay(
            getattr(ops, name), dense(arguments), monkeypatch, changes=name.endswith(("_add", "_for_peers"))
        ):
            refused.append(name)
        monkeypatch.undo()
    assert not refused


@pytest.mark.gpu
def test_ops_on_hopper(monkeypatch):
    if machine_of(CUDA).traits.kernels != "hopper":
        pytest.skip("needs a Hopper GPU")
    refused = []
    for name, arguments in list(hopper_samples(CUDA)):
        if not check_replay(getattr(ops, name), arguments, monkeypatch, changes=name.endswith(("_add", "_for_peers"))):
            refused.append(name)
        monkeypatch.undo()
    assert not refused


SIZES = {"E": 4, "H": 256, "I": 128, "T": 40}


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ("none", "fp8_rowwise", "fp8_blockwise"))
def test_steps_on_a_gpu(recipe, monkeypatch):
    w = torch.randn(3, 48, 64, device=CUDA).bfloat16().requires_grad_()
    bias, ends = torch.randn(3, 48, device=CUDA).bfloat16().requires_grad_(), torch.tensor([3, 3, 20]).int().to(CUDA)
    check_replayed_steps(
        lambda x: grouped_mm(x, w.mT, ends, recipe=recipe, bias=bias, kernel_preference="triton"),
        lambda: torch.randn(24, 64, device=CUDA).bfloat16().requires_grad_(), (w, bias), monkeypatch, 2,
    )  # fmt: skip


def layer_of(recipe, keep="full"):
    (e, h, i, t), top_k = SIZES.values(), 2
    gate_up, down = (torch.randn(shape, device=CUDA).bfloat16() / 16 for shape in ((e, 2 * i, h), (e, h, i)))
    ids, weights = torch.rand(t, e, device=CUDA).topk(top_k).indices, torch.rand(t, top_k, device=CUDA)
    parameters = gate_up.requires_grad_(), down.requires_grad_(), weights.requires_grad_()

    def layer(x):
        return experts_forward(x, ids, weights, gate_up, down, recipe=recipe, keep=keep, implementation="grouped_mm")

    return layer, parameters, lambda: torch.randn(t, h, device=CUDA).bfloat16().requires_grad_()


@pytest.mark.gpu
@pytest.mark.parametrize("recipe, keep", ((None, "full"), ("fp8_blockwise", "full"), ("fp8_blockwise", "recipe")))
def test_fused_layers_on_hopper(recipe, keep, monkeypatch):
    if machine_of(CUDA).traits.kernels != "hopper":
        pytest.skip("needs a Hopper GPU")
    layer, parameters, new_input = layer_of(recipe, keep)
    check_replayed_steps(layer, new_input, parameters, monkeypatch, 3)  # route, forward and backward


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", (None, "fp8_blockwise"))
def test_peak_memory_of_a_replayed_step(recipe):
    layer, parameters, new_input = layer_of(recipe)
    x, peaks = new_input(), []
    for _ in range(4):
        torch.cuda.reset_peak_memory_stats()
        y = layer(x)
        torch.autograd.grad(y, (x, *parameters), y.detach())
        del y
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[3] <= peaks[0]


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", (None, "fp8_blockwise"))
def test_a_graph_of_replayed_calls(recipe):
    layer, _, new_input = layer_of(recipe)
    x = new_input().detach()
    with torch.no_grad():
        for _ in range(3):
            expected = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)
        x.copy_(new_input())
        graph.replay()
        assert torch.equal(y, layer(x))


@pytest.mark.gpu
def test_a_profiler_sees_each_op():
    layer, _, new_input = layer_of("fp8_blockwise")
    x = new_input().detach()
    for _ in range(3):
        layer(x)
    with torch.profiler.profile() as profile:
        layer(x)
    names = {event.key for event in profile.key_averages()}
    assert {"grouped_gemm::moe_gated_mm", "grouped_gemm::moe_quantize_tokens", "grouped_gemm::moe_combine"} <= names


def fake_op(calls, work, name="fake"):
    """A replayed function of tensors on a CPU, which counts how often it runs itself."""

    def run(*args):
        calls.append(args)
        return work(*args)

    return replay.replayed(name, run)


class FakeLaunch:
    """Launches that only note the addresses."""

    def __init__(self):
        self.addresses = []

    def can_run(self, device):
        return True

    def __call__(self, addresses):
        self.addresses.append(list(addresses))


@pytest.fixture
def launch(monkeypatch):
    found = FakeLaunch()
    replay_on_a_cpu(monkeypatch)
    replay.forget()
    yield found
    replay.forget()


def launching(launch):
    def work(x, y=None, n=0):
        out, zeros = torch.empty_like(x), x.new_zeros(3, dtype=torch.int32)
        replay.current() and replay.current().add(launch)
        return out[..., :2], zeros

    return work


def test_the_third_call_is_replayed(launch):
    calls = []
    op = fake_op(calls, launching(launch))
    for _ in range(4):
        x = torch.randn(2, 4)
        out, zeros = op(x)
        assert out.shape == (2, 2) and out.stride() == (4, 1) and not zeros.any()
    assert len(calls) == 2
    assert launch.addresses[-1] == [x.data_ptr(), out.data_ptr(), zeros.data_ptr()]


X = torch.zeros(8, 16)
OTHERS = {
    "shape": (X[:4],),
    "strides": (X.t().contiguous().t(),),
    "dtype": (X.int(),),
    "alignment": (torch.zeros(8 * 16 + 1)[1:].view(8, 16),),
    "another tensor": (X, X),
    "absent tensor": (X, None),
    "size": (X, None, 3),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_calls_that_differ_are_distinguished(launch, other):
    calls = []
    op = fake_op(calls, launching(launch))
    for _ in range(3):
        op(X)
    op(*other)
    assert len(calls) == 3


@pytest.mark.parametrize("other", ("shape", "alignment"))
def test_calls_of_one_number_differ_in_rows_and_alignment(launch, other):
    op = fake_op(calls := [], launching(launch))
    for _ in range(3):
        op(X, number=7)
    assert len(calls) == 2
    (found,) = OTHERS[other]
    out, _ = op(found, number=7)
    assert len(calls) == 3 and len(out) == len(found)
    op(X, number=8)
    assert len(calls) == 4


def test_what_else_an_op_does_is_not_replayed(launch):
    for work in (
        lambda x: (launching(launch)(x), x + 1)[1],  # computes
        lambda x: launching(launch)(x.t().contiguous()),  # copies
        lambda x: x.new_empty(3),  # launches nothing
        lambda x: (launching(launch)(x), X.new_empty(1).view(torch.int32))[1],  # returns what it cannot make
    ):
        calls = []
        op = fake_op(calls, work)
        replay.forget()
        for _ in range(4):
            op(X)
        assert len(calls) == 4


@pytest.mark.parametrize("copies", (False, True))
def test_an_op_inside_a_call_that_copies_is_not_replayed(launch, copies, monkeypatch):
    """Below autograd, contiguous() is one op, whose schema returns a view."""
    inner = torch.ops.grouped_gemm.moe_gather.default

    def gather(x, source, places):
        return launching(launch)(x.contiguous())[0]

    monkeypatch.setitem(replay.implementations, inner, gather)
    calls, source, places = [], torch.zeros(8, dtype=torch.int32), torch.zeros(8, 1, dtype=torch.int32)
    op = fake_op(calls, lambda x: inner(x, source, places) if replay.current() else x)
    for _ in range(4):
        op(X[:, ::2] if copies else X)
    assert len(calls) == (4 if copies else 2)


def test_fills_have_the_bits_of_the_call(launch):
    values = 0, -0.0, 2, True, torch.nan

    def work(x):
        return launching(launch)(x)[1], *(torch.empty_like(x).fill_(value) for value in values)

    op = fake_op(calls := [], work)
    found, _, replayed = op(X), op(X), op(X)
    assert len(calls) == 2 and bits(replayed) == bits(found)


VIEWS = {"narrow": lambda x, start: x.narrow(0, start[0], 2), "tensor_split": lambda x, start: x.tensor_split(start)[1]}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_an_op_inside_a_call_whose_view_depends_on_values_is_not_replayed(launch, view, monkeypatch):
    """Below autograd, such a view is one op, which reads values unseen."""
    inner = torch.ops.grouped_gemm.moe_gather.default

    def work(x, start, places):
        launching(launch)(x)
        return view(x, start)

    monkeypatch.setitem(replay.implementations, inner, work)
    op = fake_op([], lambda *args: (inner if replay.current() else work)(*args))
    for start in (1, 1, 3):
        assert op(X, torch.tensor([start]), X).storage_offset() == 16 * start


@pytest.mark.parametrize("keeps", (False, True))
def test_memory_is_freed_as_the_call_frees_it(launch, keeps):
    """What is allocated first goes before the last tensor comes, unless a view of it is left."""

    def work(x):
        first = torch.empty_like(x)
        view = first[:2] if keeps else 0
        replay.current() and replay.current().add(launch)
        del first
        return torch.empty_like(x), view

    op = fake_op([], work)
    for _ in range(3):
        op(X)
    assert steps_of_the_program() == ["_allocate", "<lambda>", *([] if keeps else ["_free"]), "_allocate"]


def steps_of_the_program():
    (program,) = replay._programs.values()
    return [getattr(step, "func", step).__name__ for step in program.steps]


def test_scratch_is_one_allocation_and_zeros_are_another_one(launch):
    def work(x):
        first, second, out = (x.new_empty(n) for n in (100, 7, 3))
        third, fourth = x.new_zeros(5), x.new_zeros(2, dtype=torch.int64)
        recording = replay.current()
        if recording:
            places.append([recording.place(part) for part in (first[9:], second, third, fourth, out)])
            recording.add(launch)
        del third
        return (out, first.shape[0], fourth.numel())

    op, places = fake_op([], work), []
    for _ in range(3):
        out, *constants = op(X)
    assert steps_of_the_program() == ["_allocate_pool", "_allocate", "_allocate_pool", "<lambda>"]
    assert constants == [100, 2] and out.untyped_storage().nbytes() == 12
    (places,) = places
    first, second, third, fourth, found = (launch.addresses[-1][slot] + offset for slot, offset in places)
    assert found == out.data_ptr()
    assert second == first - 36 + 512 and fourth == third + 512


def test_scratch_is_not_one_allocation_where_that_would_take_more_memory(launch):
    def work(x):
        first, before = x.new_empty(2), x.new_empty(9999)
        replay.current() and replay.current().add(launch)
        del before
        second = x.new_empty(9999)
        replay.current() and replay.current().add(launch)
        return x, len(first) + len(second)

    op = fake_op([], work)
    for _ in range(3):
        op(X)
    assert steps_of_the_program() == ["_allocate", "_allocate", "<lambda>", "_free", "_allocate", "<lambda>"]


def test_large_scratch_is_not_pooled(launch):
    """The pool would need other memory for each M, and memory for weights that is free would not fit."""

    def work(x):
        scratch = [x.new_empty(n) for n in (7, 1 << 19, 8)] + [x.new_zeros(1 << 19)]
        replay.current() and replay.current().add(launch)
        return x, len(scratch)

    op = fake_op([], work)
    for _ in range(3):
        op(X)
    assert steps_of_the_program() == ["_allocate_pool", "_allocate", "_allocate", "_fill", "<lambda>"]


def test_arguments_and_their_views_are_returned(launch):
    def work(x, text):
        replay.current() and replay.current().add(launch)
        return x, x[2:], text, None

    op = fake_op([], work)
    for _ in range(3):
        x = torch.randn(9, 16)[1:]
        same, part, text, nothing = op(x, "text")
        assert same is x and torch.equal(part, x[2:]) and text == "text" and nothing is None


def test_calls_inside_a_call_are_part_of_it(launch):
    inner = fake_op([], launching(launch), "inner")

    def work(x):
        return inner(x)[0]

    op = fake_op([], work)
    for _ in range(3):
        assert op(X).shape == (8, 2)
    assert sum(isinstance(p, replay.Program) for p in replay._programs.values()) == 1


def test_forget(launch):
    calls = []
    op = fake_op(calls, launching(launch))
    for _ in range(3):
        op(X)
    replay.forget()
    op(X)
    assert len(calls) == 3


def test_programs_are_bounded(launch, monkeypatch):
    monkeypatch.setattr(replay, "_MAX_PROGRAMS", 4)
    op = fake_op([], launching(launch))
    for n in range(9):
        op(X, None, n)
        assert len(replay._programs) <= 4


def test_programs_outlive_calls_that_come_once(launch, monkeypatch):
    monkeypatch.setattr(replay, "_MAX_PROGRAMS", 4)
    op = fake_op(calls := [], launching(launch))
    for n in range(9):
        op(X)
        op(X, None, n)
    assert [args for args in calls if len(args) == 1] == [(X,)] * 2


def test_an_error_leaves_no_recording(launch):
    def work(x):
        raise ValueError

    op = fake_op([], work)
    for _ in range(3):
        with pytest.raises(ValueError):
            op(X)
        assert replay.current() is None


def test_a_tensor_given_twice_is_two_operands(launch):
    def work(x, y):
        recording, out = replay.current(), torch.empty_like(x)
        if recording:
            recording.add(launch)
            places.extend((recording.place(x), recording.place(y)))
        return x, y, out

    op, places = fake_op([], work), []
    for _ in range(2):
        x, y, _ = op(X, X)
        assert x is X and y is X
    assert places == [(0, 0), (1, 0)]
    other = torch.zeros(8, 16)
    x, y, _ = op(X, other)
    assert x is X and y is other


@pytest.mark.parametrize("fails", (False, True))
def test_a_recording_keeps_nothing_alive(launch, fails):
    """Not even while results are alive, or until the garbage collector runs, which trainers may turn off."""

    def work(x):
        result = launching(launch)(x)
        if fails and replay.current():
            raise ValueError
        return result

    op, results = fake_op(calls := [], work), []
    gc.disable()
    try:
        for _ in range(3):
            x = torch.zeros(8, 16)
            is_alive = weakref.ref(x)
            with contextlib.suppress(ValueError):
                results.append(op(x))
            del x
            calls.clear()
            assert is_alive() is None
    finally:
        gc.enable()


def test_forget_while_a_call_is_recorded(launch):
    def work(x):
        if replay.current():
            replay.forget()
        return launching(launch)(x)

    op = fake_op(calls := [], work)
    for _ in range(3):
        op(X)
    assert len(calls) == 3


def test_a_captured_call_is_not_recorded(launch, monkeypatch):
    op = fake_op([], launching(launch))
    with monkeypatch.context() as patch:
        patch.setattr(replay, "is_capturing", lambda x: True)
        for _ in range(3):
            op(X)
    assert not any(isinstance(p, replay.Program) for p in replay._programs.values())
    op(X)
    assert any(isinstance(p, replay.Program) for p in replay._programs.values())
