"""The MoE layer on `grouped_mm`: routing, gather, experts, combine."""

from grouped_gemm.moe import packing  # noqa: F401  (defines ops)
from grouped_gemm.moe.experts import experts_forward, explain_experts, sorted_experts
from grouped_gemm.moe.module import Experts
from grouped_gemm.moe.padding import group_alignment

__all__ = ["Experts", "experts_forward", "explain_experts", "group_alignment", "sorted_experts"]
