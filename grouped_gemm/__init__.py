"""Grouped GEMM for mixture-of-experts layers: one call over interchangeable backends.

>>> y = grouped_mm(a, b, offs, recipe="fp8_blockwise")
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from grouped_gemm import backend, ops
from grouped_gemm.backends import gemm_ops, register_ops
from grouped_gemm.core import distributions
from grouped_gemm.core.call_spec import CallSpec, Pass
from grouped_gemm.core.machine import Machine
from grouped_gemm.core.preference import BackendKind, KernelPreference, prefer
from grouped_gemm.core.quantized import Quantized, QuantizedWeights
from grouped_gemm.core.quantized import weights_of as weights_of  # saved files name it
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.functional import explain, grouped_mm, quantize_weights
from grouped_gemm.group_plan import GroupPlan
from grouped_gemm.integrations.torch_function import override_torch
from grouped_gemm.linear import QuantizedGroupedLinear
from grouped_gemm.selection.explanation import Explanation
from grouped_gemm.selection.rules import Decision, NoBackendError
from grouped_gemm.weight_cache import WeightCache, WeightCacheHandle, cache_weights, register_weight_cache
from grouped_gemm.weight_gradients import WgradQueue, delay_wgrad

if importlib.util.find_spec("grouped_gemm_backend") is not None:  # the extension module of the older package
    distributions.warn_of_others()

if TYPE_CHECKING:
    from grouped_gemm.autotune.warmup import Warmup, warmup

__version__ = "0.2.0"
__all__ = [
    "BackendKind",
    "CallSpec",
    "Decision",
    "Explanation",
    "GroupPlan",
    "KernelPreference",
    "Machine",
    "NoBackendError",
    "Pass",
    "Quantized",
    "QuantizedGroupedLinear",
    "QuantizedWeights",
    "Recipe",
    "Warmup",
    "WeightCache",
    "WeightCacheHandle",
    "WgradQueue",
    "backend",
    "cache_weights",
    "delay_wgrad",
    "explain",
    "gemm_ops",
    "grouped_mm",
    "ops",
    "override_torch",
    "prefer",
    "quantize_weights",
    "register_ops",
    "register_weight_cache",
    "warmup",
]


def __getattr__(name: str) -> Any:
    """Imports `autotune.warmup` on first use: it takes a quarter as long to import as everything else together."""
    if name not in ("Warmup", "warmup"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from grouped_gemm.autotune import warmup as warmup_module

    return getattr(warmup_module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
