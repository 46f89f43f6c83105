"""torch.library.opcheck on every op: schema, fake, autograd registration and tracing agree with what the op does."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from grouped_gemm import Recipe, grouped_mm, reference, testing
from grouped_gemm.core.library import NAMES, Size, Steps, _shortcut, schema_of

RECIPES = tuple(Recipe)
SCALED = tuple(recipe for recipe in Recipe if recipe.is_scaled)
M, K, N = 50, 40, 72  # no multiple of 32 or 128: every last block is short
FP8 = torch.float8_e4m3fn

testing.backend_kinds()  # defines the ops of every backend


def host_offs() -> torch.Tensor:
    return torch.tensor([0, 33, 33, 47], dtype=torch.int32)


def rows(features: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """(M, features): as it is usually, as a slice of columns, and without rows."""
    wide = torch.randn(M, features + 8).to(dtype)
    return {"dense": wide[:, 8:].contiguous(), "slice": wide[:, 8:], "empty": wide[:0, 8:].contiguous()}


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """(E, K, N): K contiguous, N contiguous, and a slice across both."""
    wide = torch.randn(4, N + 8, K + 8).to(dtype)
    dense = wide[:, 8:, 8:].contiguous()
    return {"k": dense.transpose(1, 2), "n": dense.transpose(1, 2).contiguous(), "slice": wide[:, 8:, 8:].mT}


def by_rows(x: torch.Tensor, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor | None]:
    return reference.quantize(x, reference.row_blocks(recipe), recipe, FP8) if recipe.is_scaled else (x, None)


def by_columns(x: torch.Tensor, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not recipe.is_scaled:
        return x, None
    return reference.quantize_columns(x, reference.group_ends(host_offs(), len(x)), recipe, FP8)


def by_weights(b: torch.Tensor, recipe: Recipe, axis: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not recipe.is_scaled:
        return b, None
    return reference.quantize(b, reference.weight_blocks(recipe, axis), recipe, FP8)


def checked_offs():
    yield "dense", (host_offs(), M, 1)
    yield "strided", (host_offs().repeat_interleave(2)[::2], M, 1)


def counted_offs():
    yield "dense", (host_offs(), len(host_offs()))
    yield "strided", (host_offs().repeat_interleave(2)[::2], len(host_offs()))


def emulated_host_offs():
    yield "dense", (host_offs(),)
    yield "strided", (host_offs().repeat_interleave(2)[::2],)


def emulated_quantize_rows():
    for recipe in SCALED:
        for name, x in rows(K).items():
            yield f"{recipe.value}-{name}", (x, recipe.value)


def emulated_quantize_columns():
    for recipe in SCALED:
        for name, x in rows(K).items():
            yield f"{recipe.value}-{name}", (x, host_offs(), recipe.value)


def emulated_quantize_weights():
    for recipe in SCALED:
        for axis in (1, 2):
            for name, b in weights().items():
                yield f"{recipe.value}-{name}-{axis}", (b, recipe.value, axis)


def emulated_grouped_mm():
    bias = torch.randn(4, N)
    for recipe in RECIPES:
        for name, b in weights().items():
            forward = by_rows(rows(K)["slice"], recipe), by_weights(b, recipe, 1)
            yield (
                f"{recipe.value}-forward-{name}",
                (*forward[0], *forward[1], bias, host_offs(), recipe.value, 1, 1, torch.float16),
            )
            dgrad = by_rows(rows(N)["dense"], recipe), by_weights(b, recipe, 2)
            yield (
                f"{recipe.value}-dgrad-{name}",
                (*dgrad[0], *dgrad[1], None, host_offs(), recipe.value, 2, 2, torch.bfloat16),
            )


def emulated_wgrad():
    for recipe in RECIPES:
        for name in ("dense", "slice", "empty"):
            left, right = by_columns(rows(K)[name], recipe), by_columns(rows(N)[name], recipe)
            yield f"{recipe.value}-{name}", (*left, *right, host_offs(), recipe.value, torch.float32)


def emulated_group_sums():
    for name, x in rows(N).items():
        yield name, (x, host_offs(), torch.bfloat16)


def torch_plan():
    yield "dense", (host_offs(), M)
    yield "strided", (host_offs().repeat_interleave(2)[::2], M)


def torch_grouped_mm():
    for name, b in weights().items():
        yield f"forward-{name}", (rows(K)["slice"], None, b, None, host_offs())
        yield f"dgrad-{name}", (rows(N)["empty"], None, b.transpose(1, 2), None, host_offs())


def torch_wgrad():
    for name, x in rows(K).items():
        yield name, (x, rows(N)[name], host_offs())


def hipblaslt_host_offs():
    yield from emulated_host_offs()


def hipblaslt_quantize_activations():
    offs = torch.tensor([16, 48], dtype=torch.int32)  # what is of no group is not written, and opcheck compares all
    for name, x in rows(48).items():
        for wanted in ((True, True), (True, False), (False, True)):
            if len(x):
                yield f"{name}-{wanted}", (x[:48], offs, offs.clone(), "fp8_rowwise", *wanted)
    yield "empty", (x, offs, offs.clone(), "fp8_rowwise", True, False)


def hipblaslt_quantize_weights():
    for name, b in weights().items():
        for wanted in ((True, True), (True, False), (False, True)):
            yield f"{name}-{wanted}", (b, "fp8_rowwise", *wanted)


def hipblaslt_grouped_mm():
    for name, b in weights().items():
        yield f"forward-{name}", (rows(K)["slice"], None, b, None, host_offs(), host_offs(), M, "none")
        yield f"dgrad-{name}", (rows(N)["dense"], None, b.mT, None, host_offs(), host_offs(), M, "none")


def hipblaslt_wgrad():
    for name in ("dense", "slice", "empty"):
        a, dy = rows(K)[name], rows(N)[name]
        yield name, (a, None, dy, None, host_offs(), len(a), "none")


def hipblaslt_group_sums():
    yield from emulated_group_sums()


# By op, a function that yields names and arguments.
SAMPLES = {
    sample.__name__: sample
    for sample in (
        checked_offs,
        counted_offs,
        emulated_group_sums,
        emulated_grouped_mm,
        emulated_host_offs,
        emulated_quantize_columns,
        emulated_quantize_rows,
        emulated_quantize_weights,
        emulated_wgrad,
        hipblaslt_group_sums,
        hipblaslt_grouped_mm,
        hipblaslt_host_offs,
        hipblaslt_quantize_activations,
        hipblaslt_quantize_weights,
        hipblaslt_wgrad,
        torch_grouped_mm,
        torch_plan,
        torch_wgrad,
    )
}


# Kernels of Triton run interpreted on a CPU: tests/interpreter checks their ops. Scaled products of
# hipBLASLt need a build that takes them: tests/test_hipblaslt.py.
INTERPRETED = ("triton_", "deepgemm_", "torch_quantize_", "torch_scaled_", "torch_token_")
HERE = sorted(name for name in NAMES if not name.startswith(INTERPRETED))


def test_every_op_has_samples():
    assert sorted(SAMPLES) == HERE


@pytest.mark.parametrize("name", HERE)
def test_op_passes_opcheck(name):
    for sample, arguments in SAMPLES[name]():
        utilities = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        # test_schema compares arguments with torch.allclose, which has no fp8; the next test covers what it looks for.
        if any(isinstance(x, torch.Tensor) and x.dtype.itemsize == 1 for x in arguments):
            utilities.remove("test_schema")
        try:
            torch.library.opcheck(op_named(name), arguments, test_utils=utilities)
        except Exception as error:
            raise AssertionError(f"{name} on {sample}: {error}") from error


@pytest.mark.parametrize("name", HERE)
def test_op_neither_changes_nor_returns_its_arguments(name):
    for sample, arguments in SAMPLES[name]():
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        before = [bits(x) for x in tensors]
        results = op_named(name)(*arguments)
        assert all(torch.equal(old, bits(x)) for old, x in zip(before, tensors)), f"{name} on {sample} wrote to one"
        places = {x.untyped_storage().data_ptr() for x in tensors if x.numel()}
        for result in results if isinstance(results, tuple) else (results,):
            assert result.untyped_storage().data_ptr() not in places, f"{name} on {sample} returned one"


def op_named(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.grouped_gemm, name).default


def bits(x: torch.Tensor) -> torch.Tensor:
    """A copy of the bytes of ``x``, so that NaN equals itself."""
    return x.contiguous().view(torch.uint8).clone()


# What one annotated function says


def _sample_op(
    x_MD: torch.Tensor, scale: torch.Tensor | None, num_rows: Size, axis: int, recipe: str, rows: bool, to: torch.dtype
) -> Steps[tuple[torch.Tensor, torch.Tensor]]:
    yield x_MD, x_MD


def _op_of_one_result(offs: torch.Tensor) -> Steps[torch.Tensor]:
    yield offs


def test_a_schema_follows_from_annotations():
    arguments = "Tensor x, Tensor? scale, SymInt num_rows, int axis, str recipe, bool rows, ScalarType to"
    assert schema_of(_sample_op) == f"sample_op({arguments}) -> (Tensor, Tensor)"
    assert schema_of(_op_of_one_result) == "op_of_one_result(Tensor offs) -> Tensor"


# The short way of an eager call


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return op(*args, **kwargs or {})


class Replace(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


class Wrapped(torch.Tensor):
    pass


X = torch.zeros(2, 2)
short = _shortcut(lambda *args: "op", lambda *args: "implementation")


def test_where_nothing_watches_an_op_is_its_implementation():
    assert short(X, None, torch.nn.Parameter(X), "none", torch.float32, 3, True) == "implementation"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert short(X) == "implementation"


@pytest.mark.parametrize("watch", (Watch, Replace, torch.autograd.profiler.profile), ids=lambda w: w.__name__)
def test_what_watches_ops_sees_them(watch):
    with watch():
        assert short(X) == "op"
    assert short(X) == "implementation"


def test_subclasses_and_transforms_go_through_the_dispatcher():
    seen = []
    torch.func.vmap(lambda x: seen.append(short(x)) or x)(X)
    assert [short(X.as_subclass(Wrapped)), *seen, short(X.to("meta"))] == ["op", "op", "op"]


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and checks what it traced with other random numbers
@pytest.mark.parametrize("recipe", (None, "fp8_blockwise"))
def test_a_trace_has_ops_and_no_values_of_offs(recipe):
    a, b = torch.randn(12, 32).bfloat16(), torch.randn(3, 32, 48).bfloat16()
    offs, others = torch.tensor([2, 5, 12], dtype=torch.int32), torch.tensor([7, 7, 9], dtype=torch.int32)

    def call(a, b, offs):
        return grouped_mm(a, b, offs, recipe=recipe, kernel_preference="emulated")

    traced = torch.jit.trace(call, (a, b, offs))
    assert torch.equal(traced(a, b, others), call(a, b, others))
