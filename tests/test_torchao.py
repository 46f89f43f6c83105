"""torchao's ``quantize_`` with `GroupedGemmConfig`: experts that call torch's grouped GEMM, beside float8 linears."""

from __future__ import annotations

import copy
import importlib
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import Linear, Module, Parameter
from torch.utils.checkpoint import checkpoint

from grouped_gemm import BackendKind, KernelPreference, Recipe, grouped_mm
from grouped_gemm.testing import relative_error

try:
    import torchao
except ImportError:
    torchao = None
if torchao is not None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear
    from torchao.quantization import quantize_
    from torchao.quantization.quantize_.common import KernelPreference as TheirPreference

    from grouped_gemm.integrations import torchao as integration

pytestmark = pytest.mark.skipif(torchao is None, reason="needs torchao: pip install 'torchao==0.18.0'")

E, H, I = 3, 32, 48  # noqa: E741
OFFS = torch.tensor([5, 5, 16], dtype=torch.int32)
PUBLIC = getattr(F, "grouped_mm", torch._grouped_mm)


class Experts(Module):
    """Two grouped GEMMs, one by each of torch's names."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = Parameter((torch.randn(E, I, H, generator=generator) * H**-0.5).to(dtype))
        self.down = Parameter((torch.randn(E, H, I, generator=generator) * I**-0.5).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(torch._grouped_mm(x, self.up.transpose(1, 2), offs=OFFS))
        return PUBLIC(h, self.down.transpose(1, 2), offs=OFFS)


class Layer(Module):
    """A linear layer before experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.experts = Linear(H, H, bias=False, dtype=torch.bfloat16), Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.linear(x))


def is_experts(module: Module, name: str) -> bool:
    return isinstance(module, Experts)


def converted(model: Module, **options: Any) -> Any:
    quantize_(model, integration.GroupedGemmConfig(**options), filter_fn=is_experts)
    return model


def rows() -> Tensor:
    return torch.randn(16, H, generator=torch.Generator().manual_seed(1)).bfloat16()


def trained(model: Any, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"y": y.detach(), "x": x.grad} | {
        name: getattr(g, "to_local", lambda g=g: g)() for name, g in gradients.items()
    }


def check_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(found[name], value) <= tolerance, name


def by_hand(experts: Experts, x: Tensor, recipe: str | None) -> Tensor:
    h = F.silu(grouped_mm(x, experts.up.transpose(1, 2), OFFS, recipe=recipe))
    return grouped_mm(h, experts.down.transpose(1, 2), OFFS, recipe=recipe)


@pytest.mark.parametrize("recipe", (None, "fp8_rowwise", "fp8_blockwise", "mxfp8"))
def test_experts_run_as_grouped_mm(recipe):
    experts, ours = Experts(), converted(Experts(), recipe=recipe)
    x = rows().requires_grad_()
    expected = by_hand(experts, x, recipe)
    expected.square().sum().backward()
    found = trained(ours, x)
    gradients = {"x": x.grad, "up": experts.up.grad, "down": experts.down.grad}
    check_close(found, {"y": expected.detach()} | gradients, 0)


def test_fp8_is_close_to_torch_and_differs():
    found, expected = trained(converted(Experts()), rows()), trained(Experts(), rows())
    check_close(found, expected, 0.15)
    assert relative_error(found["y"], expected["y"]) > 0.01


def test_parameters_and_the_state_dict_stay():
    model = Layer()
    parameters, names = dict(model.named_parameters()), list(model.state_dict())
    converted(model)
    assert list(model.state_dict()) == names
    assert all(p is parameters[name] and type(p) is Parameter for name, p in model.named_parameters())
    assert isinstance(model.experts, Experts)
    assert type(model.linear) is Linear


def test_a_copy_runs_on_its_own_weights():
    first = converted(Experts())
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.down.zero_()
    assert not second(rows()).any() and first(rows()).any()


def test_experts_beside_float8_linear_layers():
    model, plain = Layer(), Layer()
    config = Float8LinearConfig(emulate=True)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: isinstance(module, Linear))
    converted(model, recipe="fp8_blockwise")
    assert isinstance(model.linear, Float8Linear)
    found = trained(model, rows())
    check_close(found, trained(plain, rows()), 0.2)
    assert torch.equal(found["y"], by_hand(model.experts, model.linear(rows()), "fp8_blockwise"))


def test_a_compiled_model_has_no_graph_break():
    expected = trained(converted(Layer(), recipe="fp8_blockwise"), rows())
    compiled = torch.compile(converted(Layer(), recipe="fp8_blockwise"), backend="aot_eager", fullgraph=True)
    found = {name.removeprefix("_orig_mod."): value for name, value in trained(compiled, rows()).items()}
    check_close(found, expected, 0.01)


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_a_checkpoint_recomputes_with_the_recipe(use_reentrant):
    model = converted(Experts())
    x = rows().requires_grad_()
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    expected = trained(converted(Experts()), rows())
    assert torch.equal(x.grad, expected["x"]) and torch.equal(model.up.grad, expected["up"])


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_fsdp_casts_and_shards(mesh):
    expected = trained(converted(Experts()), rows())
    sharded = converted(Experts(torch.float32))
    fully_shard(sharded, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    check_close(trained(sharded, rows()), expected, 0.02)  # fp32 weights are cast from other values


@pytest.mark.parametrize("name", ("AUTO", "TORCH", "EMULATED", "TRITON", "DEEPGEMM"))
def test_torchaos_preference_is_ours(name):
    theirs = TheirPreference.__members__.get(name, name.lower())  # not every version has all: their values are strings
    assert integration.GroupedGemmConfig(kernel_preference=theirs).kernel_preference is KernelPreference[name]


def test_our_preference_stays_and_runs():
    config = integration.GroupedGemmConfig(recipe="mxfp8", kernel_preference=BackendKind.DEEPGEMM)
    model = Experts()
    quantize_(model, config, filter_fn=is_experts)
    with pytest.raises(RuntimeError, match="deepgemm"):
        model(rows())


@pytest.mark.parametrize("name", ("MSLK", "CUTEDSL"))
def test_libraries_that_no_backend_calls_are_refused(name):
    theirs = TheirPreference.__members__.get(name, name.lower())
    with pytest.raises(ValueError, match=rf"kernel_preference: expected one of AUTO.*no backend on {name}"):
        integration.GroupedGemmConfig(kernel_preference=theirs)


@pytest.mark.parametrize(
    "options, message",
    (
        ({"recipe": "fp9"}, "recipe"),
        ({"kernel_preference": "nonesuch"}, "kernel_preference: expected"),
        ({"group_alignment": 0}, "group_alignment: expected"),
    ),
)
def test_options_are_checked_when_the_config_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        integration.GroupedGemmConfig(**options)


def test_the_older_name_has_its_recipe():
    assert integration.FP8GroupedMMConfig().recipe is Recipe.FP8_ROWWISE
    model = Experts()
    quantize_(model, integration.FP8GroupedMMConfig(), filter_fn=is_experts)
    assert torch.equal(model(rows()), by_hand(model, rows(), "fp8_rowwise"))


def test_a_linear_layer_is_refused():
    with pytest.raises(
        ValueError, match=r"expected a module with parameters \(E, \., \.\); pass filter_fn.*found Linear"
    ):
        quantize_(Layer(), integration.GroupedGemmConfig())


def test_a_second_config_is_refused_and_the_same_is_not():
    model = converted(Experts())
    assert type(converted(model)) is type(converted(Experts()))
    with pytest.raises(ValueError, match="expected a module without a GroupedGemmConfig"):
        converted(model, recipe="mxfp8")


def test_a_replaced_forward_is_refused():
    model = Experts()
    model.forward = model.forward
    with pytest.raises(ValueError, match="convert it before other code replaces forward"):
        converted(model)


def test_without_torchao_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.core.config", None)
    monkeypatch.delitem(sys.modules, integration.__name__)
    with pytest.raises(ImportError, match=r"expected torchao >= 0\.18.*pip install 'torchao>=0\.18'"):
        importlib.import_module(integration.__name__)
