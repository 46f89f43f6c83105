"""A launch like an earlier one runs the compiled kernel directly; one that needs another compilation does not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import fake_rocm
from triton.tools.tensor_descriptor import TensorDescriptor

from grouped_gemm import Recipe
from grouped_gemm.backends.deepgemm import layouts as deepgemm_layouts
from grouped_gemm.backends.deepgemm import quantize as deepgemm_quantize
from grouped_gemm.backends.hipblaslt import layouts as hipblaslt_layouts
from grouped_gemm.backends.hipblaslt import quantize as hipblaslt_quantize
from grouped_gemm.core import machine
from grouped_gemm.kernels.common import launch as launching
from grouped_gemm.kernels.gemm import k_grouped, m_grouped
from grouped_gemm.kernels.quantize import fp8 as quantize_fp8
from grouped_gemm.kernels.quantize import layouts
from grouped_gemm.kernels.quantize import mx as quantize_mx


class Kernel:
    """A fake of Triton's function that records compilations and launches."""

    def __init__(self):
        self.arg_names = ["x", "y", "n", "BLOCK"]
        self.compilations, self.launches = [], []

    def __getitem__(self, grid):
        def compile_and_launch(*args, **constants_and_options):
            self.compilations.append((grid, args, constants_and_options))
            return self.Compiled(self)

        return compile_and_launch

    class Compiled:
        function, packed_metadata = "function", "metadata"

        def __init__(self, kernel):
            self.kernel = kernel

        def run(self, x, y, z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *args):
            assert (stream, function, metadata) == ("stream of -1", "function", "metadata")
            assert (launch_metadata, enter_hook, exit_hook) == (None, None, None)
            self.kernel.launches.append(((x, y, z), args))

        def __getitem__(self, grid):
            return lambda *args: self.kernel.launches.append(("hooks are called", grid, args))


@pytest.fixture
def kernel(monkeypatch):
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: f"stream of {device}"))
    monkeypatch.setattr(launching, "_launchers", {})
    monkeypatch.setattr(launching, "driver", driver)
    return Kernel()


def run(kernel, x, y=None, n=32, block=64, grid=(5,), **options):
    launching.launch(kernel, grid, x, y, n, constants={"BLOCK": block}, **options)


def test_the_second_launch_passes_all_values_in_the_order_of_the_signature(kernel):
    x = torch.zeros(8)
    run(kernel, x, num_warps=4)
    run(kernel, x, num_warps=4, grid=(7, 2))
    assert kernel.compilations == [((5,), (x, None, 32), {"BLOCK": 64, "num_warps": 4})]
    assert kernel.launches == [((7, 2, 1), (x, None, 32, 64))]


@pytest.mark.parametrize("name", ("launch_enter_hook", "launch_exit_hook"))
def test_hooks_on_launches_are_called(kernel, name):
    from triton import knobs

    def hook(metadata): ...

    x = torch.zeros(8)
    run(kernel, x)
    getattr(knobs.runtime, name).add(hook)
    try:
        run(kernel, x)
    finally:
        getattr(knobs.runtime, name).remove(hook)
    run(kernel, x)
    assert kernel.launches == [("hooks are called", (5, 1, 1), (x, None, 32, 64)), ((5, 1, 1), (x, None, 32, 64))]


X = torch.zeros(64)
DESCRIBED = SimpleNamespace(base=X, block_shape=[8, 16])
OTHERS = {
    "dtype": {"x": X.half()},
    "start": {"x": X[1:]},
    "absent": {"x": X, "y": X},
    "one": {"x": X, "n": 1},
    "no multiple of 16": {"x": X, "n": 33},
    "64 bits": {"x": X, "n": 2**31},
    "64 bits, no multiple of 16": {"x": X, "n": 2**31 + 1},
    "constant": {"x": X, "block": 128},
    "option": {"x": X, "num_warps": 8},
    "descriptor": {"x": DESCRIBED},
    "box": {"x": SimpleNamespace(base=X, block_shape=[16, 8])},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_launches_that_compile_differently_are_distinguished(kernel, other):
    for arguments in ({"x": X}, other, {"x": X}, other):
        run(kernel, **arguments)
    assert len(kernel.compilations) == 2 and len(kernel.launches) == 2


@pytest.mark.parametrize("is_hip", (True, False))
def test_amd_compiles_for_storages_of_less_than_2_gib(kernel, monkeypatch, is_hip):
    monkeypatch.setattr(launching, "_IS_HIP", is_hip)
    large = torch.empty(2**31, dtype=torch.uint8)  # memory that is never written
    small = torch.empty(2**31 - 1, dtype=torch.uint8)
    for x in (small, large, large[:16]):
        run(kernel, x)
    assert len(kernel.compilations) == 1 + is_hip


@pytest.mark.parametrize("n", (0, 48, -16))
def test_sizes_that_compile_alike_share_a_kernel(kernel, n):
    run(kernel, X)
    run(kernel, X, n=n)
    assert len(kernel.compilations) == 1 and kernel.launches[0][1][2] == n


def test_constants_in_another_order_are_refused(kernel):
    with pytest.raises(ValueError, match="constants: expected"):
        launching.launch(kernel, (1,), X, None, constants={"BLOCK": 64, "n": 32})


def test_an_interpreted_kernel_is_not_cached(monkeypatch, kernel):
    monkeypatch.setattr(Kernel, "Compiled", lambda *_: None)
    run(kernel, X)
    run(kernel, X)
    assert len(kernel.compilations) == 2


@pytest.mark.parametrize("n", (1, 2, 3, 4, 5, 128, 129))
def test_whole_numbers_are_rounded_up_as_triton_rounds_them(n):
    import triton

    assert launching.next_power_of_2(n) == triton.next_power_of_2(n)
    assert [launching.cdiv(n, b) for b in (1, 3, 128)] == [triton.cdiv(n, b) for b in (1, 3, 128)]


# Kernels that compile in seconds, and launch, for any number of groups


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, tuple[int, ...], tuple]]:
    """Records launches instead of making them: the kernel, its grid, its constants."""
    found = []

    def record(self, grid, *args):
        found.append((self._kernel.__name__, grid, self._values))

    monkeypatch.setattr(launching.Launcher, "__call__", record)
    for module in (m_grouped, k_grouped):
        monkeypatch.setattr(module, "_gemms", {})
    return found


def launch_all(num_groups: int, recipe: Recipe) -> None:
    """Launches every kernel of the Triton backend, and those that quantize for DeepGEMM."""
    num_rows, k, n = 64, 128, 16
    x, b = torch.empty(num_rows, k), torch.empty(num_groups, k, n, dtype=torch.bfloat16)
    offs = torch.empty(num_groups, dtype=torch.int32)
    activations = layouts.activations(x, num_groups, recipe, rows=True, columns=True)
    weights = layouts.weights(b, recipe, forward=True, dgrad=True)
    if recipe is Recipe.MXFP8:
        quantize_mx.quantize_activations(x, offs, activations)
        quantize_mx.quantize_weights(b, weights)
    else:
        quantize_fp8.quantize_activations(x, offs, recipe, activations)
        quantize_fp8.quantize_weights(b, recipe, weights)
    rows, row_scale, columns, column_scale = activations
    y, db, sums = (b.new_empty(shape) for shape in ((num_rows, n), (num_groups, k, k), (num_groups, k)))
    m_grouped.grouped_mm(rows, row_scale, weights[0].transpose(1, 2), weights[2], None, offs, recipe, y)
    k_grouped.wgrad(columns, column_scale, columns, column_scale, offs, num_rows, recipe, db)
    k_grouped.group_sums(x, offs, sums)
    plan = deepgemm_layouts.plan(offs, num_rows, False)
    deepgemm_quantize.fill_plan(offs, num_rows, plan)
    deepgemm_quantize.pad(x, plan[1])


def launch_all_for_hipblaslt(num_groups: int, recipe: Recipe) -> None:
    """Launches every kernel that quantizes for hipBLASLt."""
    x, b = torch.empty(64, 128), torch.empty(num_groups, 128, 16, dtype=torch.bfloat16)
    offs = torch.empty(num_groups, dtype=torch.int32)
    activations = hipblaslt_layouts.activations(x, num_groups, recipe, rows=True, columns=True)
    hipblaslt_quantize.quantize_activations(x, offs, recipe, activations)
    hipblaslt_quantize.quantize_weights(b, recipe, hipblaslt_layouts.weights(b, recipe, forward=True, dgrad=True))


def assert_same_for_many(launch_for, recipe: Recipe, launches: list[tuple[str, tuple[int, ...], tuple]]) -> None:
    launch_for(2000, recipe)
    few = list(launches)
    launches.clear()
    launch_for(70_000, recipe)
    assert few
    assert {(kernel, constants) for kernel, _, constants in launches} == {(k, c) for k, _, c in few}
    for kernel, grid, _ in launches:
        assert all(programs <= 65535 for programs in grid[1:]), kernel  # of y and z; x may have 2^31 - 1


@pytest.mark.parametrize("recipe", (Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE, Recipe.MXFP8), ids=lambda r: r.value)
def test_no_constant_of_a_kernel_grows_with_the_number_of_groups(recipe, launches):
    assert_same_for_many(launch_all, recipe, launches)


@pytest.mark.parametrize("recipe", (Recipe.FP8_ROWWISE, Recipe.MXFP8), ids=lambda r: r.value)
def test_no_constant_for_hipblaslt_grows_with_the_number_of_groups(recipe, launches, monkeypatch):
    monkeypatch.setattr(machine, "_probe", lambda kind, index: fake_rocm.machine("gfx950", "7.1"))
    assert_same_for_many(launch_all_for_hipblaslt, recipe, launches)


# What Triton's own launcher on CUDA passes on to its function in C is what a prepared launch passes


class Utils:
    """A fake of the driver's functions in C."""

    @staticmethod
    def fill_tma_descriptor(address, *facts):
        return "map", address, facts

    fill_tma_descriptor_tiled = fill_tma_descriptor


@pytest.mark.parametrize("has_descriptor", (True, False))
def test_a_prepared_launch_passes_what_triton_passes(monkeypatch, has_descriptor):
    nvidia, called = pytest.importorskip("triton.backends.nvidia.driver"), []
    active = SimpleNamespace(utils=Utils, allocate_default_profile_scratch=None)
    monkeypatch.setattr(nvidia.triton.runtime, "driver", SimpleNamespace(active=active))
    meta = {"swizzle": 3, "elem_size": 4, "elem_type": 7, "block_size": [8, 16], "fp4_padded": False}
    signature = {0: "tensordesc<fp32[8, 16]>"} if has_descriptor else {0: "*fp32"}
    launch = nvidia.wrap_handle_tensordesc(
        lambda *args: called.append(args), signature | {1: "*fp32", 2: "i32", 3: "constexpr"}, [meta]
    )
    triton_launcher = nvidia.CudaLauncher.__new__(nvidia.CudaLauncher)
    vars(triton_launcher).update(
        launch=launch, num_ctas=1, global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0,
        profile_scratch_align=1, launch_cooperative_grid=False, launch_pdl=True, gsan_enabled=False,
    )  # fmt: skip
    if "arg_annotations" in nvidia.CudaLauncher.__init__.__code__.co_names:
        vars(triton_launcher).update(arg_annotations="annotations", kernel_signature="signature")
    monkeypatch.setattr(launching, "_function_in_c", lambda run: lambda *args: called.append(args))
    compiled = launching._Compiled(
        SimpleNamespace(metadata=SimpleNamespace(tensordesc_meta=[meta])), triton_launcher, 5, "metadata", lambda _: 7
    )
    first, second = torch.zeros(8, 16), torch.zeros(8, 16)

    def args_of(x):
        described = launching.describe(TensorDescriptor, x, x.shape, x.stride(), [8, 16])
        return described if has_descriptor else x, x[1], 33, 64

    prepared = launching.Prepared.of(
        compiled, 0, (3, 2), args_of(first), lambda t: (1, t.data_ptr() - first.data_ptr())
    )
    for x in (first, second, first):  # whose descriptor is kept
        triton_launcher(3, 2, 1, 7, 5, "metadata", None, None, None, *args_of(x))
        prepared([0, x.data_ptr()])
        expected, found = (addresses(call) for call in called[-2:])
        assert found == expected


def test_a_prepared_launch_keeps_the_descriptors_of_many_layers():
    compiled, encoded = launching._Compiled(None, None, 5, "metadata", lambda _: 7), []
    prepared = launching.Prepared(compiled, 0, lambda *args: None, [3, 2, 1, None, None])
    prepared._descriptors.append((4, 0, 0, lambda address: encoded.append(address) or address + 1, {}))
    for address in (*range(128), *range(128)):
        prepared([address])
    assert len(encoded) == 128


def test_launches_on_rocm_are_not_prepared():
    """Its launcher has other attributes, and passes other arguments."""
    amd = pytest.importorskip("triton.backends.amd.driver")
    rocm_launcher = amd.HIPLauncher.__new__(amd.HIPLauncher)
    vars(rocm_launcher).update(
        launch=len, launch_cooperative_grid=False, warp_size=64, global_scratch_size=0, profile_scratch_size=0
    )
    compiled = launching._Compiled(
        SimpleNamespace(metadata=SimpleNamespace()), rocm_launcher, 5, "metadata", lambda _: 7
    )
    assert launching.Prepared.of(compiled, 0, (3,), (torch.zeros(8), 1), lambda t: (0, 0)) is None


def addresses(call):
    """Arguments, with addresses in place of tensors."""
    return [
        addresses(x) if isinstance(x, (list, tuple)) else x.data_ptr() if isinstance(x, torch.Tensor) else x
        for x in call
    ]
