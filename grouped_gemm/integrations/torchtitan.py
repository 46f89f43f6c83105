"""Overrides for torchtitan that run the experts of a model on this package. `import torchtitan` is needed to import it.

`grouped_experts` and `gpt_oss_grouped_experts` are names for torchtitan's ``override.imports``:

    --override.imports 'grouped_gemm.integrations.torchtitan.grouped_experts={"recipe": "fp8_blockwise"}'

R, E, D, F: routed rows, experts, features of a token and intermediate features, as torchtitan has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grouped_gemm.core.preference import KernelPreference
from grouped_gemm.functional import grouped_mm
from grouped_gemm.moe.arguments import check_options
from grouped_gemm.moe.experts import sorted_experts

try:
    import spmd_types as spmd
    from torchtitan.config import derive, override
    from torchtitan.models.common.moe import GroupedExperts
    from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts, ScaleBiasForward
except ImportError as error:
    raise ImportError(
        "grouped_gemm.integrations.torchtitan: expected torchtitan >= 0.3, which has torchtitan.config.override; found "
        f"none, or one without it ({error}). Install it: pip install 'torchtitan>=0.3'"
    ) from error

_CLAMP = 7.0  # of swiglu_clamped


class _OnThisPackage:
    """What both classes of experts do in the same way. It comes before torchtitan's class among their bases."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # torchtitan's
        self.recipe, self.kernel_preference = config.recipe, config.kernel_preference

    def _grouped_mm(self, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
        """A (R, K) times the matrix of each expert, B_t (E, K, N)."""
        return grouped_mm(A, B_t, offs, recipe=self.recipe, kernel_preference=self.kernel_preference)

    def _run(self, x_RD: Tensor, counts_E: Tensor, gate_up: Any, down_EDF: Tensor, **options: Any) -> Tensor:
        """y (R, D) in bfloat16, where torchtitan multiplies in bfloat16.

        Raises:
            RuntimeError: torchtitan checks SPMD types, which it cannot do through this package's functions.
        """
        if spmd.is_type_checking():
            raise RuntimeError(
                "grouped_gemm.integrations.torchtitan: expected debug.spmd_typechecking off; found it on, and "
                "torchtitan cannot follow its types through this package. Turn it off, or drop this override."
            )
        offs_E = torch.cumsum(counts_E, dim=0, dtype=torch.int32)
        options |= {"recipe": self.recipe, "kernel_preference": self.kernel_preference}
        return sorted_experts(x_RD.bfloat16(), offs_E, gate_up, down_EDF, **options)


class GroupedGemmExperts(_OnThisPackage, GroupedExperts):  # type: ignore[misc]
    """torchtitan's `GroupedExperts`, with the same parameters, as one fused layer."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):  # type: ignore[misc]
        """As its parent's.

        Attributes:
            recipe: as in `grouped_gemm.moe.experts_forward`.
            kernel_preference: as in `grouped_gemm.grouped_mm`.
        """

        recipe: str | None = None
        kernel_preference: str = "auto"

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """(R, D) in the dtype of ``x_RD`` (R, D). Rows past the last expert's give zeros."""
        w1_EFD, w2_EDF, w3_EFD = (_local(w).bfloat16() for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD))
        return self._run(x_RD, num_tokens_per_expert_E, (w1_EFD, w3_EFD), w2_EDF).type_as(x_RD)


class GroupedGemmGptOssExperts(_OnThisPackage, GptOssGroupedExperts):  # type: ignore[misc]
    """torchtitan's `GptOssGroupedExperts`, with the same parameters, as one fused layer.

    With a ``swiglu_limit`` other than 7, its parent's forward runs, and this package multiplies.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(GptOssGroupedExperts.Config):  # type: ignore[misc]
        """As its parent's.

        Attributes:
            recipe: as in `grouped_gemm.moe.experts_forward`.
            kernel_preference: as in `grouped_gemm.grouped_mm`.
        """

        recipe: str | None = None
        kernel_preference: str = "auto"

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """(R, D) in bfloat16, as its parent's. Rows past the last expert's give zeros."""
        if self.swiglu_limit != _CLAMP:
            return super().forward(x_RD, num_tokens_per_expert_E)
        weight, tp = self.mlp1_weight_EGD, 1
        if hasattr(weight, "device_mesh") and "tp" in (weight.device_mesh.mesh_dim_names or ()):
            tp = weight.device_mesh["tp"].size()
        # Under tensor parallelism the results of ranks are added: each adds its part of the bias.
        down_bias_ED = ScaleBiasForward.apply(_local(self.mlp2_bias_ED), tp, torch.bfloat16)
        return self._run(
            x_RD,
            num_tokens_per_expert_E,
            _local(weight).bfloat16(),
            _local(self.mlp2_weight_EDF).bfloat16(),
            activation="swiglu_clamped",
            interleaved=True,
            gate_up_bias=_local(self.mlp1_bias_EG).bfloat16(),
            down_bias=down_bias_ED,
        )


def _local(w: Tensor) -> Tensor:
    """``w``, or the shard of this rank if it is a DTensor. As its parents, without redistributing its gradient."""
    return w.to_local() if hasattr(w, "to_local") else w


@override(target=GroupedExperts.Config, exact=True, description="Experts on grouped_gemm.")
def grouped_experts(cfg: Any, *, recipe: str | None = None, kernel_preference: str = "auto") -> Any:
    """The config of `GroupedGemmExperts` with the fields of ``cfg``, a `GroupedExperts.Config`.

    Args:
        cfg: the config that torchtitan replaces.
        recipe: as in `grouped_gemm.moe.experts_forward`.
        kernel_preference: as in `grouped_gemm.grouped_mm`.

    Raises:
        ValueError: an option is not valid.
    """
    return _derived(cfg, GroupedGemmExperts, recipe, kernel_preference)


@override(target=GptOssGroupedExperts.Config, exact=True, description="Experts of gpt-oss on grouped_gemm.")
def gpt_oss_grouped_experts(cfg: Any, *, recipe: str | None = None, kernel_preference: str = "auto") -> Any:
    """As `grouped_experts`, for a `GptOssGroupedExperts.Config`.

    Args:
        cfg: the config that torchtitan replaces.
        recipe: as in `grouped_gemm.moe.experts_forward`.
        kernel_preference: as in `grouped_gemm.grouped_mm`.

    Raises:
        ValueError: an option is not valid.
    """
    return _derived(cfg, GroupedGemmGptOssExperts, recipe, kernel_preference)


def _derived(cfg: Any, cls: Any, recipe: str | None, kernel_preference: str) -> Any:
    check_options("swiglu", False, recipe, "auto", kernel_preference, "full", False, False)
    preference = KernelPreference.parse(kernel_preference).value
    return derive(cfg, cls.Config, recipe=recipe, kernel_preference=preference)
