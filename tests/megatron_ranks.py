"""Two ranks run a layer of Megatron-Core under expert parallelism or expert tensor parallelism. Prints what differs.

    RANK=<0 or 1> python tests/megatron_ranks.py <rendezvous file> <experts or tensors>

Prints a line of JSON: the errors against Megatron-Core's own experts, and whether their shards are the same.
`test_megatron` starts the ranks.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from test_megatron import (
    LocalSpecProvider,
    MoELayer,
    MoESubmodules,
    ProcessGroupCollection,
    config_of,
    copy_weights,
    integration,
    parallel_state,
    relative_error,
)

RANKS = 2


def shards(experts: Any) -> set[Any]:
    """Which part of which tensor each shard is, and whether it is a copy."""
    found = set()
    for entry in experts.sharded_state_dict("a.").values():
        for shard in entry.build() if hasattr(entry, "build_fn") else [entry]:
            if "_extra_state" not in shard.key:
                place = shard.global_shape, shard.global_offset, shard.local_shape
                found.add((shard.key, *place, shard.replica_id))
    return found


def main(kind: str) -> dict[str, Any]:
    tp, ep = (RANKS, 1) if kind == "tensors" else (1, RANKS)
    sizes = {"tensor_model_parallel_size": tp, "expert_model_parallel_size": ep, "expert_tensor_parallel_size": tp}
    parallel_state.initialize_model_parallel(**sizes)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = config_of(sequence_parallel=tp > 1, **sizes)
    torch.manual_seed(0)
    theirs, ours = (
        MoELayer(config, MoESubmodules(experts=experts), pg_collection=groups)
        for experts in (LocalSpecProvider().grouped_mlp_modules(False), integration.experts_builder())
    )
    copy_weights(theirs, ours)
    x = torch.randn(8, 2, config.hidden_size, generator=torch.Generator().manual_seed(dist.get_rank()))
    results = [layer(x)[0] for layer in (ours, theirs)]
    for y in results:
        y.square().sum().backward()
    first = ours.experts.linear_fc1.weight
    expected = torch.stack([expert.linear_fc1.weight.grad for expert in theirs.experts.local_experts])
    return {
        "result": relative_error(*results),
        "gradient": relative_error(first.grad, expected),
        "shapes": list(first.shape),
        "same shards": shards(ours.experts) == shards(theirs.experts),
        "allreduce": first.allreduce == theirs.experts.local_experts[0].linear_fc1.weight.allreduce,
    }


if __name__ == "__main__":
    meeting, kind = sys.argv[1:]
    torch.set_num_threads(1)
    setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))  # noqa: B010  # Megatron-Core's router asks
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(os.environ["RANK"]), world_size=RANKS)
    print(json.dumps(main(kind)))
    dist.destroy_process_group()
