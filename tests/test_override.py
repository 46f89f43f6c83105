"""`override_torch`: caught calls give what `grouped_mm` gives, others run on torch, and nothing outlives a block."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.variables import torch as dynamo_torch
from torch.distributed._composable import checkpoint_activation
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.overrides import get_overridable_functions
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from grouped_gemm import KernelPreference, NoBackendError, gemm_ops, grouped_mm, override_torch
from grouped_gemm.integrations import torch_function

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

    monkeypatch.setattr(torch_function, "grouped_mm", record)
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


def test_the_result_of_a_collective_is_taken(ours):
    a, b = operands()
    with warnings.catch_warnings(), override_torch("mxfp8"):
        warnings.simplefilter("error")
        y = F.grouped_mm(AsyncCollectiveTensor(a.detach()), b, offs=OFFS)
    assert len(ours) == 1 and type(y) is Tensor and torch.equal(y, grouped_mm(a, b, OFFS, recipe="mxfp8"))


class Subclass(Tensor):
    pass


LEFT_TO_TORCH = {
    "batched": (lambda a, b: F.grouped_mm(b.transpose(1, 2), b), "it has no offs. Pass the end row"),
    "columns_in_groups": (
        lambda a, b: F.grouped_mm(b, torch.ones(64, 24, dtype=b.dtype), offs=OFFS),
        r"a has 3 dimensions. Transpose: grouped_mm\(b.t\(\)",
    ),
    "of_another_class": (
        lambda a, b: F.grouped_mm(a.detach().as_subclass(Subclass), b, offs=OFFS),
        "is a Subclass. Pass plain tensors",
    ),
    "on_meta": (lambda a, b: F.grouped_mm(a.to("meta"), b.to("meta"), offs=OFFS.to("meta")).shape, "meta device. Move"),
}


@pytest.mark.parametrize(("call", "reason"), LEFT_TO_TORCH.values(), ids=LEFT_TO_TORCH)
def test_calls_that_grouped_mm_cannot_run_are_left_to_torch_with_one_warning(call, reason, ours, monkeypatch):
    monkeypatch.setattr(torch_function, "_warned", set())
    a, b = operands()
    with override_torch("mxfp8"):
        with pytest.warns(UserWarning, match=f"override_torch leaves .*{reason}"):
            found = call(a, b)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(a, b)
    wanted = call(a, b)
    assert not ours and (found == wanted if isinstance(wanted, torch.Size) else torch.equal(found, wanted))


def test_the_fallback_of_transformers_with_int64_offs_is_left_to_transformers(ours, monkeypatch):
    monkeypatch.setattr(torch_function, "_warned", set())
    a, b = operands()
    with torch.library._scoped_library("transformers", "FRAGMENT") as library:
        library.define("grouped_mm_fallback(Tensor input, Tensor weight, Tensor offs) -> Tensor")
        library.impl("grouped_mm_fallback", lambda a, b, offs: a[:, :1] * 2, "CompositeImplicitAutograd")
        with override_torch("mxfp8"), pytest.warns(UserWarning, match=r"offs is torch.int64. Pass offs.int\(\)"):
            torch.ops.transformers.grouped_mm_fallback(a, b, offs=OFFS.long())
    assert not ours


def test_other_functions_run_without_a_warning():
    a, _ = operands()
    with warnings.catch_warnings(), override_torch("mxfp8"):
        warnings.simplefilter("error")
        assert torch.equal(a.sum(), sum(a.split(24)).sum())


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
def test_calls_that_torch_refuses_raise_torchs_error_without_a_warning(changed, ours, monkeypatch):
    monkeypatch.setattr(torch_function, "_warned", set())
    a, b = operands()
    with warnings.catch_warnings(), override_torch("mxfp8"), pytest.raises(RuntimeError):
        warnings.simplefilter("error", UserWarning)
        F.grouped_mm(**{"mat_a": a, "mat_b": b, "offs": OFFS} | changed)
    assert not ours


@pytest.mark.parametrize("is_compiled", (False, True), ids=("eager", "compiled"))
@pytest.mark.parametrize(
    ("a", "b", "shape"),
    (((0, 32), (0, 32, 64), (0, 64)), ((32, 24), (24, 64), (0, 32, 64))),
    ids=("rows_in_groups", "weight_gradient"),
)
def test_a_call_without_groups_is_left_to_torch_without_a_warning(a, b, shape, is_compiled, ours):
    def gemm(*operands: Tensor) -> Tensor:
        return F.grouped_mm(*operands, offs=OFFS[:0])

    torch._dynamo.reset()
    if is_compiled:
        gemm = torch.compile(gemm, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings(), override_torch("mxfp8"):
        warnings.simplefilter("error")
        assert gemm(torch.ones(a).bfloat16(), torch.ones(b).bfloat16()).shape == shape
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


def test_the_override_ends_with_its_block_even_if_that_raises(ours):
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


def test_a_generator_is_inside_the_block_and_its_caller_is_not(ours):
    a, b = operands()

    @override_torch("mxfp8")
    def forward(scale: int) -> Iterator[Tensor]:
        with contextlib.suppress(KeyError):
            scale = yield F.grouped_mm(a * scale, b, offs=OFFS)
        yield F.grouped_mm(a * scale, b, offs=OFFS)
        return "returned"

    for resume, factor in ((lambda g: g.send(3), 3), (lambda g: g.throw(KeyError()), 2)):
        layer = forward(2)
        assert torch.equal(next(layer), grouped_mm(a * 2, b, OFFS, recipe="mxfp8"))
        count = len(ours)
        F.grouped_mm(a, b, offs=OFFS)
        assert len(ours) == count
        assert torch.equal(resume(layer), grouped_mm(a * factor, b, OFFS, recipe="mxfp8"))
        with pytest.raises(StopIteration, match="returned"):
            next(layer)
    F.grouped_mm(a, b, offs=OFFS)
    assert len(ours) == 4 and inspect.isgeneratorfunction(forward)


class Coroutines:
    """A coroutine function in each form that a class can hold."""

    @override_torch("mxfp8")
    async def method(self, function: Callable[[], Awaitable[Tensor]]) -> Tensor:
        return await function()

    @override_torch("mxfp8")
    @staticmethod
    async def static(function: Callable[[], Awaitable[Tensor]]) -> Tensor:
        return await function()

    async def __call__(self, function: Callable[[], Awaitable[Tensor]]) -> Tensor:
        return await function()


COROUTINES = {
    "method": Coroutines().method,
    "static": Coroutines().static,
    "object": override_torch("mxfp8")(Coroutines()),
    "partial": override_torch("mxfp8")(functools.partial(Coroutines.__call__, None)),
}


@pytest.mark.parametrize("layer", COROUTINES.values(), ids=COROUTINES)
def test_a_coroutine_is_inside_the_block_and_other_tasks_are_not(layer, ours):
    a, b = operands()
    is_waiting, goes_on = asyncio.Event(), asyncio.Event()

    async def inside() -> Tensor:
        is_waiting.set()
        await goes_on.wait()
        return F.grouped_mm(a, b, offs=OFFS)

    async def outside() -> None:
        await is_waiting.wait()
        F.grouped_mm(a, b, offs=OFFS)
        goes_on.set()

    async def both() -> Tensor:
        y, _ = await asyncio.gather(layer(inside), outside())
        return y

    assert torch.equal(asyncio.run(both()), grouped_mm(a, b, OFFS, recipe="mxfp8"))
    assert len(ours) == 1 and inspect.iscoroutinefunction(layer)


class Methods:
    @override_torch("mxfp8")
    @staticmethod
    def static(a: Tensor, b: Tensor) -> Tensor:
        return F.grouped_mm(a, b, offs=OFFS)

    @override_torch("mxfp8")
    @classmethod
    def of_class(cls, a: Tensor, b: Tensor) -> Tensor:
        return F.grouped_mm(a, b, offs=OFFS)


FUNCTIONS = {
    "static": Methods().static,
    "of_class": Methods.of_class,
    "partial": override_torch("mxfp8")(functools.partial(F.grouped_mm, offs=OFFS)),
}


@pytest.mark.parametrize("layer", FUNCTIONS.values(), ids=FUNCTIONS)
def test_it_decorates_static_methods_class_methods_and_partials(layer, ours):
    a, b = operands()
    assert torch.equal(layer(a, b), grouped_mm(a, b, OFFS, recipe="mxfp8")) and len(ours) == 1


async def stream() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("decorated", "found", "remedy"),
    (
        (torch.nn.Linear, "the class Linear", "its methods .* such as forward"),
        (torch.nn.Linear(1, 1), "the module Linear", "forward in its class"),
        (stream, "an asynchronous generator", "the functions that it calls"),
        (5, "int", "above a function"),
    ),
    ids=("class", "module", "async_generator", "number"),
)
def test_objects_that_cannot_be_decorated_are_refused(decorated, found, remedy):
    with pytest.raises(TypeError, match=f"expected a function to decorate; found {found}.*{remedy}"):
        override_torch("mxfp8")(decorated)


def test_a_decorated_context_manager_is_refused_when_it_is_called():
    a, b = operands()

    def region():
        yield F.grouped_mm(a, b, offs=OFFS)

    decorated = override_torch("mxfp8")(contextlib.contextmanager(region))
    with pytest.raises(TypeError, match="returns a _GeneratorContextManager, which runs after the block"):
        decorated()


def test_a_function_that_consumes_a_generator_is_decorated(ours):
    a, b = operands()

    def steps():
        yield F.grouped_mm(a, b, offs=OFFS)

    first = functools.wraps(steps)(lambda: next(steps()))
    override_torch("mxfp8")(first)()
    assert len(ours) == 1


def test_a_block_applies_to_its_own_thread_only(ours):
    a, b = operands()
    with override_torch("mxfp8"):
        other = threading.Thread(target=lambda: F.grouped_mm(a, b, offs=OFFS))
        other.start()
        other.join()
    assert not ours


def test_torchs_gemm_called_by_our_backend_is_not_caught_again(ours):
    a, b = operands()
    with override_torch(), override_torch(kernel_preference="torch"):
        y = F.grouped_mm(a, b, offs=OFFS)
        found = gradients(y, a, b)
        direct = grouped_mm(a, b, OFFS, kernel_preference="torch")
    assert len(ours) == 1
    assert torch.equal(y, direct) and all(map(torch.equal, found, gradients(direct, a, b)))


def test_autocast_acts_as_on_torchs_grouped_mm():
    a, b = operands(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), override_torch("mxfp8"):
        y = F.grouped_mm(a, b, offs=OFFS)
    assert y.dtype == torch.float32 and torch.equal(y, grouped_mm(a, b, OFFS, recipe="mxfp8"))


class Experts(torch.nn.Module):
    """A layer that routes rows to experts and calls torch, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Parameter(torch.randn(3, 64, 32).bfloat16())

    def forward(self, x: Tensor, ids: Tensor, gemm: Callable[..., Tensor] = F.grouped_mm) -> Tensor:
        ids, order = torch.sort(ids)
        ends = torch.histc(ids.float(), bins=3, min=0, max=2).cumsum(0, dtype=torch.int32)
        return F.silu(gemm(x[order], self.up.transpose(1, 2), offs=ends))[torch.argsort(order)]


class Decorated(Experts):
    forward = override_torch("mxfp8")(Experts.forward)


def train(layer: Callable[..., Tensor], model: Experts, block: str = "") -> list[Tensor]:
    """Output and gradients of ``layer``, with a block around "forward" or "everything"."""
    x, ids = torch.linspace(-1, 1, 24 * 32).view(24, 32).bfloat16().requires_grad_(), torch.arange(24) * 7 % 3
    model.zero_grad(set_to_none=True)
    with override_torch("mxfp8") if block else contextlib.nullcontext():
        y = layer(x, ids)
        if block == "everything":
            y.sum().backward()
    if block != "everything":
        y.sum().backward()
    return [y.detach(), x.grad, model.up.grad]


def checkpointed(function: Callable[..., Tensor], **options) -> Callable[..., Tensor]:
    return lambda x, ids: checkpoint(function, x, ids, **options)


saving_gemms = functools.partial(create_selective_checkpoint_contexts, list(gemm_ops()))
CHECKPOINTS = {
    "none": lambda f: f,
    "reentrant": lambda f: checkpointed(f, use_reentrant=True),
    "not_reentrant": lambda f: checkpointed(f, use_reentrant=False),
    "selective": lambda f: checkpointed(f, use_reentrant=False, context_fn=saving_gemms),
    "nested": lambda f: checkpointed(checkpointed(f, use_reentrant=False), use_reentrant=False),
}


# Not all combinations, since compiling takes a second. Where the block is inside the compiled function, all kinds of
# checkpoints are traced alike. Where backward is inside the block, it is traced in forward, for each kind.
PLACES = [
    pytest.param(wrap, place, is_compiled, id="-".join(("compiled" if is_compiled else "eager", place, name)))
    for name, wrap in CHECKPOINTS.items()
    for place in ("forward", "everything", "decorated", "inside")
    for is_compiled in (False, True)
    if not is_compiled or place == "forward" or name == "not_reentrant"
]


@pytest.mark.parametrize("wrap, place, is_compiled", PLACES)
def test_checkpoints_recompute_under_the_override(wrap, place, is_compiled):
    """Gradients equal those of `grouped_mm`; a recomputation with torch's GEMM would give others."""
    model = Decorated() if place == "decorated" else Experts()
    layer = wrap(model)
    if place == "inside":
        layer = override_torch("mxfp8")(functools.partial(layer))  # a module itself cannot be decorated
    if is_compiled:
        torch._dynamo.reset()
        layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = train(layer, model, "" if place in ("decorated", "inside") else place)
    wanted = train(functools.partial(model.forward, gemm=functools.partial(grouped_mm, recipe="mxfp8")), model)
    assert all(map(torch.equal, found, wanted))


def test_a_checkpoint_in_nested_blocks_is_recomputed_under_the_innermost():
    a, b = operands()
    with override_torch("mxfp8"), override_torch("fp8_rowwise"):
        y = checkpoint(lambda a, b: F.grouped_mm(a, b, offs=OFFS), a, b, use_reentrant=False)
    assert all(map(torch.equal, gradients(y, a, b), gradients(grouped_mm(a, b, OFFS, recipe="fp8_rowwise"), a, b)))


def test_a_composable_checkpoint_that_was_imported_earlier_is_recomputed_under_the_override(monkeypatch):
    """Its module, like other libraries, imported torch's functions before the first `override_torch` replaced them."""
    for name, function in list(vars(checkpoint_activation).items()):
        if getattr(function, "__module__", "") == checkpointing.__name__:
            monkeypatch.setattr(checkpoint_activation, name, inspect.unwrap(function))
    model = Experts()
    checkpoint_activation.checkpoint(model)
    found = train(model, model, "forward")
    wanted = train(functools.partial(model.forward, gemm=functools.partial(grouped_mm, recipe="mxfp8")), model)
    assert all(map(torch.equal, found, wanted))


def test_an_unknown_implementation_of_checkpoints_is_named_and_calls_are_caught(monkeypatch, ours):
    monkeypatch.setattr(torch_function, "_is_prepared", False)
    monkeypatch.setattr(torch_function, "_list_for_dynamo", lambda: None)
    monkeypatch.delattr(checkpointing, "_CheckpointFrame")
    monkeypatch.setattr(checkpointing.CheckpointFunction, "forward", lambda ctx, *args: None)
    with pytest.warns(UserWarning, match="use_reentrant=False or use_reentrant=True: expected .* Decorate") as caught:
        block = override_torch("mxfp8")
    assert caught[0].filename == __file__
    with warnings.catch_warnings(), block, override_torch("mxfp8"):
        warnings.simplefilter("error")
        F.grouped_mm(*operands(), offs=OFFS)
    assert len(ours) == 1


def test_the_fallback_of_transformers_is_caught(ours):
    a, b = operands()
    with torch.library._scoped_library("transformers", "FRAGMENT") as library:
        library.define("grouped_mm_fallback(Tensor input, Tensor weight, Tensor offs) -> Tensor")
        with override_torch("mxfp8"):
            y = torch.ops.transformers.grouped_mm_fallback(a, b, offs=OFFS)
    assert len(ours) == 1 and torch.equal(y, grouped_mm(a, b, OFFS, recipe="mxfp8"))


@pytest.fixture
def unlisted(monkeypatch) -> Iterator[None]:
    """Torch's list of overridable functions, as it is before the first `override_torch`."""
    listed = get_overridable_functions()
    monkeypatch.setitem(listed, torch, [function for function in listed[torch] if function is not torch._grouped_mm])
    dynamo_torch.get_overridable_functions.cache_clear()
    yield
    dynamo_torch.get_overridable_functions.cache_clear()


@pytest.mark.parametrize("first", ("dynamo", "override"))
def test_dynamo_asks_the_mode_in_either_order_of_imports(first, unlisted, monkeypatch):
    """Dynamo keeps the list once it has read it. It would not ask a mode about ``torch._grouped_mm`` by itself.

    The block is inside the compiled function: around it, the mode would catch the calls of the running graph.
    """
    with monkeypatch.context() as patch:
        if first == "dynamo":
            dynamo_torch.get_overridable_functions()
        else:
            patch.delitem(sys.modules, dynamo_torch.__name__)
        torch_function._list_for_dynamo()
    a, b = operands()
    torch._dynamo.reset()
    inside = override_torch("mxfp8")(lambda a, b: F.grouped_mm(a, b, offs=OFFS))
    y = torch.compile(inside, fullgraph=True, backend="eager")(a, b)
    assert torch.equal(y, grouped_mm(a, b, OFFS, recipe="mxfp8"))


def test_a_block_inside_a_compiled_checkpoint():
    """For Dynamo, making a block there is a side effect, which it would not allow."""
    a, b = operands()

    def inside(a: Tensor, b: Tensor) -> Tensor:
        with override_torch("mxfp8"):
            return F.grouped_mm(a, b, offs=OFFS)

    torch._dynamo.reset()
    y = torch.compile(checkpointed(inside, use_reentrant=False), fullgraph=True, backend="aot_eager")(a, b)
    wanted = grouped_mm(a, b, OFFS, recipe="mxfp8")
    assert torch.equal(y, wanted) and all(map(torch.equal, gradients(y, a, b), gradients(wanted, a, b)))


@pytest.mark.parametrize("place", ("around", "inside"))
def test_compiled_functions_follow_the_override_without_recompilation(place):
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
    assert not torch.equal(plain(a, b), wanted)  # the block has ended
    if place == "around":
        assert torch.equal(compiled(a, b), plain(a, b))


@pytest.mark.parametrize("place", ("around", "inside"))
def test_experts_selected_by_a_mask_compile_under_the_override(place):
    """Every recipe multiplies these integers exactly, so that the bits do not depend on the backend."""
    a, w = (torch.randint(-2, 3, shape).bfloat16().requires_grad_() for shape in ((24, 32), (3, 64, 32)))
    is_used = torch.tensor([True, False, True])

    def layer(a: Tensor, w: Tensor) -> Tensor:
        return F.grouped_mm(a, w[is_used].transpose(1, 2), offs=OFFS[is_used])

    block = override_torch("mxfp8")
    torch._dynamo.reset()
    compiled = torch.compile(block(layer) if place == "inside" else layer, fullgraph=True, backend="aot_eager")
    around = block if place == "around" else contextlib.nullcontext()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), around:
        y = compiled(a, w)
    wanted, dy = layer(a, w), torch.ones(24, 64).bfloat16()
    assert torch.equal(y, wanted)
    assert all(map(torch.equal, torch.autograd.grad(y, (a, w), dy), torch.autograd.grad(wanted, (a, w), dy)))


BODIES = {
    "cond": lambda f, a: torch.cond(a.sum() > 0, f, lambda a: f(a * 2), (a,)),
    "while_loop": lambda f, a: torch._higher_order_ops.while_loop(
        lambda i, a: i < 1, lambda i, a: (i + 1, f(a)), (torch.zeros((), dtype=torch.int32), a)
    )[1],
}


@pytest.mark.parametrize("call", BODIES.values(), ids=BODIES)
def test_bodies_of_compiled_control_flow_are_traced_under_the_override(call):
    a, b = torch.randn(24, 32).bfloat16().abs(), torch.randn(3, 32, 32).bfloat16().transpose(1, 2)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda a: call(lambda a: F.grouped_mm(a, b, offs=OFFS), a), fullgraph=True, backend="aot_eager"
    )
    with override_torch("mxfp8"):
        y = compiled(a)
    assert torch.equal(y, grouped_mm(a, b, OFFS, recipe="mxfp8"))


def test_a_region_that_cannot_be_traced_under_the_override_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(torch_function, "_warned", set())
    a, b = (x.detach() for x in operands())

    def gemm(a: Tensor) -> Tensor:
        return F.grouped_mm(a, b, offs=OFFS)

    def compiled(function: Callable[[Tensor], Tensor]) -> Tensor:
        torch._dynamo.reset()
        region = torch.compiler.nested_compile_region(function)
        return torch.compile(lambda a: region(a) + 0, fullgraph=True, backend="aot_eager")(a)

    with override_torch("mxfp8"), pytest.warns(UserWarning, match="invoke_subgraph .* Decorate that function"):
        compiled(gemm)
    assert torch.equal(compiled(override_torch("mxfp8")(gemm)), grouped_mm(a, b, OFFS, recipe="mxfp8"))


def test_a_compiled_call_that_is_left_to_torch_is_in_one_graph_with_one_warning(monkeypatch):
    monkeypatch.setattr(torch_function, "_warned", set())
    _, b = operands()
    torch._dynamo.reset()
    compiled = torch.compile(lambda b: F.grouped_mm(b.transpose(1, 2), b), fullgraph=True, backend="aot_eager")
    with override_torch("mxfp8"), pytest.warns(UserWarning, match="it has no offs") as caught:
        compiled(b)
        compiled(b)
    assert len(caught) == 1
