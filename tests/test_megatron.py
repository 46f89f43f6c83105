"""Megatron-Core's experts on this package, against a plain loop over experts and Megatron-Core's own SequentialMLP."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.nn.functional as F
from processes import environment
from torch import Tensor

from grouped_gemm.testing import relative_error

try:
    import megatron.core as megatron
except ImportError:
    megatron = None
if megatron is not None:
    from megatron.core import activations, dist_checkpointing, parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    from grouped_gemm.integrations import megatron as integration

pytestmark = [
    pytest.mark.skipif(megatron is None, reason="needs megatron-core >= 0.17: pip install 'megatron-core==0.19.2'"),
    pytest.mark.filterwarnings("ignore"),  # Megatron-Core warns of each package that is not installed
]

E, H, I = 4, 32, 48  # noqa: E741
COUNTS = torch.tensor([5, 0, 9, 3])


@pytest.fixture(scope="module")
def groups():
    """Megatron-Core's process groups, of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield ProcessGroupCollection.use_mpu_process_groups()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def config_of(**options: Any) -> Any:
    defaults = {
        "num_layers": 1, "hidden_size": H, "num_attention_heads": 4, "num_moe_experts": E, "moe_ffn_hidden_size": I,
        "ffn_hidden_size": I, "gated_linear_unit": True, "activation_func": F.silu, "add_bias_linear": False,
        "moe_router_topk": 2, "moe_token_dispatcher_type": "allgather", "moe_router_load_balancing_type": "none",
        "use_cpu_initialization": True,
    }  # fmt: skip
    late = {name: options.pop(name) for name in ("delay_wgrad_compute", "fp8") if name in options}
    config = TransformerConfig(**defaults | options)
    for name, value in late.items():  # its checks want TransformerEngine
        setattr(config, name, value)
    return config


def built(groups: Any, recipe: str | None = None, **options: Any) -> Any:
    """Experts by the builder, with a bias that is not zero."""
    torch.manual_seed(0)
    config = config_of(**options)
    experts = integration.experts_builder(recipe)(E, config, pg_collection=groups, name="experts")
    with torch.no_grad():
        for p in experts.parameters():
            p.normal_(std=0.2)
    return experts


def rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(int(COUNTS.sum()), H, generator=generator).to(dtype)
    return x.requires_grad_(), torch.rand(len(x), generator=generator).requires_grad_()


def loop(experts: Any, x: Tensor, probs: Tensor, act: Any, gated: bool = True) -> Tensor:
    """Each expert by itself: probs * (act(x @ w1.T + b1) @ w2.T + b2)."""
    results = []
    parts = zip(x.split(COUNTS.tolist()), probs.split(COUNTS.tolist()))
    for i, (rows_of_one, p) in enumerate(parts):
        b1, b2 = (None if layer.bias is None else layer.bias[i] for layer in (experts.linear_fc1, experts.linear_fc2))
        h = F.linear(rows_of_one, experts.linear_fc1.weight[i], b1)
        h = act(*h.chunk(2, 1)) if gated else act(h)
        results.append(p.unsqueeze(1) * F.linear(h, experts.linear_fc2.weight[i], b2))
    return torch.cat(results)


def gradients(experts: Any, y: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
    names = dict(experts.named_parameters())
    found = torch.autograd.grad(y.square().sum(), [*inputs, *names.values()])
    return dict(zip([*(str(i) for i in range(len(inputs))), *names], found)) | {"y": y.detach()}


def check_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(found[name], value) < tolerance, name


def clamped(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


tanh_gelu = functools.partial(F.gelu, approximate="tanh")
KINDS = {  # options, and the activation
    "swiglu": ({}, lambda gate, up: F.silu(gate) * up),
    "geglu": ({"activation_func": F.gelu}, lambda gate, up: F.gelu(gate) * up),
    "geglu_tanh": ({"activation_func": tanh_gelu}, lambda gate, up: tanh_gelu(gate) * up),
    "reglu": ({"activation_func": F.relu}, lambda gate, up: F.relu(gate) * up),
    "silu": ({"gated_linear_unit": False}, F.silu),
    "gelu": ({"activation_func": F.gelu, "gated_linear_unit": False}, F.gelu),
    "quick": ({"activation_func": "quick_gelu", "activation_func_clamp_value": 7.0, "glu_linear_offset": 1.0}, clamped),
    "fast": ({"activation_func": "fast_gelu", "gated_linear_unit": False}, tanh_gelu),
}


@pytest.mark.parametrize("bias", (False, True), ids=("plain", "bias"))
@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_those_of_a_loop(kind, bias, groups):
    options, act = KINDS[kind]
    function = options.get("activation_func")
    if isinstance(function, str):
        options = options | {"activation_func": getattr(activations, function)}
    experts = built(groups, add_bias_linear=bias, **options)
    x, probs = rows()
    expected = gradients(experts, loop(experts, x, probs, act, options.get("gated_linear_unit", True)), x, probs)
    y, y_bias = experts(x, COUNTS, probs)
    assert y_bias is None
    check_close(gradients(experts, y, x, probs), expected, 1e-4)


def test_a_recipe_is_close_and_differs(groups):
    experts = built(groups, "fp8_blockwise", params_dtype=torch.bfloat16)
    x, probs = rows(torch.bfloat16)
    y, _ = experts(x, COUNTS, probs)
    expected = loop(experts, x, probs, KINDS["swiglu"][1]).to(y.dtype)
    assert y.dtype == torch.bfloat16
    check_close(gradients(experts, y, x, probs), gradients(experts, expected, x, probs), 0.15)
    assert relative_error(y, expected) > 0.01


def test_no_rows_give_no_rows(groups):
    experts = built(groups)
    x, probs = (t[:0].detach().requires_grad_() for t in rows())
    y, _ = experts(x, torch.zeros_like(COUNTS), probs)
    y.sum().backward()
    assert y.shape == (0, H) and not experts.linear_fc1.weight.grad.any()


@pytest.mark.parametrize("delayed", (False, True), ids=("at once", "delayed"))
@pytest.mark.parametrize("fused", (False, True), ids=("grad", "main_grad"))
def test_gradients_of_weights_go_where_the_config_says(fused, delayed, groups):
    experts = built(groups, gradient_accumulation_fusion=fused, delay_wgrad_compute=delayed)
    weights = experts.linear_fc1.weight, experts.linear_fc2.weight
    x, probs = rows()
    expected = gradients(experts, loop(experts, x, probs, KINDS["swiglu"][1]), x, probs)
    for p in weights:
        p.main_grad = torch.ones_like(p)
    for micro_batch in range(2):
        experts(x, COUNTS, probs)[0].square().sum().backward()
        if delayed and micro_batch == 0:
            assert all(p.grad is None and (p.main_grad == 1).all() for p in weights)
        experts.backward_dw()
    for p, name in zip(weights, ("linear_fc1.weight", "linear_fc2.weight")):
        found = p.main_grad - 1 if fused else p.grad
        assert relative_error(found, 2 * expected[name]) < 1e-4
        assert fused or (p.main_grad == 1).all()
    assert relative_error(x.grad, 2 * expected["0"]) < 1e-4


@pytest.mark.parametrize("delayed", (False, True), ids=("at once", "delayed"))
@pytest.mark.parametrize("fused", (False, True), ids=("grad", "main_grad"))
def test_hooks_of_data_parallelism_find_the_gradients(fused, delayed, groups, monkeypatch):
    """Megatron-Core's own hooks, up to the reduction, which needs a GPU."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    experts = built(groups, gradient_accumulation_fusion=fused, delay_wgrad_compute=delayed, add_bias_linear=True)
    x, probs = rows()
    expected = gradients(experts, loop(experts, x, probs, KINDS["swiglu"][1]), x, probs)
    options = DistributedDataParallelConfig(overlap_grad_reduce=True, grad_reduce_in_fp32=True)
    options.delay_wgrad_compute = delayed
    model = DistributedDataParallel(experts.config, options, experts)
    with model.no_sync():
        for micro_batch in range(2):
            model(x, COUNTS, probs)[0].square().sum().backward()
            if delayed and micro_batch == 0:
                assert not experts.linear_fc1.weight.main_grad.any()
            experts.backward_dw()
    for name, p in experts.named_parameters():
        assert p.grad is None
        assert relative_error(p.main_grad, 2 * expected[name]) < 1e-4, name


def test_recomputation_without_gradients_needs_no_main_grad(groups):
    experts = built(groups, gradient_accumulation_fusion=True)
    with torch.no_grad():
        y, _ = experts(rows()[0], COUNTS, rows()[1])
    assert y.shape == (17, H)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
def test_counts_may_have_either_dtype(dtype, groups):
    experts = built(groups)
    x, probs = rows()
    assert torch.equal(experts(x, COUNTS.to(dtype), probs)[0], experts(x, COUNTS, probs)[0])


# A layer of Megatron-Core, and its checkpoints.


def copy_weights(theirs: Any, ours: Any) -> None:
    """Gives ``ours`` the weights of a layer with Megatron-Core's own experts."""
    with torch.no_grad():
        ours.router.load_state_dict(theirs.router.state_dict())
        for i, expert in enumerate(theirs.experts.local_experts):
            ours.experts.linear_fc1.weight[i] = expert.linear_fc1.weight
            ours.experts.linear_fc2.weight[i] = expert.linear_fc2.weight


@pytest.fixture
def layers(groups, monkeypatch):
    """A layer with Megatron-Core's own experts, and one on this package with the same weights."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))  # its router asks
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # so do its checkpoints

    def layer(experts: Any) -> Any:
        torch.manual_seed(0)
        return MoELayer(config_of(), MoESubmodules(experts=experts), pg_collection=groups)

    theirs, ours = layer(LocalSpecProvider().grouped_mlp_modules(False)), layer(integration.experts_builder())
    copy_weights(theirs, ours)
    return theirs, ours


def test_a_layer_of_megatron_is_the_same(layers):
    theirs, ours = layers
    x = torch.randn(8, 2, H, generator=torch.Generator().manual_seed(2))
    found, expected = (layer(x)[0] for layer in (ours, theirs))
    assert relative_error(found, expected) < 1e-5
    found.square().sum().backward()
    expected.square().sum().backward()
    assert relative_error(ours.router.weight.grad, theirs.router.weight.grad) < 1e-4
    for i, expert in enumerate(theirs.experts.local_experts):
        assert relative_error(ours.experts.linear_fc1.weight.grad[i], expert.linear_fc1.weight.grad) < 1e-4


@pytest.mark.parametrize("kind, shape", (("experts", [2, 2 * I, H]), ("tensors", [4, I, H])))
def test_two_ranks(kind, shape, tmp_path):
    """Expert parallelism, and expert tensor parallelism: megatron_ranks.py compares with Megatron-Core's experts."""
    command = [sys.executable, Path(__file__).with_name("megatron_ranks.py"), tmp_path / "meeting", kind]
    logs = [tmp_path / f"rank {rank}.log" for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        variables = [environment(RANK=str(rank), OMP_NUM_THREADS="1") for rank in range(2)]
        codes = list(pool.map(lambda log, own: processes.run(command, log, own, 120), logs, variables))
    for log in logs:
        lines = log.read_text().splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{")]
        assert len(found) == 1, "\n".join(lines[-40:])
        assert found[0].pop("result") < 1e-5 and found[0].pop("gradient") < 1e-4
        assert found[0] == {"shapes": shape, "same shards": True, "allreduce": True}
    assert codes == [0, 0]


def test_a_distributed_checkpoint_of_megatrons_experts_loads(layers, tmp_path):
    theirs, ours = (layer.experts for layer in layers)
    dist_checkpointing.save(theirs.sharded_state_dict("layer."), str(tmp_path))
    expected = copy.deepcopy(ours.state_dict())
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
    loaded = dist_checkpointing.load(ours.sharded_state_dict("layer."), str(tmp_path))
    ours.load_state_dict({name.removeprefix("layer."): value for name, value in loaded.items()})
    for name, value in expected.items():
        assert value.any() and torch.equal(ours.state_dict()[name], value)


@pytest.mark.parametrize("is_single", (False, True))
def test_shards_have_the_keys_of_megatrons_experts(is_single, layers):
    def keys(experts: Any) -> set[str]:
        metadata = {"singleton_local_shards": is_single}
        return {s.key for s in experts.sharded_state_dict("a.", metadata=metadata).values() if "_extra" not in s.key}

    theirs, ours = layers
    assert keys(ours.experts) == keys(theirs.experts)


def test_a_state_dict_with_a_tensor_for_each_expert_loads(groups):
    experts = built(groups, add_bias_linear=True)
    apart = {f"{name}{i}": p[i].clone() for name, p in experts.state_dict().items() for i in range(E)}
    fresh = built(groups, add_bias_linear=True)
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    fresh.load_state_dict(apart)
    assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(), experts.parameters()))


def test_parameters_have_what_megatron_reads(groups):
    experts = built(groups, gradient_accumulation_fusion=True, add_bias_linear=True)
    assert [n for n, _ in experts.named_parameters()] == [
        f"linear_fc{i}.{name}" for i in (1, 2) for name in ("weight", "bias")
    ]
    first, second = experts.linear_fc1, experts.linear_fc2
    assert first.weight.shape == (E, 2 * I, H) and second.weight.shape == (E, H, I)
    assert (first.weight.partition_dim, second.weight.partition_dim, first.bias.partition_dim) == (1, 2, 1)
    assert all(p.allreduce for p in experts.parameters())
    assert not hasattr(second.bias, "tensor_model_parallel")


REFUSED = {
    "squared_relu": (
        {"activation_func": "squared_relu", "gated_linear_unit": False},
        "activation_func: .*squared_relu",
    ),
    "clamp": ({"activation_func_clamp_value": 3.0}, "activation_func: .*clamp_value 3.0"),
    "quick without offset": ({"activation_func": "quick_gelu"}, "activation_func: .*glu_linear_offset 0"),
    "interleaved": ({"moe_mlp_glu_interleave_size": 8}, "moe_mlp_glu_interleave_size: expected off.*found 8"),
    "probs": (
        {"moe_apply_probs_on_input": True, "moe_router_topk": 1, "moe_router_pre_softmax": True},
        "moe_apply_probs_on_input: expected off",
    ),
    "fp8": ({"fp8": "e4m3"}, r"recipe: expected a recipe.*found None"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_covered_is_refused(what, groups):
    options, message = REFUSED[what]
    if isinstance(options.get("activation_func"), str):
        options = options | {"activation_func": getattr(activations, options["activation_func"])}
    with pytest.raises(ValueError, match=message):
        built(groups, **options)


def test_options_of_the_builder_are_checked_at_once():
    with pytest.raises(ValueError, match=r"recipe: expected"):
        integration.experts_builder("fp9")
    with pytest.raises(ValueError, match=r"kernel_preference: expected"):
        integration.experts_builder(kernel_preference="nonesuch")


def test_the_preferred_backend_runs(groups):
    experts = integration.experts_builder("mxfp8", "deepgemm")(E, config_of(), pg_collection=groups)
    with pytest.raises(RuntimeError, match="deepgemm"):
        experts(rows()[0], COUNTS, rows()[1])


def test_without_the_seam_the_import_says_what_to_install(monkeypatch):
    monkeypatch.delattr("megatron.core.transformer.moe.moe_layer.ExpertsBuilder")
    monkeypatch.delitem(sys.modules, integration.__name__)
    with pytest.raises(ImportError, match=r"expected megatron-core >= 0\.17.*grouped_gemm\.ops\.gmm"):
        importlib.import_module(integration.__name__)
