"""Two ranks run transformers' models by our name: under FSDP2, tensor and expert parallelism. Prints the errors.

    RANK=<0 or 1> python tests/transformers_ranks.py <rendezvous file> <fsdp2 or plans>

Prints a line of JSON: what went wrong, by check. `test_transformers` starts the ranks.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
from typing import Any

import torch
import torch.distributed as dist
from test_transformers import (
    assert_close,
    error,
    experts_in,
    fp8_experts,
    fp8_inputs,
    fp8_model,
    integration,
    model_of,
    step,
    tokens_for,
)
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

RANKS = 2


def whole(x: Tensor) -> Tensor:
    if not isinstance(x, DTensor):
        return x
    placement: Any = x.placements[0]
    pieces = getattr(placement, "split_factor", 1)
    if pieces == 1:
        return x.full_tensor()
    local = x.to_local().contiguous()  # each rank has a part of gate and one of up, which torch 2.11 cannot gather
    parts = [torch.empty_like(local) for _ in range(RANKS)]
    dist.all_gather(parts, local)
    split = [part.chunk(pieces, placement.dim) for part in parts]
    return torch.cat([part[i] for i in range(pieces) for part in split], placement.dim)


def distributed(model: Any, mesh: DeviceMesh, *, experts: bool = False) -> Any:
    """``model`` by transformers' own plan. `from_pretrained` does the same, but needs the package accelerate."""
    from transformers.distributed import DistributedConfig

    return type(model).maybe_distribute_model(
        model, DistributedConfig(tp_size=RANKS, enable_expert_parallel=experts), mesh
    )


def fsdp2_trains_as_one_process(mesh: DeviceMesh) -> None:
    """FSDP averages gradients; here both ranks have the same tokens."""
    for name in ("qwen3_moe", "gpt_oss", "deepseek_v4"):
        alone, model = (model_of(name).bfloat16().train() for _ in range(2))
        for layer in (*model.model.layers, model):
            fully_shard(layer, mesh=mesh)
        for round in range(2):
            expected, found = step(alone), step(model)
            assert isinstance(model.model.layers[0].mlp.experts.down_proj, DTensor)
            assert_close({key: whole(x) for key, x in found.items()}, expected, 1e-2)
            for m in (alone, model):
                torch.optim.SGD(m.parameters(), lr=0.01 * round).step()


@torch.no_grad()
def fsdp2_runs_fp8_experts(mesh: DeviceMesh) -> None:
    """Also after the shards have changed, of which the gathered parameters have no new version."""
    for options in ({}, {"scale_format": "ue8m0"}, {"intermediate": 96}):
        alone, module = (fp8_experts(**options).requires_grad_(False) for _ in range(2))
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        call = fp8_inputs()
        for value in (None, 2**-7, 2**-9):
            for m in (alone, module):
                scale = m.down_proj_scale_inv
                local = scale.to_local() if isinstance(scale, DTensor) else scale
                if value is not None:
                    local.copy_(torch.full(local.shape, value))
            assert torch.equal(module(*call), alone(*call)), (options, value)
        assert module not in integration._kept


def tensor_parallelism_agrees(mesh: DeviceMesh) -> None:
    """Each rank has a part of the intermediate features of all experts. gpt-oss has no such plan for experts."""
    model = distributed(model_of("qwen3_moe"), mesh)
    assert experts_in(model)[0].down_proj.to_local().shape == (4, 32, 24)
    assert_close({key: whole(x) for key, x in step(model).items()}, step(model_of("qwen3_moe", "eager")), 5e-4)


def expert_parallelism_agrees(mesh: DeviceMesh) -> None:
    """Each rank has half of the experts. Slots of the other one have the id ``num_experts``."""
    for name in ("qwen3_moe", "gpt_oss"):
        model = distributed(model_of(name), mesh, experts=True)
        assert experts_in(model)[0].down_proj.to_local().shape[0] == experts_in(model)[0].num_experts == 2
        assert_close({key: whole(x) for key, x in step(model).items()}, step(model_of(name, "eager")), 5e-4)


@torch.no_grad()
def expert_parallelism_agrees_with_fp8_experts(mesh: DeviceMesh) -> None:
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    alone = fp8_model()
    model = copy.deepcopy(alone)
    FineGrainedFP8HfQuantizer(model.config.quantization_config).update_tp_plan(model.config)  # adds the scales
    model.model.init_parallel_plans()
    model.init_parallel_plans()
    distributed(model, mesh, experts=True)
    experts = model.model.layers[0].mlp.experts
    assert experts.down_proj_scale_inv.to_local().shape[0] == experts.num_experts == 2
    ids = tokens_for(model)
    for _ in range(2):
        assert error(model(ids).logits, alone(ids).logits) < 1e-2  # sums of the ranks are rounded in another order
    assert experts in integration._kept


CHECKS = {
    "fsdp2": (fsdp2_trains_as_one_process, fsdp2_runs_fp8_experts),
    "plans": (
        tensor_parallelism_agrees,
        expert_parallelism_agrees,
        expert_parallelism_agrees_with_fp8_experts,
    ),
}


def main(rendezvous: str, kind: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    integration.register()
    for check in CHECKS[kind]:
        try:
            check(mesh)
        except Exception:
            print(json.dumps({check.__name__: traceback.format_exc()}), flush=True)
            return  # the other rank may wait for this one
    print(json.dumps({}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
