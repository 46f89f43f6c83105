"""torchtitan's experts on this package, against torchtitan's own, through its config and its overrides."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from grouped_gemm.testing import relative_error

try:
    import torchtitan
except ImportError:
    torchtitan = None
if torchtitan is not None:
    import spmd_types as spmd
    from spmd_types.checker import typecheck
    from torchtitan.config import OverrideConfig, apply_overrides
    from torchtitan.config.manager import ConfigManager
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher
    from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

    from grouped_gemm.integrations import torchtitan as integration

pytestmark = [
    pytest.mark.skipif(torchtitan is None, reason="needs torchtitan: pip install 'torchtitan==0.3.0'"),
    pytest.mark.filterwarnings("ignore:In CPU autocast"),  # of torchtitan's router
]

E, D, F = 4, 32, 48
COUNTS = torch.tensor([5, 0, 9, 3])
NAME = "grouped_gemm.integrations.torchtitan.grouped_experts"
KINDS = ("plain", "gpt-oss")


def config_of(kind: str, **own: Any) -> Any:
    parent = GroupedExperts if kind == "plain" else GptOssGroupedExperts
    return parent.Config(dim=D, hidden_dim=F, num_experts=E, **own)


def pair(kind: str, dtype: torch.dtype, *, swiglu_limit: float = 7.0, **options: Any) -> tuple[Any, Any]:
    """torchtitan's experts, and this package's with the same weights."""
    torch.manual_seed(0)
    override = integration.grouped_experts if kind == "plain" else integration.gpt_oss_grouped_experts
    config = config_of(kind, **({} if kind == "plain" else {"swiglu_limit": swiglu_limit}))
    theirs, ours = config.build(), override(config, **options).build()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=D**-0.5)
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(dtype), ours.to(dtype)


def rows(dtype: torch.dtype, extra: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(int(COUNTS.sum()) + extra, D, generator=generator).to(dtype).requires_grad_()


def trained(experts: Any, x: Tensor) -> dict[str, Tensor]:
    """The result, and the gradients of rows and parameters."""
    x = x.detach().requires_grad_()
    y = experts(x, COUNTS)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in experts.named_parameters()}


def check_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert relative_error(found[name], value) < tolerance, name


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients_are_those_of_torchtitan(kind, dtype):
    theirs, ours = pair(kind, dtype)
    x = rows(dtype)
    check_close(trained(ours, x), trained(theirs, x), 0.02)  # both multiply in bfloat16, and round elsewhere


@pytest.mark.parametrize("kind", KINDS)
def test_fp8_is_close_and_differs(kind):
    theirs, ours = pair(kind, torch.bfloat16, recipe="fp8_blockwise")
    found, expected = trained(ours, rows(torch.bfloat16)), trained(theirs, rows(torch.bfloat16))
    check_close(found, expected, 0.12)
    assert relative_error(found["y"], expected["y"]) > 0.01


def test_another_limit_of_gpt_oss_keeps_torchtitans_activation():
    theirs, ours = pair("gpt-oss", torch.bfloat16, swiglu_limit=0.5)
    x = rows(torch.bfloat16)
    expected = trained(theirs, x)
    check_close(trained(ours, x), expected, 0.02)
    _, ours = pair("gpt-oss", torch.bfloat16, swiglu_limit=0.5, recipe="fp8_blockwise")
    assert 0.01 < relative_error(ours(x, COUNTS), expected["y"]) < 0.12  # the GEMMs have the recipe


@pytest.mark.parametrize("kind", KINDS)
def test_rows_past_the_last_expert_give_zeros(kind):
    _, ours = pair(kind, torch.bfloat16)
    x = rows(torch.bfloat16, extra=4)
    y = ours(x, COUNTS)
    assert y.shape == x.shape and not y[-4:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_layer_has_no_graph_break(kind):
    _, ours = pair(kind, torch.bfloat16, recipe="fp8_blockwise")
    expected = trained(ours, rows(torch.bfloat16))
    ours.zero_grad()
    found = trained(torch.compile(ours, backend="aot_eager", fullgraph=True), rows(torch.bfloat16))
    check_close({name.removeprefix("_orig_mod."): value for name, value in found.items()}, expected, 0.01)


@pytest.fixture
def mesh():
    """A mesh of one process with the dimensions efsdp and tp."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1, 1), mesh_dim_names=("efsdp", "tp"))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("placement", (Shard(0), Shard(1), Replicate()), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dtensor_weights_run_as_their_shards(kind, placement, mesh):
    _, ours = pair(kind, torch.bfloat16)
    expected = trained(ours, rows(torch.bfloat16))
    for name, p in list(ours.named_parameters()):
        setattr(ours, name, torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Replicate(), placement])))
    found = trained(ours, rows(torch.bfloat16))
    check_close({name: getattr(g, "to_local", lambda g=g: g)() for name, g in found.items()}, expected, 1e-6)


def test_fsdp_casts_and_shards(mesh):
    expected = trained(pair("plain", torch.float32)[1], rows(torch.bfloat16))
    sharded = pair("plain", torch.float32)[1]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(sharded, mesh=mesh["efsdp"], mp_policy=policy)
    found = trained(sharded, rows(torch.bfloat16))
    check_close({name: getattr(g, "to_local", lambda g=g: g)() for name, g in found.items()}, expected, 0.01)


# The whole way: torchtitan's command line, its overrides, a model of its own.


def debug_model(*imports: str) -> tuple[Any, list[str]]:
    """torchtitan's debug model of DeepSeek V3 with two layers, the second with experts, and what was replaced."""
    arguments = ["--module", "deepseek_v3", "--config", "deepseek_v3_debugmodel"]
    config = ConfigManager().parse_args([*arguments, *(["--override.imports", *imports] if imports else [])])
    model = config.model_spec.model
    model.layers = model.layers[:2]
    for layer in model.layers:  # torchtitan's own needs a GPU or a compiler
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    replaced = apply_overrides(config.override, config)
    torch.manual_seed(0)
    built = model.build()
    built.init_states()
    built.verify_module_protocol()
    return built, replaced


def losses(model: Any, steps: int = 2) -> list[float]:
    tokens = torch.randint(2048, (2, 33), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(32).expand(2, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for _ in range(steps):
        logits = model(tokens[:, :-1], positions=positions)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.fixture(scope="module")
def own_losses() -> list[float]:
    return losses(debug_model()[0])


@pytest.mark.parametrize("recipe", (None, "fp8_blockwise"))
def test_a_model_trains_by_its_command_line_alone(recipe, own_losses):
    model, replaced = debug_model(NAME if recipe is None else f'{NAME}={{"recipe": "{recipe}"}}')
    assert len(replaced) == 1 and "GroupedGemmExperts.Config" in replaced[0]
    experts = model.layers["1"].moe.routed_experts.inner_experts
    assert isinstance(experts, integration.GroupedGemmExperts) and experts.recipe == recipe
    found = losses(model)
    assert found[1] < found[0] - 0.05
    assert found == pytest.approx(own_losses, abs=0.01)


def test_the_state_dict_is_torchtitans():
    assert list(debug_model(NAME)[0].state_dict()) == list(debug_model()[0].state_dict())


def test_each_override_claims_its_own_parent_only():
    plain, oss = config_of("plain"), config_of("gpt-oss")
    for config, name, expected in (
        (plain, NAME, integration.GroupedGemmExperts.Config),
        (oss, NAME, GptOssGroupedExperts.Config),
        (
            oss,
            NAME.replace(".grouped_experts", ".gpt_oss_grouped_experts"),
            integration.GroupedGemmGptOssExperts.Config,
        ),
    ):
        dispatcher = LocalTokenDispatcher.Config(num_experts=E, top_k=2)
        routed = RoutedExperts.Config(inner_experts=config, token_dispatcher=dispatcher)
        apply_overrides(OverrideConfig(imports=[name]), routed)
        assert type(routed.inner_experts) is expected


def test_options_are_checked_before_a_model_is_built():
    config = config_of("plain")
    with pytest.raises(ValueError, match=r"recipe: expected .*found 'fp9'"):
        integration.grouped_experts(config, recipe="fp9")
    with pytest.raises(ValueError, match="kernel_preference: expected"):
        integration.grouped_experts(config, kernel_preference="cutlass")


def test_the_preferred_backend_runs():
    _, ours = pair("plain", torch.bfloat16, kernel_preference="EMULATED")
    assert ours.kernel_preference == "emulated"
    _, refused = pair("plain", torch.bfloat16, recipe="mxfp8", kernel_preference="deepgemm")
    with pytest.raises(RuntimeError, match="deepgemm"):
        refused(rows(torch.bfloat16), COUNTS)


def test_checking_of_spmd_types_is_refused(mesh):
    _, ours = pair("plain", torch.bfloat16)
    with typecheck(local=True), pytest.raises(RuntimeError, match=r"expected debug\.spmd_typechecking off"):
        assert spmd.is_type_checking()
        ours._run(rows(torch.bfloat16), COUNTS, None, None)


def test_without_torchtitan_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchtitan.config", None)
    monkeypatch.delitem(sys.modules, integration.__name__)
    with pytest.raises(ImportError, match=r"expected torchtitan >= 0\.3.*pip install 'torchtitan>=0\.3'"):
        importlib.import_module(integration.__name__)
