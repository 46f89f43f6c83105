"""`cache_weights` and `register_weight_cache`: a weight is quantized once, and results are the same bit for bit.

No entry outlives its values.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import io
import pickle
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import Optimizer
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from grouped_gemm import (
    BackendKind,
    Recipe,
    WeightCache,
    cache_weights,
    grouped_mm,
    register_weight_cache,
    weight_cache,
)
from grouped_gemm.backends import get_backend
from grouped_gemm.core.quantized import Quantized
from grouped_gemm.testing import TRAINING, Case, Shape, cases, make_inputs

SCALED = tuple(recipe for recipe in Recipe if recipe.is_scaled)
# K and N in whole blocks, which every backend takes.
SHAPE = Shape("whole_blocks", (0, 37, 1, 130, 0), tail=5, k=256, n=128)
EMULATED = Case(BackendKind.EMULATED, Recipe.FP8_BLOCKWISE, passes=TRAINING, shape=SHAPE)
EACH = pytest.mark.parametrize("case", cases(recipes=SCALED, passes=(TRAINING,), shapes=[SHAPE]), ids=str)
A_RECIPE = pytest.mark.parametrize(
    "case", cases(recipes=(Recipe.MXFP8, Recipe.FP8_BLOCKWISE), passes=(TRAINING,), shapes=[SHAPE]), ids=str
)


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> Callable[[Case], list[tuple[bool, bool]]]:
    """Records the layouts of weights that the backend of a case writes, as (forward, dgrad)."""

    def spy(case: Case) -> list[tuple[bool, bool]]:
        backend, written = get_backend(case.backend), []
        quantize = backend.quantize_weights

        def record(b, recipe, *, forward, dgrad):
            written.append((forward, dgrad))
            return quantize(b, recipe, forward=forward, dgrad=dgrad)

        monkeypatch.setattr(backend, "quantize_weights", record)
        return written

    return spy


class Layer:
    """An up and a down projection, with weights (E, N, K) and (E, K, N)."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, inputs = case, make_inputs(case, device)
        self.a, self.offs = inputs.a.nan_to_num(), inputs.offs
        self.up = torch.nn.Parameter(inputs.b.transpose(1, 2).contiguous())
        self.down = torch.nn.Parameter(inputs.b.contiguous())

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        return self.up, self.down

    def __call__(self, a: Tensor) -> Tensor:
        y = a
        for w in self.weights:
            options = {"recipe": self.case.recipe, "kernel_preference": self.case.backend}
            y = grouped_mm(y, w.transpose(1, 2), self.offs, **options)
        return y

    def accumulate(self, micro_batches: int = 3, call: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """Results of all of ``micro_batches``: outputs, and gradients of ``a`` and of the weights, accumulated."""
        results = []
        for w in self.weights:
            w.grad = None
        for i in range(micro_batches):
            a = (self.a * (i + 1)).requires_grad_()
            y = (call or self)(a)
            y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(y.dtype))
            results += [y.detach(), a.grad]
        return [*results, *(w.grad for w in self.weights)]


def assert_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


# What is kept


@EACH
def test_each_weight_is_quantized_once_and_every_result_is_the_same(case, device, quantized):
    layer = Layer(case, device)
    wanted = layer.accumulate()
    written = quantized(case)
    with cache_weights():
        assert_equal(layer.accumulate(), wanted)
        assert written == [(True, True)] * 2
    layer.accumulate(micro_batches=1)
    assert written == [(True, True)] * 4  # outside of the block, nothing is kept


@A_RECIPE
def test_a_layout_is_added_when_it_is_needed(case, device, quantized):
    layer = Layer(case, device)
    wanted = layer.accumulate()
    written = quantized(case)
    with cache_weights():
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                layer(layer.a)
        assert written == [(True, False)] * 2
        assert_equal(layer.accumulate(), wanted)
        assert written == [(True, False)] * 2 + [(False, True)] * 2


def test_forward_alone_uses_a_layout_that_was_written_with_the_other(device, quantized):
    layer, written = Layer(EMULATED, device), quantized(EMULATED)
    with cache_weights():
        layer.accumulate()
        with torch.no_grad():
            layer(layer.a)
    assert written == [(True, True)] * 2


def test_views_of_one_parameter_are_distinguished(quantized):
    """Gate and up are in one parameter. Two views of the same values share an entry."""
    layer = Layer(EMULATED, torch.device("cpu"))
    half = layer.up.shape[1] // 2
    gate, up = (w.clone() for w in (layer.up[:, :half], layer.up[:, half:]))
    wanted = [grouped_mm(layer.a, w.transpose(1, 2), layer.offs, recipe="mxfp8") for w in (gate, up)]
    written = quantized(EMULATED)
    with cache_weights():
        for _ in range(3):
            for w, right in zip((layer.up[:, :half], layer.up[:, half:]), wanted):
                assert torch.equal(grouped_mm(layer.a, w.transpose(1, 2), layer.offs, recipe="mxfp8"), right)
    assert len(written) == 2


def test_recipes_are_distinguished(quantized):
    layer = Layer(EMULATED, torch.device("cpu"))

    def call(recipe: Recipe) -> Tensor:
        return grouped_mm(layer.a, layer.up.transpose(1, 2), layer.offs, recipe=recipe)

    wanted = [call(recipe) for recipe in Recipe]
    written = quantized(EMULATED)
    with cache_weights():
        for _ in range(2):
            assert_equal([call(recipe) for recipe in Recipe], wanted)
    assert len(written) == len(SCALED) + 2  # without a recipe nothing is quantized, so nothing is kept


class Named:
    """A backend whose layouts hold its name."""

    def __init__(self, kind: BackendKind) -> None:
        self.kind = kind

    def quantize_weights(self, b, recipe, *, forward, dgrad):
        names = (f"{self.kind.value} {pass_}" for pass_ in ("forward", "dgrad"))
        return tuple(
            Quantized(b, None, recipe, 1, name) if wanted else None for name, wanted in zip(names, (forward, dgrad))
        )


def test_backends_are_distinguished():
    cache, b = WeightCache(), torch.ones(2, 3, 4)
    first, second = (Named(kind) for kind in (BackendKind.TRITON, BackendKind.DEEPGEMM))
    for _ in range(2):
        (one, _), (_, other) = (
            cache.quantize(first, b, Recipe.MXFP8, forward=True, dgrad=False),
            cache.quantize(second, b, Recipe.MXFP8, forward=False, dgrad=True),
        )
        assert (one.layout, other.layout) == ("triton forward", "deepgemm dgrad")


@A_RECIPE
def test_micro_batches_share_memory(case, device):
    layer, data = Layer(case, device), []

    def pack(x: Tensor) -> Tensor:
        if x.dtype.itemsize == 1 and x.numel() == layer.up.numel():
            data.append(x.data_ptr())
        return x

    sizes = []
    with cache_weights() as cache, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = [layer(layer.a.clone().requires_grad_()) for _ in range(2) if sizes.append(cache.nbytes) is None]
        sizes.append(cache.nbytes)
    assert len(kept) == 2
    assert len(data) == 4 and len(set(data)) == 2
    assert sizes[0] == 0 and sizes[1] == sizes[2] >= 2 * layer.up.numel()


# What invalidates an entry


def doubled(w: Tensor) -> None:
    with torch.no_grad():
        w.mul_(2)


def replaced(w: Tensor) -> None:
    w.data = w.data * 2


def stepped(optimizer: type, **options) -> Callable[[Tensor], None]:
    def step(w: Tensor) -> None:
        optimizer([w], lr=0.5, **options).step()

    return step


CHANGES = {"in place": doubled, "data": replaced}
CHANGES |= {
    f"{optimizer.__name__} {name}": stepped(optimizer, **{name: True} if name else {})
    for optimizer in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
    for name in ("", "foreach", "fused")
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_that_changed_are_quantized_again(change, device):
    # In fp32: on a CPU, torch's fused SGD leaves most of a bf16 tensor as it was.
    layer = Layer(dataclasses.replace(EMULATED, dtype=torch.float32), device)
    with cache_weights():
        before = layer.accumulate(1)
        for w in layer.weights:
            change(w)
        after = layer.accumulate(1)
    assert_equal(after, layer.accumulate(1))
    assert not torch.equal(before[0], after[0])


def test_other_storage_at_the_same_address_is_noticed():
    layer = Layer(dataclasses.replace(EMULATED, dtype=torch.float32), torch.device("cpu"))
    addresses, shape = set(), layer.up.shape

    def call(w: Tensor) -> Tensor:
        return grouped_mm(layer.a, w.transpose(1, 2), layer.offs, recipe="fp8_blockwise")

    with cache_weights(), torch.no_grad():
        for i in range(20):
            layer.up.data = torch.empty(0)  # whose memory the next one may take over
            layer.up.data = torch.full(shape, float(i))
            addresses.add(layer.up.data_ptr())
            assert torch.equal(call(layer.up), call(layer.up.clone()))
    assert len(addresses) < 20


def test_a_change_that_moves_no_counter_needs_clear():
    layer = Layer(EMULATED, torch.device("cpu"))
    with torch.no_grad(), cache_weights() as cache:
        before = layer(layer.a)
        layer.up.data.mul_(2)
        assert torch.equal(layer(layer.a), before)
        cache.clear()
        assert not torch.equal(layer(layer.a), before)


# Changes that move no version counter, and GROUPED_GEMM_VALIDATE=1, which finds them


@pytest.fixture
def ranks() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def validate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUPED_GEMM_VALIDATE", "1")


def swapped(w: Tensor) -> None:
    """Two values of one line, which differ, change places."""
    line = w.data[-1, -1]
    i, j = int(line.argmin()), int(line.argmax())
    line[i], line[j] = line[j].clone(), line[i].clone()


def moved_by_a_bit(w: Tensor) -> None:
    codes = w.data.view(torch.int16 if w.element_size() == 2 else torch.int32)
    codes[0, 0, 0] ^= 1


UNSEEN = {
    "copy": lambda w: w.data.copy_(w.data.flip(1)),
    "merge": lambda w: w.data.add_(torch.ones_like(w)),
    "signs": lambda w: w.data.neg_(),
    "one sign": lambda w: w.data[0, 1, 2:3].neg_(),
    "swapped values": swapped,
    "swapped experts": lambda w: w.data.copy_(w.data.flip(0)),
    "permuted columns": lambda w: w.data.copy_(w.data.roll(1, 2)),
    "one bit": moved_by_a_bit,
    "shared memory": lambda w: torch.from_dlpack(w.detach()).mul_(2),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("change", UNSEEN.values(), ids=UNSEEN)
def test_validation_finds_a_change_that_moves_no_counter(change, dtype, validate):
    layer = Layer(dataclasses.replace(EMULATED, dtype=dtype), torch.device("cpu"))
    with torch.no_grad(), cache_weights() as cache:
        for w in layer.weights:
            layer(layer.a)
            change(w)
            shape = re.escape(str(tuple(w.transpose(1, 2).shape)))
            with pytest.raises(RuntimeError, match=shape + r".*found others.*cache\.clear\(\)"):
                layer(layer.a)
            cache.clear()
        kept = layer(layer.a)
    assert torch.equal(kept, layer(layer.a).detach())


COLLECTIVES = {
    "scatter": lambda w, new: dist.scatter(w, [new], 0),
    "all_gather": lambda w, new: dist.all_gather([w], new),
    "all_gather_into_tensor": dist.all_gather_into_tensor,
}


@pytest.mark.filterwarnings("ignore:.*all_gather_into_tensor.*:FutureWarning")
@pytest.mark.parametrize("into", [lambda w: w, lambda w: w.data], ids=["parameter", "data"])
@pytest.mark.parametrize("collective", COLLECTIVES.values(), ids=COLLECTIVES)
def test_a_collective_into_weights_is_noticed_or_found_by_validation(collective, into, ranks, validate):
    layer = Layer(EMULATED, torch.device("cpu"))
    with torch.no_grad(), cache_weights():
        before, version = layer(layer.a), layer.up._version
        collective(into(layer.up), layer.up * 2)
        if layer.up._version > version:  # as all_gather_into_tensor moves it, on a parameter itself
            assert not torch.equal(layer(layer.a), before)
        else:
            with pytest.raises(RuntimeError, match=r"cache\.clear"):
                layer(layer.a)


def flattened(layer: Layer) -> Tensor:
    flat = torch.cat([w.detach().flatten() for w in layer.weights])
    for w, part in zip(layer.weights, flat.split([w.numel() for w in layer.weights])):
        w.data = part.view_as(w)
    return flat


def set_into(layer: Layer) -> Tensor:
    flat, first = torch.cat([w.detach().flatten() for w in layer.weights]), 0
    with torch.no_grad():
        for w in layer.weights:
            w.set_(flat.untyped_storage(), first, w.shape, w.stride())
            first += w.numel()
    return flat


@pytest.mark.parametrize("flatten", [flattened, set_into])
def test_weights_in_a_flat_buffer_are_kept_and_its_changes_found(flatten, validate, quantized):
    layer = Layer(EMULATED, torch.device("cpu"))
    flat, written = flatten(layer), quantized(EMULATED)
    with cache_weights() as cache:
        layer.accumulate()
        assert len(written) == 2
        flat.mul_(2)
        with pytest.raises(RuntimeError, match=r"cache\.clear"):
            layer.accumulate(1)
        cache.clear()
        found = layer.accumulate(1)
    assert_equal(found, layer.accumulate(1))


def test_a_change_in_another_part_of_the_memory_is_ignored(validate):
    """Gate and up are in one parameter: only the part that a call reads is compared."""
    layer = Layer(EMULATED, torch.device("cpu"))
    half = layer.up.shape[1] // 2

    def call(w: Tensor) -> Tensor:
        return grouped_mm(layer.a, w.transpose(1, 2), layer.offs, recipe="mxfp8")

    with torch.no_grad(), cache_weights():
        before = call(layer.up[:, :half])
        layer.up.data[:, half:].mul_(2)
        assert torch.equal(call(layer.up[:, :half]), before)
        layer.up.data[:, :half].mul_(2)
        with pytest.raises(RuntimeError, match=r"cache\.clear"):
            call(layer.up[:, :half])


@A_RECIPE
def test_validation_changes_nothing_else(case, device, quantized, validate):
    layer = Layer(case, device)
    wanted, written = layer.accumulate(), quantized(case)
    with cache_weights():
        assert_equal(layer.accumulate(call=lambda a: checkpoint(layer, a, use_reentrant=False)), wanted)
    assert written == [(True, True)] * 2


def test_entries_from_before_validation_are_not_used(monkeypatch):
    layer = Layer(EMULATED, torch.device("cpu"))
    with torch.no_grad(), cache_weights():
        before = layer(layer.a)
        layer.up.data.mul_(2)
        monkeypatch.setenv("GROUPED_GEMM_VALIDATE", "1")
        after = layer(layer.a)
        assert not torch.equal(after, before)
    assert torch.equal(after, layer(layer.a))


def test_weights_that_a_captured_step_updates_are_not_kept(monkeypatch, quantized):
    """A replay runs no Python, so nothing shows that it has changed the weights."""
    layer, other = Layer(EMULATED, torch.device("cpu")), Layer(EMULATED, torch.device("cpu"))
    layer.accumulate(1)
    with monkeypatch.context() as capture:
        capture.setattr(weight_cache, "is_capturing", lambda x: True)
        torch.optim.SGD(layer.weights, lr=0.1).step()
    written = quantized(EMULATED)
    with torch.no_grad(), cache_weights() as cache:
        before = layer(layer.a)
        assert cache.nbytes == 0
        layer.up.data.mul_(2)  # a replay
        assert not torch.equal(layer(layer.a), before)
        del written[:]
        other(other.a), other(other.a)
    assert len(written) == 2


def test_a_dtensor_that_a_captured_step_updates_is_not_kept(monkeypatch, ranks):
    """Calls see its local tensor."""
    layer, mesh = Layer(EMULATED, torch.device("cpu")), dist.init_device_mesh("cpu", (1,))
    w = torch.nn.Parameter(distribute_tensor(layer.up.detach(), mesh, [Shard(0)]))
    w.grad = torch.zeros_like(w)
    with monkeypatch.context() as capture:
        capture.setattr(weight_cache, "is_capturing", lambda x: True)
        torch.optim.SGD([w], lr=0.1).step()
    with torch.no_grad(), cache_weights() as cache:
        for b in (w, w.to_local()):
            grouped_mm(layer.a, b.transpose(1, 2), layer.offs, recipe="mxfp8")
        assert cache.nbytes == 0


def test_data_of_a_parameter_is_never_mistaken_for_earlier_data():
    """Each ``p.data`` is a new tensor with a counter of its own, and may have the id of one that is gone."""
    layer = Layer(EMULATED, torch.device("cpu"))

    def call(w: Tensor) -> Tensor:
        return grouped_mm(layer.a, w.transpose(1, 2), layer.offs, recipe="fp8_blockwise")

    with torch.no_grad():
        wanted = [call(w) for w in (layer.up, -layer.up)]
        with cache_weights():
            for i in range(8):
                assert torch.equal(call(layer.up.data), wanted[i % 2])
                layer.up.neg_()


def test_an_entry_ends_with_its_parameter_even_if_the_memory_stays(quantized):
    """A new parameter on the same memory may have its id and version. A view or a graph keeps a parameter alive."""
    layer, written = Layer(EMULATED, torch.device("cpu")), quantized(EMULATED)
    with cache_weights() as cache:
        w = torch.nn.Parameter(layer.down.data)
        b = w.view_as(w)
        del w
        for _ in range(2):
            y = grouped_mm(layer.a, b, layer.offs, recipe="fp8_blockwise")
        assert len(written) == 1
        del b
        assert cache.nbytes > 0
        y.sum().backward()
        del y
        gc.collect()
        assert cache.nbytes == 0


def test_a_cached_parameter_can_be_saved():
    layer, file = Layer(EMULATED, torch.device("cpu")), io.BytesIO()
    with cache_weights():
        layer.accumulate(1)
        torch.save(layer.up, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), layer.up)


# Modules that are moved


@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def test_a_module_may_swap_its_parameters(swapping, quantized):
    layer, module, written = Layer(EMULATED, torch.device("cpu")), torch.nn.Module(), quantized(EMULATED)
    module.up, module.down = layer.weights
    with cache_weights() as cache:
        layer.accumulate()
        both, up = cache.nbytes, layer.up
        del written[:]
        module.to(torch.float32)
        assert module.up is up and up.dtype == torch.float32
        gc.collect()
        assert cache.nbytes == 0
        layer.a = layer.a.float()
        found = layer.accumulate()
        assert len(written) == 2 and cache.nbytes == both
    assert_equal(found, layer.accumulate())


@A_RECIPE
def test_an_entry_ends_with_its_parameter(case, device):
    layer = Layer(case, device)
    with cache_weights() as cache:
        layer.accumulate()
        both, gone = cache.nbytes, weakref.ref(layer.up)
        del layer.up
        gc.collect()
        assert gone() is None
        assert cache.nbytes == both // 2
    assert cache.nbytes == 0


def test_a_nested_block_uses_the_outer_cache(quantized):
    layer, written = Layer(EMULATED, torch.device("cpu")), quantized(EMULATED)
    with cache_weights() as outer:
        for _ in range(2):
            with cache_weights() as inner:
                layer.accumulate()
            assert inner is outer
        layer.accumulate()
    assert len(written) == 2


def test_a_block_that_raises_drops_its_cache(quantized):
    layer, written = Layer(EMULATED, torch.device("cpu")), quantized(EMULATED)
    with pytest.raises(ZeroDivisionError), cache_weights() as cache:
        layer.accumulate(1)
        raise ZeroDivisionError
    layer.accumulate(1)
    assert len(written) == 4
    assert cache.nbytes == 0


# Threads and streams


def in_a_thread(job: Callable[[], object]) -> None:
    thread = threading.Thread(target=job)
    thread.start()
    thread.join()


def test_another_thread_adds_nothing_to_the_cache(quantized):
    layer, other, written = *(Layer(EMULATED, torch.device("cpu")) for _ in range(2)), quantized(EMULATED)
    with cache_weights():
        layer.accumulate()
        del written[:]
        in_a_thread(other.accumulate)
        assert len(written) == 6


def test_another_thread_uses_the_entries_of_the_block(quantized):
    """Autograd has a thread of its own for each GPU, and checkpointed layers are recomputed there."""
    layer, written = Layer(EMULATED, torch.device("cpu")), quantized(EMULATED)
    with cache_weights():
        layer.accumulate()
        in_a_thread(layer.accumulate)
    assert len(written) == 2


def test_blocks_of_several_threads_do_not_mix():
    layer = Layer(EMULATED, torch.device("cpu"))
    wanted, found = layer.accumulate(1)[0], []
    barrier = threading.Barrier(4, timeout=30)

    def run() -> None:
        with cache_weights() as cache, torch.no_grad():
            barrier.wait()
            y = layer(layer.a)
            barrier.wait()
            found.append((y, cache.nbytes))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, wanted) and kept for y, kept in found) and len(found) == 4
    assert not weight_cache._open


@pytest.mark.gpu
@A_RECIPE
def test_a_stream_does_not_use_the_entries_of_another(case, device, quantized):
    layer = Layer(case, device)
    wanted, written = layer.accumulate(), quantized(case)
    with cache_weights():
        for stream in (torch.cuda.Stream(device), torch.cuda.Stream(device)):
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                results = layer.accumulate()
            torch.cuda.current_stream(device).wait_stream(stream)
            assert_equal(results, wanted)
    assert len(written) == 4


# Checkpointing, torch.compile, CUDA graphs, modes


@EACH
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
def test_a_recomputed_layer_uses_the_entries_of_forward(case, use_reentrant, device, quantized):
    layer = Layer(case, device)
    wanted, written = layer.accumulate(), quantized(case)
    with cache_weights():
        assert_equal(layer.accumulate(call=lambda a: checkpoint(layer, a, use_reentrant=use_reentrant)), wanted)
    # A reentrant checkpoint runs forward without gradients, which needs only one layout.
    assert sorted(written) == ([(False, True)] * 2 + [(True, False)] * 2 if use_reentrant else [(True, True)] * 2)


def test_backward_may_come_after_the_block():
    layer = Layer(EMULATED, torch.device("cpu"))
    wanted = layer.accumulate(1)
    with cache_weights():
        a = layer.a.clone().requires_grad_()
        y = checkpoint(layer, a, use_reentrant=False)
    for w in layer.weights:
        w.grad = None
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    assert_equal([y.detach(), a.grad, layer.up.grad, layer.down.grad], wanted)


@EACH
@pytest.mark.parametrize("saved", ["grouped_mm", "quantize_weights", ""])
def test_selective_checkpointing_sees_the_same_ops_in_forward_and_recomputation(case, saved, device):
    """If forward and recomputation found different entries, the result of one op would be taken for that of another."""
    layer = Layer(case, device)
    wanted = layer.accumulate(1)

    def policy(context, op, *args, **kwargs):
        is_saved = saved and str(op).startswith("grouped_gemm.") and saved in str(op)
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

    def call(a: Tensor) -> Tensor:
        with cache_weights() as cache:
            grouped_mm(a, layer.up.transpose(1, 2), layer.offs, recipe=case.recipe, kernel_preference=case.backend)
            kept = cache.nbytes
            contexts = functools.partial(create_selective_checkpoint_contexts, policy)
            y = checkpoint(layer, a, use_reentrant=False, context_fn=contexts)
            assert cache.nbytes == kept > 0
        return y

    assert_equal(layer.accumulate(1, call), wanted)


@A_RECIPE
def test_a_compiled_layer_does_not_use_the_cache_and_compiles_once(case, device):
    layer = Layer(case, device)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(lambda a: layer(a), fullgraph=True, backend=counter)
    wanted = layer.accumulate(call=compiled)
    with cache_weights() as cache:
        assert_equal(layer.accumulate(call=compiled), wanted)
        doubled(layer.up)
        changed = layer.accumulate(call=compiled)
        assert cache.nbytes == 0
    assert_equal(changed, layer.accumulate())
    assert counter.frame_count == 1


@pytest.mark.parametrize("form", ["foreach", "fused"])
def test_a_compiled_step_is_noticed(form):
    layer = Layer(dataclasses.replace(EMULATED, dtype=torch.float32), torch.device("cpu"))
    optimizer = torch.optim.Adam(layer.weights, lr=0.1, **{form: True})
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="aot_eager")
    for _ in range(3):
        with cache_weights():
            layer.accumulate(1)
            step()
            found = layer.accumulate(1)
        assert_equal(found, layer.accumulate(1))


def test_a_capture_neither_adds_nor_uses_entries(monkeypatch, quantized):
    layer = Layer(EMULATED, torch.device("cpu"))
    with cache_weights() as cache:
        monkeypatch.setattr(weight_cache, "is_capturing", lambda x: True)
        layer.accumulate(1)
        assert cache.nbytes == 0
        monkeypatch.setattr(weight_cache, "is_capturing", lambda x: False)
        layer.accumulate(1)
        monkeypatch.setattr(weight_cache, "is_capturing", lambda x: True)
        written = quantized(EMULATED)
        layer.accumulate(1)
    assert len(written) == 2


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", cases(backends=[BackendKind.TRITON], recipes=(Recipe.FP8_BLOCKWISE,), shapes=[SHAPE]), ids=str
)
def test_a_replayed_graph_reads_the_current_weights(case, device):
    layer = Layer(case, device)
    with cache_weights(), torch.no_grad():
        layer(layer.a)  # compiles kernels, and caches the weights before they change
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(layer.a)
        doubled(layer.up)
        graph.replay()
        assert torch.equal(y, layer(layer.a))


def test_a_mode_sees_every_op():
    from torch.utils._python_dispatch import TorchDispatchMode

    layer, seen = Layer(EMULATED, torch.device("cpu")), []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **kwargs or {})

    with cache_weights(), torch.no_grad():
        for _ in range(2):
            layer(layer.a)
            with Recorder():
                layer(layer.a)
    assert len([op for op in seen if "quantize_weights" in op]) == 4


# What cannot be kept


def test_weights_that_are_new_at_each_call_are_not_kept():
    layer = Layer(EMULATED, torch.device("cpu"))
    w = layer.up.float().detach().requires_grad_()
    with cache_weights() as cache, torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_mm(layer.a, w.transpose(1, 2), layer.offs, recipe="mxfp8")
        y.sum().backward()
        del y
        gc.collect()
        assert cache.nbytes == 0
    assert w.grad.dtype == torch.float32


def test_inference_tensors_are_not_kept():
    with torch.inference_mode():
        layer = Layer(EMULATED, torch.device("cpu"))
        with cache_weights() as cache:
            y = layer(layer.a)
            layer.up.mul_(2)
            assert not torch.equal(layer(layer.a), y)
            assert cache.nbytes == 0


def test_vmap_over_weights_keeps_each_of_them():
    layer = Layer(EMULATED, torch.device("cpu"))
    weights = torch.stack([layer.up.detach(), layer.up.detach() * 2])

    def call(w: Tensor) -> Tensor:
        return grouped_mm(layer.a, w.transpose(1, 2), layer.offs, recipe="fp8_blockwise")

    wanted = torch.stack([call(w) for w in weights])
    with cache_weights() as cache:
        assert torch.equal(torch.func.vmap(call)(weights), wanted)
        assert weights in cache
        assert torch.equal(torch.func.vmap(call)(weights), wanted)


# Registered optimizers


def fused(weights: Iterable[Tensor]) -> Optimizer:
    """An optimizer whose steps move no version counter."""
    return torch.optim.Adam(weights, lr=0.5, fused=True)


def layer_in_fp32() -> Layer:
    """In fp32, since a step must change what is quantized: torch's fused optimizers round bf16 on a CPU."""
    return Layer(dataclasses.replace(EMULATED, dtype=torch.float32), torch.device("cpu"))


@EACH
def test_a_registered_optimizer_quantizes_each_weight_once_per_step(case, device, quantized):
    trained, written = [], quantized(case)
    for register in (False, True):
        layer = Layer(case, device)
        optimizer = torch.optim.Adam(layer.weights, lr=0.01, fused=True)
        handle = register_weight_cache(optimizer) if register else None
        del written[:]
        results = []
        for _ in range(3):
            results += [x.clone() for x in layer.accumulate()]
            optimizer.step()
        trained.append([*results, *(w.detach() for w in layer.weights)])
    assert written == [(True, True)] * 2 * 3
    assert_equal(*trained)
    assert handle.nbytes == 0  # the last step has dropped everything


@A_RECIPE
def test_a_handle_states_the_memory_and_its_removal_frees_it(case, device, quantized):
    layer = Layer(case, device)
    optimizer = fused(layer.weights)
    handle = register_weight_cache(optimizer)
    assert handle.nbytes == 0
    layer.accumulate()
    numel = sum(w.numel() for w in layer.weights)
    layouts = 1 if case.backend is BackendKind.EMULATED and case.recipe is Recipe.FP8_BLOCKWISE else 2
    scale_bytes = 1 / 32 if case.recipe is Recipe.MXFP8 else 4 / 128**2
    assert layouts <= handle.nbytes / numel <= layouts * (1 + 1.1 * scale_bytes)
    handle.remove()
    assert handle.nbytes == 0
    written = quantized(case)
    layer.accumulate()
    assert len(written) == 6
    handle.remove()  # again, without an effect


def test_only_parameters_of_the_optimizer_and_their_views_are_kept(quantized):
    layer, written = Layer(EMULATED, torch.device("cpu")), quantized(EMULATED)
    optimizer = fused([layer.down])
    handle = register_weight_cache(optimizer)
    for w, count in ((layer.up, 2), (layer.down, 1), (layer.down[:, :64], 1), (layer.down.detach().clone(), 2)):
        del written[:]
        for _ in range(2):
            grouped_mm(layer.a[:, : w.shape[2]], w.transpose(1, 2), layer.offs, recipe="mxfp8")
        assert len(written) == count
    assert handle.nbytes > 0


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_a_registered_parameter_is_noticed(change):
    """Here another optimizer steps, which has the same parameters: a copy, or the one inside of a wrapper."""
    layer = layer_in_fp32()
    optimizer = fused(layer.weights)
    handle = register_weight_cache(optimizer)
    before = layer.accumulate(1)
    for w in layer.weights:
        change(w)
    after = layer.accumulate(1)
    assert handle.nbytes > 0
    handle.remove()
    assert_equal(after, layer.accumulate(1))
    assert not torch.equal(before[0], after[0])


def test_a_step_of_another_optimizer_drops_nothing(quantized):
    layer, other, written = layer_in_fp32(), layer_in_fp32(), quantized(EMULATED)
    optimizers = [fused(one.weights) for one in (layer, other)]
    for optimizer in optimizers:
        register_weight_cache(optimizer)
    for one in (layer, other):
        one.accumulate(1)
    del written[:]
    optimizers[1].step()
    layer.accumulate(1)
    assert not written
    other.accumulate(1)
    assert len(written) == 2


@pytest.mark.parametrize("form", ["foreach", "fused"])
def test_a_compiled_step_of_a_registered_optimizer_is_noticed(form):
    layer = layer_in_fp32()
    optimizer = torch.optim.Adam(layer.weights, lr=0.1, **{form: True})
    handle = register_weight_cache(optimizer)
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend=counter)
    for _ in range(4):
        layer.accumulate(1)
        assert handle.nbytes > 0
        step()
        assert handle.nbytes == 0
    assert counter.frame_count <= 1


def test_registered_parameters_are_kept_in_every_thread(quantized):
    layer, written = Layer(EMULATED, torch.device("cpu")), quantized(EMULATED)
    optimizer = fused(layer.weights)
    register_weight_cache(optimizer)
    in_a_thread(layer.accumulate)
    in_a_thread(layer.accumulate)
    layer.accumulate()
    assert len(written) == 2
    in_a_thread(optimizer.step)
    layer.accumulate()
    assert len(written) == 4


@A_RECIPE
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
def test_a_recomputed_layer_uses_what_its_registered_optimizer_keeps(case, use_reentrant, device, quantized):
    layer = Layer(case, device)
    wanted, written = layer.accumulate(), quantized(case)
    optimizer = fused(layer.weights)
    register_weight_cache(optimizer)
    assert_equal(layer.accumulate(call=lambda a: checkpoint(layer, a, use_reentrant=use_reentrant)), wanted)
    assert sum(forward for forward, _ in written) == sum(dgrad for _, dgrad in written) == 2


def test_a_registered_parameter_needs_no_gradient(quantized):
    layer, written = Layer(EMULATED, torch.device("cpu")), quantized(EMULATED)
    layer.up.requires_grad_(False)
    layer.down.requires_grad_(False)
    optimizer = fused(layer.weights)
    register_weight_cache(optimizer)
    for _ in range(2):
        for _ in range(3):
            layer(layer.a)
        optimizer.step()
    assert written == [(True, False)] * 4


def test_parameter_groups_may_be_added_and_removed_later(quantized):
    layer = layer_in_fp32()
    optimizer = fused([layer.up])
    handle = register_weight_cache(optimizer)
    layer.accumulate(1)
    one = handle.nbytes
    optimizer.add_param_group({"params": [layer.down]})
    layer.accumulate(1)
    assert handle.nbytes == 2 * one
    optimizer.step()
    layer.accumulate(1)
    del optimizer.param_groups[1]
    optimizer.step()  # drops the removed parameter as well
    layer.accumulate(1)
    assert handle.nbytes == one


def test_states_may_be_loaded_into_a_registered_optimizer_and_its_model(quantized):
    layer, module = layer_in_fp32(), torch.nn.Module()
    module.up, module.down = layer.weights
    optimizer = fused(layer.weights)
    handle = register_weight_cache(optimizer)
    layer.accumulate(1)
    optimizer.step()
    state, state_of_optimizer = copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict())
    wanted = [x.clone() for x in layer.accumulate(1)]
    optimizer.step()
    layer.accumulate(1)
    module.load_state_dict(state)
    optimizer.load_state_dict(state_of_optimizer)
    written = quantized(EMULATED)
    assert_equal(layer.accumulate(1), wanted)
    assert len(written) == 2
    optimizer.step()
    assert handle.nbytes == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deep", "pickled"])
def test_a_copy_of_a_registered_optimizer_is_not_registered(copied):
    layer = layer_in_fp32()
    optimizer = fused(layer.weights)
    handle = register_weight_cache(optimizer)
    layer.accumulate(1)
    kept, other = handle.nbytes, layer_in_fp32()
    twin = copied(optimizer)
    other.up, other.down = twin.param_groups[0]["params"]
    other.accumulate(1)
    twin.step()
    assert handle.nbytes == kept > 0


@pytest.mark.parametrize("swap", [False, True], ids=["", "swapped"])
def test_registered_parameters_may_be_converted(swap, request, quantized):
    if swap:
        request.getfixturevalue("swapping")
    layer, module, written = Layer(EMULATED, torch.device("cpu")), torch.nn.Module(), quantized(EMULATED)
    module.up, module.down = layer.weights
    optimizer = fused(layer.weights)
    handle = register_weight_cache(optimizer)
    layer.accumulate()
    kept = handle.nbytes
    module.to(torch.float32)
    layer.a = layer.a.float()
    found = layer.accumulate()
    assert len(written) == 4 and handle.nbytes == kept
    handle.remove()
    assert_equal(found, layer.accumulate())


def test_a_registration_ends_with_its_optimizer(quantized):
    layer = Layer(EMULATED, torch.device("cpu"))
    optimizer = fused(layer.weights)
    handle = register_weight_cache(optimizer)
    layer.accumulate()
    del optimizer
    gc.collect()
    assert handle.nbytes == 0 and handle not in weight_cache._registered
    written = quantized(EMULATED)
    layer.accumulate(2)
    assert len(written) == 4


def test_a_handle_keeps_neither_optimizer_nor_parameters_alive():
    layer = Layer(EMULATED, torch.device("cpu"))
    optimizer = fused(layer.weights)
    handle = register_weight_cache(optimizer)
    layer.accumulate()
    gone = weakref.ref(optimizer), weakref.ref(layer.up.untyped_storage()), weakref.ref(layer)
    del optimizer, layer
    gc.collect()
    assert [x() for x in gone] == [None] * 3
    assert handle.nbytes == 0


def test_a_registered_optimizer_comes_before_a_block(quantized):
    """So a weight is not kept twice. Other weights belong to the block."""
    layer, other, written = *(Layer(EMULATED, torch.device("cpu")) for _ in range(2)), quantized(EMULATED)
    optimizer = fused(layer.weights)
    handle = register_weight_cache(optimizer)
    layer.accumulate()
    kept = handle.nbytes
    with cache_weights() as cache:
        layer.accumulate()
        assert cache.nbytes == 0
        other.accumulate()
        assert cache.nbytes == handle.nbytes == kept
    layer.accumulate()
    assert len(written) == 4


REMEDIES = {
    "of the handle": lambda first, second, cache: first.refresh(),
    "of another handle": lambda first, second, cache: second.refresh(),
    "of the block": lambda first, second, cache: cache.clear(),
}


@pytest.mark.parametrize("remedy", REMEDIES.values(), ids=REMEDIES)
def test_a_change_that_moves_no_counter_needs_a_refresh(remedy):
    """Any cache may have the entry, so any remedy drops it."""
    layer = Layer(EMULATED, torch.device("cpu"))
    optimizer = fused(layer.weights)
    first, second = (register_weight_cache(optimizer) for _ in range(2))
    with torch.no_grad(), cache_weights() as cache:
        before = layer(layer.a)
        layer.up.data.mul_(2)
        assert torch.equal(layer(layer.a), before)
        remedy(first, second, cache)
        assert first.nbytes == second.nbytes == cache.nbytes == 0
        assert not torch.equal(layer(layer.a), before)


def test_validation_finds_a_change_of_a_registered_parameter(validate):
    layer = Layer(EMULATED, torch.device("cpu"))
    optimizer = fused(layer.weights)
    handle = register_weight_cache(optimizer)
    with torch.no_grad():
        layer(layer.a)
        layer.up.data.mul_(2)
        with pytest.raises(RuntimeError, match=r"found others.*handle\.refresh\(\)"):
            layer(layer.a)
        handle.refresh()
        layer(layer.a)


def test_parameters_of_a_registered_optimizer_whose_step_is_captured_are_not_kept(monkeypatch):
    layer = Layer(EMULATED, torch.device("cpu"))
    optimizer = torch.optim.SGD(layer.weights, lr=0.1)
    handle = register_weight_cache(optimizer)
    layer.accumulate(1)
    assert handle.nbytes > 0
    with monkeypatch.context() as capture:
        capture.setattr(weight_cache, "is_capturing", lambda x: True)
        optimizer.step()
    layer.accumulate(1)
    assert handle.nbytes == 0


def test_the_local_shard_of_a_registered_dtensor_is_kept(ranks, quantized):
    layer, mesh = layer_in_fp32(), dist.init_device_mesh("cpu", (1,))
    w = torch.nn.Parameter(distribute_tensor(layer.up.detach(), mesh, [Shard(0)]))
    w.grad = torch.ones_like(w)
    optimizer = fused([w])
    handle = register_weight_cache(optimizer)

    def call() -> Tensor:
        return grouped_mm(layer.a, w.to_local().transpose(1, 2), layer.offs, recipe="mxfp8")

    written = quantized(EMULATED)
    before = call()
    assert torch.equal(call(), before) and len(written) == 1
    optimizer.step()
    assert handle.nbytes == 0
    assert not torch.equal(call(), before)


def test_a_compiled_call_does_not_use_what_a_registered_optimizer_keeps():
    layer = Layer(EMULATED, torch.device("cpu"))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda a: layer(a), fullgraph=True, backend=counter)
    wanted = layer.accumulate(call=compiled)
    optimizer = fused(layer.weights)
    handle = register_weight_cache(optimizer)
    assert_equal(layer.accumulate(call=compiled), wanted)
    assert handle.nbytes == 0 and counter.frame_count == 1


@pytest.mark.parametrize("argument", [torch.nn.Linear(2, 2), [torch.nn.Parameter(torch.ones(2))], None])
def test_only_an_optimizer_can_be_registered(argument):
    with pytest.raises(TypeError, match=rf"expected a torch\.optim\.Optimizer; found {type(argument).__name__}"):
        register_weight_cache(argument)
