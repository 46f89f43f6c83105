"""The hipBLASLt backend: its requirements, whole calls on a fake torch that checks its arguments, and the real one.

The CPU stands for an MI300X or MI355X: selection, layouts and loops over groups are those of the GPU, and so are all
GEMMs except those of MX operands. tests/interpreter/test_hipblaslt.py has its Triton kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import fake_rocm
import pytest
import torch
from fake_rocm import BUILDS, Build
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from grouped_gemm import CallSpec, Explanation, Pass, Recipe, grouped_mm, quantize_weights, reference, testing
from grouped_gemm.backends import Candidate, get_backend
from grouped_gemm.backends.base import Health
from grouped_gemm.backends.hipblaslt import backend as hipblaslt
from grouped_gemm.core.call_spec import RowClass
from grouped_gemm.core.preference import BackendKind, KernelPreference
from grouped_gemm.selection.rules import decide
from grouped_gemm.testing import DGRAD, TRAINING, Case, Shape

AUTO = KernelPreference.AUTO
HIPBLASLT, TRITON, EMULATED = (BackendKind[name] for name in ("HIPBLASLT", "TRITON", "EMULATED"))
FORWARD, BACKWARD, WGRAD = Pass
NONE, ROWWISE, POW2, MX = Recipe.NONE, Recipe.FP8_ROWWISE, Recipe.FP8_ROWWISE_POW2, Recipe.MXFP8
BACKEND = get_backend(HIPBLASLT)
CPU = torch.device("cpu")


def on(name: str, rocm: str = ""):
    """A machine with Triton, and with another ROCm if ``rocm`` is given."""
    arch, usual = BUILDS[name]
    machine = fake_rocm.machine(arch, rocm or usual)
    return dataclasses.replace(machine, versions=(*machine.versions, ("triton", "3.6.0")))


MI300X, MI355X = on("MI300X"), on("MI355X")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Build]]:
    """Installs a fake build of torch for a machine, and makes its health check."""

    yield functools.partial(fake_rocm.install, monkeypatch)
    fake_rocm.forget()


# Selection


def spec(machine=MI355X, recipe: Recipe = ROWWISE, **facts) -> CallSpec:
    facts = {"num_groups": 8, "k": 4096, "n": 2048, "passes": TRAINING, "group_alignment": 128} | facts
    return CallSpec(machine, rows=RowClass.LARGE, recipe=recipe, **facts)


def decision(asked: CallSpec, preference: BackendKind | KernelPreference = HIPBLASLT, *broken: BackendKind):
    def health(kind: BackendKind) -> Health:
        return Health("does not work", "Repair it.") if kind in broken else Health()

    kinds = (HIPBLASLT, TRITON, EMULATED)
    found = [Candidate(get_backend(kind), lambda kind=kind: health(kind)) for kind in kinds]
    return decide(asked, preference, found)


@pytest.mark.parametrize(
    "facts, passes, text",
    (
        ({}, (), ""),
        ({"machine": MI300X}, (), ""),
        ({"recipe": NONE, "k": 2881, "n": 15, "group_alignment": 1}, (), ""),
        ({"recipe": MX}, (), ""),
        ({"recipe": POW2, "machine": MI300X, "group_alignment": 16}, (), ""),
        ({"machine": dataclasses.replace(MI300X, arch="gfx90a")}, TRAINING, "gfx942 or gfx950; found gfx90a"),
        ({"recipe": Recipe.FP8_BLOCKWISE}, TRAINING, "no blocks of 128 or 128x128); found fp8_blockwise"),
        ({"recipe": Recipe.FP8_BLOCKWISE_POW2}, TRAINING, "found fp8_blockwise_pow2. Use fp8_rowwise"),
        ({"recipe": MX, "machine": MI300X}, TRAINING, "gfx950 for mxfp8; found gfx942"),
        ({"recipe": MX, "machine": on("MI355X", "6.9")}, TRAINING, "ROCm 7.0 to 7.13 for mxfp8"),
        ({"recipe": MX, "machine": on("MI355X", "7.0")}, (), ""),
        ({"recipe": MX, "machine": on("MI355X", "7.13")}, (), ""),
        ({"recipe": MX, "machine": on("MI355X", "7.14")}, TRAINING, "found ROCm 7.14"),
        ({"recipe": MX, "machine": on("MI355X", "7.14.0a2")}, TRAINING, "found ROCm 7.14.0a2"),
        ({"machine": on("MI355X", "6.4")}, TRAINING, "ROCm 6.5 or later for fp8 on gfx950; found ROCm 6.4"),
        ({"machine": on("MI355X", "6.5")}, (), ""),
        ({"machine": on("MI355X", "6.4"), "recipe": NONE}, (), ""),
        ({"k": 2888}, TRAINING, "K and N in multiples of 16 with scales; found K = 2888"),
        ({"n": 712}, TRAINING, "N = 712"),
        ({"recipe": MX, "k": 2880}, (FORWARD,), "K in multiples of 128 for mxfp8; found K = 2880"),
        ({"recipe": MX, "n": 704}, (BACKWARD,), "N in multiples of 128 for mxfp8; found N = 704"),
        ({"group_alignment": 8}, (WGRAD,), "group_alignment a multiple of 16 with scales, of 128 for mxfp8; found"),
        ({"recipe": MX, "group_alignment": 64}, (WGRAD,), "found group_alignment = 64"),
        ({"dtype": torch.float16, "out_dtype": torch.float16}, TRAINING, "bfloat16 with scales; found float16"),
        ({"out_dtype": torch.float32}, TRAINING, "bfloat16 with scales; found bfloat16 to float32"),
        ({"recipe": NONE, "dtype": torch.float16, "out_dtype": torch.float16}, (), ""),
        ({"recipe": NONE, "out_dtype": torch.float32}, TRAINING, "output in the dtype of the operands"),
        ({"has_bias": True}, (FORWARD,), "no bias"),
        ({"host_sync": False}, TRAINING, "host syncs to be allowed; found CUDA graph capture"),
    ),
    ids=str,
)
def test_what_it_refuses(facts, passes, text):
    asked = spec(**facts)
    found = [r for r in decision(asked).refusals if r.backend is HIPBLASLT]
    reasons = {p: "; ".join(f"{r.reason}. {r.fix}" for r in found if p in r.passes) for p in asked.passes}
    assert tuple(p for p in asked.passes if reasons[p]) == tuple(passes)
    assert all(text in reasons[p] for p in passes)


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("recipe", Recipe, ids=lambda r: r.value)
def test_what_auto_chooses(recipe, name):
    """Triton; where that is broken, hipBLASLt for what it runs."""
    asked = spec(on(name), recipe)
    assert decision(asked, AUTO).backends == (TRITON,)
    runs = recipe in (NONE, ROWWISE, POW2) or (recipe is MX and name == "MI355X")
    assert decision(asked, AUTO, TRITON).backends == ((HIPBLASLT,) if runs else (EMULATED,))
    ragged = decision(asked._replace(group_alignment=1), AUTO, TRITON)
    takes_wgrad = recipe is NONE
    expected = (HIPBLASLT if runs else EMULATED,) * 2 + (HIPBLASLT if takes_wgrad else EMULATED,)
    assert tuple(ragged.backend(pass_) for pass_ in TRAINING) == expected


def test_explain_reports_its_host_sync():
    assert Explanation(decision(spec())).host_syncs == {"hipblaslt": BACKEND.host_syncs}


def test_a_wrong_tiny_run_makes_it_unhealthy(install, monkeypatch):
    build = install("MI355X")
    right = build.scaled_mm

    def without_scales(a, b, scale_a, scale_b, *, out_dtype, out):
        return right(a, b, torch.ones_like(scale_a), scale_b, out_dtype=out_dtype, out=out)

    monkeypatch.setattr(torch, "_scaled_mm", without_scales)
    assert BACKEND.health(CPU).problem == "a tiny fp8_rowwise GEMM gives wrong results"


# Whole calls

RAGGED = Shape("ragged", (0, 37, 1, 130, 0), tail=5, k=256, n=128)
SHAPES = (
    RAGGED,
    Shape("ragged_16", (0, 37, 1, 130, 0), tail=5, k=144, n=176),
    Shape("aligned_16", (16, 0, 48, 128, 16), tail=5, k=144, n=176, alignment=16),
    Shape("aligned_128", (128, 0, 256), tail=7, k=128, n=256, alignment=128),
    Shape("one_row", (1,), k=128, n=128),
    Shape("all_empty", (0, 0, 0), tail=4, k=128, n=128, alignment=128),
    Shape("no_rows", (0, 0), k=128, n=128, alignment=128),
    Shape("many_groups", tuple(i % 4 for i in range(40)), k=128, n=128),
)
ON_EACH = [(name, recipe) for name in BUILDS for recipe in (NONE, ROWWISE, POW2)] + [("MI355X", MX)]
AT_ONCE = [(name, recipe, True) for name, recipe in ON_EACH if recipe in (ROWWISE, POW2)]
CALLS = [
    (shape, name, recipe, grouped)
    for shape in SHAPES
    for name, recipe, grouped in [*((*each, False) for each in ON_EACH), *AT_ONCE]
    if recipe is not MX or shape.k % 128 == 0
]


def case_of(shape: Shape, recipe: Recipe, b_contiguous: str = "k", dtype: torch.dtype = torch.bfloat16) -> Case:
    """A case with all passes, except wgrad where the group sizes of ``shape`` are not the multiples that it needs."""
    multiple = {NONE: 1, MX: 128}.get(recipe, 16)
    passes = DGRAD if shape.alignment % multiple else TRAINING
    return Case(HIPBLASLT, recipe, dtype, passes, shape, b_contiguous)


@pytest.mark.parametrize("b_contiguous", "kn")
@pytest.mark.parametrize("shape, name, recipe, grouped", CALLS, ids=lambda x: getattr(x, "name", str(x)))
def test_every_pass_against_the_reference(shape, name, recipe, grouped, b_contiguous, install):
    install(name, grouped=grouped)
    check_passes(case_of(shape, recipe, b_contiguous), CPU)


def check_passes(case: Case, device: torch.device) -> None:
    inputs = testing.make_inputs(case, device)
    found = testing.run(case, inputs)
    for pass_ in case.passes:
        result, truth = found.of(pass_), testing.expected(pass_, inputs, case.recipe)
        assert testing.worst_row_error(result, truth) <= testing.rounding_tolerance(case.dtype, case, device), pass_
        if pass_ is not WGRAD:
            assert not result[sum(case.shape.sizes) :].any()
    if WGRAD in case.passes:
        assert found.db.stride() == inputs.b.stride()
        assert not any(found.db[e].any() for e, size in enumerate(case.shape.sizes) if size == 0)


scaled_mm_on_cpu = torch._scaled_mm


def rowwise_on_cpu(a, b, scale_a, scale_b, out):
    with torch.backends.mkldnn.flags(enabled=False):  # which has no e4m3fnuz
        return scaled_mm_on_cpu(a, b, scale_a, scale_b, out_dtype=out.dtype, out=out)


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", BUILDS)
def test_the_cpus_own_scaled_mm_agrees(name, shape, install, monkeypatch):
    build = install(name)
    x, out = torch.ones(16, 16).to(build.fp8), torch.empty(16, 16, dtype=torch.bfloat16)
    try:
        rowwise_on_cpu(x, x.t(), torch.ones(16, 1), torch.ones(1, 16), out)
    except RuntimeError as error:
        pytest.skip(f"this torch has no rowwise scaled GEMM on a CPU: {error}")
    monkeypatch.setattr(build, "rowwise_gemm", rowwise_on_cpu)
    check_passes(case_of(shape, ROWWISE), CPU)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
def test_other_dtypes_without_scales(dtype, install):
    install("MI300X")
    check_passes(case_of(Shape("odd", (3, 0, 4), tail=2, k=17, n=15), NONE, dtype=dtype), CPU)


def test_there_is_one_gemm_for_each_group_with_rows(install):
    build = install("MI355X")
    testing.run(case := case_of(SHAPES[2], ROWWISE), testing.make_inputs(case, CPU))
    assert [name for name, _ in build.calls] == ["scaled_mm"] * 4 * 3
    build.calls.clear()
    testing.run(case := case_of(SHAPES[5], ROWWISE), testing.make_inputs(case, CPU))
    assert build.calls == []


def operands_of(case: Case, inputs: testing.Inputs):
    """Plan and operands of all three passes."""
    plan = BACKEND.plan(inputs.offs, len(inputs.a), case.shape.alignment)
    a = BACKEND.quantize_activations(inputs.a, plan, case.recipe, rows=True, columns=True)
    dy = BACKEND.quantize_activations(inputs.dy, plan, case.recipe, rows=True, columns=True)
    b = BACKEND.quantize_weights(inputs.b, case.recipe, forward=True, dgrad=True)
    return plan, a, dy, b


class Allocations(TorchDispatchMode):
    """Ops whose results are new tensors: neither views nor arguments."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func._schema.returns
        if any(result.alias_info is None for result in results):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name, recipe", ON_EACH, ids=str)
def test_gemms_read_the_quantized_storage_and_write_the_result(name, recipe, install, monkeypatch):
    """Nothing is copied, transposed or allocated, except the result."""
    build = install(name)
    case = case_of(SHAPES[3], recipe)
    plan, a, dy, b = operands_of(case, testing.make_inputs(case, CPU))
    # a mode does not see what an op calls
    inside = SimpleNamespace(
        hipblaslt_grouped_mm=hipblaslt._hipblaslt_grouped_mm, hipblaslt_wgrad=hipblaslt._hipblaslt_wgrad
    )
    monkeypatch.setattr(hipblaslt, "ops", inside)
    with Allocations() as allocations:
        y = BACKEND.grouped_mm(a[0], b[0], plan, torch.bfloat16)
        da = BACKEND.grouped_mm(dy[0], b[1], plan, torch.bfloat16)
        db = BACKEND.wgrad(a[1], dy[1], plan, torch.bfloat16, contiguous="k")
    assert allocations.found == ["aten.new_empty.default"] * 3
    groups = 2  # that have rows
    assert len(build.calls) == 3 * groups
    per_pass = [(a[0], b[0], y)] * groups + [(dy[0], b[1], da)] * groups + [(dy[1], a[1], db)] * groups
    for (_, tensors), (lhs, rhs, result) in zip(build.calls, per_pass):
        *read, out = tensors
        for tensor, whole in zip(read, (lhs.data, rhs.data, lhs.scale, rhs.scale)):
            assert shares_storage(tensor, whole)
        assert shares_storage(out, result)


def shares_storage(x: torch.Tensor, whole: torch.Tensor) -> bool:
    return x.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


# Copies of offs on the host


def train(a: torch.Tensor, w: torch.Tensor, offs: torch.Tensor, **options) -> tuple[torch.Tensor, ...]:
    a, w = a.detach().requires_grad_(), w.detach().requires_grad_()
    y = grouped_mm(a, w.transpose(1, 2), offs, kernel_preference=HIPBLASLT, **options)
    return (y, *torch.autograd.grad(y.float().square().sum(), (a, w)))


def arguments() -> tuple[torch.Tensor, ...]:
    a, w = torch.randn(100, 32).bfloat16(), torch.randn(3, 48, 32).bfloat16()
    return a, w, torch.tensor([16, 16, 96], dtype=torch.int32)


@pytest.mark.parametrize("recipe", (NONE, ROWWISE), ids=str)
def test_offs_is_read_once_for_all_passes_of_all_projections(recipe, install):
    build = install("MI300X")
    a, w, offs = arguments()
    for _ in range(3):
        train(a, w, offs, recipe=recipe, group_alignment=16)
    assert build.reads == [offs.data_ptr()]


def test_offs_is_read_once_under_checkpointing_and_offloading(install):
    build = install("MI300X")
    a, w, offs = arguments()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
        train(a, w, offs)
    w = w.requires_grad_()
    y = checkpoint(lambda: grouped_mm(a, w.transpose(1, 2), offs, kernel_preference=HIPBLASLT), use_reentrant=False)
    y.sum().backward()
    assert len(build.reads) == 1


def test_offs_that_changes_in_place_is_read_again(install):
    build = install("MI300X")
    a, w, offs = arguments()
    train(a, w, offs)
    offs.copy_(torch.tensor([5, 50, 100]))
    found = train(a, w, offs)
    expected = train(a, w, offs.clone())
    assert all(map(torch.equal, found, expected))
    assert len(build.reads) == 3


@pytest.mark.parametrize("change", ("view", "data", "set_"))
def test_other_ways_to_change_offs_are_noticed(change, install):
    build = install("MI300X")
    a, w, offs = arguments()
    train(a, w, offs)
    new = torch.tensor([5, 50, 100], dtype=torch.int32)
    if change == "view":
        offs[1:].detach().fill_(90)
    elif change == "data":
        offs.data = new
    else:
        offs.set_(new)
    found = train(a, w, offs)
    assert all(map(torch.equal, found, train(a, w, offs.clone())))
    assert len(build.reads) == 3


def test_another_tensor_in_the_same_memory_is_read(install):
    build = install("MI300X")
    a, w, offs = arguments()
    train(a, w, offs[:])
    train(a, w, offs[:])
    assert len(build.reads) == 2


def test_values_are_kept_no_longer_than_their_tensor(install):
    install("MI300X")
    gc.collect()
    before = len(hipblaslt._host_values)
    a, w, offs = arguments()
    train(a, w, offs)
    assert len(hipblaslt._host_values) == before + 1
    del offs
    gc.collect()
    assert len(hipblaslt._host_values) == before


def test_inference_tensors_have_no_version_and_are_read_each_time(install):
    build = install("MI300X")
    with torch.inference_mode():
        a, w, offs = arguments()
        for ends in ([16, 16, 96], [5, 50, 100]):
            offs.copy_(torch.tensor(ends))
            y = grouped_mm(a, w.transpose(1, 2), offs, kernel_preference=HIPBLASLT)
            truth = reference.grouped_mm(a, w.transpose(1, 2), ends)
            assert testing.worst_row_error(y, truth) <= testing.rounding_tolerance(y.dtype)
    assert len(build.reads) == 2


def test_validation_reads_offs_again(install, monkeypatch):
    """It is the remedy for changes that torch does not see, such as those by a replayed graph."""
    build = install("MI300X")
    monkeypatch.setenv("GROUPED_GEMM_VALIDATE", "1")
    a, w, offs = arguments()
    for _ in range(2):
        train(a, w, offs)
    assert len(build.reads) == 2


@pytest.mark.parametrize("recipe", (NONE, ROWWISE), ids=str)
@pytest.mark.parametrize("ends", ([50, 20, 60], [-50, 20, 10], [20, 101, 10_000], [-1, -3, -2]), ids=str)
def test_hostile_offs_are_safe(ends, recipe, install):
    install("MI300X", grouped=True)
    a, w, _ = arguments()
    y = grouped_mm(
        a, w.transpose(1, 2), torch.tensor(ends, dtype=torch.int32), recipe=recipe, kernel_preference=HIPBLASLT
    )
    inside = reference.group_ends(torch.tensor(ends), 100)
    inputs = testing.Inputs(a, w.transpose(1, 2), None, torch.tensor(inside), y, inside)
    assert testing.worst_row_error(y, testing.expected(FORWARD, inputs, recipe)) <= testing.rounding_tolerance(y.dtype)


# torch.compile


@pytest.mark.parametrize("name, recipe", (("MI300X", NONE), ("MI300X", ROWWISE), ("MI355X", MX)), ids=str)
def test_compiles_once_for_any_number_of_rows_and_reads_offs_once(name, recipe, install):
    """A graph with two projections makes one plan."""
    build = install(name)
    counter = CompileCounterWithBackend("aot_eager")
    w = torch.randn(3, 128, 128).bfloat16().requires_grad_()

    def layer(a, offs):
        options = {"recipe": recipe, "kernel_preference": "hipblaslt", "group_alignment": 128}
        hidden = grouped_mm(a, w.transpose(1, 2), offs, **options)
        return grouped_mm(hidden, w, offs, **options)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for num_rows in (1000, 1100, 1500):
        a = torch.randn(num_rows, 128).bfloat16().requires_grad_()
        offs = torch.tensor([128, 128, num_rows // 128 * 128], dtype=torch.int32)
        build.reads.clear()
        results = [compiled(a, offs), layer(a, offs)]
        gradients = [torch.autograd.grad(y.float().square().sum(), (a, w)) for y in results]
        assert torch.equal(*results) and all(map(torch.equal, *gradients))
        assert len(build.reads) == 1
    assert counter.frame_count == 1
    torch._dynamo.reset()


# Grouped GEMMs


@pytest.mark.parametrize("grouped", (False, True))
def test_a_grouped_gemm_is_used_where_the_build_has_one(grouped, install):
    build = install("MI300X", grouped=grouped)
    case = case_of(SHAPES[2], ROWWISE)
    testing.run(case, testing.make_inputs(case, CPU))
    at_once, one_by_one = ["scaled_grouped_mm"] * 2, ["scaled_mm"] * 4 * 2
    assert [name for name, _ in build.calls] == [*(at_once if grouped else one_by_one), *["scaled_mm"] * 4]


def test_a_wrong_grouped_gemm_is_not_used(install, monkeypatch):
    build = install("MI300X")

    def wrong(*args, **options):
        return torch.zeros(40, 48, dtype=torch.bfloat16)

    monkeypatch.setattr(torch.nn.functional, "scaled_grouped_mm", wrong)
    hipblaslt._has_grouped_gemm.cache_clear()
    case = case_of(SHAPES[1], ROWWISE)
    testing.run(case, testing.make_inputs(case, CPU))
    assert {name for name, _ in build.calls} == {"scaled_mm"}


def test_ends_out_of_order_do_not_reach_the_grouped_gemm(install):
    build = install("MI300X", grouped=True)
    a, w, _ = arguments()
    offs = torch.tensor([50, 20, 101], dtype=torch.int32)
    grouped_mm(a, w.transpose(1, 2), offs, recipe=ROWWISE, kernel_preference=HIPBLASLT)
    assert {name for name, _ in build.calls if name != "scaled_mm"} == set()


# Operands that do not fit


def test_a_wrong_group_alignment_is_an_error_at_the_forward_call(install):
    install("MI300X")
    a, w, _ = arguments()
    with pytest.raises(ValueError, match=r"offs\[1\]: expected a group size that is a multiple of 16.*found 4"):
        train(a, w, torch.tensor([16, 20, 96], dtype=torch.int32), recipe=ROWWISE, group_alignment=16)


def quantized() -> tuple[torch.Tensor, ...]:
    a, w, offs = arguments()
    return a, quantize_weights(w.transpose(1, 2), ROWWISE, kernel_preference=HIPBLASLT), offs


def test_data_of_another_architecture_are_refused(install):
    install("MI355X")
    a, weights, offs = quantized()
    install("MI300X")
    with pytest.raises(ValueError, match="expected float8_e4m3fnuz, the fp8 type of gfx942; found float8_e4m3fn"):
        grouped_mm(a, weights, offs, kernel_preference=HIPBLASLT)


def test_data_at_odd_addresses_are_refused(install):
    install("MI300X")
    a, weights, offs = quantized()
    data = weights.forward.data.transpose(1, 2)
    moved = torch.empty(data.numel() + 1, dtype=data.dtype)[1:].view(data.shape).copy_(data).transpose(1, 2)
    weights = dataclasses.replace(weights, forward=dataclasses.replace(weights.forward, data=moved))
    with pytest.raises(ValueError, match="b: expected an address that is a multiple of 16 bytes"):
        grouped_mm(a, weights, offs, kernel_preference=HIPBLASLT)


@pytest.mark.parametrize("offset", (0, 1))
@pytest.mark.parametrize("name, recipe", (("MI300X", ROWWISE), ("MI355X", ROWWISE), ("MI355X", MX)), ids=str)
def test_weights_of_a_checkpoint(name, recipe, offset, install):
    """e4m3fn on either machine, with unchanged values; dgrad quantizes them again, along N."""
    install(name)
    b = torch.randn(2, 256, 128).transpose(1, 2)
    blocks = reference.weight_blocks(recipe, 1)
    data, scale = reference.quantize(b, blocks, recipe, torch.float8_e4m3fn)
    by_n = data.transpose(1, 2)
    moved = torch.empty(by_n.numel() + offset, dtype=by_n.dtype)[offset:].view(by_n.shape).copy_(by_n)
    weights = quantize_weights(moved.transpose(1, 2), recipe, scale=scale, dgrad=True, kernel_preference=HIPBLASLT)
    a, offs = torch.randn(150, 128).bfloat16().requires_grad_(), torch.tensor([20, 150], dtype=torch.int32)
    y = grouped_mm(a, weights, offs, kernel_preference=HIPBLASLT)
    values = reference.dequantize(data, scale, blocks)
    rows = testing.as_quantized(a.detach(), reference.row_blocks(recipe), recipe)
    truth = reference.grouped_mm(rows, values, [20, 150])
    assert testing.worst_row_error(y, truth) <= testing.rounding_tolerance(y.dtype)
    dy = torch.randn(150, 256).bfloat16()
    (da,) = torch.autograd.grad(y, a, dy)
    truth = reference.grouped_mm(dy, values.transpose(1, 2), [20, 150])
    assert testing.relative_error(da, truth) <= testing.quantization_tolerance(recipe, da.dtype)


def test_a_gradient_whose_rows_share_memory_is_copied_once(install):
    build = install("MI300X")
    a, w, offs = arguments()
    a = a.requires_grad_()
    y = grouped_mm(a, w.transpose(1, 2), offs, kernel_preference=HIPBLASLT)
    (da,) = torch.autograd.grad(y, a, torch.ones(1, 48).bfloat16().expand(100, 48))
    (expected,) = torch.autograd.grad(
        grouped_mm(a, w.transpose(1, 2), offs, kernel_preference=HIPBLASLT), a, torch.ones(100, 48).bfloat16()
    )
    assert torch.equal(da, expected)
    copies = {tensors[0].untyped_storage().data_ptr() for _, tensors in build.calls[2:4]}
    assert len(copies) == 1


# Ops


def samples():
    """Arguments of the ops that need a build with scaled GEMMs; tests/test_ops.py has the others."""
    for recipe in (ROWWISE, MX):
        case = Case(HIPBLASLT, recipe, passes=TRAINING, shape=SHAPES[3])
        inputs = testing.make_inputs(case, CPU)
        plan, a, dy, b = operands_of(case, inputs)
        shared = *plan.derived, len(inputs.a), recipe.value
        if recipe is MX:
            yield "hipblaslt_quantize_activations", (inputs.a, inputs.offs, *plan.derived, "mxfp8", True, True)
            yield "hipblaslt_quantize_weights", (inputs.b, "mxfp8", True, True)
        yield "hipblaslt_grouped_mm", (a[0].data, a[0].scale, b[0].data, b[0].scale, inputs.offs, *shared)
        yield "hipblaslt_wgrad", (a[1].data, a[1].scale, dy[1].data, dy[1].scale, *shared)


def test_ops_with_scales(install):
    install("MI355X")
    for name, tensors in samples():
        op = getattr(torch.ops.grouped_gemm, name).default
        torch.library.opcheck(op, tensors, test_utils=("test_faketensor",))


# On a GPU of any vendor


@pytest.mark.gpu
def test_quantizers_equal_their_twins_bit_for_bit(device):
    from hipblaslt_checks import GROUPS, check_activations, check_weights

    for recipe, group in itertools.product((ROWWISE, POW2, MX), GROUPS):
        check_activations(*group, recipe, device)
    for recipe, contiguous in itertools.product((ROWWISE, POW2, MX), "kn"):
        check_weights(recipe, contiguous, device)


def count_host_syncs(function: Callable[[], object]) -> int:
    """The number of host syncs in ``function``."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in found)


@pytest.mark.gpu
def test_plans_of_one_tensor_have_one_host_sync(device):
    offs = torch.tensor([16, 16, 96], dtype=torch.int32, device=device)
    assert count_host_syncs(lambda: [BACKEND.plan(offs, 100) for _ in range(3)]) == 1
    offs += 1
    assert count_host_syncs(lambda: BACKEND.plan(offs, 100)) == 1


# The real library, on an AMD GPU


@pytest.fixture
def amd(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("--device names another device")
    return device


@pytest.mark.rocm
def test_the_real_library_is_healthy(amd):
    assert BACKEND.health(amd) == Health()


@pytest.mark.rocm
@pytest.mark.parametrize("b_contiguous", "kn")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("recipe", (NONE, ROWWISE, POW2, MX), ids=lambda r: r.value)
def test_real_gemms_against_the_reference(recipe, shape, b_contiguous, amd):
    wanted = case_of(shape, recipe, b_contiguous)
    if reason := testing.refusal(wanted, amd):
        pytest.skip(reason)
    check_passes(wanted, amd)


@pytest.mark.rocm
def test_gemms_by_group_and_a_grouped_gemm_agree(amd, monkeypatch):
    if not hipblaslt._has_grouped_gemm(amd):
        pytest.skip("this build of torch has no grouped rowwise GEMM")
    inputs = testing.make_inputs(case := Case(HIPBLASLT, ROWWISE, shape=SHAPES[1]), amd)
    at_once = testing.run(case, inputs).y
    monkeypatch.setattr(hipblaslt, "_has_grouped_gemm", lambda device: False)
    assert testing.relative_error(at_once, testing.run(case, inputs).y) <= 2 * testing.rounding_tolerance(at_once.dtype)


@pytest.mark.rocm
def test_two_training_steps_have_one_host_sync(amd):
    a, w, offs = (x.to(amd) for x in arguments())
    train(a, w, offs, recipe=ROWWISE, group_alignment=16)  # compiles the quantizers
    offs = offs.clone()
    steps = [lambda: train(a, w, offs, recipe=ROWWISE, group_alignment=16)] * 2
    assert count_host_syncs(lambda: [step() for step in steps]) == 1
