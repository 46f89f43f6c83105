"""Experts for Megatron-Core: `experts_builder` makes the callable that its ``MoESubmodules`` takes.

It needs megatron-core to be installed. Importing it changes nothing in Megatron-Core.

M, E, H, F: routed rows, experts of this rank, features of a token, and intermediate features of this rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module, Parameter

from grouped_gemm.core.preference import KernelPreference, Preference
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.moe.arguments import check_options
from grouped_gemm.moe.experts import sorted_experts
from grouped_gemm.selection import checks
from grouped_gemm.weight_gradients import WgradQueue, delay_wgrad

try:
    from megatron.core import activations
    from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
    from megatron.core.fusions import fused_bias_geglu
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.moe.moe_layer import ExpertsBuilder
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
    from megatron.core.utils import get_pg_rank, get_pg_size
except ImportError as error:
    raise ImportError(
        "grouped_gemm.integrations.megatron: expected megatron-core >= 0.17, which takes an ExpertsBuilder; found "
        f"none, or one without it ({error}). Install it: pip install 'megatron-core>=0.17'. Older versions call "
        "grouped_gemm.ops.gmm themselves"
    ) from error

_QUICK = (activations.quick_gelu, fused_bias_geglu.quick_gelu)
_NAMES = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu", activations.fast_gelu: "gelu_tanh"}
_GATED = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu", "gelu_tanh": "geglu_tanh"}


def experts_builder(
    recipe: Recipe | str | None = None, kernel_preference: Preference = KernelPreference.AUTO
) -> ExpertsBuilder:
    """What builds experts on this package, for ``MoESubmodules(experts=...)`` or a backend's ``grouped_mlp_modules``.

    >>> MoELayer(config, MoESubmodules(experts=experts_builder("fp8_blockwise")))

    Args:
        recipe: how the operands of the GEMMs are quantized, as in `grouped_gemm.moe.experts_forward`.
        kernel_preference: as in `grouped_gemm.grouped_mm`.

    Returns:
        A callable ``(num_local_experts, config, *, pg_collection, name=None)`` that returns `GroupedGemmMLP`.

    Raises:
        ValueError: an option is not valid.
    """
    check_options("swiglu", False, recipe, "auto", kernel_preference, "full", False, False)
    return functools.partial(GroupedGemmMLP, recipe=recipe, kernel_preference=kernel_preference)


class GroupedGemmMLP(MegatronModule):  # type: ignore[misc]
    """The experts of a MoE layer, as Megatron-Core's ``TEGroupedMLP``: one layer on `grouped_gemm.moe.sorted_experts`.

    ``config.gradient_accumulation_fusion`` adds gradients of weights to ``main_grad``. ``config.delay_wgrad_compute``
    and ``overlap_dispatch_backward_with_experts_wgrad`` put them off until `backward_dw`.

    Args:
        num_local_experts: E.
        config: the ``TransformerConfig``.
        pg_collection: the ``ProcessGroupCollection``, of which it reads ``ep``, ``expt_tp`` and ``expt_dp``.
        name: not used, as nothing here is quantized by name.
        recipe: as in `experts_builder`.
        kernel_preference: as in `experts_builder`.

    Attributes:
        linear_fc1: its ``weight`` is (E, 2F, H), gate rows before up rows, or (E, F, H) without a gate, as with
            ``moe_single_grouped_weight``; its ``bias`` (E, 2F) or (E, F), or None.
        linear_fc2: its ``weight`` is (E, H, F); its ``bias`` (E, H), or None.

    Raises:
        ValueError: ``config`` asks for something that these experts do not do.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: Any,
        *,
        pg_collection: Any,
        name: str | None = None,
        recipe: Recipe | str | None = None,
        kernel_preference: Preference = KernelPreference.AUTO,
    ) -> None:
        super().__init__(config=config)
        self.activation = _activation(config)
        tp = get_pg_size(pg_collection.expt_tp)
        _check(config, recipe, tp, get_pg_size(getattr(pg_collection, "expt_gtp_remat", None) or _ONE))
        self.num_local_experts, self.recipe, self.kernel_preference = num_local_experts, recipe, kernel_preference
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        self.accumulate_main_grad = bool(config.gradient_accumulation_fusion)
        is_delayed = config.delay_wgrad_compute or config.overlap_dispatch_backward_with_experts_wgrad
        self._waiting = WgradQueue() if is_delayed else None
        self._reduce_hooks: list[Callable[[], None]] = []
        hidden = config.moe_latent_size or config.hidden_size
        intermediate = config.moe_ffn_hidden_size // tp
        width = 2 * intermediate if config.gated_linear_unit else intermediate
        self.linear_fc1 = _Weights(num_local_experts, width, hidden, config, config.init_method, 0)
        self.linear_fc2 = _Weights(num_local_experts, hidden, intermediate, config, config.output_layer_init_method, 1)
        uses_expert_groups = config.expert_model_parallel_size > 1 or (
            config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        for p in self.parameters():
            p.allreduce = not uses_expert_groups  # which group reduces its gradient
        weights: tuple[Any, ...] = self.linear_fc1.weight, self.linear_fc2.weight
        for w in weights:
            # Megatron-Core's hooks want a gradient, also of weights whose gradient is in main_grad already.
            w.zero_out_wgrad = self.accumulate_main_grad
            w.skip_backward_post_hook = is_delayed  # its hook runs in backward_dw

    def forward(
        self, dispatched_input: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """The experts on rows in expert order, and None for a bias, which is added already.

        Args:
            dispatched_input: (M, H).
            tokens_per_expert: (E,) integers, on the CPU or the device. No host sync, wherever they are.
            permuted_probs: (M,), what each row of the result is multiplied by.
        """
        offs = tokens_per_expert.cumsum(0, dtype=torch.int32).to(dispatched_input.device, non_blocking=True)
        with nullcontext() if self._waiting is None else delay_wgrad(self._waiting):
            y = sorted_experts(
                dispatched_input,
                offs,
                self.linear_fc1.weight,
                self.linear_fc2.weight,
                row_weights=permuted_probs,
                recipe=self.recipe,
                activation=self.activation,
                gate_up_bias=self.linear_fc1.bias,
                down_bias=self.linear_fc2.bias,
                kernel_preference=self.kernel_preference,
                accumulate_main_grad=self.accumulate_main_grad,
            )
        return y, None

    def backward_dw(self) -> None:
        """Computes the gradients of weights that wait, then calls the hooks of Megatron-Core's data parallelism."""
        if self._waiting is not None:
            self._waiting.backward_dw()
            for hook in self._reduce_hooks:
                hook()

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], None]) -> None:
        """Adds a hook that runs after the gradients that waited are there, for Megatron-Core's data parallelism."""
        self._reduce_hooks.append(hook)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The shards of a distributed checkpoint, one for each expert, with the keys of Megatron-Core's experts."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        is_single = metadata.get("singleton_local_shards", False)
        count, first = get_pg_size(self.ep_group) * self.num_local_experts, get_pg_rank(self.ep_group)
        found: dict[str, Any] = {}
        for name, linear, axis in (("linear_fc1", self.linear_fc1, 0), ("linear_fc2", self.linear_fc2, 1)):
            for i in range(self.num_local_experts):
                expert = first * self.num_local_experts + i
                offsets = sharded_offsets if is_single else (*sharded_offsets, (len(sharded_offsets), expert, count))
                parts = {"weight": linear.weight[i]} | ({} if linear.bias is None else {"bias": linear.bias[i]})
                axes = {"weight": axis} | ({"bias": 0} if axis == 0 else {})
                shards = make_sharded_tensors_for_checkpoint(
                    parts, "", axes, offsets, tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"]
                )
                for part, shard in shards.items():
                    shard.replica_id = (*shard.replica_id[:2], get_pg_rank(self.dp_group))
                    if axis == 0 and self.config.gated_linear_unit:
                        shards[part] = apply_swiglu_sharded_factory(
                            shard, offsets, is_single, tp_group=self.tp_group, dp_group=metadata["dp_cp_group"]
                        )
                experts = f"{prefix}experts.{expert}." if is_single else f"{prefix}experts."
                replace_prefix_for_sharding(shards, "", f"{experts}{name}.")
                found |= {f"{prefix}{name}.{part}{i}": shard for part, shard in shards.items()}
        return found


class _Weights(Module):
    """Weights (E, N, K) and a bias (E, N) or None, with the names of a grouped linear layer.

    State dicts that have a tensor for each expert, weight0, weight1 and so on, load too.
    """

    def __init__(self, num_experts: int, n: int, k: int, config: Any, init: Callable[[Tensor], Any], axis: int) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        options = {"device": device, "dtype": config.params_dtype}
        self.weight = Parameter(torch.empty(num_experts, n, k, **options))
        self.bias = Parameter(torch.zeros(num_experts, n, **options)) if config.add_bias_linear else None
        if config.perform_initialization:
            tracker = get_cuda_rng_tracker()
            own = tracker.fork(get_expert_parallel_rng_tracker_name()) if tracker.is_initialized() else nullcontext()
            with own, torch.no_grad():
                for w in self.weight:
                    init(w)
        partitioned = ((self.weight, axis + 1), *(((self.bias, 1),) if self.bias is not None and axis == 0 else ()))
        for p, dim in partitioned:
            p.tensor_model_parallel, p.partition_dim, p.partition_stride = True, dim, 1
        self.register_load_state_dict_pre_hook(_stack)


def _stack(module: Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Replaces the tensors of each expert in ``state_dict`` by one, before it is loaded."""
    for name, p in module.named_parameters(recurse=False):
        keys = [f"{prefix}{name}{i}" for i in range(p.shape[0])]
        if all(key in state_dict for key in keys):
            state_dict[prefix + name] = torch.stack([state_dict.pop(key) for key in keys])


class _One:
    """A group of one rank, where Megatron-Core has none."""

    @staticmethod
    def size() -> int:
        return 1


_ONE = _One()


def _activation(config: Any) -> str:
    """The name of the activation of ``config``.

    Raises:
        ValueError: it is none that this package has.
    """
    function, gated = config.activation_func, config.gated_linear_unit
    clamp, offset = config.activation_func_clamp_value, config.glu_linear_offset if gated else 0.0
    if gated and function in _QUICK and (clamp, offset) == (7.0, 1.0):
        return "swiglu_clamped"
    if isinstance(function, functools.partial):
        is_tanh = (function.func, function.args, function.keywords) == (F.gelu, (), {"approximate": "tanh"})
        name = "gelu_tanh" if is_tanh else None
    else:
        name = _NAMES.get(function)
    if name is None or clamp is not None or offset:
        expected = (
            "silu, gelu, relu, fast_gelu, gated or not, without clamp or offset; or quick_gelu, gated, with "
            "activation_func_clamp_value 7 and glu_linear_offset 1"
        )
        own = getattr(function, "__name__", repr(function))
        found = f"{own}, gated_linear_unit {gated}, activation_func_clamp_value {clamp}, glu_linear_offset {offset}"
        checks.fail("config.activation_func", expected, found)
    return _GATED[name] if gated else name


def _check(config: Any, recipe: Recipe | str | None, tp: int, gtp: int) -> None:
    """Raises ValueError if ``config`` asks for something else that these experts do not do."""
    refused: dict[str, Any] = {
        "moe_apply_probs_on_input": config.moe_apply_probs_on_input,
        "moe_mlp_glu_interleave_size": config.moe_mlp_glu_interleave_size,
        "moe_paged_stash": getattr(config, "moe_paged_stash", False),
        "use_transformer_engine_op_fuser": config.use_transformer_engine_op_fuser,
    }
    if config.fine_grained_activation_offloading:
        modules = {"expert_fc1", "moe_act", "fused_group_mlp"} & set(config.offload_modules or ())
        refused["offload_modules"] = sorted(modules)
    for option, value in refused.items():
        if value:
            checks.fail(f"config.{option}", "off, with experts of grouped_gemm", repr(value))
    if (config.fp8 or config.fp4) and recipe is None:
        expected = 'a recipe, such as experts_builder("fp8_blockwise"), because config asks for fp8 or fp4'
        checks.fail("recipe", expected, "None")
    if config.add_bias_linear and tp > 1:
        checks.fail("config.add_bias_linear", "False, with expert tensor parallelism", "True")
    if gtp > 1:
        checks.fail("pg_collection.expt_gtp_remat", "one rank", f"{gtp} ranks")
    if config.moe_ffn_hidden_size % tp:
        checks.fail(
            "config.moe_ffn_hidden_size", f"a multiple of {tp}, the ranks of expt_tp", config.moe_ffn_hidden_size
        )
