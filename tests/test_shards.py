"""`grouped_mm` takes the local shards of DTensors, or raises an error. One process here; test_ranks.py has several."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from grouped_gemm import cache_weights, explain, grouped_mm, override_torch, quantize_weights, warmup
from grouped_gemm.integrations import torch_function

M, E, K, N = 12, 3, 48, 32
OFFS = torch.tensor([4, 4, 12], dtype=torch.int32)


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """Two dimensions of one rank each."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicas", "experts"))
    dist.destroy_process_group()


EXPERTS = (Replicate(), Shard(0))
REPLICAS = (Replicate(), Replicate())


def spread(x: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...] = EXPERTS) -> DTensor:
    """``x`` as a DTensor that is a leaf."""
    return DTensor.from_local(x, mesh, placements).detach().requires_grad_(x.is_floating_point())


def operands() -> dict[str, Tensor]:
    """Plain tensors; w (E, N, K) instead of b."""
    sizes = {"a": (M, K), "w": (E, N, K), "bias": (E, N)}
    return {name: torch.randn(size, dtype=torch.bfloat16).requires_grad_() for name, size in sizes.items()}


def train(a: Tensor, w: Tensor, bias: Tensor, **options) -> tuple[Tensor, tuple[Tensor, ...]]:
    y = grouped_mm(a, w.transpose(1, 2), OFFS, bias=bias, **options)
    return y, torch.autograd.grad(y, (a, w, bias), torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))


@pytest.mark.parametrize("placements", [EXPERTS, REPLICAS], ids=["experts", "replicas"])
@pytest.mark.parametrize("names", [("w",), ("w", "bias"), ("a", "w", "bias")], ids="+".join)
@pytest.mark.parametrize("recipe", ["none", "mxfp8"])
def test_shards_give_what_plain_tensors_give(names, placements, recipe, mesh):
    plain = operands()
    mixed = plain | {name: spread(plain[name], mesh, placements) for name in names}
    wanted, wanted_gradients = train(**plain, recipe=recipe)
    for _ in range(2):  # the second call uses a cached route
        y, gradients = train(**mixed, recipe=recipe)
        assert type(y) is Tensor and torch.equal(y, wanted)
        for name, gradient, right in zip(plain, gradients, wanted_gradients):
            assert isinstance(gradient, DTensor) == (name in names), name
            if name in names:
                assert gradient.placements == placements, name
            assert torch.equal(gradient.to_local() if name in names else gradient, right), name


def test_offs_may_be_replicated_where_nothing_is_sharded(mesh):
    plain = operands()
    b = spread(plain["w"], mesh, REPLICAS).transpose(1, 2)
    found = grouped_mm(plain["a"], b, spread(OFFS, mesh, REPLICAS))
    assert torch.equal(found, grouped_mm(plain["a"], plain["w"].transpose(1, 2), OFFS))


def test_the_weight_gradient_form_takes_replicated_operands(mesh):
    a, b = torch.randn(K, M), torch.randn(M, N)
    found = grouped_mm(spread(a, mesh, REPLICAS), spread(b, mesh, REPLICAS), OFFS)
    assert torch.equal(found, grouped_mm(a, b, OFFS))


@pytest.mark.parametrize(
    ("name", "placements", "expected"),
    (
        (
            "a",
            (Replicate(), Shard(1)),
            r"a DTensor that is Replicate or Shard\(0\) on each mesh dimension, or its",
        ),
        ("a", (Partial(), Replicate()), r"a DTensor that is Replicate or Shard\(0\)"),
        ("b", (Replicate(), Shard(1)), r"a DTensor that is Replicate or Shard\(0\)"),  # K, the contraction
        ("b", (Replicate(), Shard(2)), r"a DTensor that is Replicate or Shard\(0\)"),  # N: dA would be partial
        ("bias", (Replicate(), Shard(1)), r"a DTensor that is Replicate or Shard\(0\)"),
        ("offs", EXPERTS, "a plain tensor with the ends of the local rows"),
    ),
    ids=lambda value: str(value) if isinstance(value, tuple) else None,
)
def test_other_placements_are_named(name, placements, expected, mesh):
    plain = operands()
    arguments = {"a": plain["a"], "b": plain["w"].transpose(1, 2), "offs": OFFS, "bias": plain["bias"]}
    arguments[name] = spread(arguments[name].detach(), mesh, placements)
    for call in (grouped_mm, explain):
        with pytest.raises(ValueError, match=f"^{name}: expected {expected}.*; found ") as error:
            call(**arguments)
        assert str(error.value).endswith(str(placements))


def test_shards_whose_placements_differ_from_those_of_a_are_named(mesh):
    plain = operands()
    a, b = spread(plain["a"].detach(), mesh), spread(plain["w"].detach(), mesh, REPLICAS).transpose(1, 2)
    with pytest.raises(
        ValueError, match=r"^b: expected the mesh and placements of a, .*Shard\(dim=0\)\); found .*Replicate"
    ):
        grouped_mm(a, b, OFFS)


def test_the_weight_gradient_form_refuses_shards(mesh):
    a, b = torch.randn(K, M), spread(torch.randn(M, N), mesh)
    with pytest.raises(ValueError, match=r"^b: expected a DTensor that is Replicate on each mesh dimension"):
        grouped_mm(a, b, OFFS)


def test_quantize_weights_takes_the_shard(mesh):
    a, b = torch.randn(M, K), torch.randn(E, K, N)
    found = quantize_weights(spread(b, mesh), "mxfp8")
    assert torch.equal(grouped_mm(a, found, OFFS), grouped_mm(a, quantize_weights(b, "mxfp8"), OFFS))


def test_a_checkpoints_scales_may_be_sharded_with_its_weights(mesh):
    a, data, scale = (
        torch.randn(M, 128).bfloat16(),
        torch.randn(E, 128, 128).to(torch.float8_e4m3fn),
        torch.rand(E, 1, 1),
    )
    sharded = [DTensor.from_local(x, mesh, EXPERTS) for x in (data, scale)]
    found = quantize_weights(sharded[0], "fp8_blockwise", scale=sharded[1])
    wanted = quantize_weights(data, "fp8_blockwise", scale=scale)
    assert torch.equal(grouped_mm(a, found, OFFS), grouped_mm(a, wanted, OFFS))


def test_warmup_takes_the_shard(mesh):
    b = spread(operands()["w"].detach(), mesh).transpose(1, 2)
    assert [warmed.decision.spec.num_groups for warmed in warmup(b, rows="small").classes] == [E]


@pytest.mark.parametrize("placements", [EXPERTS, REPLICAS], ids=["experts", "replicas"])
def test_a_compiled_call_takes_shards(placements, mesh):
    plain = operands()
    a, w = plain["a"], spread(plain["w"].detach(), mesh, placements)
    torch._dynamo.reset()
    layer = torch.compile(lambda a, w: grouped_mm(a, w.transpose(1, 2), OFFS), fullgraph=True, backend="aot_eager")
    y, wanted = layer(a, w), grouped_mm(a, plain["w"].transpose(1, 2), OFFS)
    assert torch.equal(y, wanted)
    dy = torch.randn_like(y)
    gradients, right = torch.autograd.grad(y, (a, w), dy), torch.autograd.grad(wanted, (a, plain["w"]), dy)
    assert torch.equal(gradients[0], right[0])
    assert torch.equal(gradients[1].to_local(), right[1]) and gradients[1].placements == placements


@pytest.mark.parametrize("form", ["foreach", "fused"])
def test_an_optimizer_step_on_a_dtensor_invalidates_the_cache_of_its_shard(form, mesh):
    """The DTensor's version counter is not that of its shard, which is quantized."""
    w, a = torch.nn.Parameter(spread(torch.randn(E, N, K), mesh)), torch.randn(M, K)
    optimizer = torch.optim.Adam([w], lr=0.5, **{form: True})

    def call() -> Tensor:
        return grouped_mm(a, w.to_local().transpose(1, 2), OFFS, recipe="mxfp8")

    with cache_weights() as cache:
        before = call()
        assert torch.equal(call(), before) and cache.nbytes
        before.sum().backward()
        optimizer.step()
        assert not torch.equal(call(), before)


def test_override_torch_leaves_a_dtensor_to_torch_and_says_so(mesh, monkeypatch):
    """For torch a DTensor is the whole tensor, and the result is one."""
    monkeypatch.setattr(torch_function, "_warned", set())
    a, b = (
        DTensor.from_local(x, mesh, REPLICAS) for x in (torch.randn(M, K).bfloat16(), torch.randn(E, K, N).bfloat16())
    )
    offs = DTensor.from_local(OFFS, mesh, REPLICAS)
    with override_torch("mxfp8"), pytest.warns(UserWarning, match="an argument is a DTensor. Pass local shards"):
        y = torch.nn.functional.grouped_mm(a, b, offs=offs)
    assert torch.equal(y.to_local(), torch.nn.functional.grouped_mm(a.to_local(), b.to_local(), offs=OFFS))
