"""torch.library.opcheck on every op: schema, fake, autograd registration and tracing agree with what the op does."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from routings import blocks_of, routing
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from grouped_gemm import NoBackendError, Recipe, grouped_mm, reference, testing
from grouped_gemm.core.library import NAMES, Changed, Size, Steps, _shortcut, ops, schema_of
from grouped_gemm.core.machine import machine_of
from grouped_gemm.moe import decode, gemms, steps  # noqa: F401 - define ops

RECIPES = (Recipe.NONE, Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE, Recipe.MXFP8)  # the others differ in values
M, K, N = 50, 40, 72  # no multiple of 32 or 128: every last block is short


def host_offs() -> torch.Tensor:
    return torch.tensor([0, 33, 33, 47], dtype=torch.int32)


def rows(features: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """(M, features): contiguous, as a slice of columns, and without rows."""
    wide = torch.randn(M, features + 8).to(dtype)
    return {"dense": wide[:, 8:].contiguous(), "slice": wide[:, 8:], "empty": wide[:0, 8:].contiguous()}


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """(E, K, N): K contiguous, N contiguous, and a slice across both."""
    wide = torch.randn(4, N + 8, K + 8).to(dtype)
    dense = wide[:, 8:, 8:].contiguous()
    return {"k": dense.transpose(1, 2), "n": dense.transpose(1, 2).contiguous(), "slice": wide[:, 8:, 8:].mT}


def checked_offs():
    yield "dense", (host_offs(), M, 1)
    yield "strided", (host_offs().repeat_interleave(2)[::2], M, 1)


def counted_offs():
    yield "dense", (host_offs(), len(host_offs()))
    yield "strided", (host_offs().repeat_interleave(2)[::2], len(host_offs()))


def moe_route():
    ids = torch.tensor([[0, 3, 1], [-1, 1, 4]])
    yield "strided", (ids.t(), 4)
    yield "no tokens", (ids[:0].int(), 4)
    yield "padded", (ids, 4, 16)


def moe_find_ranks():
    ids = torch.tensor([[0, 3, 1], [-1, 1, 4]])
    yield "strided", (ids.t(), 4, 2, 9)
    yield "no tokens", (ids[:0].int(), 4, 2, 9)


def moe_pack():
    """Rows of 64 bytes, that are all used: opcheck compares every byte."""
    places = torch.tensor([[0, 2], [-1, 3], [1, -1]], dtype=torch.int32)
    yield "alone", (torch.randn(3, 32, dtype=torch.bfloat16), None, None, places, 4, "none")
    for features, k, recipe in ((32, 8, "none"), (256, 7, "fp8_blockwise")):
        slots = torch.randint(8, (k, 3)).t(), torch.rand(3, 2 * k)[:, ::2]
        yield recipe, (torch.randn(features, 3, dtype=torch.bfloat16).t(), *slots, places, 4, recipe)


def moe_limit_rows():
    numbers = torch.tensor([[2, 3, 9], [1, 1, 9]], dtype=torch.int32)
    yield "one is lost", (torch.tensor([[0, 2], [-1, -1], [1, -1]], dtype=torch.int32), numbers, 1)
    yield "no tokens", (torch.empty(0, 2, dtype=torch.int32), torch.zeros_like(numbers), 3)


def moe_local_ids():
    ids, told = torch.arange(24, dtype=torch.int32).view(6, 4), torch.tensor([[2, 0], [1, 1]], dtype=torch.int32)
    yield "one is lost", (ids[:, 1:], told, 4)
    yield "none is", (ids, told.fill_(0), 0)


def moe_pack_for_peers():
    """On a CPU, where no kernel runs, rows go to this rank's buffer."""
    for name, (*tokens, places, num_rows, recipe) in moe_pack():
        told, shifts = torch.ones(2, 2, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int64)
        buffer = torch.zeros(4096, dtype=torch.uint8)
        yield name, (buffer, *tokens, places, told, shifts, 1, num_rows, recipe)


# hipBLASLt needs an AMD GPU, but its ops around the GEMMs run on a CPU, and so do GEMMs without scales.
# tests/test_hipblaslt.py has the scaled GEMMs, on a fake build of torch.


def hipblaslt_host_offs():
    yield "dense", (host_offs(),)
    yield "strided", (host_offs().repeat_interleave(2)[::2],)


def hipblaslt_quantize_activations():
    offs = torch.tensor([16, 48], dtype=torch.int32)  # rows of no group are not written, and opcheck compares all rows
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
    for name, x in rows(N).items():
        yield name, (x, host_offs(), torch.bfloat16)


# Ops of the MoE layer, which no backend owns


def moe_gather():
    for name, x in rows(K).items():
        yield name, (x, *routing(len(x), 3))


def moe_combine():
    for name, x in rows(K).items():
        _, places = routing(len(x) // 2, 2)
        yield name, (x, torch.rand(places.shape), places)
        yield f"{name}, no weights", (x, None, places)
        yield f"{name}, of peers", (x, None, places, None, torch.zeros(2, dtype=torch.int64))
        yield f"{name}, none lost", (x, None, places, torch.zeros(len(places), dtype=torch.bool))


def moe_combine_backward():
    for name, x in rows(K).items():
        routed, weights, routes = x.repeat_interleave(2, 0), torch.rand(len(x), 2), routing(len(x), 2)
        yield f"{name}, both", (x, routed, weights, *routes, True)
        yield f"{name}, dweights", (x, routed, weights, *routes, False)
        yield f"{name}, dRows", (x, None, weights, *routes, True)
        yield f"{name}, no weights", (x, None, None, *routes, True)


def moe_activate():
    for name, pre in rows(K).items():
        yield f"{name}, gate", (pre, "swiglu", True)
        yield f"{name}, no gate", (pre, "gelu", False)


def moe_activate_gradient():
    for dh, pre in zip(rows(K).values(), rows(2 * K).values()):
        yield "gate", (dh, pre, "swiglu_clamped", False)
        yield "no gate", (dh, dh, "relu", False)


def moe_activate_backward():
    for dh, pre in zip(rows(K).values(), rows(2 * K).values()):
        offs, (source, places) = host_offs().clamp(max=len(dh)), routing(len(dh), 1)
        yield "weights", (dh, pre, torch.rand(len(dh), 1), source, places, "swiglu", True, offs)
        yield "no weights", (dh, pre, None, source, None, "swiglu", False, offs)


def blocks(num_rows: int) -> torch.Tensor:
    return blocks_of([min(end, num_rows) for end in host_offs().tolist()], num_rows)


def moe_activate_quantize():
    for name, pre in rows(2 * K).items():
        yield name, (pre, blocks(len(pre)), "fp8_blockwise", "swiglu", False, 4)


def moe_activate_backward_quantize():
    for (name, dh), pre in zip(rows(K).items(), rows(2 * K).values()):
        offs, (source, places) = host_offs().clamp(max=len(dh)), routing(len(dh), 1)
        for weights in (None, torch.rand(len(dh), 1)):
            weighted = dh, pre, weights, source, places
            yield name, (*weighted, blocks(len(dh)), offs, "fp8_blockwise_pow2", "geglu", True)


def moe_quantize_tokens():
    for name, x in rows(K).items():
        yield name, (x, "fp8_blockwise")


def sources(x: torch.Tensor) -> torch.Tensor:
    """(M,): tokens of ``x`` (T, D) for each routed row, and rows without a token; no rows without tokens."""
    source = torch.randint(max(len(x), 1), (M if len(x) else 0,), dtype=torch.int32)
    source[host_offs()[-1] :] = -1
    return source


def quantized(x: torch.Tensor, b: torch.Tensor):
    """``x`` and weights, with their scales in blocks of 128."""
    return *ops.moe_quantize_tokens(x, "fp8_blockwise"), *in_blocks(b)


def in_blocks(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.quantize(w, (1, 128, 128), Recipe.FP8_BLOCKWISE, machine_of(w.device).fp8_dtype)


def moe_dequantize_tokens():
    for name, (x, recipe) in moe_quantize_tokens():
        yield name, (*ops.moe_quantize_tokens(x, recipe), torch.float16)


def moe_decode():
    """E = 4, H = 40, I = 36: gate and up in one tensor, in two, and no gate."""
    for (name, x), b in zip(rows(K).items(), weights().values()):
        x = x[:5]
        ids = torch.randint(-1, 5, (2, len(x))).t()
        slots, down, bias = (x, ids, torch.rand(ids.shape)), torch.randn(4, K, 36).bfloat16(), torch.randn(4, N)
        plain, kinds = (None, None, None), ("16 bit", "none")
        yield f"{name}, one", (*slots, b.mT, None, bias, *plain, down, None, bias[:, :K], *kinds, "swiglu", True)
        half = b.mT[:, :36], None, None
        yield f"{name}, two", (*slots, *half, *half, down, None, None, *kinds, "geglu", False)
        yield f"{name}, no gate", (*slots, *half, *plain, down, None, None, *kinds, "relu", False)
        first, last = in_blocks(b.mT), in_blocks(down)
        for kind in ("blockwise", "weight only"):
            kinds = kind, "fp8_blockwise"
            yield f"{name}, {kind}", (*slots, *first, None, *plain, *last, None, *kinds, "swiglu", False)


def moe_gathered_mm():
    for (name, x), b in zip(rows(K).items(), weights().values()):
        source, offs = sources(x), host_offs().clamp(max=len(sources(x)))
        yield name, (x, None, source, b, None, offs, torch.bfloat16)
        data, scale, w, w_scale = quantized(x, b)
        yield f"{name}, scaled", (data, scale, source, w, w_scale, offs, torch.bfloat16)


def moe_gated_mm():
    for (name, x), b in zip(rows(K).items(), weights().values()):
        source, offs = sources(x), host_offs().clamp(max=len(sources(x)))
        for keep in ("full", "nothing"):
            options = torch.bfloat16, "swiglu", keep == "nothing", keep
            yield f"{name} {keep}", (x, None, source, b, None, offs, "none", *options)
            data, scale, w, w_scale = quantized(x, b)
            yield f"{name} {keep}, scaled", (data, scale, source, w, w_scale, offs, "fp8_blockwise", *options)


def moe_gathered_wgrad():
    for name, x in rows(K).items():
        source, offs = sources(x), host_offs().clamp(max=len(sources(x)))
        dy = rows(N)[name][: len(source)]
        yield f"{name}, lhs", (x, dy, source, True, offs, torch.bfloat16)
        yield f"{name}, rhs", (dy, x, source, False, offs, torch.float32)


def moe_gathered_wgrad_add():
    for name, (*operands, _) in moe_gathered_wgrad():
        yield name, (torch.randn(len(operands[4]), *(x.shape[1] for x in operands[:2])), *operands)


# For each op, a function that yields names and arguments.
BY_HAND = {
    sample.__name__: sample
    for sample in (
        checked_offs,
        counted_offs,
        hipblaslt_group_sums,
        hipblaslt_grouped_mm,
        hipblaslt_host_offs,
        hipblaslt_quantize_activations,
        hipblaslt_quantize_weights,
        hipblaslt_wgrad,
        moe_route,
        moe_activate,
        moe_activate_backward,
        moe_activate_backward_quantize,
        moe_activate_gradient,
        moe_activate_quantize,
        moe_combine,
        moe_combine_backward,
        moe_decode,
        moe_dequantize_tokens,
        moe_find_ranks,
        moe_gated_mm,
        moe_gather,
        moe_gathered_mm,
        moe_gathered_wgrad,
        moe_gathered_wgrad_add,
        moe_pack,
        moe_limit_rows,
        moe_local_ids,
        moe_pack_for_peers,
        moe_quantize_tokens,
    )
}
# Ops whose backend runs here, but whose kernels do not. tests/interpreter has those that Triton interprets.
NOT_HERE = ("torch_quantize_", "torch_scaled_", "torch_token_")


class Recorder(TorchDispatchMode):
    """Records the arguments of each op of this package, once for each set of shapes, strides and dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, dict[object, tuple[object, ...]]] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "grouped_gemm":
            forms = tuple((x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for x in args)
            without_history = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in args)
            self.found.setdefault(op._opname, {}).setdefault(forms, without_history)
        return op(*args, **kwargs or {})


@functools.cache
def samples() -> tuple[dict[str, list[tuple[str, tuple[object, ...]]]], set[str]]:
    """Names and arguments by op, and which backends run here.

    A backend's ops are recorded from training calls, with each recipe, on operands in each memory order.
    """
    torch.manual_seed(0)
    ran = set()
    with Recorder() as recorder:
        for kind, recipe, (a, b) in itertools.product(testing.backend_kinds(), RECIPES, zip(rows(K), weights())):
            bias = torch.randn(4, N, requires_grad=True) if (a, b) == ("dense", "k") else None
            leaves = [x.requires_grad_() for x in (rows(K)[a], weights()[b])]
            dy = rows(N)[a]
            try:
                grouped_mm(*leaves, host_offs(), bias=bias, recipe=recipe, kernel_preference=kind).backward(dy)
                if b == "n":
                    leaves[1].main_grad = torch.zeros_like(leaves[1], dtype=torch.float32)
                    y = grouped_mm(
                        *leaves, host_offs(), recipe=recipe, kernel_preference=kind, accumulate_main_grad=True
                    )
                    y.backward(dy)
                if b == "k":
                    grouped_mm(leaves[0].t(), dy, host_offs(), recipe=recipe, kernel_preference=kind)
            except NoBackendError:
                continue
            ran.add(kind.value)
    found = {name: [(str(i), x) for i, x in enumerate(forms.values())] for name, forms in recorder.found.items()}
    return found | {name: list(sample()) for name, sample in BY_HAND.items()}, ran


testing.backend_kinds()  # defines the ops of every backend
each_op = pytest.mark.parametrize("name", sorted(NAMES))


def samples_of(name: str) -> list[tuple[str, tuple[object, ...]]]:
    found, ran = samples()
    if name not in found:
        runs_elsewhere = name.partition("_")[0] not in ran or name.startswith(NOT_HERE)
        assert runs_elsewhere, f"no call of a backend that runs here reaches {name}"
        pytest.skip("its backend or its kernel does not run here")
    return found[name]


@each_op
def test_op_passes_opcheck(name):
    for sample, arguments in samples_of(name):
        utilities = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        # test_schema compares arguments with torch.allclose, which has no fp8; the next test covers what it looks for.
        if any(isinstance(x, torch.Tensor) and x.dtype.itemsize == 1 for x in arguments):
            utilities.remove("test_schema")
        try:
            torch.library.opcheck(op_named(name), arguments, test_utils=utilities)
        except Exception as error:
            raise AssertionError(f"{name} on {sample}: {error}") from error


@each_op
def test_op_neither_returns_its_arguments_nor_changes_others_than_it_says(name):
    changed = [x.alias_info is not None for x in op_named(name)._schema.arguments]
    for sample, arguments in samples_of(name):
        tensors = [x for x, may_change in zip(arguments, changed) if isinstance(x, torch.Tensor) and not may_change]
        before = [bits(x) for x in tensors]
        results = op_named(name)(*arguments)
        assert all(torch.equal(old, bits(x)) for old, x in zip(before, tensors)), (
            f"{name} on {sample} wrote to its input"
        )
        places = {x.untyped_storage().data_ptr() for x in tensors if x.numel()}
        for result in results if isinstance(results, tuple) else (results,) if results is not None else ():
            assert result.untyped_storage().data_ptr() not in places, f"{name} on {sample} returned its input"


def op_named(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.grouped_gemm, name).default


def bits(x: torch.Tensor) -> torch.Tensor:
    """A copy of the bytes of ``x``, so that NaN equals itself."""
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


# Schemas from annotated functions


def _sample_op(
    x_MD: torch.Tensor, scale: torch.Tensor | None, num_rows: Size, axis: int, recipe: str, rows: bool, to: torch.dtype
) -> Steps[tuple[torch.Tensor, torch.Tensor]]:
    yield x_MD, x_MD


def _op_of_one_result(offs: torch.Tensor) -> Steps[torch.Tensor]:
    yield offs


def _op_that_changes(sum_EKN: Changed, lhs: torch.Tensor) -> Steps[None]:
    yield None


def test_a_schema_follows_from_annotations():
    arguments = "Tensor x, Tensor? scale, SymInt num_rows, int axis, str recipe, bool rows, ScalarType to"
    assert schema_of(_sample_op) == f"sample_op({arguments}) -> (Tensor, Tensor)"
    assert schema_of(_op_of_one_result) == "op_of_one_result(Tensor offs) -> Tensor"
    assert schema_of(_op_that_changes) == "op_that_changes(Tensor(a!) sum, Tensor lhs) -> ()"


# The shortcut of an eager call


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


def test_an_op_outside_of_modes_calls_its_implementation_directly():
    assert short(X, None, torch.nn.Parameter(X), "none", torch.float32, 3, True) == "implementation"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert short(X) == "implementation"


@pytest.mark.parametrize("watch", (Watch, Replace, torch.autograd.profiler.profile), ids=lambda w: w.__name__)
def test_modes_and_the_profiler_see_ops(watch):
    with watch():
        assert short(X) == "op"
    assert short(X) == "implementation"


def test_subclasses_and_transforms_go_through_the_dispatcher():
    seen = []
    torch.func.vmap(lambda x: seen.append(short(x)) or x)(X)
    assert [short(X.as_subclass(Wrapped)), *seen, short(X.to("meta"))] == ["op", "op", "op"]


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and checks what it traced with other random numbers
@pytest.mark.parametrize("recipe", (None, "fp8_blockwise"))
def test_a_trace_has_ops_and_not_the_values_of_offs(recipe):
    a, b = torch.randn(12, 32).bfloat16(), torch.randn(3, 32, 48).bfloat16()
    offs, others = torch.tensor([2, 5, 12], dtype=torch.int32), torch.tensor([7, 7, 9], dtype=torch.int32)

    def call(a, b, offs):
        return grouped_mm(a, b, offs, recipe=recipe, kernel_preference="emulated")

    traced = torch.jit.trace(call, (a, b, offs))
    assert torch.equal(traced(a, b, others), call(a, b, others))
